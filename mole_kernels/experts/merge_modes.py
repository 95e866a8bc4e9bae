"""The arithmetic of merging one layer: several pairs of factors into one, by every mode's formula.

PEFT's modes (svd, linear, cat, ties, dare_linear, dare_ties, magnitude_prune and their `_svd` forms) give
what its
`add_weighted_adapter` gives. Sources: TIES (Yadav et al., 2023), DARE (Yu et al., 2023), SELMA (Li et al.,
2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mole_kernels.experts.compress_svd import truncate
from mole_kernels.experts.lowrank import LowRank

Mode = Literal[
    "delta_mean",
    "factor_mean",
    "cat",
    "svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
SignMethod = Literal["total", "frequency"]
# work on A and B by themselves, so their ranks must be equal
FACTOR_MODES = ("factor_mean", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSITY_MODES = tuple(
    f"{mode}{end}" for mode in ("ties", "dare_linear", "dare_ties", "magnitude_prune") for end in ("", "_svd")
)
RANK_MODES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@dataclass(frozen=True)
class Settings:
    """How to merge; checked by `merge.plan_merge`.

    Attributes:
        mode: The formula.
        rank: Of the result, for svd and the `_svd` modes.
        density: The part of the values that pruning keeps, in (0, 1].
        signs: How ties elects a sign: by the sum of the values ("total") or by their number ("frequency");
            PEFT's majority_sign_method.
    """

    mode: Mode = "delta_mean"
    rank: int | None = None
    density: float | None = None
    signs: SignMethod = "total"


def merge_layer(
    layers: Sequence[LowRank],
    weights: Sequence[float],
    how: Settings,
    generator: torch.Generator | None = None,
) -> LowRank:
    """One layer of the merged expert, in float32 (float64 where an input is), or in the inputs' dtype where
    their bits can stay.

    Args:
        layers: The experts that have this layer; one that lacks it adds nothing to any mode's sum.
        weights: One for each of them.
        how: The mode and its numbers.
        generator: dare's random numbers: for each layer all A first, then all B, in the experts' order, as
            PEFT draws them.
    """
    fits = sum(layer.rank for layer in layers) <= min(layers[0].out_features, layers[0].in_features)
    if (how.mode == "cat" or (how.mode == "delta_mean" and fits)) and _bits_stay(layers, weights):
        return concatenate(layers, weights)
    wide = (
        torch.float64
        if any(t.dtype == torch.float64 for layer in layers for t in (layer.down, layer.up))
        else torch.float32
    )
    layers = [
        LowRank(layer.down.detach().to(wide), layer.up.detach().to(wide), layer.scale, layer.conv)
        for layer in layers
    ]
    if how.mode == "delta_mean":
        return _within_the_layer(concatenate(layers, weights))
    if how.mode == "cat":
        return concatenate(layers, weights)
    if how.mode == "svd":
        joined = concatenate(layers, weights)
        return truncate(joined, how.rank or joined.rank)
    if how.mode == "factor_mean":
        return _factor_mean(layers, weights)
    if how.mode.endswith("_svd"):
        return _by_delta(layers, weights, how, generator)
    # the weight goes half to A and half to B; its sign must not be lost twice
    roots = [math.sqrt(abs(weight * layer.scale)) for layer, weight in zip(layers, weights)]
    signed = [
        math.copysign(root, weight * layer.scale) for root, layer, weight in zip(roots, layers, weights)
    ]
    down = combine_tensors([layer.down for layer in layers], signed, how.mode, how, generator)
    up = combine_tensors([layer.up for layer in layers], roots, how.mode, how, generator)
    return LowRank(down, up, 1.0, _conv(layers))


def concatenate(layers: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ_e w_e s_e B_e A_e as one expert of rank Σ R_e.

    The largest |w_e s_e| becomes its scale and the other downs carry their ratio to it: equal ones leave
    every factor bit for bit.
    """
    share = [weight * layer.scale for layer, weight in zip(layers, weights)]
    scale = max(share, key=abs) or 1.0
    down = torch.cat(
        [layer.down if part == scale else layer.down * (part / scale) for layer, part in zip(layers, share)]
    )
    return LowRank(down, torch.cat([layer.up for layer in layers], 1), scale, _conv(layers))


def combine_tensors(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    rule: str,
    how: Settings,
    generator: torch.Generator | None,
) -> Tensor:
    """PEFT's linear, ties, dare_linear, dare_ties and magnitude_prune of equally shaped tensors; they are not
    written to.
    """
    if rule.startswith("dare"):
        tensors = [_drop(tensor, how.density, generator) for tensor in tensors]
    elif rule != "linear":
        tensors = [_keep_largest(tensor, how.density) for tensor in tensors]
    if not rule.endswith("ties"):
        total = torch.zeros_like(tensors[0])
        for tensor, weight in zip(tensors, weights):
            total.add_(tensor, alpha=weight)
        return total
    # elect a sign for each value, then the mean of those that agree with it
    vote = torch.zeros_like(tensors[0])
    for tensor in tensors:
        vote += tensor if how.signs == "total" else tensor.sign()
    elected = torch.where(vote >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(vote), torch.zeros_like(vote)
    for tensor, weight in zip(tensors, weights):
        agrees = tensor.sign() == elected
        total += tensor * weight * agrees
        count += agrees
    return total / count.clamp(min=1.0)


def _by_delta(
    layers: Sequence[LowRank], weights: Sequence[float], how: Settings, generator: torch.Generator | None
) -> LowRank:
    """A rule on the ΔW themselves, then the best approximation of the rank asked for: the one place where ΔW
    is formed.
    """
    delta = combine_tensors(
        [layer.delta(layer.up.dtype) for layer in layers],
        weights,
        how.mode.removesuffix("_svd"),
        how,
        generator,
    )
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = min(how.rank or len(s), len(s))
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * vh[:rank], u[:, :rank] * root, 1.0, _conv(layers))


def _factor_mean(layers: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """s · (Σ w_e B_e) · (Σ w_e A_e); where the scales differ, √|s_e| goes to both factors and the sign to
    B.
    """
    scale = layers[0].scale
    if any(layer.scale != scale for layer in layers):
        parts = [(layer, weight * math.sqrt(abs(layer.scale))) for layer, weight in zip(layers, weights)]
        down = sum((layer.down * part for layer, part in parts), torch.zeros_like(layers[0].down))
        up = sum(
            (layer.up * math.copysign(part, part * layer.scale) for layer, part in parts),
            torch.zeros_like(layers[0].up),
        )
        return LowRank(down, up, 1.0, _conv(layers))
    down = sum(
        (layer.down * weight for layer, weight in zip(layers, weights)), torch.zeros_like(layers[0].down)
    )
    up = sum((layer.up * weight for layer, weight in zip(layers, weights)), torch.zeros_like(layers[0].up))
    return LowRank(down, up, scale, _conv(layers))


def _within_the_layer(layer: LowRank) -> LowRank:
    """The same ΔW with a rank no larger than the layer: beyond that, ΔW and a unit matrix are the smaller
    pair.
    """
    N, K = layer.out_features, layer.in_features
    if layer.rank <= min(N, K):
        return layer
    delta = layer.delta(layer.up.dtype)
    # the factor holds values near one, whatever ΔW's size: 16 bits hold them best
    scale = delta.abs().max().item() or 1.0
    unit = torch.eye(min(N, K), dtype=delta.dtype)
    return (
        LowRank(delta / scale, unit, scale, layer.conv)
        if N <= K
        else LowRank(unit, delta / scale, scale, layer.conv)
    )


def _keep_largest(tensor: Tensor, density: float | None) -> Tensor:
    """The `density` part of the values that is largest in size; zero elsewhere."""
    if density is None or density >= 1:
        return tensor
    largest = torch.topk(tensor.abs().flatten(), int(density * tensor.numel()), sorted=False).indices
    out = torch.zeros_like(tensor).flatten()
    out[largest] = tensor.flatten()[largest]
    return out.view_as(tensor)


def _drop(tensor: Tensor, density: float | None, generator: torch.Generator | None) -> Tensor:
    """A random `density` part of the values over `density`; zero elsewhere."""
    if density is None or density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def _bits_stay(layers: Sequence[LowRank], weights: Sequence[float]) -> bool:
    """Whether side by side the factors can stay as they are, in their own dtype."""
    dtypes = {t.dtype for layer in layers for t in (layer.down, layer.up)}
    shares = {weight * layer.scale for layer, weight in zip(layers, weights)}
    return len(dtypes) == 1 and len(shares) == 1 and dtypes.pop().itemsize > 1


def _conv(layers: Sequence[LowRank]) -> bool | tuple[int, int]:
    return next((layer.conv for layer in layers if layer.conv), False)
