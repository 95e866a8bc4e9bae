"""Nothing made of PEFT's tensors outlives a call: every way of changing them between two calls, by itself and
in long random orders.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from tests.peft_models import K, N, Pair, calls, draw, lora_config, twins

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


def like(tensor: Tensor, seed: int) -> Tensor:
    return 0.3 * draw(*tensor.shape, dtype=tensor.dtype, seed=seed)


def factors(model: Any) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def data_copy(model: Any, seed: int) -> None:
    """As hot-swapping writes: the same object, address and version."""
    for i, parameter in enumerate(factors(model)):
        version, address = parameter._version, parameter.data_ptr()
        parameter.data.copy_(like(parameter, seed + i))
        assert parameter._version == version and parameter.data_ptr() == address


def data_assigned(model: Any, seed: int) -> None:
    """As merging and group offloading write: the same object, another address."""
    for i, parameter in enumerate([*factors(model), model[0].base_layer.weight]):
        parameter.data = like(parameter, seed + i)


def through_numpy(model: Any, seed: int) -> None:
    """Past torch altogether."""
    for i, parameter in enumerate(factors(model)):
        if parameter.dtype == torch.float32:
            parameter.detach().numpy()[:] = like(parameter, seed + i).numpy()


def optimiser(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[Any, int], None]:
    def step(model: Any, seed: int) -> None:
        for i, parameter in enumerate(factors(model)):
            parameter.grad = like(parameter, seed + i)
        kind(factors(model), **options).step()
        model.zero_grad()

    step.__name__ = kind.__name__ + "".join(f"-{name}" for name in options if name != "lr")
    return step


def to_and_back(model: Any, seed: int) -> None:
    model.to(torch.bfloat16).to(torch.float64).to(torch.float32)


def half_and_float(model: Any, seed: int) -> None:
    model.half().float()


def meta_and_back(model: Any, seed: int) -> None:
    """As offloading to disk does: nothing left in memory, then new tensors in the place of the old."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict({name: tensor * 0.9 for name, tensor in kept.items()})


def load(assign: bool) -> Callable[[Any, int], None]:
    def step(model: Any, seed: int) -> None:
        state = model.state_dict()
        model.load_state_dict(
            {name: like(tensor, seed + i) for i, (name, tensor) in enumerate(state.items())}, assign=assign
        )

    step.__name__ = "load_state_dict" + ("-assign" if assign else "")
    return step


def swap_tensors(model: Any, seed: int) -> None:
    for i, parameter in enumerate(factors(model)):
        torch.utils.swap_tensors(parameter, nn.Parameter(like(parameter, seed + i)))


def new_parameters(model: Any, seed: int) -> None:
    for i, module in enumerate((*model[0].lora_A.values(), *model[0].lora_B.values())):
        module.weight = nn.Parameter(like(module.weight, seed + i))


def shared_storage(model: Any, seed: int) -> None:
    """Both A as views of one buffer, and transposed ones of B: written to as a whole."""
    downs = list(model[0].lora_A.values())
    buffer = draw(sum(d.weight.shape[0] for d in downs), K, seed=seed)
    begin = 0
    for module in downs:
        rows = module.weight.shape[0]
        module.weight.data = buffer[begin : begin + rows].to(module.weight.dtype)
        begin += rows
    buffer.mul_(-0.5)
    for i, module in enumerate(model[0].lora_B.values()):
        module.weight.data = like(module.weight, seed + i).mT.contiguous().mT


def merge_and_back(model: Any, seed: int) -> None:
    model[0].merge()
    model[0].unmerge()


def scales(model: Any, seed: int) -> None:
    model[0].set_scale("a0", (seed % 7) / 3 - 1)
    model[0].scaling["a1"] = torch.tensor((seed % 5) / 2)


def scale_layer(model: Any, seed: int) -> None:
    model[0].scale_layer(1.5)
    model[0].set_scale("a1", 0.4)
    model[0].unscale_layer(2)


def other_adapters(model: Any, seed: int) -> None:
    model[0].set_adapter([["a0"], ["a1", "a0"], ["a1"]][seed % 3])


def both_adapters(model: Any, seed: int) -> None:
    model[0].set_adapter(["a0", "a1"])


CHANGES = [
    data_copy,
    data_assigned,
    through_numpy,
    optimiser(torch.optim.SGD, lr=0.1),
    optimiser(torch.optim.AdamW, lr=0.05),
    optimiser(torch.optim.AdamW, lr=0.05, fused=True),
    optimiser(torch.optim.SGD, lr=0.1, foreach=True),
    to_and_back,
    half_and_float,
    meta_and_back,
    load(False),
    load(True),
    swap_tensors,
    new_parameters,
    shared_storage,
    merge_and_back,
    scales,
    scale_layer,
    other_adapters,
    both_adapters,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_by_the_next_call(change: Callable[[Any, int], None]):
    plain, fast = twins((4, 2))
    x = draw(3, K)
    for call in (0, 1):
        with torch.set_grad_enabled(bool(call)):
            before = fast(x).detach()
            for model in (plain, fast):
                change(model, 11 + 2 * call)
            after = fast(x).detach()
            torch.testing.assert_close(after, plain(x).detach(), rtol=1e-4, atol=1e-4)
        if change not in (merge_and_back, both_adapters, to_and_back, half_and_float):
            assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert calls()[1] == {}


@pytest.mark.parametrize("seed", range(6))
def test_long_random_orders(seed: int):
    plain, fast = twins((4, 2))
    chosen, x = random.Random(seed), draw(3, K)
    for step in range(25):
        change = chosen.choice(CHANGES)
        for model in (plain, fast):
            change(model, 100 * seed + step)
        # detached: a graph kept from an earlier call holds the tensors that swap_tensors wants to itself
        with torch.set_grad_enabled(step % 2 == 0):
            theirs, ours = plain(x).detach(), fast(x).detach()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    assert calls() == (25, {})


def test_nothing_is_kept():
    """No tensor of PEFT's, nor any made of one, is referred to after a call: what is freed is freed, and no
    attribute comes.
    """
    import gc
    import weakref

    _, fast = twins((4, 2))
    attributes = set(vars(fast[0]))
    with torch.no_grad():
        fast(draw(3, K))
    assert set(vars(fast[0])) == attributes
    seen = [weakref.ref(parameter) for parameter in factors(fast)]
    fast[0].delete_adapter("a0"), fast[0].delete_adapter("a1")
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4
    made = [
        t
        for t in gc.get_objects()
        if type(t) is Tensor and tuple(t.shape) in ((6, K), (N, 6), (1, 6, K), (1, N, 6))
    ]
    assert not made


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind: str):
    from diffusers.hooks import apply_group_offloading

    pair = Pair("flux")
    before = pair.assert_same()
    for model in pair.both:
        extra = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), kind, **extra)
    for _ in range(2):
        theirs, ours = pair.outputs()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-5)
    for model in pair.both:
        model.set_adapters(["b"], [2.0])
    theirs, ours = pair.outputs()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, before, rtol=1e-3)


def test_model_offload_and_new_weights_while_away():
    """What `enable_model_cpu_offload` puts on a component; the other device is the CPU too, so the moves are
    the hooks' own.
    """
    from accelerate import cpu_offload_with_hook

    pair = Pair("unet")
    pair.assert_same()
    hooks = [cpu_offload_with_hook(model, torch.device("cpu"))[1] for model in pair.both]
    before = pair.assert_same()
    for hook, model in zip(hooks, pair.both):
        hook.offload()
        model.add_adapter(_adapter(), "c")
        model.set_adapters(["a", "c"], [1.0, 0.5])
    assert not torch.allclose(pair.assert_same(), before, rtol=1e-3)
    for hook in hooks:
        hook.remove()
    pair.assert_same()
    assert pair.counts()[1] == {}


def _adapter() -> Any:
    torch.manual_seed(8)
    return lora_config(3)
