"""The experts of one layer, packed as the operator reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleValueError
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.files.limits import finite
from mole_kernels.operands import Experts


class AssignmentSource(Protocol):
    """Says which set each sample of the running forward takes: current [B] int64, −1 for none.

    None: the base alone, for all of them.
    """

    @property
    def current(self) -> Tensor | None: ...

    def regrouped(self, samples: int) -> Tensor:
        """The sets of a layer's batch of another size than the forward's."""
        ...


class StrengthSource(Protocol):
    """ΔW of one expert at any strength."""

    def factors(self, strength: float) -> tuple[Tensor, Tensor]:
        """A [R,K] and B [N,R] of ΔW at a strength."""
        ...


class LayerExperts(nn.Module):
    """E named experts of one layer: A_e one under the other, B_e side by side.

    The scales stay float32 whatever `.to(dtype)` does to the rest.

    Args:
        down: [S,R,K], R = Σ R_e; S = 1 for experts that the batch shares, the number of samples, or any with
            a route.
        up: [S,N,R].
        base_scale: [E], the file's scale of each expert (alpha/r, …).
        names: The experts, all different.
        ranks: R_e of each.

    Attributes:
        base_scale: [E] float32 buffer.
        scale: [E] float32 buffer: base_scale times the adapter weights, what the operator multiplies by.
        route: None, or what says which of the S sets each sample of the running forward takes
            (`serving.ComponentRoute`).

    Raises:
        MoleShapeError: Tensors that do not fit each other.
        MoleValueError: Names that repeat, or not one name and rank for each expert.
    """

    base_scale: Tensor
    scale: Tensor
    bias_delta: Tensor | None

    def __init__(
        self, down: Tensor, up: Tensor, base_scale: Tensor, names: tuple[str, ...], ranks: tuple[int, ...]
    ) -> None:
        super().__init__()
        if len(names) != len(ranks) or len(set(names)) != len(names) or not names or min(ranks) < 1:
            raise MoleValueError(
                "LayerExperts",
                expected="one name (all different) and one rank >= 1 for each expert",
                got=f"{names}, {ranks}",
            )
        S, R = down.shape[0], sum(ranks)
        if (
            down.dim() != 3
            or up.dim() != 3
            or down.shape[1] != R
            or tuple(up.shape) != (S, up.shape[1], R)
            or base_scale.shape != (len(names),)
        ):
            raise MoleShapeError(
                "LayerExperts",
                expected=f"down [S,{R},K], up [S,N,{R}], base_scale [{len(names)}]",
                got=f"{list(down.shape)}, {list(up.shape)}, {list(base_scale.shape)}",
            )
        self.names, self.ranks = tuple(names), tuple(ranks)
        self.route: AssignmentSource | None = None
        # experts whose ΔW is no multiple of its strength -> what computes it (`patching.families`)
        self.strengths: dict[str, StrengthSource] = {}
        # [E,N] float32: what each expert adds to the bias, before scale and gates; None where none does
        self.register_buffer("bias_delta", None)
        # ranks of the widest layer in the same place of another block; what a compiled block pads to
        self.block_ranks: tuple[int, ...] | None = None
        self.down, self.up = nn.Parameter(down, requires_grad=False), nn.Parameter(up, requires_grad=False)
        self.register_buffer("base_scale", base_scale.to(torch.float32))
        self.register_buffer("scale", self.base_scale.clone())

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, LowRank],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LayerExperts:
        """Pack LowRank experts, in the mapping's order; they must agree in K and N."""
        layers = list(factors.values())
        first = layers[0]
        dtype, device = dtype or first.down.dtype, device or first.down.device
        ranks = tuple(layer.rank for layer in layers)
        down = torch.empty(1, sum(ranks), first.in_features, dtype=dtype, device=device)
        up = torch.empty(1, first.out_features, sum(ranks), dtype=dtype, device=device)
        start = 0
        for layer in layers:
            down[0, start : start + layer.rank].copy_(layer.down.detach())
            up[0, :, start : start + layer.rank].copy_(layer.up.detach())
            start += layer.rank
        return cls(
            down, up, torch.tensor([layer.scale for layer in layers], device=device), tuple(factors), ranks
        )

    def operands(self, samples: int | None = None) -> Experts:
        """The tensors of one call, as the operator takes them."""
        assignment = None if self.route is None else self.route.current
        if assignment is not None and samples is not None and samples != assignment.shape[0]:
            assert self.route is not None
            assignment = self.route.regrouped(samples)
        # past nn.Module.__getattr__, at every call of every layer; sharding may keep them elsewhere
        own, buffers = self._parameters, self._buffers
        down = own["down"] if "down" in own else self.down  # noqa: SIM401
        up = own["up"] if "up" in own else self.up  # noqa: SIM401
        scale = buffers["scale"] if "scale" in buffers else self.scale  # noqa: SIM401
        # `Experts(…)` without its Python call
        return tuple.__new__(Experts, (down, up, scale, self.ranks, assignment))

    def is_idle(self) -> bool:
        """Whether no sample of the running forward takes a set: the layer is then the base alone."""
        return self.route is not None and self.route.current is None

    @torch.no_grad()
    def pad_to(self, ranks: tuple[int, ...]) -> None:
        """Widen every expert to R_e = ranks[e] by zeros, in the same Parameter objects; the output stays the
        same.

        Raises:
            MoleValueError: Fewer ranks than there are now, or another number of experts.
        """
        if len(ranks) != len(self.ranks) or any(new < old for new, old in zip(ranks, self.ranks)):
            raise MoleValueError("LayerExperts.pad_to", expected=f"ranks of at least {self.ranks}", got=ranks)
        if tuple(ranks) == self.ranks:
            return
        downs, ups = self.down.split(self.ranks, 1), self.up.split(self.ranks, 2)
        more = [new - old for new, old in zip(ranks, self.ranks)]
        down = torch.cat([F.pad(part, (0, 0, 0, extra)) for part, extra in zip(downs, more)], 1)
        up = torch.cat([F.pad(part, (0, extra)) for part, extra in zip(ups, more)], 2)
        self.down.data, self.up.data, self.ranks = down, up, tuple(ranks)

    def span(self, name: str) -> slice:
        """The rank columns of one expert.

        Args:
            name: The expert.

        Raises:
            MoleKeyError: No such expert on this layer.
        """
        e = self.index(name)
        start = sum(self.ranks[:e])
        return slice(start, start + self.ranks[e])

    def index(self, name: str) -> int:
        """The place of one expert among the layer's.

        Args:
            name: The expert.

        Raises:
            MoleKeyError: No such expert on this layer.
        """
        if name not in self.names:
            raise MoleKeyError("expert", f"no expert {name!r} on this layer; it has {', '.join(self.names)}")
        return self.names.index(name)

    def factor(self, name: str, sample: int = 0) -> LowRank:
        """One expert as it stands now (copies); its adapter weight is not part of it."""
        span = self.span(name)
        # sharded ones (FSDP) are gathered, for which every rank must call
        down, up = (
            getattr(t, "full_tensor", lambda t=t: t)() for t in (self.down.detach(), self.up.detach())
        )
        down, up = down[sample, span].clone(), up[sample, :, span].clone()
        return LowRank(down, up, self.base_scale[self.index(name)].item())

    @torch.no_grad()
    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """A and B of experts whose ΔW is no multiple of its strength, at theirs; their scale is then 1.

        Args:
            strengths: Name -> strength, of those that have such a ΔW.
        """
        for name, strength in strengths.items():
            if name not in self.strengths:
                continue
            down, up = self.strengths[name].factors(strength)
            e, span = self.index(name), self.span(name)
            part_down, part_up = self.down[0, span], self.up[0, :, span]
            part_down[: len(down)].copy_(down)
            part_up[:, : len(down)].copy_(up)
            self.scale[e] = float(strength != 0)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, float]) -> None:
        """scale_e = base_scale_e · weight for the experts named; the others keep theirs.

        Args:
            weights: Name -> weight.

        Raises:
            MoleKeyError: No such expert on this layer.
            MoleValueError: A weight that is not finite; nothing is set.
        """
        for name, weight in weights.items():
            if not finite(weight, torch.float32):
                raise MoleValueError(f"weight of expert {name!r}", expected="a finite number", got=weight)
            self.index(name)
        for name, weight in weights.items():
            e = self.index(name)
            self.scale[e] = self.base_scale[e] * weight

    def _apply(self, fn, recurse: bool = True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        S, _, K = self.down.shape
        experts = ", ".join(f"{name} r={rank}" for name, rank in zip(self.names, self.ranks))
        return f"{K}→{self.up.shape[1]}, {experts}" + (f", {S} sets" if S > 1 else "")
