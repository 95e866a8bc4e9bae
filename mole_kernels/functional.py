"""The public door to the operator: check, cast, flatten, call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mole_kernels.backends.select import Backend, select
from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.operands import Call, Experts, Gates
from mole_kernels.ops import direct, schema
from mole_kernels.ops.twice import plain_forward
from mole_kernels.precision import autocast_dtype

OP = "gated_lora_linear"
NO_GATES = Gates()
# device types that torch.ops.mole has kernels for; others (meta) are its fake's
DEVICES = ("cpu", "cuda", "xpu", "mps")
MOST_KNOWN = 4096


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Experts,
    gates: Gates | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """A frozen linear layer plus E gated low-rank experts, in one call.

    y = x Wᵀ + b + Σ_e s_e · gate_e · l_e · G_e · (x A_eᵀ) B_eᵀ, with the token gate
    l = sigmoid(x token_weightᵀ + token_bias) and the sample gate
    G_e = sigmoid(Σ_{r∈e} sample_weight_r · mean_t h_r + sample_bias_e), h = x Aᵀ.
    Low-precision inputs accumulate in float32. Gradients reach x, down, up, scale and every part of gates.

    Args:
        x: [..., K] float. The first dimension is the sample, the last K, all between are tokens; [M,K] is one
            sample.
        weight: [N,K], frozen: it gets no gradient.
        bias: [N] or None, frozen too.
        experts: down [S,R,K], up [S,N,R], scale [E], ranks; S = 1 or the number of samples, or any S with an
            assignment [B] of each sample's set. An assignment is checked to lie in −1 … S−1 on a CPU; on a
            GPU that would wait for the device, so there the caller must see to it.
        gates: Absent parts count as 1. Gates need not sum to one; a NaN in a gate makes NaN of the outputs
            that it touches.
        backend: "auto", or a backend by name.

    Returns:
        y [..., N] in x's dtype (autocast's where that is on).

    Raises:
        MoleShapeError: A tensor has another shape than the sizes above ask for.
        MoleTypeError: dtypes or devices differ or are not supported.
        MoleValueError: Ranks, assignment, top_k or the backend's name are not valid.
        MoleStateError: The weight or the bias wants a gradient.
        MoleBackendError: The backend that was named refuses the call.

    Example:
        >>> import torch, mole_kernels as mk
        >>> x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
        >>> experts = mk.Experts(torch.randn(1, 4, 8), torch.randn(1, 6, 4), torch.ones(1), (4,))
        >>> mk.gated_lora_linear(x, weight, None, experts).shape
        torch.Size([2, 5, 6])
    """
    return gated_lora_linear_with_gates(x, weight, bias, experts, gates, backend=backend)[0]


def gated_lora_linear_with_gates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Experts,
    gates: Gates | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`gated_lora_linear`, and the values of its gates.

    Args:
        x: See `gated_lora_linear`, as the other arguments.
        weight: [N,K].
        bias: [N] or None.
        experts: The experts.
        gates: The gates.
        backend: "auto", or a backend by name.

    Returns:
        y [..., N]; the token gate l [B,T,E] and the sample gate G [B,E], detached and in float32 (float64
        beside float64 operands), or None where the call has none.

    Raises:
        MoleError: As `gated_lora_linear` does.
    """
    compiling = torch.compiler.is_compiling()
    return run_call(x, weight, bias, experts, gates or NO_GATES, backend, compiling)


def run_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Experts,
    gates: Gates,
    backend: str,
    compiling: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`gated_lora_linear_with_gates`, for a caller that has asked torch whether a compiler traces the call.

    A layer's eager call pays for every Python function on its way (tests/layers/test_calls.py counts them),
    so what is looked up here is looked up without one.
    """
    down, up, scale, ranks, assignment = experts
    tensors = (x, weight, bias, down, up, scale, assignment) + gates[:-1]
    unobserved = not compiling and direct.unobserved_eager(tensors)
    known = None
    if unobserved:
        autocast = autocast_dtype(x.device.type) if torch._C._is_any_autocast_enabled() else None
        key: list[object] = [backend, tuple(ranks), gates.top_k, autocast]
        for t in tensors:
            key.append(None if t is None else (t.shape, t.dtype, t.device))
        kind = tuple(key)
        known = _KNOWN.get(kind) or _learn(kind, x, weight, bias, experts, gates)
    else:
        _check(x, weight, bias, experts, gates)
    if assignment is not None:
        _check_values(assignment, down.shape[0])
    flat = x.dim() == 3
    x3 = x if flat else as_samples(x)
    save = trains = False
    if torch.is_grad_enabled():
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        for t in (x, down, up, scale) + gates[:-1]:
            save = save or (t is not None and t.requires_grad)
    if save and trains:
        raise MoleStateError(
            OP,
            "weight or bias requires a gradient, but the base layer is frozen here and would get none",
            hint="weight.requires_grad_(False)",
        )
    call = Call(x3, weight, bias, experts, gates, save)
    if known is None or known.casts:
        call = _cast(call)
    if save and not unobserved and direct.transformed():
        # torch gives a registered operator no rule for torch.func.grad; plain operations have theirs
        y, token_gate, sample_gate = plain_forward(*call[:-1])
        token_gate, sample_gate = (None if g is None else g.detach() for g in (token_gate, sample_gate))
        return y if flat else y.reshape(*x.shape[:-1], weight.shape[0]), token_gate, sample_gate
    if known is None or known.backend is None or trains:
        y, _, token_gate, sample_gate = schema.forward_op(*call.flat(), backend)
    elif not save and not known.autocast:
        y, _, token_gate, sample_gate = known.backend.forward(call)
    else:
        y, _, token_gate, sample_gate = direct.forward(known.backend, call, known.autocast)
    y = y if flat else y.reshape(*x.shape[:-1], weight.shape[0])
    return (
        y,
        token_gate if gates.token_weight is not None else None,
        sample_gate if gates.sample_weight is not None else None,
    )


class Known(NamedTuple):
    """What a call's shapes, dtypes, devices and backend name settle, once they were found good.

    Attributes:
        casts: Whether an operand must be cast to the compute dtype.
        autocast: Whether autocast is on.
        backend: The backend that computes it; None on a device that only torch's dispatcher knows.
    """

    casts: bool
    autocast: bool
    backend: Backend | None


# (backend's name, ranks, top_k, autocast's dtype; shape, dtype, device of each tensor) -> what follows from
# nothing else. The environment (MOLE_NO_EXTENSION) is read once for each kind of call, not at each call
_KNOWN: dict[tuple, Known] = {}


def _learn(
    key: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates
) -> Known:
    """What is known of a kind of call: its first one is checked, and a backend chosen for it."""
    _check(x, weight, bias, experts, gates)
    uncast = Call(as_samples(x), weight, bias, experts, gates)
    call = _cast(uncast)
    backend, _, _, autocast, *_ = key
    chosen = select(call.problem(), backend) if x.device.type in DEVICES else None
    if len(_KNOWN) >= MOST_KNOWN:
        _KNOWN.clear()
    known = _KNOWN[key] = Known(call is not uncast, autocast is not None, chosen)
    return known


def as_samples(x: Tensor) -> Tensor:
    """[K] -> [1,1,K], [M,K] -> [1,M,K], [B,...,K] -> [B,T,K]."""
    if x.dim() == 3:
        return x
    if x.dim() < 3:
        return (
            x.reshape(1, -1, x.shape[-1])
            if x.numel()
            else x.reshape(1, x.shape[0] if x.dim() == 2 else 1, x.shape[-1])
        )
    return x.flatten(1, -2)


def _cast(call: Call) -> Call:
    """Everything that enters a product in one dtype: autocast's where it is on, else x's. The same call where
    nothing is cast.
    """
    x, weight, bias, experts, gates, save = call
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype
    entering = (x, weight, bias, experts.down, experts.up, gates.token_weight)
    if all(t is None or t.dtype == dtype for t in entering):
        return call
    return Call(
        x.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        experts._replace(down=experts.down.to(dtype), up=experts.up.to(dtype)),
        gates if gates.token_weight is None else gates._replace(token_weight=gates.token_weight.to(dtype)),
        save,
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates) -> None:
    _check_types(x, weight, bias, experts, gates)
    _check_shapes(as_samples(x), weight, bias, experts, gates)


def _check_types(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates) -> None:
    if not x.is_floating_point():
        raise MoleTypeError(OP, expected="x of a floating dtype", got=str(x.dtype))
    named = (
        ("weight", weight),
        ("bias", bias),
        ("down", experts.down),
        ("up", experts.up),
        ("scale", experts.scale),
        *gates.tensors().items(),
    )
    for name, tensor in named:
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise MoleTypeError(
                OP,
                expected=f"{name} on x's device {x.device}",
                got=str(tensor.device),
                hint=f"{name}.to(x.device)",
            )
        if not tensor.is_floating_point():
            raise MoleTypeError(OP, expected=f"{name} of a floating dtype", got=str(tensor.dtype))
    if weight.dtype != x.dtype and autocast_dtype(x.device.type) is None:
        raise MoleTypeError(
            OP,
            expected=f"x and weight of one dtype, x has {x.dtype}",
            got=str(weight.dtype),
            hint="cast x or the layer, or use autocast",
        )


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates) -> None:
    B, T, K = x.shape
    down, up, ranks = experts.down, experts.up, experts.ranks
    if weight.dim() != 2 or weight.shape[1] != K:
        raise MoleShapeError(
            OP, expected=f"weight [N,K] with K = {K} (x's last dimension)", got=tuple(weight.shape)
        )
    N, R, E = weight.shape[0], sum(ranks), len(ranks)
    if E == 0 or min(ranks) < 1:
        raise MoleValueError(
            OP, expected="ranks: one number ≥ 1 for each expert, and at least one expert", got=tuple(ranks)
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise MoleShapeError(OP, expected=f"bias [N] = [{N}]", got=tuple(bias.shape))
    S = down.shape[0] if down.dim() == 3 else 1
    if down.dim() != 3 or tuple(down.shape) != (S, R, K):
        hint = (
            "down looks transposed; down-projections are stored [R,K]"
            if down.dim() == 3 and tuple(down.shape[1:]) == (K, R)
            else ""
        )
        raise MoleShapeError(
            OP, expected=f"down [S,R,K] = [S, {R}, {K}] (from ranks and x)", got=tuple(down.shape), hint=hint
        )
    if experts.assignment is not None:
        _check_assignment(experts.assignment, B, S, x.device)
    elif S not in (1, B):
        raise MoleShapeError(
            OP, expected=f"down [S,R,K] with S = 1 or the number of samples B = {B}", got=tuple(down.shape)
        )
    if tuple(up.shape) != (S, N, R):
        hint = (
            "up looks transposed; up-projections are stored [N,R]"
            if up.dim() == 3 and tuple(up.shape) == (S, R, N)
            else ""
        )
        raise MoleShapeError(
            OP,
            expected=f"up [S,N,R] = [{S}, {N}, {R}] (from weight and down)",
            got=tuple(up.shape),
            hint=hint,
        )
    if tuple(experts.scale.shape) != (E,):
        raise MoleShapeError(OP, expected=f"scale [E] = [{E}]", got=tuple(experts.scale.shape))
    _check_gates(gates, B, T, K, E, R, S)


def _check_assignment(assignment: Tensor, B: int, S: int, device: torch.device) -> None:
    if assignment.dtype != torch.int64 or assignment.device != device:
        raise MoleTypeError(
            OP,
            expected=f"assignment int64 on x's device {device}",
            got=f"{assignment.dtype} on {assignment.device}",
        )
    if tuple(assignment.shape) != (B,):
        raise MoleShapeError(
            OP, expected=f"assignment [B] = [{B}], one set for each sample", got=tuple(assignment.shape)
        )


def _check_values(assignment: Tensor, S: int) -> None:
    """Every value is a set or −1: where looking costs nothing, and there is a value to look at."""
    if torch.compiler.is_compiling() or not assignment.is_cpu or type(assignment) not in direct.PLAIN:
        return
    for b, s in enumerate(assignment.tolist()):
        if not -1 <= s < S:
            raise MoleValueError(
                OP, expected=f"assignment between -1 and {S - 1} (S = {S} sets)", got=f"{s} for sample {b}"
            )


def _check_gates(gates: Gates, B: int, T: int, K: int, E: int, R: int, S: int) -> None:
    gate = gates.gate
    if gates.top_k < 0 or (gates.top_k and gates.token_weight is None):
        raise MoleValueError(OP, expected="top_k = 0, or k ≥ 1 with token_weight", got=gates.top_k)
    if gate is not None and (
        gate.dim() != 3 or gate.shape[0] not in (1, B) or gate.shape[1] not in (1, T) or gate.shape[2] != E
    ):
        raise MoleShapeError(
            OP,
            expected=f"gate broadcastable to [B,T,E] = [{B}, {T}, {E}], three dimensions, E whole",
            got=tuple(gate.shape),
        )
    for name, tensor, shape, words in (
        ("token_weight", gates.token_weight, (E, K), "[E,K]"),
        ("token_bias", gates.token_bias, (E,), "[E]"),
        ("sample_weight", gates.sample_weight, (S, R), "[S,R]"),
        ("sample_bias", gates.sample_bias, (E,), "[E]"),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise MoleShapeError(OP, expected=f"{name} {words} = {list(shape)}", got=tuple(tensor.shape))
    for bias, product in (("token_bias", "token_weight"), ("sample_bias", "sample_weight")):
        if getattr(gates, bias) is not None and getattr(gates, product) is None:
            raise MoleValueError(OP, f"{bias} without {product}", hint=f"give {product} too, or neither")
