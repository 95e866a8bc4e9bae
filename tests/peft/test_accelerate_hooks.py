"""Hooks that bring the tensors of lora_A and lora_B run as PEFT's calls would run them, around one
computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mole_kernels as mk
from mole_kernels.peft import forward as peft_forward
from tests.peft_models import K, calls, draw, make, twins

pytest.importorskip("peft")
pytest.importorskip("diffusers")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


def modules_of(layer: Any) -> dict[str, nn.Module]:
    return {
        "base": layer.base_layer,
        **{f"A.{name}": layer.lora_A[name] for name in layer.lora_A},
        **{f"B.{name}": layer.lora_B[name] for name in layer.lora_B},
    }


def track(layer: Any) -> list[str]:
    """diffusers' own trackers, from whose record it decides what to prefetch after what."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.group_offloading import LayerExecutionTrackerHook

    order: list[str] = []
    for name, module in modules_of(layer).items():
        hook = LayerExecutionTrackerHook(lambda name=name: order.append(name))
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "layer_execution_tracker")
    return order


@pytest.mark.parametrize("names", [["a0"], ["a2", "a0"], ["a0", "a1", "a2"]], ids=str)
def test_modules_are_fetched_in_the_order_of_pefts_calls(names: list[str]):
    plain, fast = twins((4, 2, 3))
    orders = []
    for model in (plain, fast):
        model[0].set_adapter(names)
        # an adapter of weight zero is fetched as well: PEFT calls it
        model[0].set_scale(names[0], 0.0)
        orders.append(track(model[0]))
        with torch.no_grad():
            model(draw(3, K))
    assert orders[0] == orders[1] and len(orders[1]) == 1 + 2 * len(names)
    assert calls() == (1, {})


def offloaded(layer: Any) -> list[Any]:
    """Group offloading of every leaf; what is on the offload device is made unusable, as another device would
    be.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.group_offloading import GroupOffloadingHook

    class Group:
        """A group that holds zeros while its module is not called."""

        onload_leader = None
        onload_self, stream, non_blocking, onload_device, offload_device = True, None, False, CPU, None

        def __init__(self, module: nn.Module) -> None:
            self.module = self.offload_leader = module
            self.stored = {name: p.data.clone() for name, p in module.named_parameters()}
            self.held = True

        def onload_(self) -> None:
            self.held = True
            for name, parameter in self.module.named_parameters():
                parameter.data = self.stored[name].clone()

        def offload_(self) -> None:
            self.held = False
            for parameter in self.module.parameters():
                parameter.data = torch.zeros_like(parameter.data)

    class Config:
        exclude_kwargs = None

    groups = []
    for module in modules_of(layer).values():
        group: Any = Group(module)
        hook = GroupOffloadingHook(group, config=Config())  # type: ignore[arg-type]
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "group_offloading")
        groups.append(group)
    return groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computes_while_the_tensors_are_there_and_gives_them_back(dtype: torch.dtype):
    plain, fast = twins((4, 2), dtype)
    groups = offloaded(fast[0])
    x = draw(3, K, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), plain(x), rtol=2e-2, atol=2e-2)
    assert calls() == (2, {}) and not any(group.held for group in groups)


def test_an_error_inside_gives_the_tensors_back(monkeypatch: pytest.MonkeyPatch):
    _, fast = twins((4, 2))
    groups = offloaded(fast[0])

    def fail(*args: Any) -> Any:
        assert [group.held for group in groups] == [False, True, True, True, True]
        raise MemoryError

    monkeypatch.setattr(peft_forward, "_added", fail)
    with torch.no_grad(), pytest.raises(MemoryError):
        fast(draw(3, K))
    assert not any(group.held for group in groups)


def a_hook_of_ones_own(layer: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    class Doubling(AlignDevicesHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return 2 * output

    add_hook_to_module(layer.lora_A["a0"], Doubling(CPU))


def a_wrapper_around_the_hook(layer: Any) -> None:
    module = layer.lora_A["a0"]
    align(layer)
    inner = module.forward
    module.forward = lambda x: 2 * inner(x)


def a_wrapper_below_the_hook(layer: Any) -> None:
    module = layer.lora_A["a0"]
    module.forward = lambda x: 2 * type(module).forward(module, x)
    align(layer)


def a_torch_hook_beside_it(layer: Any) -> None:
    align(layer)
    layer.lora_A["a0"].register_forward_hook(lambda m, a, y: 2 * y)


def hooks_of_both_packages(layer: Any) -> None:
    align(layer)
    track(layer)


def align(layer: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(layer.lora_A["a0"], AlignDevicesHook(CPU))


UNKNOWN = [
    a_hook_of_ones_own,
    a_wrapper_around_the_hook,
    a_wrapper_below_the_hook,
    a_torch_hook_beside_it,
    hooks_of_both_packages,
]


@pytest.mark.parametrize("change", UNKNOWN, ids=lambda change: change.__name__)
def test_anything_else_is_pefts_matter(change: Callable[[Any], None]):
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        change(model[0])
    with torch.no_grad():
        x = draw(3, K)
        assert torch.equal(fast(x), plain(x))
    assert calls() == (0, {"hooks on lora_A, lora_B or lora_dropout": 1})


def test_a_sequence_of_known_hooks_is_run_whole():
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    plain, fast = twins((4, 2))
    for module in modules_of(fast[0]).values():
        hook = SequentialHook(AlignDevicesHook(CPU), AlignDevicesHook(CPU, offload=True))
        add_hook_to_module(module, hook)
    x = draw(3, K)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls() == (1, {}) and all(p.is_meta for p in fast.parameters())


def test_with_a_gradient_wanted_peft_computes():
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        align(model[0])
    x = draw(3, K)
    assert torch.equal(fast(x), plain(x))
    assert calls() == (0, {"hooks fetch lora_A and lora_B, and a gradient is wanted": 1})
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    fast(x)
    assert calls()[0] == 1


@pytest.mark.parametrize(
    "dtypes", [("float8_e4m3fn", torch.float32), ("float8_e5m2", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("first", [True, False], ids=["accelerated-first", "cast-first"])
def test_layerwise_casting_of_adapters(dtypes: tuple[str, torch.dtype], first: bool):
    from diffusers.hooks import apply_layerwise_casting

    storage, compute = getattr(torch, dtypes[0]), dtypes[1]
    plain, fast = make((4, 2), compute), make((4, 2), compute)
    if first:
        mk.accelerate(fast)
    for model in (plain, fast):
        apply_layerwise_casting(model, storage, compute, skip_modules_pattern=())
    handle = mk.accelerate(fast)
    x = draw(3, K, dtype=compute)
    with torch.no_grad():
        theirs, ours = plain(x), fast(x)
    assert ours.dtype == compute
    assert (ours - theirs).norm() <= 8 * torch.finfo(compute).eps * theirs.norm()
    assert calls() == (1, {}) and list(handle.layers) == ["0"]
    assert fast[0].lora_A["a0"].weight.dtype == storage
