"""Families that scale, rotate or shift what the layer has: DoRA, OFT, BOFT, IA³, GLoRA, bias differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError
from mole_kernels.experts.families.family import AdapterFamily, check_shape, wide
from mole_kernels.experts.lowrank import LowRank

_EMPTY = torch.empty(0)
NOTHING = LowRank(torch.zeros(1, 1), torch.zeros(1, 1))
# LyCORIS adds this to the norm
LYCORIS_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class DoRA(AdapterFamily):
    """W' = c ⊙ (W + ΔW) with c = m / ‖W + ΔW‖, the norm of each row, or of each input channel.

    Strength w ≠ 1 follows the writer's rule. "peft": W' = m/‖W + wΔW‖ ⊙ (W + wΔW). "lycoris":
    W' = (w (c − 1) + 1) ⊙ (W + ΔW), with ε = 1.2e-7 added to the norm. At 0 nothing is added.

    Attributes:
        inner: ΔW as A and B.
        magnitude: m: [N] of rows; [C] of input channels.
        on_input: Whether the norm is taken over each input channel.
        rule: Whose rule for the strength.

    Source: Liu et al., DoRA, ICML 2024; PEFT `tuners/lora/dora.py`; LyCORIS `functional/general.py`.
    """

    inner: LowRank = NOTHING
    magnitude: Tensor = field(default=_EMPTY)
    on_input: bool = False
    rule: Literal["peft", "lycoris"] = "peft"

    kind: ClassVar[str] = "DoRA"
    linear: ClassVar[bool] = False

    def weight_delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = wide(weight)
        axis = 1 if self.on_input else 0
        check_shape(
            self.kind,
            "magnitude",
            self.magnitude,
            base.shape[axis],
            hint="its magnitude belongs to another layer",
        )
        if (self.inner.out_features, self.inner.in_features) != (len(base), base[0].numel()):
            raise MoleShapeError(
                self.kind,
                expected=f"A and B of a layer [{len(base)},{base[0].numel()}]",
                got=[self.inner.out_features, self.inner.in_features],
            )
        if strength == 0:
            return torch.zeros_like(base)
        amount = strength if self.rule == "peft" else 1.0
        delta = self.inner.scale * amount * (wide(self.inner.up, base) @ wide(self.inner.down, base))
        changed = base + delta.view(base.shape)
        others = [d for d in range(base.dim()) if d != axis]
        norm = changed.pow(2).sum(others, keepdim=True).sqrt()
        shape = [-1 if d == axis else 1 for d in range(base.dim())]
        magnitude = wide(self.magnitude, base).view(shape)
        if self.rule == "peft":
            return changed * (magnitude / norm) - base
        factor = strength * (magnitude / (norm + LYCORIS_EPSILON) - 1) + 1
        return changed * factor - base


@dataclass(frozen=True, eq=False)
class OFT(AdapterFamily):
    """W' = ρ ⊙ (R W) (output), or W' = W R (input), R block-diagonal or a butterfly of orthogonal blocks.

    On the output, LyCORIS: R = (1+Q)(1−Q)⁻¹ with Q = q − qᵀ, Q scaled to the norm `constraint` where it is
    larger, transposed for its diagonal form, ρ its rescale. On the input, PEFT: R from the entries above the
    diagonal, by Cayley's transform or by the first terms of its series. Strength w: each block becomes
    w R + (1 − w), LyCORIS' rule; at 0 nothing is added.

    Attributes:
        blocks: q: [n,b,b] (OFT) or [m,n,b,b] (BOFT) on the output; on the input [n,b(b−1)/2], n = 1 where
            all blocks are shared.
        rescale: ρ [N] or [N,1…], or None.
        constraint: The largest norm of Q; 0 for none.
        on_input: Whether the input is rotated.
        series: Terms of Neumann's series for Cayley's transform (PEFT); 0 for the inverse.

    Source: Qiu et al., OFT, NeurIPS 2023; Liu et al., BOFT, ICLR 2024; LyCORIS `functional/diag_oft.py`,
    `functional/boft.py`; PEFT `tuners/oft/layer.py`.
    """

    blocks: Tensor = field(default=_EMPTY)
    rescale: Tensor | None = None
    constraint: float = 0.0
    on_input: bool = False
    series: int = 0

    kind: ClassVar[str] = "OFT"
    linear: ClassVar[bool] = False

    @property
    def is_butterfly(self) -> bool:
        """Whether it is BOFT."""
        return not self.on_input and self.blocks.dim() == 4

    @property
    def block_size(self) -> int:
        """b; of PEFT's form from the b(b−1)/2 entries."""
        if not self.on_input:
            return self.blocks.shape[-1]
        return round((1 + (1 + 8 * self.blocks.shape[-1]) ** 0.5) / 2)

    def rotation(self, features: int, like: Tensor) -> Tensor:
        """R as blocks [m,n,b,b] that act on a column of features.

        Args:
            features: n·b.
            like: Whose device and precision.
        """
        q, b = wide(self.blocks, like), self.block_size
        whole = q.dim() == 2 if self.on_input else q.dim() in (3, 4) and q.shape[-1] == q.shape[-2]
        count = q.shape[0] if self.on_input else q.shape[-3] if whole else 0
        shared = self.on_input and count == 1
        if not whole or b < 1 or not (count * b == features or (shared and features % b == 0)):
            raise MoleShapeError(
                f"{'BOFT' if self.is_butterfly else self.kind}, blocks",
                expected=f"square blocks that divide the layer's {features} features",
                got=list(self.blocks.shape),
            )
        if self.on_input:
            rows, columns = torch.triu_indices(b, b, 1, device=q.device)
            skew = q.new_zeros(count, b, b)
            skew[:, rows, columns] = q
            skew = skew - skew.mT
            # x_c = Σ_k x_k R[k,c]: the transpose acts on a column
            turned = (_neumann(skew, self.series) if self.series else _cayley(-skew)).mT[None]
            return turned.expand(-1, features // b, -1, -1)
        skew = q - q.mT
        norm = skew.norm() + 1e-8
        if self.constraint > 0 and norm > self.constraint:
            skew = skew * (self.constraint / norm)
        return _cayley(skew) if self.is_butterfly else _cayley(skew).mT[None]

    def weight_delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = wide(weight)
        if strength == 0:
            return torch.zeros_like(base)
        columns = base.flatten(1)
        if self.on_input:
            # [N,C,kh·kw] -> one row for each place of the kernel
            rows = base.flatten(2) if base.dim() > 2 else base[..., None]
            blocks = self._at(strength, self.rotation(rows.shape[1], base))
            # rows of W times R, over channels: R acts on a column, so that Wᵀ takes its transpose
            turned = _turned(rows.transpose(0, 1).flatten(1), blocks.mT, False)
            return turned.view(rows.shape[1], rows.shape[0], -1).transpose(0, 1).reshape(base.shape) - base
        blocks = self._at(strength, self.rotation(len(base), base))
        new = _turned(columns, blocks, self.is_butterfly)
        if self.rescale is not None:
            new = new * wide(self.rescale, base).view(-1, 1)
        return new.view(base.shape) - base

    def _at(self, strength: float, blocks: Tensor) -> Tensor:
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        return strength * blocks + (1 - strength) * eye


def _turned(columns: Tensor, blocks: Tensor, butterfly: bool) -> Tensor:
    """R times columns [F,M], R of blocks [m,n,b,b]; stage i of a butterfly mixes features 2^i·b/2 apart."""
    m, n, b, _ = blocks.shape
    out = columns
    for stage in range(m):
        stride = 2**stage * (b // 2)
        if butterfly:
            out = out.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
        out = torch.einsum("nij,njm->nim", blocks[stage], out.unflatten(0, (n, b))).flatten(0, 1)
        if butterfly:
            out = out.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return out


def _cayley(skew: Tensor) -> Tensor:
    """(1 + Q)(1 − Q)⁻¹."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """1 + 2 (Q + Q² + …) + Qⁿ: PEFT's series of `terms` terms."""
    total = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


@dataclass(frozen=True, eq=False)
class IA3(AdapterFamily):
    """W' = (1 + v) ⊙ W over outputs, or W ⊙ (1 + v) over inputs; strength w: 1 + w v.

    Attributes:
        vector: v [N] or [C]: l − 1 for PEFT's l.
        on_input: Whether v multiplies the input; None: whichever side has as many features, the output
            first (PEFT's files do not say).
        scales_bias: Whether an output's v multiplies the bias too (PEFT does, LyCORIS does not).

    Source: Liu et al., (IA)³, NeurIPS 2022; PEFT `tuners/ia3/layer.py`; LyCORIS `modules/ia3.py`.
    """

    vector: Tensor = field(default=_EMPTY)
    on_input: bool | None = None
    scales_bias: bool = False

    kind: ClassVar[str] = "IA3"

    def _axis(self, shape: torch.Size) -> int:
        if self.on_input is not None:
            return int(self.on_input)
        return 0 if self.vector.numel() == shape[0] else 1

    def weight_delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = wide(weight)
        axis = self._axis(base.shape)
        check_shape(self.kind, "vector", self.vector.flatten(), base.shape[axis])
        v = wide(self.vector, base).flatten()
        return strength * base * v.view([-1 if d == axis else 1 for d in range(base.dim())])

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or not self.scales_bias or self.on_input or self.vector.numel() != len(bias):
            return None
        return wide(bias) * wide(self.vector, bias).flatten()


@dataclass(frozen=True, eq=False)
class GLoRA(AdapterFamily):
    """ΔW = s · (W a1 a2 + b1 b2). Strength multiplies it.

    Attributes:
        a1: [C,r], C the channels of a convolution.
        a2: [r,C].
        b1: [N,r].
        b2: [r,K].
        scale: s = alpha/r.

    Source: Chavan et al., One-for-All (GLoRA), 2023; LyCORIS `modules/glora.py`.
    """

    a1: Tensor = field(default=_EMPTY)
    a2: Tensor = field(default=_EMPTY)
    b1: Tensor = field(default=_EMPTY)
    b2: Tensor = field(default=_EMPTY)
    scale: float = 1.0

    kind: ClassVar[str] = "GLoRA"

    def weight_delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        base = wide(weight)
        a1, a2, b1, b2 = (wide(t, base).flatten(1) for t in (self.a1, self.a2, self.b1, self.b2))
        channels = base.shape[1]
        check_shape(self.kind, "a2", a2, None, channels)
        check_shape(self.kind, "a1", a1, channels, len(a2))
        check_shape(self.kind, "b2", b2, None, base[0].numel())
        check_shape(self.kind, "b1", b1, len(base), len(b2))
        through = torch.einsum("nc...,cd->nd...", base, a1 @ a2)
        return strength * self.scale * (through + (b1 @ b2).view(base.shape))


@dataclass(frozen=True, eq=False)
class Biased(AdapterFamily):
    """Another expert, or none, and a difference β of the bias. Strength multiplies both.

    Attributes:
        bias: β [N].
        inner: The expert beside it; None for the bias alone.
        scale: What β is multiplied with: 1 of `diff_b`; PEFT's `lora_bias`, B(A x) + β, lies inside alpha/r.

    Source: PEFT `LoraConfig.lora_bias`; `diff_b` of LyCORIS' `modules/full.py` and of ComfyUI.
    """

    bias: Tensor = field(default=_EMPTY)
    inner: LowRank | AdapterFamily | None = None
    scale: float = 1.0

    kind: ClassVar[str] = "bias difference"

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """That of the expert beside it."""
        return not isinstance(self.inner, AdapterFamily) or self.inner.linear

    def weight_delta(self, weight: Tensor, strength: float = 1.0) -> Tensor | None:
        check_shape(self.kind, "bias", self.bias.flatten(), len(weight), hint="it belongs to another layer")
        if self.inner is None:
            return None
        if isinstance(self.inner, AdapterFamily):
            return self.inner.weight_delta(weight, strength)
        base = wide(weight)
        delta = wide(self.inner.up, base) @ wide(self.inner.down, base)
        return strength * self.inner.scale * delta.view(base.shape)

    def bias_delta(self, bias: Tensor | None) -> Tensor:
        return self.scale * wide(self.bias).flatten()


@dataclass(frozen=True, eq=False)
class Difference(AdapterFamily):
    """A difference of a norm's or an embedding's own weight and bias: added to the module, no gate.

    Attributes:
        weight: The difference of the weight, in its shape; None where the weight stays.
        bias: That of the bias; None where the bias stays.

    Source: `.diff` and `.diff_b` of ComfyUI and of step-distillation files; LyCORIS `modules/norms.py`.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None

    kind: ClassVar[str] = "norm difference"
