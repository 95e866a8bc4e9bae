"""The operator by the compiled Hopper kernels (csrc/cuda/sm90): cluster, persistent, recompute. Forward in
one launch, dX in one.

Which way computes a call: `dispatch/choose.py` among these and Triton's ways; where one of Triton's wins,
where a layout is none that
TMA takes, and for a backward with a sample gate or without dX, the call goes on to the Triton backend (or,
without Triton, to plain
torch). The sums over tokens, the backward's second launch, are always Triton's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mole_kernels import extension
from mole_kernels.backends import stacked, triton
from mole_kernels.dispatch import device as devices
from mole_kernels.dispatch.choose import CANDIDATES, HOPPER, choose
from mole_kernels.dispatch.tables import for_device
from mole_kernels.dispatch.work import Use
from mole_kernels.errors import MoleBackendError
from mole_kernels.kernels.sm90 import WAYS, impossible
from mole_kernels.kernels.triton.workspace import flags
from mole_kernels.problem import Problem

name = "cuda"
# of dX too
BACKWARD_WAYS = WAYS


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why the kernels cannot run here at all, or None."""
    reason = extension.why_not()
    if reason is not None:
        return reason
    if not extension.has_sm90():
        return "the library was built without nvcc, or without Hopper among its architectures"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    return (
        None
        if (major, minor) == (9, 0)
        else f"needs compute capability 9.0 (Hopper), this GPU has {major}.{minor}"
    )


def reject(problem: Problem) -> str | None:
    """Why it does not take `problem`, or None."""
    if problem.device != "cuda":
        return f"computes on CUDA devices only, x is on {problem.device}"
    return impossible(problem) or why_not()


@lru_cache(maxsize=4096)
def _way(
    index: int | None,
    B: int,
    T: int,
    K: int,
    N: int,
    ranks: tuple[int, ...],
    S: int,
    dtype: torch.dtype,
    token: bool,
    sample: bool,
    gate: tuple[bool, bool] | None,
    top_k: int,
    assigned: bool,
    save: bool,
    backward: bool,
) -> str:
    """What `choose` takes for a call, or its backward, of Triton's ways too; gate: whether the given one
    varies by sample, by token.
    """
    problem = Problem(B, T, K, N, ranks, S, dtype, "cuda", token, sample, gate is not None, top_k, assigned)
    by_sample, by_token = gate or (False, False)
    device = devices.present(index)
    others, kind = (
        triton.reject(problem) is None,
        (B, T, K, N, ranks, S, token, sample, assigned, backward, index),
    )
    able = [n for n in HOPPER if (others or not backward) and not _plan(n.removeprefix("cuda_"), *kind)[1]]
    names = (*(CANDIDATES if others else ("stacked",)), *able)
    return choose(problem, device, for_device(device), Use(backward, save, by_token, by_sample), names).name


@lru_cache(maxsize=4096)
def _plan(
    way: str,
    B: int,
    T: int,
    K: int,
    N: int,
    ranks: tuple[int, ...],
    S: int,
    token: bool,
    sample: bool,
    assigned: bool,
    backward: bool,
    index: int | None,
) -> tuple[tuple[int, ...], str]:
    """The library's tile for a way, and the floats of z, floats of shares and counters that it needs; or the
    reason why it has none.
    """
    device = torch.cuda.current_device() if index is None else index
    plan, reason = torch.ops.mole_cuda.sm90_plan(
        way, [B, T, K, N, sum(ranks), len(ranks), S], token, sample, assigned, backward, device
    )
    return tuple(plan), reason


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ranks: tuple[int, ...],
    gate: Tensor | None,
    phi: Tensor | None,
    phi_bias: Tensor | None,
    pool: Tensor | None,
    pool_bias: Tensor | None,
    save: bool,
    assignment: Tensor | None = None,
    top_k: int = 0,
    way: str | None = None,
) -> tuple[Tensor, ...]:
    """y, h, l, G; see docs/design.md section 3. `way` (cluster, persistent, recompute) overrides the choice.

    Raises MoleBackendError where the way that was asked for by name cannot compute the call.
    """
    arguments = (
        x,
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
    B, T, K = x.shape
    kind = (B, T, K, weight.shape[0], tuple(ranks), down.shape[0])
    token, sample, assigned, index = phi is not None, pool is not None, assignment is not None, x.device.index
    chosen = way
    if chosen is None:
        varies = None if gate is None else (gate.shape[0] > 1, gate.shape[1] > 1)
        chosen = _way(
            index, *kind, x.dtype, token, sample, varies, top_k if token else 0, assigned, save, False
        )
        if chosen not in HOPPER:
            return _elsewhere(arguments, chosen)
        chosen = chosen.removeprefix("cuda_")
    elif chosen not in WAYS:
        raise MoleBackendError("backend 'cuda'", f"has no way {chosen!r}: {', '.join(WAYS)}")
    plan, reason = _plan(chosen, *kind, token, sample, assigned, False, index)
    if not reason:
        *outputs, reason = _run(chosen, plan, arguments)
    if not reason:
        return tuple(outputs)
    if way is not None:
        raise MoleBackendError(
            f"backend 'cuda', way {way!r}", reason, hint="way=None takes the best that fits"
        )
    return _elsewhere(arguments, None)


def _run(way: str, plan: tuple[int, ...], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """One launch with the outputs and the workspace that it fills -> y, h, l, G, and why it was refused (""
    where it was not).
    """
    x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, save, assignment, top_k = (
        arguments
    )
    B, T, _ = x.shape
    E = len(ranks)
    floats = {"dtype": torch.float32, "device": x.device}
    none = x.new_empty(0)
    y = x.new_empty(B, T, weight.shape[0])
    h = x.new_empty(B, T, down.shape[1]) if save else None
    token_gate = torch.empty(B, T, E, **floats) if phi is not None else None
    sample_gate = torch.empty(B, E, **floats) if pool is not None else None
    n_z, n_parts, n_flags = plan[8:11]
    z = torch.empty(n_z, **floats) if n_z else None
    parts = torch.empty(n_parts, **floats) if n_parts else None
    counters = flags(x.device, n_flags) if n_flags else None
    vectors = (
        t if t is None else t.contiguous() for t in (bias, scale, phi_bias, pool, pool_bias, assignment)
    )
    bias, scale, phi_bias, pool, pool_bias, assignment = vectors
    reason = torch.ops.mole_cuda.sm90_forward(
        x,
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
        assignment,
        top_k if phi is not None else 0,
        y,
        h,
        token_gate,
        sample_gate,
        z,
        parts,
        counters,
        way,
        plan[:4],
    )
    absent = torch.empty(0, **floats)
    gates = (absent if g is None else g for g in (token_gate, sample_gate))
    return y, none if h is None else h, *gates, reason


def _problem(x: Tensor, weight: Tensor, down: Tensor, ranks: tuple[int, ...]) -> Problem:
    B, T, K = x.shape
    return Problem(B, T, K, weight.shape[0], tuple(ranks), down.shape[0], x.dtype, x.device.type)


def _elsewhere(arguments: Any, way: str | None) -> tuple[Tensor, ...]:
    """The same call by Triton, or without it by plain torch; way: of Triton's, None lets it choose."""
    x, weight, down, ranks = arguments[0], arguments[1], arguments[3], arguments[6]
    if way == "stacked" or triton.reject(_problem(x, weight, down, ranks)) is not None:
        return stacked.forward(*arguments)
    run: Any = triton.forward
    return run(*arguments, way=way)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ranks: tuple[int, ...],
    gate: Tensor | None,
    phi: Tensor | None,
    pool: Tensor | None,
    h: Tensor,
    token_gate: Tensor,
    sample_gate: Tensor,
    need: list[bool],
    assignment: Tensor | None = None,
    top_k: int = 0,
    way: str | None = None,
) -> tuple[Tensor, ...]:
    """The nine gradients: dX by one of our launches, the sums over tokens by Triton's second; or all by
    Triton, or by plain torch.

    `way` (cluster, persistent, recompute) overrides the choice of who makes dX; where nobody wants dX it says
    nothing.
    Raises MoleBackendError where the way that was asked for by name cannot compute dX.
    """
    arguments = (
        dy,
        x,
        weight,
        down,
        up,
        scale,
        ranks,
        gate,
        phi,
        pool,
        h,
        token_gate,
        sample_gate,
        need,
        assignment,
        top_k,
    )
    kind = (*x.shape, weight.shape[0], tuple(ranks), down.shape[0])
    token, sample, assigned, index = phi is not None, pool is not None, assignment is not None, x.device.index
    second = triton.reject(_problem(x, weight, down, ranks))
    chosen = way
    if not need[0] or (way is None and second is not None):
        return _backward_elsewhere(arguments, None, second)
    if chosen is None:
        varies = None if gate is None else (gate.shape[0] > 1, gate.shape[1] > 1)
        chosen = _way(
            index, *kind, x.dtype, token, sample, varies, top_k if token else 0, assigned, False, True
        )
        if chosen not in HOPPER:
            return _backward_elsewhere(arguments, chosen, second)
        chosen = chosen.removeprefix("cuda_")
    elif chosen not in WAYS:
        raise MoleBackendError("backend 'cuda'", f"has no way {chosen!r}: {', '.join(WAYS)}")
    plan, reason = _plan(chosen, *kind, token, sample, assigned, True, index)
    reason = reason or second or ""
    if not reason:
        *first, reason = _run_dx(chosen, plan, arguments)
    if not reason:
        run: Any = triton.backward
        return run(*arguments, first=tuple(first))
    if way is not None:
        raise MoleBackendError(
            f"backend 'cuda', dX by way {way!r}", reason, hint="way=None takes the best that fits"
        )
    return _backward_elsewhere(arguments, None, second)


def _run_dx(way: str, plan: tuple[int, ...], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """One launch -> dX, dh [B,T,R] and shares of D [slices,B·T,E] (None where nobody wants them), and why it
    was refused ("").
    """
    dy, x, weight, down, up, scale, ranks, gate, phi, _, h, token_gate, _, need, assignment, top_k = arguments
    B, T, _ = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # `persistent` hands them over to its own tiles of dX
    dh = x.new_empty(B, T, down.shape[1]) if need[1] or way == "persistent" else None
    wanted = need[3] or (need[4] and gate is not None) or phi is not None
    d = torch.empty(plan[7], B * T, len(ranks), dtype=torch.float32, device=x.device) if wanted else None
    counters = flags(x.device, plan[10]) if plan[10] else None
    scale, assignment = (t if t is None else t.contiguous() for t in (scale, assignment))
    reason = torch.ops.mole_cuda.sm90_backward(
        dy,
        weight,
        down,
        up,
        scale,
        ranks,
        gate,
        phi,
        assignment,
        top_k if phi is not None else 0,
        h.contiguous(),
        token_gate if phi is not None else None,
        dx,
        dh,
        d,
        counters,
        way,
        plan[:4],
    )
    return dx, dh, d, reason


def _backward_elsewhere(arguments: Any, way: str | None, refused: str | None) -> tuple[Tensor, ...]:
    """The same backward by Triton, or where it refuses, by plain torch; way: of Triton's, None lets it
    choose.
    """
    if refused is not None or way == "stacked":
        return stacked.backward(*arguments)
    run: Any = triton.backward
    return run(*arguments, way=way)
