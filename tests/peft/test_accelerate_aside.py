"""States and calls that must go through PEFT's own forward: it answers, and the reason is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from tests.peft_models import K, calls, draw, make, twins

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


def offload_hook(layer: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer.lora_B["a0"], ModelHook())


def half_second(layer: Any) -> None:
    layer.lora_A["a1"].half(), layer.lora_B["a1"].half()


def casting_hooks(layer: Any) -> None:
    """What `enable_layerwise_casting` does, adapters included: weights in float8 between calls, PEFT told not
    to cast the input.
    """
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())


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
    Aside(
        "pre-hook",
        ON_ADAPTER,
        lambda layer: layer.lora_A["a1"].register_forward_pre_hook(lambda m, a: a[0] * 2),
    ),
    Aside(
        "backward-hook",
        ON_ADAPTER,
        lambda layer: layer.lora_B["a0"].register_full_backward_hook(lambda *a: None),
    ),
    Aside("accelerate-up", ON_ADAPTER, offload_hook),
    Aside("layerwise-casting", "hooks fetch lora_A and lora_B, and a gradient is wanted", casting_hooks),
    Aside("adapters-differ", "adapters of different dtypes", half_second),
]


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


def test_told_not_to_cast_the_input_it_fails_as_in_peft():
    plain, fast = twins()
    said = []
    for model in (plain, fast):
        model[0].lora_A.half(), model[0].lora_B.half()
        model[0].cast_input_dtype_enabled = False
        with pytest.raises(RuntimeError) as error:
            model(draw(3, K))
        said.append(str(error.value))
    assert said[0] == said[1] and calls() == (0, {"weights and input of different dtypes": 1})


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


def test_hooks_on_the_layer_itself_come_and_go_in_any_order():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks.layerwise_casting import PeftInputAutocastDisableHook

    def by_accelerate(layer: Any) -> Callable[[], object]:
        add_hook_to_module(layer, ModelHook())
        return lambda: remove_hook_from_module(layer)

    def by_diffusers(layer: Any) -> Callable[[], object]:
        registry = HookRegistry.check_if_exists_or_initialize(layer)
        registry.register_hook(PeftInputAutocastDisableHook(), "peft")
        return lambda: registry.remove_hook("peft", recurse=False)

    from diffusers.hooks import HookRegistry

    for hook in (by_accelerate, by_diffusers):
        for order in set(permutations("hHaA")):
            if order.index("h") > order.index("H") or order.index("a") > order.index("A"):
                continue
            plain, fast = make((4, 2)), make((4, 2))
            x = draw(3, K)
            accelerated, undo = False, {}
            for step in order:
                if step == "h":
                    undo["h"] = hook(fast[0])
                elif step == "a":
                    undo["a"], accelerated = mk.accelerate(fast).remove, True
                else:
                    undo[step.lower()]()
                    accelerated = accelerated and step != "A"
                before = calls()[0]
                torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
                assert calls()[0] - before == accelerated, (hook.__name__, order, step)
            assert isinstance(fast[0], type(plain[0])) and type(fast[0]) is type(plain[0])


def test_a_forward_of_the_callers_own_stays():
    plain, fast = make((4, 2)), make((4, 2))
    fast[0].forward = lambda x: 2 * type(plain[0]).forward(fast[0], x)
    with pytest.warns(match="replaced on the instance"):
        handle = mk.accelerate(fast)
    assert "replaced on the instance" in handle.skipped["0"] and not handle.layers
    assert torch.equal(fast(draw(3, K)), 2 * plain(draw(3, K))) and calls() == (0, {})


COMPILED_ASIDES = ("disabled", "merged", "lora-bias", "none-active")


@pytest.mark.parametrize("case", [case for case in ASIDES if case.id in COMPILED_ASIDES], ids=str)
def test_stepping_aside_compiles_too(case: Aside):
    torch.compiler.reset()
    plain, fast = twins((4, 2), **(case.config or {}))
    for model in (plain, fast):
        case.change(model[0])
    graphs: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph

    x = draw(3, K)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend=compiler)(x), plain(x))
    assert len(graphs) == 1 and "gated_lora_fwd" not in graphs[0]
    torch.compiler.reset()
