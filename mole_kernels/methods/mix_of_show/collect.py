"""What layers see while one concept's model runs, summed up by forward hooks as it comes; no input is
kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.fuse import Sums
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.patching.apply import patch

DOUBLE = 8


@dataclass
class Site:
    """One layer that is fused.

    Args:
        group: "text encoder", "cross-attention" (K and V of the text) or "unet".
        layer: Which of the L embeddings it reads, for the second group.
        lots: How many sums of it are kept at once: fitted, choosing, judging inputs.
        factors: Concept -> its factors here; a concept without this layer is not among them.
    """

    path: str
    module: nn.Module
    factors: dict[str, LowRank]
    group: str
    layer: int | None = None
    lots: int = 1

    @property
    def K(self) -> int:
        return next(iter(self.factors.values())).in_features

    @property
    def bytes(self) -> int:
        """Of its Gram matrix, of the few inputs kept beside it at first, and of A G for every concept."""
        return (self.lots * DOUBLE) * (
            self.K**2 + self.K // 4 * self.K + sum(f.rank for f in self.factors.values()) * self.K
        )

    def sums(self) -> Sums:
        device = self.module.weight.device  # type: ignore[union-attr]
        # float64 is what mps lacks
        return Sums.of(self.K, "cpu" if device.type == "mps" else device)  # type: ignore[union-attr, arg-type]


@dataclass
class Listening:
    """Where hooks add to: the sums of some layers by lot, which lot, under which concept, and which tokens
    count (None: all).
    """

    sums: dict[str, dict[str, Sums]]
    lot: str = ""
    concept: str = ""
    keep: Tensor | None = field(default=None)


def passes(sites: Sequence[Site], budget: int | None) -> list[list[Site]]:
    """The sites in order, cut so that each part's sums fit into `budget` bytes.

    Raises MoleValueError where a single layer does not. The work on one layer takes about twice its Gram
    matrix beside that.
    """
    parts: list[list[Site]] = []
    room = 0
    for site in sites:
        if budget is not None and site.bytes > budget:
            need = f"at least {site.bytes / 1e6:.1f} MB for {site.path}"
            raise MoleValueError(
                "fuse: memory",
                expected=need,
                got=f"{budget / 1e6:.1f} MB",
                hint="one layer at a time is the least",
            )
        if not parts or (budget is not None and site.bytes > room):
            parts.append([])
            room = budget or 0
        parts[-1].append(site)
        room -= site.bytes
    return parts


@contextmanager
def listening(sites: Sequence[Site], lots: Sequence[str]) -> Iterator[Listening]:
    """Hooks on the layers of `sites`: whatever runs through them is added under the lot and concept that
    `Listening` names just then.
    """
    heard = Listening({lot: {site.path: site.sums() for site in sites} for lot in lots})
    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(partial(_add, heard, site)).remove)
        yield heard


def _add(heard: Listening, site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = args[0]
    if isinstance(module, nn.Conv2d):
        x = x.movedim(1, -1)
    if heard.keep is not None:
        if x.shape[:2] != heard.keep.shape:
            raise MoleStateError(
                f"fuse, {site.path}",
                expected=f"inputs of {tuple(heard.keep.shape)} tokens",
                got=tuple(x.shape),
            )
        x = x[heard.keep.to(x.device)]
    heard.sums[heard.lot][site.path].add(heard.concept, site.factors.get(heard.concept), x)


@contextmanager
def patched_by_one(
    model: nn.Module, component: str, factors: Mapping[str, LowRank], alpha: float
) -> Iterator[None]:
    """One concept by itself in one component: of the factors those whose path begins with it."""
    own = {
        path.removeprefix(f"{component}."): factor
        for path, factor in factors.items()
        if path.startswith(f"{component}.")
    }
    if not own or alpha == 0:
        yield
        return
    with (
        torch.no_grad(),
        patch(model, {"concept": Expert(own)}, scales={"concept": alpha}, allow_large_rank=True),
    ):
        yield
