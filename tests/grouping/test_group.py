"""q, k and v as one product: the same numbers, never a stale one, everything back as it was, and aside where
it would not be exact.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.gates.gate import ConstantGate, MaskGate, SampleGate
from mole_kernels.grouping.group import Group
from mole_kernels.grouping.groups import Groups
from mole_kernels.ops.group import beside
from tests.tiny_models import State, make_expert

K, N, B, T, E = 12, 8, 2, 5, 2


class Attention(nn.Module):
    """Three projections of one tensor, one without a bias and one of another width; `between` is run after
    to_q.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(K, N), nn.Linear(K, N, bias=False), nn.Linear(K, N + 4)
        self.between: Callable[[Tensor], Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x)
        if self.between is not None:
            changed = self.between(x)
            x = x if changed is None else changed
        return torch.cat([q, self.to_k(x), self.to_v(x)], -1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expert(model: Any, rank: int = 2, seed: int = 0, same: bool = False) -> Expert:
    made = make_expert(model, rank=rank, seed=seed)
    if same:
        down = next(iter(made.layers.values())).down
        made = Expert({path: LowRank(down, one.up, one.scale) for path, one in made.layers.items()})
    return made


class Twins:
    """The same attention patched twice, of which the second is grouped whatever it costs."""

    def __init__(
        self,
        gates: Any = None,
        same: bool = False,
        always: bool = True,
        make: Callable[[], nn.Module] = Attention,
    ) -> None:
        self.models: list[Any] = []
        self.handles: list[Any] = []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(make()).eval()
            experts = {"a": expert(model, 3, 0, same), "b": expert(model, 2, 1, same)}
            self.models.append(model)
            torch.manual_seed(1)
            self.handles.append(mk.patch(model, experts, gates))
        self.groups = self.handles[1].groups = Groups(
            self.models[1], self.handles[1].layers.values(), always=always
        )
        self.x = draw(B, T, K, seed=2)

    def both(self, change: Callable[[Any, Any], Any]) -> None:
        for model, handle in zip(self.models, self.handles):
            change(model[0], handle)

    def check(self, computed: int | None = None) -> Tensor:
        """Both say the same; `computed` more forwards were one product."""
        before = self.groups.report()["computed"]
        with torch.no_grad():
            want, got = (model(self.x.clone()) for model in self.models)
        torch.testing.assert_close(got, want)
        if computed is not None:
            assert self.groups.report()["computed"] == before + computed, self.groups.report()
        return got


GATES: dict[str, Callable[[str, Any, Any], Any] | str | None] = {
    "none": None,
    "mole": "mole",
    "local": "local",
    "constant": lambda p, m, e: ConstantGate(E, [0.5, 2.0]),
    "one layer's": lambda p, m, e: ConstantGate(E, [0.5, 2.0]) if p.endswith("to_k") else None,
    "mask": lambda p, m, e: MaskGate(draw(T, E, seed=len(p) + m.out_features)),
    "mask and constant": lambda p, m, e: (
        MaskGate(draw(B, T, E)) if p.endswith("to_k") else ConstantGate(E, 0.3)
    ),
    "sample": lambda p, m, e: SampleGate(draw(B, E)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_says_what_its_layers_say(gates: str, dtype: torch.dtype):
    t = Twins(GATES[gates])
    t.both(lambda attention, handle: attention.to(dtype))
    t.x = t.x.to(dtype)
    with torch.no_grad():
        got, alone = t.models[1](t.x), t.models[0](t.x)
        maps, own = t.handles[1].gate_maps(), t.handles[0].gate_maps()
        t.both(lambda attention, handle: attention.double())
        truth = t.models[0](t.x.double())
    error, theirs = ((y.double() - truth).norm() / truth.norm() for y in (got, alone))
    assert got.dtype == dtype and error <= max(1.5 * theirs, 2 * torch.finfo(dtype).eps)
    assert t.groups.report()["computed"] == 1
    # what the gates said reaches each layer
    for path, said in own.items():
        for mine, other in zip(maps[path], said):
            assert (mine is None) == (other is None)
            if isinstance(mine, Tensor):
                torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(T, K), (K,), (B, 2, 3, K), (B, 0, K), (0, T, K)], ids=str)
def test_every_shape_of_input(shape: tuple[int, ...]):
    t = Twins("mole")
    t.x = draw(*shape)
    t.check(1)


def test_experts_on_some_of_the_layers():
    torch.manual_seed(0)
    model = nn.Sequential(Attention()).eval()
    plain = State(model, lambda: model(draw(B, T, K)).detach())
    handle = mk.patch(
        model, {"a": make_expert(model, ["0.to_q", "0.to_v"]), "b": make_expert(model, ["0.to_v"], seed=1)}
    )
    want = model(draw(B, T, K)).detach()
    handle.groups = Groups(model, handle.layers.values(), always=True)
    assert list(handle.groups.groups) == ["0.(to_q, to_v)"]
    torch.testing.assert_close(model(draw(B, T, K)).detach(), want)
    handle.remove()
    plain.assert_unchanged()
    with mk.patch(model, {"a": make_expert(model, ["0.to_q"])}, group=True) as handle:
        assert handle.groups.report()["skipped"] == {"0.(to_q)": "only one of its projections holds experts"}


# -- equal A


def test_equal_a_is_applied_once_and_only_while_it_is_equal():
    t = Twins(same=True)
    t.check(1)
    assert t.groups.report()["shared"] == 1
    t.both(lambda a, h: h.set_scales({"a": 0.3}))
    t.check(1)
    assert t.groups.report()["shared"] == 2
    # one layer's scale, then one layer's A
    t.both(lambda a, h: a.to_k.experts.scale.mul_(2))
    t.check(1)
    assert t.groups.report()["shared"] == 2
    t.both(lambda a, h: h.set_scales({"a": 1.0}))
    t.check(1)
    t.both(lambda a, h: a.to_v.experts.down.detach()[0, 0].mul_(2))
    t.check(1)
    t.both(lambda a, h: h.swap("a", expert(a_model(a), 3, 7)))
    t.check(1)
    assert t.groups.report()["shared"] == 3


def a_model(attention: nn.Module) -> nn.Module:
    return nn.Sequential(attention)


def test_equal_a_with_gates_of_their_own_is_not_shared():
    t = Twins("mole", same=True)
    t.check(1)
    assert t.groups.report()["shared"] == 0


# -- never stale


def replace_weight(attention: Any, handle: Any) -> None:
    attention.to_k.weight = nn.Parameter(draw(N, K, seed=9), requires_grad=False)


def assign(attention: Any, handle: Any) -> None:
    attention.load_state_dict({n: v + 0.25 for n, v in attention.state_dict().items()}, assign=True)
    attention.requires_grad_(False)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "scale": lambda a, h: h.set_scales({"a": 0.25}),
    "scale of one layer": lambda a, h: a.to_v.experts.scale.mul_(3),
    "swap": lambda a, h: h.swap("a", expert(a_model(a), 3, 7)),
    "swap to a smaller rank": lambda a, h: h.swap("a", expert(a_model(a), 1, 7)),
    "swap to a larger rank": lambda a, h: h.swap("b", expert(a_model(a), 6, 7)),
    "disable": lambda a, h: h.disable(),
    "fold": lambda a, h: h.fold(),
    "weights loaded": lambda a, h: a.load_state_dict({n: v + 0.25 for n, v in a.state_dict().items()}),
    "weights assigned": assign,
    "a weight replaced": replace_weight,
    "a weight written in place": lambda a, h: a.to_k.weight.detach().mul_(2),
    "a weight written through .data": lambda a, h: a.to_k.weight.data.mul_(2),
    "a bias written": lambda a, h: a.to_v.bias.detach().add_(1),
    "a gate exchanged": lambda a, h: setattr(a.to_k, "gate", ConstantGate(E, 0.5)),
    "an expert's tensors replaced": lambda a, h: setattr(
        a.to_k.experts, "up", nn.Parameter(draw(1, N, 5), requires_grad=False)
    ),
    "double": lambda a, h: a.double(),
    "half and back": lambda a, h: a.half().float(),
    "another backend": lambda a, h: setattr(a.to_k, "backend", "reference"),
}
# change nothing that an output shows
SILENT = ("another backend", "half and back", "double", "fold")


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_forwards_are_followed(name: str):
    t = Twins()
    before = t.check(1)
    t.both(CHANGES[name])
    t.x = t.x.to(t.models[1][0].to_q.weight.dtype)
    for _ in range(2):
        after = t.check()
    assert name in SILENT or not torch.equal(after, before)


@pytest.mark.parametrize(
    "name",
    [name for name in CHANGES if name not in ("double", "half and back", "a weight written through .data")],
)
def test_changes_in_the_middle_of_a_forward_are_followed(name: str):
    t = Twins()
    t.check(1)
    for model, handle in zip(t.models, t.handles):

        def change(x: Tensor, attention: Any = model[0], handle: Any = handle) -> None:
            CHANGES[name](attention, handle)
            attention.between = None

        model[0].between = change
    t.check()
    t.check()


def zero_the_first(x: Tensor) -> None:
    x[0].zero_()


INPUTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "written in place": lambda x: x.mul_(3),
    "written through a view": zero_the_first,
    "another tensor": lambda x: x * 2,
    "a view of it": lambda x: x[..., :],
    "a detached alias, written": lambda x: x.detach().mul_(2),
    "another batch": lambda x: x[:1].expand(B, -1, -1),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_is_not_the_same_is_computed(name: str):
    t = Twins()
    for model in t.models:
        model[0].between = INPUTS[name]
    for _ in range(12):
        t.check()
    # in the end it is left to the layers
    assert t.groups.report()["apart"].get("its layers are not called with one input")


def test_nothing_is_kept_outside_a_forward():
    t = Twins()
    group: Group = next(iter(t.groups.groups.values()))
    attention = t.models[1][0]
    with torch.no_grad():
        q = attention.to_q(t.x)
        assert not group.open and torch.equal(q, t.models[0][0].to_q(t.x))

        def fail(x: Tensor) -> None:
            raise ZeroDivisionError

        attention.between = fail
        with pytest.raises(ZeroDivisionError):
            t.models[1](t.x)
        assert not group.open
        attention.between = None
    t.check(1)
    assert not group.open


def test_a_layer_called_twice_is_computed_twice():
    t = Twins()
    attention = t.models[1][0]
    attention.between = lambda x: torch.testing.assert_close(attention.to_q(x), t.models[0][0].to_q(x))
    t.check()


def test_threads_do_not_take_from_each_other():
    t = Twins("mole")
    inputs = [draw(B, T, K, seed=i) for i in range(4)]
    with torch.no_grad():
        want = [t.models[0](x) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(t.models[1](inputs[i]), want[i], rtol=1e-4, atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and t.groups.report()["computed"] == 80


# -- weights


def storages(model: nn.Module) -> int:
    """Bytes of memory behind a model's tensors."""
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in model.state_dict(keep_vars=True).values()
    }
    return sum(found.values())


def test_weights_are_there_once_and_come_back_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = nn.Sequential(Attention()).eval()
    before = State(model, lambda: model(draw(B, T, K)).detach())
    handle = mk.patch(model, {"a": make_expert(model)})
    memory, state = storages(model), {n: v.clone() for n, v in model.state_dict().items()}
    handle.groups = Groups(model, handle.layers.values(), always=True)
    weights = [layer.weight for layer in handle.layers.values()]
    whole = beside(weights)
    assert whole is not None and whole.shape == (3 * N + 4, K) and storages(model) == memory
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[name], value) for name, value in state.items())
    save_file(now, tmp_path / "m.safetensors")
    assert all(
        torch.equal(value, state[name]) for name, value in load_file(tmp_path / "m.safetensors").items()
    )
    handle.remove()
    assert all(w.untyped_storage().nbytes() == w.nbytes for w in weights)
    before.assert_unchanged()


def test_moved_weights_are_laid_side_by_side_again_but_not_for_ever():
    t = Twins()
    weights = [layer.weight for layer in t.handles[1].layers.values()]
    for i in range(10):
        dtype = (torch.float64, torch.float32)[i % 2]
        t.both(lambda a, h, dtype=dtype: a.to(dtype))  # type: ignore[misc]
        t.x = t.x.to(dtype)
        t.check(int(i < 8))
        assert (beside(weights) is not None) == (i < 8)
    assert "its weights were moved 8 times" in t.groups.report()["apart"]


def test_tied_weights_stay_where_they_are():
    model = nn.Sequential(Attention(), Attention()).eval()
    model[1].to_k.weight = nn.Parameter(model[0].to_k.weight.detach())
    model[1].to_q = model[0].to_q
    with mk.patch(model, {"a": make_expert(model)}, group=True) as handle:
        assert "shares its memory" in handle.groups.skipped["0.(to_q, to_k, to_v)"]
        assert model[0].to_k.weight.data_ptr() == model[1].to_k.weight.data_ptr()


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_layer_by_layer(how: Callable[[nn.Module], Any]):
    t = Twins("mole")
    want = t.check(1)
    other = how(t.models[1])
    with torch.no_grad():
        torch.testing.assert_close(other(t.x), want)
        other[0].to_k.weight.data.mul_(2)
        assert not torch.allclose(other(t.x), want)
    assert t.groups.report()["computed"] == 1
    t.check(1)


def test_a_failure_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(Attention(), Attention()).eval()
    before = State(model, lambda: model[1](draw(B, T, K)).detach())
    laid: list[Any] = []

    def fail(weights: Any) -> None:
        if laid:
            raise MemoryError
        laid.append(weights)

    monkeypatch.setattr("mole_kernels.grouping.weights.lay_side_by_side", fail)
    with pytest.raises(MemoryError):
        mk.patch(model, {"a": make_expert(model)}, group=True)
    assert len(laid) == 1
    before.assert_unchanged()
