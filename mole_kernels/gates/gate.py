"""Gates that weigh the experts per token, per sample or by constants."""

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
    """Base class of all gates: holds parameters and gives the operator's `Gates` for one call.

    A gate never sees activations. The operator computes what depends on the layer's input.
    """

    def operands(self, experts: LayerExperts) -> Gates:
        """The gate operands of one call.

        Args:
            experts: The E experts of the layer that asks, whose `scale` and `up` a gate may use.
        """
        raise NotImplementedError


class SampleVector(NamedTuple):
    """A cached p [S,R] of a sample gate, and the state of the tensors that it was computed from.

    Attributes:
        p: The vector itself.
        key: Address and version of up, scale and head.
        sources: Their storages, held weakly: once one is freed, another tensor may reuse its address.
    """

    p: Tensor
    key: tuple[int, ...]
    sources: tuple[StorageWeakRef, ...]

    def is_current(self, key: tuple[int, ...]) -> bool:
        """Whether p still belongs to tensors with this key."""
        up, scale, head = self.sources
        # what StorageWeakRef.expired() calls, at a tenth of its time
        return self.key == key and not (_expired(up.cdata) or _expired(scale.cdata) or _expired(head.cdata))


class MoLEGate(Gate):
    """Token gate sigmoid(Phi x + phi_bias) times sample gate sigmoid(head_e · mean_t(o_e) + head_bias_e).

    o_e is the scaled output of expert e. Each expert has sigmoids of its own; they are initialised as
    nn.Linear is, so their product starts near 1/4. The sample gate reaches the operator as
    p_e = s_e B_eᵀ head_e, which gives the same number without any expert output, because experts are linear.

    Args:
        in_features: K, the layer's input features.
        out_features: N, the layer's output features.
        num_experts: E.
        local: Whether there is a token gate: `phi` [E,K] and `phi_bias` [E].
        pooled: Whether there is a sample gate: `head` [E,N] and `head_bias` [E].
        device: Device of the parameters.
        dtype: Dtype of the parameters, torch's default if None.

    Raises:
        MoleValueError: Neither gate is asked for.

    Source: MoLE (Zhu et al., NeurIPS 2024), its published network code; `phi` is its `softmoe.Phi_1`, and
    row e of `head` its `<name>_scale`.
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
        self._pool: SampleVector | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases from U(−1/√fan_in, 1/√fan_in), nn.Linear's default."""
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
        """p_r = s_e Σ_n up[n,r] head[e,n] for each column r of expert e.

        Cached until up, scale or head is written to. Computed at every call where a gradient must flow, and
        inside a compiled graph.

        Args:
            experts: The layer's E experts, with up [S,N,R] and scale [E].

        Returns:
            p [S,R] in the gates' dtype (float32, or float64 for float64 heads).
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
        cached = self._pool
        if cached is None or cached.p.device != up.device or not cached.is_current(key):
            # not an inference tensor, since a later call may train with it
            with torch.inference_mode(False), torch.no_grad():
                p = collapsed(up, scale, head, experts.ranks)
                cached = self._pool = SampleVector(
                    p, key, tuple([StorageWeakRef(t.untyped_storage()) for t in (up, scale, head)])
                )
        return cached.p

    def forget(self) -> None:
        """Drop the cached p, so that the next call computes it again."""
        self._pool = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # FSDP sets gathered parameters for each forward; their values change but their versions do not
        if isinstance(value, nn.Parameter):
            self._pool = None

    def __getstate__(self):
        return {**self.__dict__, "_pool": None}

    def extra_repr(self) -> str:
        return " + ".join(
            word for word, on in (("local", self.phi is not None), ("global", self.head is not None)) if on
        )


def collapsed(up: Tensor, scale: Tensor, head: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """p_r = s_e Σ_n up[n,r] head[e,n] for each column r of expert e.

    Args:
        up: Up-projections of S adapter sets [S,N,R].
        scale: Scale of each expert [E].
        head: Rows of the sample gate [E,N].
        ranks: Rank of each expert; their sum is R.

    Returns:
        p [S,R] in the gates' dtype.
    """
    E, (S, _, R), wide = len(ranks), up.shape, gate_dtype(head.dtype)
    with no_autocast(up.device.type):
        scaled, up = head.to(wide) * scale.to(wide)[:, None], up.to(wide)
        # [S,E,R]: each head row against every column, of which expert e keeps its own columns
        every = (scaled @ up[0])[None] if S == 1 else scaled @ up
        if min(ranks) == max(ranks):
            return every.view(S, E, E, ranks[0]).diagonal(dim1=1, dim2=2).mT.reshape(S, R)
        return torch.cat([part[:, e] for e, part in enumerate(every.split(ranks, -1))], -1)


class ConstantGate(Gate):
    """gate_e = value_e for every token and sample, or a learnt sigmoid(logit_e).

    Args:
        num_experts: E.
        value: One number for all experts, or E of them. None: 1, or 0.25 to start learning from.
        learned: Whether the value is trained, as `logit` [E].
        device: Device of the values.

    Raises:
        MoleShapeError: `value` is neither one number nor E numbers.
        MoleValueError: `learned`, and a value that is not between 0 and 1.
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
    """gate_e[t] = mask[t,e]: fixed values per token.

    Args:
        mask: [T,E] for all samples alike, or [B,T,E]; copied as float32.

    Raises:
        MoleShapeError: The mask has neither two nor three dimensions.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", _as_gate(mask, "MaskGate", "[T,E] or [B,T,E]"))

    def set(self, mask: Tensor) -> None:
        """Write another mask of the same shape in place; nothing recompiles.

        Args:
            mask: [T,E] or [B,T,E], as at the start.

        Raises:
            MoleShapeError: The mask has another shape. The old one stays.
        """
        new = _as_gate(mask, "MaskGate.set", "[T,E] or [B,T,E]")
        if new.shape != self.mask.shape:
            raise MoleShapeError(
                "MaskGate.set", expected=f"a mask of shape {tuple(self.mask.shape)}", got=tuple(new.shape)
            )
        self.mask.copy_(new)

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.mask)


class SampleGate(Gate):
    """gate_e[b] = weights[b,e]: one row per sample, for example one expert for each picture.

    Args:
        weights: [B,E]; copied as float32.

    Raises:
        MoleShapeError: The weights are not two-dimensional.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        if weights.dim() != 2:
            raise MoleShapeError("SampleGate", expected="weights [B,E]", got=tuple(weights.shape))
        self.register_buffer("weights", weights.detach().to(torch.float32).clone())

    def set(self, weights: Tensor) -> None:
        """Write other weights of the same shape in place; nothing recompiles.

        Args:
            weights: [B,E], as at the start.

        Raises:
            MoleShapeError: The weights have another shape. The old ones stay.
        """
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
