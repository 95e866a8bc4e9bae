"""The public door to the operator: check, cast, flatten, call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mole_kernels.backends.select import Backend, select
from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.operands import Experts, Gates
from mole_kernels.ops import direct, schema
from mole_kernels.ops.twice import plain_forward
from mole_kernels.precision import autocast_dtype
from mole_kernels.problem import Problem

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
    """y = x Wᵀ + b + Σ_e s_e·gate_e·l_e·G_e·(x A_eᵀ) B_eᵀ, with l = sigmoid(x phiᵀ + phi_bias), G =
    sigmoid(pooled).

    x        [..., K] float     first dimension is the sample, the last K, all between are tokens; [M,K] is
             one sample
    weight   [N,K], bias [N]    frozen: no gradient is made for them
    experts  down [S,R,K], up [S,N,R], scale [E], ranks; S = 1 or the number of samples; any S with an
             assignment [B] of each sample's set
    gates    `Gates`; absent parts count as 1; with top_k the token gate is a softmax over each token's k
             largest logits.
             A NaN in a gate makes NaN of the outputs it touches; gates need not sum to one
    backend  "auto", or a backend by name
    Returns y [..., N] in x's dtype (autocast's where that is on). Low-precision inputs accumulate in float32.
    Gradients: x, down, up, scale and every part of gates.

    An assignment is checked to lie in −1 … S−1 on the CPU; on a GPU that would wait for the device, so there
    it is the caller's to hold.

    Raises MoleShapeError, MoleTypeError (dtypes, devices), MoleValueError (ranks, assignment, top_k, backend
    name), MoleStateError
    (weight wants a gradient), MoleBackendError (the backend named refuses).
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
    """`gated_lora_linear`, and what its gates said: y [...,N], token gate l [B,T,E] and sample gate G [B,E]
    (None where absent).

    The gates come back detached and in float32.
    """
    gates = gates or NO_GATES
    down, up, scale, ranks, assignment = experts
    gate, phi, phi_bias, pool, pool_bias, top_k = gates
    tensors = (x, weight, bias, down, up, scale, gate, phi, phi_bias, pool, pool_bias, assignment)
    unobserved = direct.unobserved(tensors)
    known = _look_up(tensors, backend, x, weight, bias, experts, gates) if unobserved else None
    if known is None:
        _check_types(x, weight, bias, experts, gates)
        _check_shapes(_as_samples(x), weight, bias, experts, gates)
    if assignment is not None:
        _check_values(assignment, down.shape[0])
    flat = x.dim() == 3
    x3 = x if flat else _as_samples(x)
    if known is None or known.casts:
        x3, weight, bias, down, up, phi = _cast(x3, weight, bias, down, up, phi)
    save = trains = False
    if torch.is_grad_enabled():
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        save = _wants_grad((x3, down, up, scale, gate, phi, phi_bias, pool, pool_bias))
    if save and trains:
        raise MoleStateError(
            OP,
            "weight or bias requires a gradient, but the base layer is frozen here and would get none",
            hint="weight.requires_grad_(False)",
        )
    if save and not unobserved and direct.transformed():
        # torch gives a registered operator no rule for torch.func.grad; plain operations have theirs
        experts, gates = Experts(down, up, scale, ranks, assignment), gates._replace(phi=phi)
        y, token_gate, sample_gate = plain_forward(x3, weight, bias, experts, gates)
        token_gate, sample_gate = (None if g is None else g.detach() for g in (token_gate, sample_gate))
        return y if flat else y.reshape(*x.shape[:-1], weight.shape[0]), token_gate, sample_gate
    args = (
        x3,
        weight,
        bias,
        down,
        up,
        scale,
        ranks,
        gate,
        phi,
        phi_bias,
        pool,
        pool_bias,
        save,
        assignment,
        top_k,
    )
    if known is None or known.backend is None or trains:
        y, _, token_gate, sample_gate = schema.forward_op(*args, backend)
    else:
        y, _, token_gate, sample_gate = direct.forward(known.backend, args, save, known.autocast)
    y = y if flat else y.reshape(*x.shape[:-1], weight.shape[0])
    return y, token_gate if phi is not None else None, sample_gate if pool is not None else None


class Known(NamedTuple):
    """What a call's shapes, dtypes, devices and backend name settle, once they were found good.

    Attributes:
        problem: The problem that the tensors pose.
        casts: Whether an operand must be cast to the compute dtype.
        autocast: Whether autocast is on.
        backend: The backend that computes it; None on a device that only torch's dispatcher knows.
    """

    problem: Problem
    casts: bool
    autocast: bool
    backend: Backend | None


# (backend's name, ranks, top_k, autocast's dtype; shape, dtype, device of each tensor) -> what follows from
# nothing else. The environment (MOLE_NO_EXTENSION) is read once for each kind of call, not at each call
_KNOWN: dict[tuple, Known] = {}


def _look_up(
    tensors: tuple,
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Experts,
    gates: Gates,
) -> Known:
    """What is known of such a call; the first of its kind is checked."""
    ranks, autocast = tuple(experts.ranks), autocast_dtype(x.device.type)
    key = (
        backend,
        ranks,
        gates.top_k,
        autocast,
        *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
    )
    known = _KNOWN.get(key)
    if known is None:
        _check_types(x, weight, bias, experts, gates)
        x3 = _as_samples(x)
        _check_shapes(x3, weight, bias, experts, gates)
        x3, *operands = _cast(x3, weight, bias, experts.down, experts.up, gates.phi)
        casts = (
            any(a is not b for a, b in zip(operands, (weight, bias, experts.down, experts.up, gates.phi)))
            or x3.dtype != x.dtype
        )
        problem = schema.problem_of(
            x3,
            weight,
            experts.down,
            ranks,
            gates.gate,
            gates.phi,
            gates.pool,
            experts.assignment,
            gates.top_k,
        )
        chosen = select(problem, backend) if problem.device in DEVICES else None
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[key] = Known(problem, casts, autocast is not None, chosen)
    return known


def _as_samples(x: Tensor) -> Tensor:
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


def _wants_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, phi: Tensor | None):
    """Everything that enters a product in one dtype: autocast's where it is on, else x's."""
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype
    return (t if t is None or t.dtype == dtype else t.to(dtype) for t in (x, weight, bias, down, up, phi))


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
    if gates.top_k < 0 or (gates.top_k and gates.phi is None):
        raise MoleValueError(OP, expected="top_k = 0, or k ≥ 1 with phi", got=gates.top_k)
    if gate is not None and (
        gate.dim() != 3 or gate.shape[0] not in (1, B) or gate.shape[1] not in (1, T) or gate.shape[2] != E
    ):
        raise MoleShapeError(
            OP,
            expected=f"gate broadcastable to [B,T,E] = [{B}, {T}, {E}], three dimensions, E whole",
            got=tuple(gate.shape),
        )
    for name, tensor, shape, words in (
        ("phi", gates.phi, (E, K), "[E,K]"),
        ("phi_bias", gates.phi_bias, (E,), "[E]"),
        ("pool", gates.pool, (S, R), "[S,R]"),
        ("pool_bias", gates.pool_bias, (E,), "[E]"),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise MoleShapeError(OP, expected=f"{name} {words} = {list(shape)}", got=tuple(tensor.shape))
    for bias, product in (("phi_bias", "phi"), ("pool_bias", "pool")):
        if getattr(gates, bias) is not None and getattr(gates, product) is None:
            raise MoleValueError(OP, f"{bias} without {product}", hint=f"give {product} too, or neither")
