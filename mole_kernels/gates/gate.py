"""What decides how much of each expert a token gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mole_kernels.errors import MoleShapeError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.operands import Gates
from mole_kernels.precision import gate_dtype, no_autocast

_expired = torch.UntypedStorage._expired


class Gate(nn.Module):
    """Makes the `Gates` of one call for E experts; holds parameters, looks at no activations."""

    def operands(self, experts: LayerExperts) -> Gates:
        raise NotImplementedError


class Pool(NamedTuple):
    """A pooled gate's p, how what it was made of stood, and that memory: not held, but known when it is gone
    and another may lie there.
    """

    p: Tensor
    key: tuple[int, ...]
    made_of: tuple[StorageWeakRef, ...]

    def stands(self, key: tuple[int, ...]) -> bool:
        up, scale, head = self.made_of
        # what StorageWeakRef.expired() calls, at a tenth of its time
        return self.key == key and not (_expired(up.cdata) or _expired(scale.cdata) or _expired(head.cdata))


class MoLEGate(Gate):
    """l = sigmoid(Phi x + phi_bias) per token, G_e = sigmoid(head_e · mean_t(o_e) + head_bias_e) per sample,
    o_e the scaled expert output.

    phi   [E,K], phi_bias  [E]   the token ("local") gate; the official file's `softmoe.Phi_1`
    head  [E,N], head_bias [E]   the sample ("global") gate; row e is the official `<name>_scale`
    Initialised as nn.Linear is, which starts l·G near 1/4; sigmoids, independent per expert.
    Source: MoLE (Zhu et al., NeurIPS 2024), its published network code.
    The pooled gate reaches the operator as p_e = s_e B_eᵀ head_e: the same number, as experts are linear,
    without any expert output.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        local: bool = True,
        pooled: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not local and not pooled:
            raise MoleValueError(
                "MoLEGate", "neither local nor pooled: such a gate says nothing", hint="use ConstantGate"
            )
        make = {"device": device, "dtype": dtype}
        self.phi = nn.Parameter(torch.empty(num_experts, in_features, **make)) if local else None
        self.phi_bias = nn.Parameter(torch.empty(num_experts, **make)) if local else None
        self.head = nn.Parameter(torch.empty(num_experts, out_features, **make)) if pooled else None
        self.head_bias = nn.Parameter(torch.empty(num_experts, **make)) if pooled else None
        self._pool: Pool | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(−1/√fan_in, 1/√fan_in) for weights and biases: nn.Linear's default."""
        for weight, bias in ((self.phi, self.phi_bias), (self.head, self.head_bias)):
            if weight is not None and bias is not None:
                bound = 1 / math.sqrt(weight.shape[1])
                nn.init.uniform_(weight, -bound, bound)
                nn.init.uniform_(bias, -bound, bound)

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(
            None, self.phi, self.phi_bias, None if self.head is None else self.pooled(experts), self.head_bias
        )

    def pooled(self, experts: LayerExperts) -> Tensor:
        """p [S,R] float32, p_r = s_e Σ_n up[n,r] head[e,n] for column r of expert e.

        Kept while nothing that it is made of was written to; made anew where a gradient must flow, and inside
        a compiled graph.
        """
        up, scale, head = experts.up, experts.scale, self.head
        assert head is not None
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and (up.requires_grad or head.requires_grad or scale.requires_grad)
        ):
            return collapsed(up, scale, head, experts.ranks)
        if up.is_inference() or scale.is_inference() or head.is_inference():
            # such tensors count no versions
            return collapsed(up, scale, head, experts.ranks)
        key = (up.data_ptr(), up._version, scale.data_ptr(), scale._version, head.data_ptr(), head._version)
        kept = self._pool
        if kept is None or kept.p.device != up.device or not kept.stands(key):
            # made outside inference mode, for a later call may train with it
            with torch.inference_mode(False), torch.no_grad():
                p = collapsed(up, scale, head, experts.ranks)
                kept = self._pool = Pool(
                    p, key, tuple([StorageWeakRef(t.untyped_storage()) for t in (up, scale, head)])
                )
        return kept.p

    def forget(self) -> None:
        """Make p anew at the next call."""
        self._pool = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # FSDP puts gathered parameters in for each forward, whose values change without a version
        if isinstance(value, nn.Parameter):
            self._pool = None

    def __getstate__(self):
        return {**self.__dict__, "_pool": None}

    def extra_repr(self) -> str:
        return " + ".join(
            word for word, on in (("local", self.phi is not None), ("global", self.head is not None)) if on
        )


def collapsed(up: Tensor, scale: Tensor, head: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """p [S,R], p_r = s_e Σ_n up[n,r] head[e,n] for column r of expert e.  up [S,N,R]  scale [E]  head [E,N];
    p in the gates' dtype
    """
    E, (S, _, R), wide = len(ranks), up.shape, gate_dtype(head.dtype)
    with no_autocast(up.device.type):
        scaled, up = head.to(wide) * scale.to(wide)[:, None], up.to(wide)
        # [S,E,R]: each head row against every column; expert e then keeps its own
        every = (scaled @ up[0])[None] if S == 1 else scaled @ up
        if min(ranks) == max(ranks):
            return every.view(S, E, E, ranks[0]).diagonal(dim1=1, dim2=2).mT.reshape(S, R)
        return torch.cat([part[:, e] for e, part in enumerate(every.split(ranks, -1))], -1)


class ConstantGate(Gate):
    """gate_e = value_e for every token; with `learned`, gate_e = sigmoid(logit_e), trained, blind to its
    input.
    """

    value: Tensor

    def __init__(
        self,
        num_experts: int,
        value: float | Sequence[float] | None = None,
        *,
        learned: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        values = torch.as_tensor(
            [1.0] * num_experts if value is None else value, dtype=torch.float32, device=device
        )
        values = values.expand(num_experts).clone() if values.dim() == 0 else values
        if values.shape != (num_experts,):
            raise MoleShapeError(
                "ConstantGate", expected=f"one value, or {num_experts}", got=tuple(values.shape)
            )
        self.logit: nn.Parameter | None = None
        if learned:
            start = torch.full_like(values, 0.25) if value is None else values
            if not bool(((start > 0) & (start < 1)).all()):
                raise MoleValueError(
                    "ConstantGate",
                    expected="values between 0 and 1 to start learning from",
                    got=start.tolist(),
                )
            self.logit = nn.Parameter(torch.logit(start))
        else:
            self.register_buffer("value", values)

    def operands(self, experts: LayerExperts) -> Gates:
        value = self.value if self.logit is None else torch.sigmoid(self.logit)
        return Gates(gate=value[None, None])

    def extra_repr(self) -> str:
        return "learned" if self.logit is not None else f"{self.value.tolist()}"


class MaskGate(Gate):
    """gate_e[t] = mask[t,e]: a given value for every token, the same for all samples ([T,E]) or for each
    ([B,T,E]).
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", _as_gate(mask, "MaskGate", "[T,E] or [B,T,E]"))

    def set(self, mask: Tensor) -> None:
        """Write another mask of the same shape in place: nothing recompiles."""
        new = _as_gate(mask, "MaskGate.set", "[T,E] or [B,T,E]")
        if new.shape != self.mask.shape:
            raise MoleShapeError(
                "MaskGate.set", expected=f"a mask of shape {tuple(self.mask.shape)}", got=tuple(new.shape)
            )
        self.mask.copy_(new)

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.mask)


class SampleGate(Gate):
    """gate_e[b] = weights[b,e]: one row per sample, for example one-hot (each picture its own expert)."""

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        if weights.dim() != 2:
            raise MoleShapeError("SampleGate", expected="weights [B,E]", got=tuple(weights.shape))
        self.register_buffer("weights", weights.detach().to(torch.float32).clone())

    def set(self, weights: Tensor) -> None:
        """Write other weights of the same shape in place: nothing recompiles."""
        if weights.shape != self.weights.shape:
            raise MoleShapeError(
                "SampleGate.set",
                expected=f"weights of shape {tuple(self.weights.shape)}",
                got=tuple(weights.shape),
            )
        self.weights.copy_(weights)

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.weights[:, None])


def _as_gate(mask: Tensor, where: str, shape: str) -> Tensor:
    if mask.dim() not in (2, 3):
        raise MoleShapeError(where, expected=f"a mask {shape}", got=tuple(mask.shape))
    mask = mask.detach().to(torch.float32)
    return (mask[None] if mask.dim() == 2 else mask).clone()
