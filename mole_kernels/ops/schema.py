"""The operator as `torch.ops.mole.*`: schemas, backends behind them, fakes for compilers, and the gradient.

`define` + `impl` in Python costs ~2 µs a call, ~5 µs with autograd (measured with an empty op); `custom_op`
costs ~11.
What an eager call does instead is in `direct.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mole_kernels.backends.select import Backend, select
from mole_kernels.operands import Experts, Gates
from mole_kernels.ops.twice import differentiable_gradients
from mole_kernels.precision import gate_dtype, no_autocast
from mole_kernels.problem import Problem

library = torch.library.Library("mole", "DEF")
library.define(
    "gated_lora_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale, "
    "int[] ranks, Tensor? gate, Tensor? phi, Tensor? phi_bias, Tensor? pool, Tensor? pool_bias, bool save, "
    "Tensor? assignment, int top_k, str backend) "
    "-> (Tensor y, Tensor h, Tensor token_gate, Tensor sample_gate)"
)
library.define(
    "gated_lora_bwd(Tensor dy, Tensor x, Tensor weight, Tensor down, Tensor up, Tensor scale, int[] ranks, "
    "Tensor? gate, Tensor? phi, Tensor? pool, Tensor h, Tensor token_gate, Tensor sample_gate, bool[9] need, "
    "Tensor? assignment, int top_k, str backend) "
    "-> (Tensor dx, Tensor ddown, Tensor dup, Tensor dscale, Tensor dgate, Tensor dphi, Tensor dphi_bias, "
    "Tensor dpool, Tensor dpool_bias)"
)


def problem_of(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    ranks: tuple[int, ...],
    gate: Tensor | None,
    phi: Tensor | None,
    pool: Tensor | None,
    assignment: Tensor | None,
    top_k: int,
) -> Problem:
    """The Problem that these tensors pose.  x [B,T,K], weight [N,K], down [S,R,K]"""
    B, T, K = x.shape
    return Problem(
        B,
        T,
        K,
        weight.shape[0],
        ranks,
        down.shape[0],
        x.dtype,
        x.device.type,
        phi is not None,
        pool is not None,
        gate is not None,
        top_k if phi is not None else 0,
        assignment is not None,
    )


def _forward(
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
    backend,
):
    ranks = tuple(ranks)
    chosen: Backend = select(problem_of(x, weight, down, ranks, gate, phi, pool, assignment, top_k), backend)
    # operands are already in the compute dtype, and the gates' float32 must stay float32
    with no_autocast(x.device.type):
        return chosen.forward(
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


def _backward(
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
    backend,
):
    ranks = tuple(ranks)
    chosen: Backend = select(problem_of(x, weight, down, ranks, gate, phi, pool, assignment, top_k), backend)
    with no_autocast(x.device.type):
        return chosen.backward(
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


def _forward_fake(
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
    backend,
):
    B, T, _ = x.shape
    E, wide = len(ranks), gate_dtype(x.dtype)
    return (
        x.new_empty(B, T, weight.shape[0]),
        x.new_empty(B, T, down.shape[1]) if save else x.new_empty(0),
        x.new_empty(B, T, E, dtype=wide) if phi is not None else x.new_empty(0, dtype=wide),
        x.new_empty(B, E, dtype=wide) if pool is not None else x.new_empty(0, dtype=wide),
    )


def _backward_fake(
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
    backend,
):
    wide, E = gate_dtype(x.dtype), len(ranks)
    bias_like = x.new_empty(E, dtype=wide)
    like = (x, down, up, scale, gate, phi, bias_like, pool, bias_like)
    return tuple(
        x.new_empty(t.shape, dtype=t.dtype) if wanted and t is not None else x.new_empty(0)
        for t, wanted in zip(like, need)
    )


def setup(ctx, inputs, output) -> None:
    """Keep what the gradient needs of a forward's inputs and outputs."""
    (
        x,
        weight,
        _,
        down,
        up,
        scale,
        ranks,
        gate,
        phi,
        phi_bias,
        pool,
        pool_bias,
        _,
        assignment,
        top_k,
        backend,
    ) = inputs
    _, h, token_gate, sample_gate = output
    ctx.mark_non_differentiable(h, token_gate, sample_gate)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x,
        weight,
        down,
        up,
        scale,
        gate,
        phi,
        phi_bias,
        pool,
        pool_bias,
        h,
        token_gate,
        sample_gate,
        assignment,
    )
    ctx.ranks, ctx.backend, ctx.top_k = ranks, backend, top_k


# positions of x, down, up, scale, gate, phi, phi_bias, pool, pool_bias among the sixteen inputs
_DIFFERENTIABLE = (0, 3, 4, 5, 7, 8, 9, 10, 11)


def grad(ctx, dy, *_unused, run=None):
    """The gradients of the sixteen inputs; `run` computes `gated_lora_bwd`.

    With `create_graph=True` the gradients themselves are differentiable: see `ops.twice`.
    """
    if dy is None:
        return (None,) * 16
    (
        x,
        weight,
        down,
        up,
        scale,
        gate,
        phi,
        phi_bias,
        pool,
        pool_bias,
        h,
        token_gate,
        sample_gate,
        assignment,
    ) = ctx.saved_tensors
    need = [bool(ctx.needs_input_grad[i]) for i in _DIFFERENTIABLE]
    if torch.is_grad_enabled():
        experts = Experts(down, up, scale, tuple(ctx.ranks), assignment)
        gates = Gates(gate, phi, phi_bias, pool, pool_bias, ctx.top_k)
        grads = differentiable_gradients(dy, x, weight, experts, gates, need)
    else:
        grads = (run or backward_op)(
            dy,
            x,
            weight,
            down,
            up,
            scale,
            ctx.ranks,
            gate,
            phi,
            pool,
            h,
            token_gate,
            sample_gate,
            need,
            assignment,
            ctx.top_k,
            ctx.backend,
        )
    like = (x, down, up, scale, gate, phi, phi_bias, pool, pool_bias)
    out: list[Tensor | None] = [None] * 16
    for i, wanted, g, t in zip(_DIFFERENTIABLE, need, grads, like):
        if wanted and g is not None and t is not None:
            out[i] = g.to(t.dtype)
    return tuple(out)


for _key in ("CPU", "CUDA", "XPU", "MPS"):
    library.impl("gated_lora_fwd", _forward, _key)
    library.impl("gated_lora_bwd", _backward, _key)
torch.library.register_fake("mole::gated_lora_fwd", _forward_fake, lib=library)
torch.library.register_fake("mole::gated_lora_bwd", _backward_fake, lib=library)
torch.library.register_autograd("mole::gated_lora_fwd", grad, setup_context=setup, lib=library)

forward_op = torch.ops.mole.gated_lora_fwd.default
backward_op = torch.ops.mole.gated_lora_bwd.default
