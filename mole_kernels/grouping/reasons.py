"""Why layers with one input are computed one by one: their state, or the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from mole_kernels import extension
from mole_kernels.dispatch.choose import CANDIDATES, candidates_of, choose
from mole_kernels.dispatch.cost import GAP
from mole_kernels.dispatch.device import present
from mole_kernels.dispatch.tables import for_device
from mole_kernels.dispatch.work import Use
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.ops.direct import PLAIN
from mole_kernels.problem import Problem
from mole_kernels.text_cache.layer import has_offload_hook

# one product of equal A against three (docs/grouping.md): 64 rows 1 % slower, 154 rows 2 % faster
CPU_ROWS = 128


def reason_against_layers(layers: Sequence[GatedLoRALinear]) -> str | None:
    """Why the layers, as they stand, are computed one by one, or None."""
    for layer in layers:
        if type(layer) is not GatedLoRALinear:
            return "a layer holds no experts any more"
        if layer.experts.bias_delta is not None:
            return "its experts change the bias"
        if not layer.experts_on:
            return "the experts are off"
        if layer.tokens_group is not None:
            return "its tokens are split over ranks"
        if type(layer.weight) not in PLAIN:
            return f"a weight is stored as {type(layer.weight).__name__}"
        if layer.weight.requires_grad:
            return "a base weight wants a gradient"
        if layer.backend != layers[0].backend:
            return "its layers are to use different backends"
        # hooks on the experts or the gate bring tensors that only the layer fetches
        if has_offload_hook(layer):
            return "offload hooks move its tensors"
        for child in layer._modules.values():
            if child is not None and has_offload_hook(child):
                return "offload hooks move its tensors"
    return None


@lru_cache(maxsize=4096)
def reason_against_one_product(
    whole: Problem, split: tuple[tuple[int, tuple[int, ...]], ...], index: int | None, trains: bool
) -> str | None:
    """Why the calls one by one are faster, or None if the one call is.

    Args:
        whole: The problem of the one call.
        split: N and ranks of each layer.
        index: Index of the GPU.
        trains: Whether a backward follows.
    """
    if whole.device != "cuda":
        if whole.ranks != split[0][1]:
            return "on a CPU the zeros beside each layer's B cost more than its calls"
        if whole.M < CPU_ROWS:
            return "too few rows for a CPU to gain by one product"
        return None
    alone = [replace(whole, N=N, ranks=ranks) for N, ranks in split]
    device = present(index)
    table, names = for_device(device), candidates_of(device) if extension.has_sm90() else CANDIDATES

    def time(problem: Problem) -> float:
        total = 0.0
        for use in (Use(save=trains), Use(backward=True)) if trains else (Use(),):
            choice = choose(problem, device, table, use, names)
            best = choice.of(choice.name)
            total += best.predicted if best.measured is None else best.measured  # type: ignore[operator]
        return total

    if time(whole) >= sum(time(problem) + GAP for problem in alone) - GAP:
        return "predicted slower than its layers one by one"
    return None
