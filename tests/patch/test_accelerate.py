"""A PEFT layer that computes through our operator gives PEFT's answer and gradients, or steps aside and says why."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError

peft = pytest.importorskip("peft")
lora = pytest.importorskip("peft.tuners.lora")

K, N = 24, 40


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


def make(ranks: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32, bias: bool = True, **config: Any) -> nn.Sequential:
    """One PEFT layer with an adapter "a0", "a1", … for every rank, all active, scalings 0.3, 0.55, 0.8, …"""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(K, N, bias=bias))
    for i, rank in enumerate(ranks):
        made = peft.LoraConfig(r=rank, lora_alpha=rank * (0.3 + 0.25 * i), target_modules=["0"], init_lora_weights=False, **config)
        model = peft.inject_adapter_in_model(made, model, f"a{i}")
    model[0].set_adapter([f"a{i}" for i in range(len(ranks))])
    return model.to(dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def twins(*args: Any, **kwargs: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The same model twice: PEFT's own, and accelerated."""
    plain = make(*args, **kwargs)
    fast = copy.deepcopy(plain)
    handle = mk.accelerate(fast)
    assert list(handle.layers) == ["0"] and not handle.skipped
    return plain, fast


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def assert_as_right(got: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """No further from float64 than 1.5 times PEFT's own forward, with a floor of two roundings of the output."""
    floor = 2 * torch.finfo(got.dtype).eps
    assert got.dtype == theirs.dtype and got.shape == theirs.shape
    assert error(got, truth) <= max(1.5 * error(theirs, truth), floor)


def calls() -> tuple[int, dict[str, int]]:
    report: Any = mk.status()
    return report["accelerated"], report["fallbacks"]


@pytest.mark.parametrize("base", [True, False], ids=["with-base", "low-rank-alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [(4,), (1,), (4, 4), (3, 8, 5)], ids=str)
def test_same_answer(ranks: tuple[int, ...], dtype: torch.dtype, base: bool):
    plain, fast = twins(ranks, dtype)
    if not base:
        for model in (plain, fast):
            model[0].base_layer.weight.data.zero_()
            model[0].base_layer.bias.data.zero_()
    x = draw(2, 7, K, dtype=dtype)
    truth = copy.deepcopy(plain).double()(x.double())
    assert_as_right(fast(x), plain(x), truth)
    assert calls() == (1, {})


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (2, 3, 4, K), (0, K), (2, 0, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_any_leading_shape(shape: tuple[int, ...], bias: bool):
    plain, fast = twins((4, 2), bias=bias)
    x = draw(*shape)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls() == (1, {})


def test_strided_input():
    plain, fast = twins()
    x = draw(3, 2 * K, 5).mT[..., 1::2]
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [(4,), (4, 2)], ids=str)
def test_same_gradients(ranks: tuple[int, ...]):
    plain, fast = twins(ranks, torch.float64)
    x = draw(2, 7, K, dtype=torch.float64)
    grads = []
    for model in (plain, fast):
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        grads.append([inputs.grad, *(p.grad for p in model.parameters())])
    assert calls() == (1, {})
    assert len(grads[0]) == 3 + 2 * len(ranks)
    for theirs, ours in zip(*grads, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


def test_weight_zero_costs_nothing_and_still_trains():
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        model[0].set_scale("a0", 0.0)
    x = draw(3, K)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
        fast[0].set_scale("a1", 0.0)
        assert torch.equal(fast(x), fast[0].base_layer(x))
    fast(x).sum().backward()
    grad = fast[0].lora_A["a0"].weight.grad
    assert grad is not None and not grad.any()
    assert calls() == (3, {})


def test_tensors_are_read_at_each_call():
    plain, fast = twins((4, 2))
    x = draw(3, K)
    before = fast(x)
    for model in (plain, fast):
        layer = model[0]
        layer.lora_A["a0"].weight.data.copy_(draw(4, K, seed=5))
        layer.lora_B["a1"].weight.data = draw(N, 2, seed=6)
        layer.set_scale("a1", 3.0)
        layer.base_layer.weight.data.mul_(0.5)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fast(x), before)


def test_scaling_as_tensor():
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        model[0].scaling["a1"] = torch.tensor(0.3)
    x = draw(3, K)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls() == (1, {})


def test_scale_made_in_inference_mode_serves_training():
    _, fast = twins((7,))
    fast[0].set_scale("a0", 0.123456)
    with torch.inference_mode():
        fast(draw(3, K))
    fast(draw(3, K)).sum().backward()
    assert fast[0].lora_A["a0"].weight.grad is not None


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(adapter: torch.dtype):
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        model[0].lora_A.to(adapter)
    x = draw(2, 7, K)
    truth = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(x), plain(x)
    assert ours.dtype == torch.bfloat16
    assert_as_right(ours, theirs, truth)
    assert calls() == (1, {})


def half_adapter(layer: Any) -> None:
    layer.lora_A.half(), layer.lora_B.half()


def offload_hook(child: str) -> Callable[[Any], None]:
    def put(layer: Any) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(layer.base_layer if child == "base" else layer.lora_B["a0"], ModelHook())

    return put


def casting_hooks(layer: Any) -> None:
    """What `enable_layerwise_casting` does, adapters included: weights in float8 between calls, PEFT told not to cast the input."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def other_base(layer: Any) -> None:
    doubled = Doubled(K, N)
    doubled.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = doubled


@dataclass(frozen=True)
class Aside:
    """A state or call that must go through PEFT's own forward."""

    id: str
    reason: str
    change: Callable[[Any], object] = lambda layer: None
    kwargs: dict[str, Any] | None = None
    config: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.id


ON_ADAPTER = "hooks on lora_A, lora_B or lora_dropout"
ASIDES = [
    Aside("disabled", "adapters are disabled", lambda layer: layer.enable_adapters(False)),
    Aside("merged", "adapters are merged into the weight", lambda layer: layer.merge()),
    Aside("adapter_names", "adapter_names were given", kwargs={"adapter_names": ["a0", "__base__", "a1"]}),
    Aside("none-active", "no adapter is active", lambda layer: layer.set_adapter([])),
    Aside("dora", "a LoRA variant (DoRA and its like)", config={"use_dora": True}),
    Aside("lora-bias", "lora_bias", config={"lora_bias": True}),
    Aside("base-subclass", "the base layer is a Doubled", other_base),
    Aside("forward-hook", "hooks on the base layer", lambda layer: layer.base_layer.register_forward_hook(lambda m, a, y: y * 2)),
    Aside("pre-hook", ON_ADAPTER, lambda layer: layer.lora_A["a1"].register_forward_pre_hook(lambda m, a: a[0] * 2)),
    Aside("backward-hook", ON_ADAPTER, lambda layer: layer.lora_B["a0"].register_full_backward_hook(lambda *a: None)),
    Aside("accelerate-base", "hooks on the base layer", offload_hook("base")),
    Aside("accelerate-up", ON_ADAPTER, offload_hook("up")),
    Aside("layerwise-casting", "hooks on the base layer", casting_hooks),
    Aside("mixed-dtypes", "weights and input of different dtypes", half_adapter),
    Aside("trainable-base", "the base layer wants a gradient", lambda layer: layer.base_layer.requires_grad_(True)),
]  # fmt: skip


@pytest.mark.parametrize("case", ASIDES, ids=str)
def test_steps_aside(case: Aside):
    plain, fast = twins((4, 2), **(case.config or {}))
    for model in (plain, fast):
        case.change(model[0])
    x = draw(3, K)
    kwargs = case.kwargs or {}
    assert torch.equal(fast[0](x, **kwargs), plain[0](x, **kwargs))
    assert calls() == (0, {case.reason: 1})


def test_dropout_only_counts_in_training():
    plain, fast = twins((4,), lora_dropout=0.5)
    x = draw(3, K)
    for model in (plain, fast):
        model.train()
    torch.manual_seed(0)
    theirs = plain(x)
    torch.manual_seed(0)
    assert torch.equal(fast(x), theirs)
    assert calls() == (0, {"dropout in training": 1})
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-5)
    assert calls()[0] == 1


def test_double_input_to_a_float_layer_fails_as_in_peft():
    plain, fast = twins()
    with pytest.raises(RuntimeError) as theirs:
        plain(draw(3, K, dtype=torch.float64))
    with pytest.raises(RuntimeError) as ours:
        fast(draw(3, K, dtype=torch.float64))
    assert str(ours.value) == str(theirs.value)


def test_global_hooks_and_function_transforms_step_aside():
    plain, fast = twins()
    x = draw(3, K)
    seen: list[nn.Module] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, a, y: seen.append(module))
    try:
        fast(x)
    finally:
        hook.remove()
    assert fast[0].base_layer in seen
    ours, theirs = (torch.func.vmap(model)(draw(2, 3, K)) for model in (fast, plain))
    torch.testing.assert_close(ours, theirs)
    assert calls()[1] == {"global module hooks": 1, "function transforms or forward-mode derivatives": 1}


def test_removed_hooks_leave_nothing_behind():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    _, fast = twins()
    for module in (fast[0].base_layer, fast[0].lora_A["a0"]):
        add_hook_to_module(module, ModelHook())
        remove_hook_from_module(module)
    fast(draw(3, K))
    assert calls() == (1, {})


def test_hook_on_the_layer_itself_outlives_remove():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    plain, fast = twins()
    x = draw(3, K)
    handle = mk.accelerate(fast)
    add_hook_to_module(fast[0], ModelHook())
    fast(x)
    assert calls() == (1, {})
    handle.remove()
    assert torch.equal(fast(x), plain(x)) and calls() == (1, {})
    assert "replaced on the instance" in mk.accelerate(fast).skipped["0"]
    remove_hook_from_module(fast[0])
    assert mk.accelerate(fast).skipped == {}
    fast(x)
    assert calls() == (2, {})


def test_remove_gives_everything_back():
    plain, fast = twins((4, 2))
    x = draw(3, K)
    handle = mk.accelerate(fast)
    before = {name: id(module) for name, module in fast.named_modules()}
    state = {name: (id(t), t.clone()) for name, t in fast.state_dict(keep_vars=True).items()}
    assert isinstance(fast[0], lora.Linear) and repr(fast) == repr(plain)
    fast(x)
    handle.remove()
    assert type(fast[0]) is lora.Linear and vars(fast[0]).keys() == vars(plain[0]).keys()
    assert {name: id(module) for name, module in fast.named_modules()} == before
    assert {name: id(t) for name, t in fast.state_dict(keep_vars=True).items()} == {name: i for name, (i, _) in state.items()}
    assert all(torch.equal(t, state[name][1]) for name, t in fast.state_dict().items())
    assert torch.equal(fast(x), plain(x)) and calls() == (1, {})
    handle.remove()


def test_copies_and_pickles_stay_accelerated():
    _, fast = twins((4, 2))
    x = draw(3, K)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), fast(x))
    assert calls() == (6, {})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(backend: str):
    torch.compiler.reset()
    plain, fast = twins((4, 2))
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(fast, fullgraph=True, backend=compiler)
    x = draw(2, 5, K)
    for seed in (1, 2):
        torch.testing.assert_close(compiled(draw(2, 5, K, seed=seed)), plain(draw(2, 5, K, seed=seed)), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and "gated_lora_fwd" in graphs[0].code
    assert calls() == (0, {})
    compiled(x).sum().backward()
    plain(x).sum().backward()
    for theirs, ours in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.compiler.reset()


def test_compiled_graph_with_tensor_scaling_serves_every_weight():
    torch.compiler.reset()
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        for name in ("a0", "a1"):
            model[0].scaling[name] = torch.tensor(0.5)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    x = draw(2, 5, K)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weight in (0.5, 0.25, 2.0):
            for model in (plain, fast):
                model[0].scaling["a1"].fill_(weight)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_acceleration_reaches_a_compiled_model_and_leaves_it():
    torch.compiler.reset()
    plain = make((4, 2))
    graphs: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(plain, fullgraph=True, backend=compiler)
    x = draw(2, 5, K)
    first = compiled(x)
    handle = mk.accelerate(compiled)
    compiled(x)
    handle.remove()
    assert torch.equal(compiled(x), first)
    assert ["gated_lora_fwd" in code for code in graphs[:2]] == [False, True]
    torch.compiler.reset()


def test_which_layers_keep_their_own_forward():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.conv, self.emb = nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Embedding(5, 4)

    config = peft.LoraConfig(r=2, target_modules=["lin", "conv", "emb"])
    handle = mk.accelerate(peft.inject_adapter_in_model(config, Model(), "a"))
    assert list(handle.layers) == ["lin"]
    assert handle.skipped == {"conv": "Conv2d has a forward of its own", "emb": "Embedding has a forward of its own"}
    assert repr(handle) == "AccelerateHandle(1 layers accelerated, 2 skipped)"


def test_again_finds_the_new_layers():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model, "a")
    assert list(mk.accelerate(model).layers) == ["0"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "1"]), model, "b")
    assert list(mk.accelerate(model).layers) == ["0", "1"]


def test_bad_targets():
    with pytest.raises(MoleValueError, match="no PEFT LoRA layer"):
        mk.accelerate(nn.Linear(4, 4))
    with pytest.raises(MoleTypeError):
        mk.accelerate("unet")


def test_without_peft(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "mole_kernels.patch.peft_forward", None)
    with pytest.raises(MoleStateError, match="PEFT cannot be imported"):
        mk.accelerate(make())


def test_status_and_reset():
    _, fast = twins()
    fast(draw(3, K))
    fast[0].enable_adapters(False)
    fast(draw(3, K))
    report: Any = mk.status(reset=True)
    assert report["accelerated"] == 1 and report["fallbacks"] == {"adapters are disabled": 1}
    assert report["backends"]["stacked"] is None and set(report["backends"]) >= {"cpu", "stacked", "reference"}
    assert calls() == (0, {})


def test_backend_refusals_step_aside_and_are_counted(monkeypatch: pytest.MonkeyPatch):
    from mole_kernels.backends import select

    plain, fast = twins()
    for backend in select.BACKENDS.values():
        monkeypatch.setattr(backend, "reject", lambda problem: "not today")
    x = draw(3, K)
    with pytest.warns(match="not today"):
        assert torch.equal(fast(x), plain(x))
    report: Any = mk.status()
    assert report["fallbacks"] == {"no backend takes the problem": 1}
    assert report["refusals"]["stacked: not today"] == 1
