"""An assignment belongs to the thread or task that makes it; memory to the forwards that read it."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.errors import MoleShapeError, MoleStateError, MoleValueError
from mole_kernels.serving.serve import Served
from tests.serving.test_state_machine import SOLO, VERSIONS, X, merged
from tests.tiny_models import Mlp, make_expert, run_unet, tiny_unet


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Mlp()


def served_with(model: nn.Module, **kw) -> Served:
    return mk.serve(model, {name: VERSIONS[i] for i, name in enumerate("abc")}, **{"rank": 2, **kw})


def is_solo(out: Tensor, *versions: int | None) -> bool:
    """Whether each sample is what its own adapter makes of it alone."""
    want = torch.stack([SOLO[v][i] for i, v in enumerate(versions)])
    return torch.allclose(out, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def draw(model: nn.Module) -> Tensor:
    return model(X)


def in_threads(*works: Callable[[], object]) -> None:
    """Run in threads of empty contexts; the first error is raised."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


# -- threads and tasks


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_threads_draw_with_their_own_adapters(model, capacity):
    """Also where the pool holds fewer than they have together: then they take turns."""
    served = served_with(model, capacity=capacity)
    wrong: list[tuple[int | None, int]] = []

    def work(version: int | None) -> None:
        name = None if version is None else "abc"[version]
        for i in range(30):
            with served.assign([name] * 3):
                if not is_solo(draw(model), *[version] * 3):
                    wrong.append((version, i))

    in_threads(*[lambda v=v: work(v) for v in (0, 1, 2, None)])
    assert not wrong


def test_a_full_pool_waits_for_a_running_forward_and_only_for_it(model):
    """By counts: the second forward begins, waits, and ends after the first one, which holds the only set."""
    served = served_with(model, capacity=1)
    order: list[str] = []
    first_is_inside, second_began = threading.Event(), threading.Event()

    def first() -> None:
        def inside(*_: object) -> None:
            if not first_is_inside.is_set():
                first_is_inside.set()
                second_began.wait(30)
                order.append("first")

        hook = model.first.register_forward_hook(inside)
        with served.assign(["a"]):
            assert is_solo(draw(model), 0, 0, 0)
        hook.remove()

    def second() -> None:
        first_is_inside.wait(30)
        with served.assign(["b"]):
            threading.Timer(0.05, second_began.set).start()
            assert is_solo(draw(model), 1, 1, 1)
            order.append("second")

    in_threads(first, second)
    assert order == ["first", "second"]


def test_an_assignment_with_no_room_beside_its_own_outer_forward_is_refused_not_waited_for(model):
    served = served_with(model, capacity=1)

    def inside(*_: object) -> None:
        hook.remove()
        with served.assign(["b"]):
            model(X)

    hook = model.first.register_forward_hook(inside)
    with served.assign(["a"]), torch.no_grad(), pytest.raises(MoleStateError, match=r"pool is full.*'b'"):
        model(X)
    with served.assign(["b"]):
        assert is_solo(draw(model), 1, 1, 1)


def test_a_component_called_within_its_own_forward_keeps_the_outer_rows(model):
    served = served_with(model)
    inner: list[Tensor] = []

    def inside(*_: object) -> None:
        hook.remove()
        with served.assign(["b", None, "c"]):
            inner.append(model(X))

    hook = model.first.register_forward_hook(inside)
    with served.assign(["a", "c", None]):
        assert is_solo(draw(model), 0, 2, None)
    assert is_solo(inner[0], 1, None, 2)


def test_asyncio_tasks_have_their_own(model):
    served = served_with(model)

    async def request(version: int, hops: int) -> None:
        with served.assign(["abc"[version]]):
            for i in range(hops):
                await asyncio.sleep(0)
                out = await asyncio.to_thread(draw, model) if i % 2 else draw(model)
                assert is_solo(out, version, version, version)
        assert torch.equal(draw(model), SOLO[None])

    async def main() -> None:
        with served.assign(["b", None, "a"]):
            await asyncio.gather(*(request(version, 4 + version) for version in (0, 1, 2, 0)))
            assert is_solo(draw(model), 1, None, 0)

    # a task that ends its own `with` is back under the one that it inherited
    async def request_inherits() -> None:
        with served.assign(["a"]):
            await asyncio.create_task(child())

    async def child() -> None:
        with served.assign(["c"]):
            await asyncio.sleep(0)
            assert is_solo(draw(model), 2, 2, 2)
        assert is_solo(draw(model), 0, 0, 0)

    async def alone() -> None:
        await asyncio.gather(*(request(version, 4) for version in (0, 1, 2)))

    asyncio.run(alone())
    asyncio.run(request_inherits())
    with pytest.raises(AssertionError):
        # the requests' last line expects the base, and they inherit an assignment here
        asyncio.run(main())


def test_a_thread_without_an_assignment_is_refused_while_another_has_one(model):
    served = served_with(model)
    in_threads(lambda: torch.testing.assert_close(draw(model), SOLO[None]))
    with served.assign(["a"]):
        with pytest.raises(MoleStateError, match="no assignment of its own"):
            in_threads(lambda: draw(model))
        in_threads(lambda: (served.assign([]), torch.testing.assert_close(draw(model), SOLO[None])))
        contexts = [contextvars.copy_context()]
        in_threads(lambda: contexts.pop().run(lambda: _assert(is_solo(draw(model), 0, 0, 0))))
    in_threads(lambda: torch.testing.assert_close(draw(model), SOLO[None]))


def _assert(value: bool) -> None:
    assert value


def test_ends_of_with_in_any_order(model):
    served = served_with(model)
    served.assign(["a"])
    with served.assign(["b"]):
        served.assign(["c"])
        assert is_solo(draw(model), 2, 2, 2)
        with served.assign(["a"]):
            assert is_solo(draw(model), 0, 0, 0)
        assert is_solo(draw(model), 2, 2, 2)
    assert is_solo(draw(model), 0, 0, 0)
    outer, inner = served.assign(["b"]), None
    outer.__enter__()
    inner = served.assign(["c"])
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert is_solo(draw(model), 2, 2, 2)
    inner.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert is_solo(draw(model), 0, 0, 0)
    with pytest.raises(ZeroDivisionError), served.assign(["b"]):
        raise ZeroDivisionError
    assert is_solo(draw(model), 0, 0, 0)
    served.assign([])
    assert torch.equal(draw(model), SOLO[None])


# -- adapters come and go


def test_a_replaced_and_a_dropped_adapter_live_on_where_they_are_assigned(model):
    served = served_with(model, capacity=1)
    with served.assign(["a"]):
        served.add("a", VERSIONS[3])
        served.prefetch(["b", "c"])
        assert is_solo(draw(model), 0, 0, 0)
        served.drop("a")
        # pushes the old one out; its assignment brings it back
        with served.assign(["b"]):
            assert is_solo(draw(model), 1, 1, 1)
        assert is_solo(draw(model), 0, 0, 0)
        with pytest.raises(mk.MoleError, match="'a' for sample 0"):
            served.assign(["a"])
    served.add("a", VERSIONS[3])
    with served.assign(["a"]):
        assert is_solo(draw(model), 3, 3, 3)


def test_moving_the_model_keeps_what_is_being_read(model):
    served = served_with(model, capacity=2)
    with served.assign(["a", "b", "a"]):
        draw(model)
        model.double()
        with torch.no_grad():
            torch.testing.assert_close(
                model(X.double())[0],
                merged(Mlp_like(), VERSIONS[0]).double()(X.double())[0],
                rtol=1e-4,
                atol=1e-4,
            )
        model.float()
        assert is_solo(draw(model), 0, 1, 0)

        def inside(*_: object) -> None:
            hook.remove()
            served._pool.place(torch.float64, torch.device("cpu"))

        # the tables stay true to what a running forward holds
        hook = model.first.register_forward_hook(inside)
        draw(model)
        model.double()
        with torch.no_grad():
            assert torch.allclose(model(X.double()).float()[0], SOLO[0][0], rtol=1e-4, atol=1e-4)


def Mlp_like() -> nn.Module:
    torch.manual_seed(0)
    return Mlp()


def test_host_memory_of_an_adapter_ends_with_its_last_assignment(model):
    served = served_with(model)
    vectors = [weakref.ref(served._pool.look_up(["a"])[0].vector)]
    served.assign(["a"])
    served.drop("a")
    gc.collect()
    assert vectors[0]() is not None and is_solo(draw(model), 0, 0, 0)
    served.assign(["b"])
    served.assign(["c"])
    served.add("d", VERSIONS[3])
    with served.assign(["b", "c", "d"]):
        gc.collect()
        assert vectors[0]() is None


@pytest.mark.parametrize("evict", [True, False])
def test_more_than_fits_is_refused_and_changes_nothing(model, evict):
    served = served_with(model, capacity=2, evict=evict)
    with served.assign(["a", None, "b"]):
        with pytest.raises(MoleStateError, match="3 adapters and the pool room for 2"):
            served.assign(["a", "b", "c"])
        if not evict:
            with pytest.raises(MoleStateError, match="pool is full"):
                served.assign(["c"])
        assert is_solo(draw(model), 0, None, 1)


def test_gradients_do_not_read_what_came_into_the_place_of_their_adapter(model):
    served = served_with(model, capacity=1)
    x = X.clone().requires_grad_()
    alone = merged(Mlp_like(), VERSIONS[0])
    (want,) = torch.autograd.grad(alone(x).square().sum(), x)
    with served.assign(["a"]):
        y = model(x).square().sum()
        with served.assign(["b"]):
            draw(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, x)
        (got,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- strengths


def test_scales_at_add_and_at_assign(model):
    served = served_with(model, capacity=4)
    served.add("half", VERSIONS[0], scale=0.5)
    want = merged(Mlp_like(), scaled(VERSIONS[0], 0.5))
    with torch.no_grad(), served.assign(["half"]):
        torch.testing.assert_close(model(X), want(X), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), served.assign(["a", "b", None], scales={"a": 0.5}):
        out = model(X)
        torch.testing.assert_close(out[0], want(X)[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(out[1], SOLO[1][1], rtol=1e-4, atol=1e-4)
        assert torch.allclose(out[2], SOLO[None][2], rtol=1e-4, atol=1e-4)
        misses = served.stats.misses
        with served.assign(["a"], scales={"a": 0.5}):
            torch.testing.assert_close(model(X), want(X), rtol=1e-4, atol=1e-4)
        assert served.stats.misses == misses
    served.add("large", VERSIONS[1], scale=1e38)
    with pytest.raises(MoleValueError, match="scale of 'large', layer first"):
        served.assign(["a", "large"], scales={"large": 100.0})
    for scales, words in (({"zoe": 1.0}, "'zoe'"), ({"a": float("nan")}, "finite"), ({"b": 1.0}, "'b'")):
        with pytest.raises(MoleValueError, match=words):
            served.assign(["a"], scales=scales)


def scaled(expert, factor: float):
    from dataclasses import replace

    return replace(expert, layers={p: replace(f, scale=f.scale * factor) for p, f in expert.layers.items()})


def test_block_scales_of_a_unet():
    unet = tiny_unet()
    expert = make_expert(unet, seed=1)
    blocks = {"down": 0.3, "mid": 0.0, "up": 2.0}
    handle = mk.patch(unet, {"a": expert})
    handle.set_scales({"a": blocks})
    want = run_unet(unet, batch=2)
    handle.remove()
    with mk.serve(unet, {"a": expert}, capacity=2) as served:
        with served.assign(["a"], scales={"a": blocks}):
            torch.testing.assert_close(run_unet(unet, batch=2), want, rtol=1e-4, atol=1e-4)
        served.add("b", expert, scale=blocks)
        with served.assign(["b"]):
            torch.testing.assert_close(run_unet(unet, batch=2), want, rtol=1e-4, atol=1e-4)


# -- copies, parts of models, layers without tokens


def test_a_copy_of_a_served_model_is_refused(model):
    served = served_with(model)
    served.assign(["a"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(MoleStateError, match="copy of a served one"):
            draw(twin)
        with pytest.raises(MoleStateError, match="copy of a served one"), torch.no_grad():
            twin.first(X)
    with pytest.raises(MoleStateError, match="copy the model"):
        copy.deepcopy(served)
    assert is_solo(draw(model), 0, 0, 0)


def test_a_layer_called_outside_of_its_component_is_refused_under_an_assignment(model):
    served = served_with(model)
    base = Mlp_like()
    assert torch.equal(model.first(X), base.first(X))
    with served.assign(["a"]):
        with pytest.raises(MoleStateError, match="outside of a forward"):
            model.first(X)
        assert is_solo(draw(model), 0, 0, 0)
        with pytest.raises(MoleStateError, match="outside of a forward"):
            model.first(X)
    assert torch.equal(model.first(X), base.first(X))


def test_a_forward_that_fails_lets_its_sets_go(model):
    served = served_with(model, capacity=1)
    hook = model.second.register_forward_pre_hook(lambda *_: 1 / 0)
    with served.assign(["a"]), pytest.raises(ZeroDivisionError):
        draw(model)
    hook.remove()
    with served.assign(["b"]):
        assert is_solo(draw(model), 1, 1, 1)
    assert torch.equal(draw(model), SOLO[None])


def fail_in_a_layer(model: nn.Module) -> None:
    model.second.register_forward_pre_hook(lambda *_: 1 / 0)
    draw(model)


@torch.no_grad()
def fail_for_the_batch(model: nn.Module) -> None:
    model(X[:1])


def fail_outside_a_forward(model: nn.Module) -> None:
    model.first(X)


@pytest.mark.parametrize("fail", [fail_in_a_layer, fail_for_the_batch, fail_outside_a_forward])
def test_an_error_in_the_blocks_is_the_one_that_is_seen(model, fail):
    """An error's traceback holds the frames it came through; the model is given back all the same."""
    weight = model.first.weight
    try:
        with served_with(model) as served, served.assign(["a", "b", "c"]):
            fail(model)
    except MoleStateError as error:
        assert "another" not in str(error) and "other callers" not in str(error)
        assert fail is fail_outside_a_forward
    except (ZeroDivisionError, MoleShapeError):
        pass
    else:
        raise AssertionError("nothing was raised")
    assert type(model.first) is nn.Linear and model.first.weight is weight


class Timed(nn.Module):
    """A layer over [B,K], as the time embeddings of UNets have it, and one over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.time_emb_proj, self.tokens = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.tokens(x) + self.time_emb_proj(t)[:, None]


def test_layers_without_a_token_axis_have_a_sample_in_each_row():
    torch.manual_seed(0)
    model = Timed()
    experts = {n: make_expert(model, ["time_emb_proj", "tokens"], seed=i) for i, n in enumerate("ab")}
    x, t = torch.randn(3, 4, 6), torch.randn(3, 6)
    with torch.no_grad():
        alone = [merged(model, experts[n])(x, t) if n else model(x, t) for n in ("b", None, "a")]
        with mk.serve(model, experts) as served, served.assign(["b", None, "a"]):
            out = model(x, t)
            one = model(x[:1], t[:1]) if served.assign(["b"]) else None
    torch.testing.assert_close(out, torch.stack([a[i] for i, a in enumerate(alone)]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, alone[0][:1], rtol=1e-5, atol=1e-5)


class Frames(Timed):
    """A model that lays its frames into the batch, as video models do between their layers."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1), t).unflatten(0, x.shape[:2])


def test_samples_regrouped_inside_a_model_are_served_where_all_take_one_adapter():
    torch.manual_seed(0)
    model = Frames()
    experts = {n: make_expert(model, ["tokens"], seed=i) for i, n in enumerate("ab")}
    x, t = torch.randn(2, 3, 4, 6), torch.randn(6, 6)
    with torch.no_grad():
        want = merged(model, experts["b"])(x, t)
        with mk.serve(model, experts) as served, served.assign(["b", "b"]):
            torch.testing.assert_close(model(x, t), want, rtol=1e-5, atol=1e-5)
            with (
                served.assign(["a", "b"]),
                pytest.raises(mk.MoleError, match="sees 6 samples in a forward of 2"),
            ):
                model(x, t)
            torch.testing.assert_close(model(x, t), want, rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_unet_is_served():
    """Time embeddings, convolutions and all: what LoCon files hold."""
    from mole_kernels.modules.scan import scan

    unet = tiny_unet()
    paths = list(scan(unet).layers)
    experts = {n: make_expert(unet, paths, rank=1, seed=i, scale=0.2) for i, n in enumerate("ab")}
    want = []
    for name in "ab":
        with mk.patch(unet, {name: experts[name]}):
            want.append(run_unet(unet, batch=2))
    with mk.serve(unet, experts) as served, served.assign(["a", "b"]):
        out = run_unet(unet, batch=2)
    torch.testing.assert_close(out, torch.stack([want[0][0], want[1][1]]), rtol=1e-4, atol=1e-4)


# -- compiled as a whole


@pytest.mark.parametrize("fullgraph", [False, True])
def test_threads_of_a_compiled_model_have_their_own(model, fullgraph):
    """One graph for every assignment in every thread, and one for the base alone."""
    served = served_with(model)
    graphs = [0]

    def count(gm, inputs):
        graphs[0] += 1
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=fullgraph)
    torch.testing.assert_close(draw(compiled), SOLO[None])
    wrong: list[int] = []

    def work(version: int) -> None:
        for _ in range(10):
            with served.assign(["abc"[version], None, "b"]):
                if not is_solo(draw(compiled), version, None, 1):
                    wrong.append(version)

    # threads that begin together would each compile
    in_threads(lambda: work(0))
    in_threads(*[lambda v=v: work(v) for v in (0, 1, 2)])
    assert not wrong and graphs[0] == 2
    with served.assign(["a", "b"]), pytest.raises(mk.MoleError, match="multiple of the 2 prompts"):
        draw(compiled)
    assert is_solo(draw(model), None, None, None)


def test_a_compiled_model_gives_its_sets_back(model):
    served = served_with(model, capacity=1)
    compiled = torch.compile(model, backend="eager")
    for version in (0, 1, 2, 0):
        with served.assign(["abc"[version]]):
            assert is_solo(draw(compiled), *[version] * 3)
            assert is_solo(draw(model), *[version] * 3)
    in_threads(lambda: (served.assign(["b"]), _assert(is_solo(draw(model), 1, 1, 1))))


def test_removing_under_another_callers_assignment_is_refused(model):
    served = served_with(model)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with served.assign(["b"]):
            inside.set()
            done.wait(30)
            assert is_solo(draw(model), 1, 1, 1)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(30)
    served.assign(["a"])
    with pytest.raises(MoleStateError, match=r"1 other callers have an assignment, one of them \['b'\]"):
        served.remove()
    assert is_solo(draw(model), 0, 0, 0)
    done.set()
    thread.join(30)
    served.remove()
    assert torch.equal(draw(model), SOLO[None])
