"""One fused product with all that its kernels need, in either direction, and the buffers they fill.

Forward:   y = x·Wᵀ + b + (γ ⊙ x·Aᵀ)·Bᵀ.
Backward:  the same with the roles swapped: x is dY, W is Wᵀ, A is Bᵀ, B is Aᵀ; all are views, nothing is
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mole_kernels.kernels.triton.tiles import Tile, next_power
from mole_kernels.kernels.triton.workspace import flags
from mole_kernels.operands import Call

# offsets within a tile are 32 bits wide
WIDEST = 1 << 22
OPERANDS = (
    "x",
    "w",
    "bias",
    "down",
    "up",
    "scale",
    "gate",
    "token_weight",
    "token_bias",
    "sample_weight",
    "sample_bias",
    "assignment",
)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def tame(t: Tensor) -> Tensor:
    """t, or a contiguous copy where its last stride is so long that an offset within a tile would not fit in
    32 bits.
    """
    return t if t.stride(-1) < WIDEST else t.contiguous()


@dataclass(frozen=True)
class Fused:
    """x [B,T,K], w [N,K], down [S,R,K], up [S,N,R] in any strides; gates and assignment [B] as in
    docs/design.md section 3.

    backward   the roles are swapped, and h [B,T,R], token_gate [B,T,E], sample_gate [B,E] are given
    save       forward: h is wanted. need_d: backward: the gates' gradients are wanted
    store_z    γ·V is wanted (it is, unless only gates train)
    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: Tensor
    ranks: tuple[int, ...]
    gate: Tensor | None
    token_weight: Tensor | None
    token_bias: Tensor | None
    sample_weight: Tensor | None
    sample_bias: Tensor | None
    assignment: Tensor | None = None
    top_k: int = 0
    save: bool = False
    backward: bool = False
    h: Tensor | None = None
    token_gate: Tensor | None = None
    sample_gate: Tensor | None = None
    need_d: bool = False
    store_z: bool = True

    @classmethod
    def of(cls, call: Call) -> Fused:
        """A forward call: vectors contiguous, strides that a tile's offsets can hold."""
        down, up, scale, ranks, assignment = call.experts
        gate, token_weight, *vectors, top_k = call.gates
        token_bias, sample_weight, sample_bias = map(contiguous, vectors)
        return cls(
            tame(call.x),
            call.weight,
            contiguous(call.bias),
            down,
            up,
            scale.contiguous(),
            tuple(ranks),
            gate,
            token_weight,
            token_bias,
            sample_weight,
            sample_bias,
            contiguous(assignment),
            min(top_k, len(ranks)) if token_weight is not None else 0,
            call.save,
        )

    def operands(self) -> tuple[Tensor | None, ...]:
        """Its tensors in the order of `OPERANDS`."""
        return tuple(getattr(self, name) for name in OPERANDS)

    @property
    def B(self) -> int:
        return self.x.shape[0]

    @property
    def T(self) -> int:
        return self.x.shape[1]

    @property
    def K(self) -> int:
        return self.x.shape[2]

    @property
    def N(self) -> int:
        return self.w.shape[0]

    @property
    def M(self) -> int:
        return self.B * self.T

    @property
    def R(self) -> int:
        return self.down.shape[1]

    @property
    def E(self) -> int:
        return len(self.ranks)

    @property
    def EP(self) -> int:
        return next_power(self.E)

    @property
    def per_sample(self) -> bool:
        """Tiles must not straddle samples: each has its own experts, or its own sample gate."""
        return self.down.shape[0] > 1 or self.sample_weight is not None or self.assignment is not None

    @property
    def span(self) -> int:
        return self.T if self.per_sample else self.M

    @property
    def groups(self) -> int:
        return self.B if self.per_sample else 1

    def row_tiles(self, BM: int) -> int:
        """Row tiles of one group."""
        return -(-self.span // BM)

    def columns(self, tile: Tile) -> tuple[int, int]:
        """Width of a column tile of h, and how many."""
        BR = min(tile.BR, next_power(self.R))
        return BR, -(-self.R // BR)

    @property
    def precision(self) -> str:
        """How float32 products are made: torch's own switch says."""
        # not allow_tf32: reading that raises where the newer switch was set
        return (
            "tf32"
            if self.x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
            else "ieee"
        )

    def strides(self) -> dict[str, int]:
        """Strides by the kernels' names; 0 where a tensor is absent or its set is shared."""
        gate, token_weight, sample_weight = self.gate, self.token_weight, self.sample_weight
        many = self.down.shape[0] > 1
        s = dict(zip(("sxb", "sxt", "sxk"), self.x.stride())) | dict(zip(("swn", "swk"), self.w.stride()))
        s |= dict(zip(("sds", "sdr", "sdk"), self.down.stride())) | dict(
            zip(("sus", "sun", "sur"), self.up.stride())
        )
        s |= {} if many else {"sds": 0, "sus": 0}
        s["spe"], s["spk"] = token_weight.stride() if token_weight is not None else (0, 0)
        s["sgb"], s["sgt"], s["sge"] = (
            (0 if n == 1 else k for n, k in zip(gate.shape, gate.stride()))
            if (gate is not None)
            else (0, 0, 0)
        )
        s["sps"] = sample_weight.stride(0) if sample_weight is not None and many else 0
        return s


@dataclass
class Buffers:
    """What the kernels fill: z [M,R], parts and D for gates, flags; and the outputs."""

    y: Tensor
    h: Tensor
    z: Tensor
    token_gate: Tensor
    sample_gate: Tensor
    d: Tensor
    parts: Tensor
    q: Tensor
    flags: Tensor


@lru_cache(maxsize=512)
def expert_of_column(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """[R] int32: the expert that each rank column belongs to."""
    return torch.tensor([e for e, rank in enumerate(ranks) for _ in range(rank)], dtype=torch.int32).to(
        device
    )


@lru_cache(maxsize=512)
def first_columns(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """[E+1] int32: the first rank column of each expert, and R."""
    return torch.tensor([sum(ranks[:e]) for e in range(len(ranks) + 1)], dtype=torch.int32).to(device)


def buffers(f: Fused, tile: Tile, BM: int, y: bool = True) -> Buffers:
    """Buffers for one call whose tiles of h have BM rows; empty where the call has no use for one."""
    x = f.x
    _, n_r = f.columns(tile)
    n_t = f.row_tiles(BM)

    def new(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=dtype, device=x.device)

    token, sample = f.token_weight is not None, f.sample_weight is not None
    n_flags = 2 + f.groups * (n_t + 1)
    return Buffers(
        y=new(f.B, f.T, f.N, dtype=x.dtype, wanted=y),
        h=f.h if f.h is not None else new(f.B, f.T, f.R, dtype=x.dtype, wanted=f.save),
        # with a sample gate z is gated once more where it is read, so it is rounded only then
        z=new(f.M, f.R, dtype=torch.float32 if sample else x.dtype) if f.store_z else f.scale,
        token_gate=f.token_gate if f.token_gate is not None else new(f.B, f.T, f.E, wanted=token),
        sample_gate=f.sample_gate if f.sample_gate is not None else new(f.B, f.E, wanted=sample),
        # never returned, so any tensor stands in for what a call has no use for
        d=new(n_r, f.M, f.E) if f.need_d else f.scale,
        parts=new(f.B * n_t * n_r, f.E) if sample else f.scale,
        q=new(f.B, f.E) if sample and f.backward else f.scale,
        flags=flags(x.device, n_flags),
    )


def common_arguments(f: Fused, b: Buffers) -> dict[str, object]:
    """Tensors and sizes by the kernels' names; a tensor that a call lacks is stood in for by `scale`, and
    never read.
    """
    absent = f.scale
    sample = f.sample_weight is not None
    return dict(
        x=f.x,
        x2=f.x,
        w=f.w,
        w2=f.w,
        down=f.down,
        up=f.up,
        cols=expert_of_column(f.ranks, f.x.device),
        scale=f.scale,
        y=b.y,
        h=b.h,
        z=b.z,
        d=b.d,
        parts=b.parts,
        token_gate=b.token_gate,
        sample_gate=b.sample_gate,
        q=b.q if f.backward else b.sample_gate,
        bias=absent if f.bias is None else f.bias,
        gate=absent if f.gate is None else f.gate,
        token_weight=absent if f.token_weight is None else f.token_weight,
        token_bias=absent if f.token_bias is None else f.token_bias,
        assignment=absent if f.assignment is None else f.assignment,
        top_k=f.top_k,
        sample_weight=absent if f.sample_weight is None else f.sample_weight,
        sample_bias=absent if f.sample_bias is None else f.sample_bias,
        T=f.T,
        span=f.span,
        M=f.M,
        N=f.N,
        K=f.K,
        R=f.R,
        E=f.E,
        **f.strides(),
        BACKWARD=f.backward,
        ASSIGN=f.assignment is not None,
        TOKEN=f.token_weight is not None,
        SOFTMAX=f.top_k > 0,
        GATE=f.gate is not None,
        POOL=sample,
        BIAS=f.bias is not None,
        PHI_BIAS=f.token_bias is not None,
        POOL_BIAS=f.sample_bias is not None,
        SAVE=f.save,
        NEED_D=f.need_d,
        STORE_Z=f.store_z,
        PRECISION=f.precision,
        EP=f.EP,
    )


def descriptors(f: Fused, tile: Tile) -> tuple[object, object, object, bool] | None:
    """Descriptors of x, of w in blocks of BN and of BX (BN where that is 0), and whether w's rows are
    outputs; None: no such layout.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    size = f.x.element_size()
    sxb, sxt, sxk = f.x.stride()
    rows = f.w.stride(1) == 1
    flat_w = f.w if rows else f.w.mT
    fits = sxk == 1 and (f.B == 1 or sxb == f.T * sxt) and flat_w.stride(1) == 1 and size < 4
    steps = (sxt * size, flat_w.stride(0) * size, f.x.data_ptr(), f.w.data_ptr())
    # a stride is given to the descriptor even where there is one row only
    if not fits or any(s % 16 for s in steps) or sxt < f.K or flat_w.stride(0) < flat_w.shape[1]:
        return None

    def of_w(columns: int) -> object:
        block = [columns, tile.BK] if rows else [tile.BK, columns]
        return TensorDescriptor(f.w, list(flat_w.shape), list(flat_w.stride()), block)

    x = TensorDescriptor(f.x, [f.M, f.K], [sxt, 1], [tile.BM, tile.BK])
    w = of_w(tile.BN)
    return x, w, of_w(tile.BX) if tile.BX else w, rows
