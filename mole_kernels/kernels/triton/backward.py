"""The whole backward: dX (and V, D, dq) by the fused product with the roles swapped, then every sum over
tokens in one launch.

Two launches where both are wanted; only the first where x alone wants a gradient, only the second where `up`
alone does. Gates-only
training makes V and D by the shrink kernel (no base product at all), then the gates' sums.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from mole_kernels.kernels.triton.fused import Buffers, Fused, buffers, expert_of_column
from mole_kernels.kernels.triton.gradients import gradients_kernel
from mole_kernels.kernels.triton.launch import _processors, _start, expand, persistent, shrink
from mole_kernels.kernels.triton.tiles import Tile, for_sums
from mole_kernels.kernels.triton.workspace import flags
from mole_kernels.operands import Gradients, Need


def wanted_of(need: Need, f: Fused) -> Need:
    """Without the gradients of operands that the call does not have."""
    token, sample = f.token_weight is not None, f.sample_weight is not None
    return need._replace(
        gate=need.gate and f.gate is not None,
        token_weight=need.token_weight and token,
        token_bias=need.token_bias and token,
        sample_weight=need.sample_weight and sample,
        sample_bias=need.sample_bias and sample,
    )


def needs_d(need: Need, f: Fused) -> bool:
    """Whether D is needed: for a gate's gradient, or for what flows through a gate into x or h."""
    through_token = f.token_weight is not None and (need.x or need.token_weight or need.token_bias)
    through_sample = f.sample_weight is not None and (
        need.x or need.down or need.sample_weight or need.sample_bias
    )
    return need.scale or need.gate or through_token or through_sample


def swapped(dy: Tensor, weight: Tensor, down: Tensor, up: Tensor, f: Fused) -> Fused:
    """The backward's fused product: dY for x, Wᵀ for W, Bᵀ for A, Aᵀ for B."""
    return replace(
        f,
        x=dy,
        w=weight.mT,
        bias=None,
        down=up.mT,
        up=down.mT,
        token_bias=None,
        sample_bias=None,
        save=False,
        backward=True,
    )


First = tuple[Tensor, Tensor | None, Tensor | None]


def backward(
    f: Fused, dy: Tensor, need: Need, tile: Tile, one_launch: bool = True, first: First | None = None
) -> Gradients:
    """The gradients that `need` names; an empty tensor where one is not wanted.

    f      the forward call with h [B,T,R], token_gate [B,T,E], sample_gate [B,E] as it left them
    dy     [B,T,N] in any strides
    first  of a call without a sample gate: dX [B,T,K], dh [B,T,R] in its dtype and shares of D [any,B·T,E]
           float32, the last two where
           they are wanted, as another kernel made them; only the second launch is done here then
    """
    need = wanted_of(need, f)
    g = replace(swapped(dy, f.w, f.down, f.up, f), need_d=needs_d(need, f), store_z=need.x or need.down)
    b: Buffers | None = None
    if first is not None:
        dx, dh, d = (f.scale if t is None else t for t in first)
        b = Buffers(dx, g.h, dh, g.token_gate, g.sample_gate, d, *(f.scale,) * 3)  # type: ignore[arg-type]
    elif need.x and one_launch:
        b = persistent(g, tile)
    elif need.x or g.store_z or g.need_d:
        b = buffers(g, tile, tile.BS, y=need.x)
        shrink(g, b, tile)
        if need.x:
            expand(g, b, tile)
    sums = _sums(f, g, b, dy, need, tile)
    dx = b.y if need.x and b is not None else f.x.new_empty(0)
    return Gradients(x=dx, **{name: sums[f"d{name}"] for name in Gradients._fields if name != "x"})


def _given_jobs(f: Fused, CH: int, BT: int) -> tuple[int, int, int, bool]:
    """Samples of the given gate, tokens of a chunk, chunks, and whether it varies by token (a chunk is one
    step then).
    """
    assert f.gate is not None
    by_token = f.gate.shape[1] > 1
    CG = BT if by_token else min(CH, ceil(f.T / BT) * BT)
    return f.gate.shape[0], CG, ceil(f.T / CG), by_token


def _chunks(f: Fused, jobs: int, BT: int) -> tuple[int, int]:
    """Tokens of a chunk and chunks of a group: about two jobs for each multiprocessor, each at least four
    steps long.

    jobs: what there would be with one chunk a group
    """
    wanted = ceil(2 * _processors(f.x) / max(1, jobs))
    n_c = min(wanted, ceil(f.span / (4 * BT)))
    CH = ceil(f.span / n_c / BT) * BT
    return CH, ceil(f.span / CH)


def _sums(f: Fused, g: Fused, b: Buffers | None, dy: Tensor, need: Need, tile: Tile) -> dict[str, Tensor]:
    """The second launch, with the kinds of jobs that are wanted; none, no launch."""
    x, E = f.x, f.E
    gates = need.token_bias or need.scale or need.sample_bias
    outputs = dict(
        ddown=need.down,
        dup=need.up,
        dtoken_weight=need.token_weight,
        dsample_weight=need.sample_weight,
        dgate=need.gate,
    )
    like = dict(
        ddown=f.down, dup=f.up, dtoken_weight=f.token_weight, dsample_weight=f.sample_weight, dgate=f.gate
    )
    out = {
        name: torch.empty(
            like[name].shape if on else 0,  # type: ignore[union-attr]
            dtype=like[name].dtype if on else x.dtype,  # type: ignore[union-attr]
            device=x.device,
        )
        for name, on in outputs.items()
    }
    vectors = torch.empty(3 * E if gates else 0, dtype=torch.float32, device=x.device)
    small = dict(
        zip(("dscale", "dtoken_bias", "dsample_bias"), vectors.split(E) if gates else (vectors,) * 3)
    )
    if any(outputs.values()) or gates:
        _launch(f, g, b, dy, tile, out, small, outputs, gates)
    wanted = dict(dscale=need.scale, dtoken_bias=need.token_bias, dsample_bias=need.sample_bias)
    small_outputs = {name: small[name] if on else x.new_empty(0) for name, on in wanted.items()}
    if need.scale and f.scale.dtype != torch.float32:
        small_outputs["dscale"] = small_outputs["dscale"].to(f.scale.dtype)
    return out | small_outputs


def _launch(
    f: Fused,
    g: Fused,
    b: Buffers | None,
    dy: Tensor,
    tile: Tile,
    out: dict[str, Tensor],
    small: dict[str, Tensor],
    outputs: dict[str, bool],
    gates: bool,
) -> None:
    x, E, EP, S = f.x, f.E, f.EP, f.down.shape[0]
    busy = f.assignment is not None or (
        f.gate is not None and (f.token_weight is not None or f.sample_weight is not None)
    )
    on_gpu = x.device.type == "cuda"
    BT, BC, BR = for_sums(
        f.R, x.dtype, torch.cuda.get_device_capability(x.device) if on_gpu else (8, 0), busy
    )
    if not on_gpu:
        BT, BC, BR = min(BT, tile.BM), min(BC, tile.BN), min(BR, tile.BR)
    n_r = -(-f.R // BR)
    tiles = dict(
        down=S * n_r * -(-f.K // BC) * outputs["ddown"],
        up=S * n_r * -(-f.N // BC) * outputs["dup"],
        token_weight=-(-f.K // BC) * outputs["dtoken_weight"],
        sample_weight=S * n_r * outputs["dsample_weight"],
    )
    many = S > 1 or f.assignment is not None
    at_once = sum(tiles.values()) if f.assignment is not None else sum(tiles.values()) // S * f.groups
    CH, n_c = _chunks(f, at_once + gates * f.groups, BT)
    every = n_c * f.groups
    per_tile = n_c if many else every
    sizes = dict(down=BR * BC, up=BR * BC, token_weight=EP * BC, sample_weight=BR)
    slots, at, jobs = {}, 0, 0
    for kind, size in sizes.items():
        of_tile = every if kind == "token_weight" else per_tile
        slots[kind], at, jobs = at, at + tiles[kind] * of_tile * size, jobs + tiles[kind] * of_tile
    o_given = at + (every * 2 * EP if gates else 0)
    n_given, CG, n_given_c, by_token = _given_jobs(f, CH, BT) if outputs["dgate"] else (0, BT, 1, False)
    total = o_given + (0 if by_token else n_given * n_given_c * EP)
    absent, shares = f.scale, b.d.shape[0] if b and g.need_d else 1
    strides = (
        g.strides()
        | dict(zip(("syb", "syt", "syn"), dy.stride()))
        | dict(zip(("sxb", "sxt", "sxk"), x.stride()))
    )
    arguments = (
        strides
        | out
        | small
        | dict(
            dy=dy,
            x=x,
            cols=expert_of_column(f.ranks, x.device),
            scale=f.scale,
            gate=absent if f.gate is None else f.gate,
            sample_weight=absent if f.sample_weight is None else f.sample_weight,
            h=f.h,
            z=b.z if b else absent,
            d=b.d if b else absent,
            q=b.q if b else absent,
            token_gate=f.token_gate,
            sample_gate=f.sample_gate,
            partial=torch.empty(total, dtype=torch.float32, device=x.device),
            counters=flags(x.device, sum(tiles.values()) + 1 + n_given),
            n_down=tiles["down"],
            n_up=tiles["up"],
            n_phi=tiles["token_weight"],
            n_pool=tiles["sample_weight"],
            n_given=n_given,
            n_given_c=n_given_c,
            CG=CG,
            o_given=o_given,
            assignment=absent if f.assignment is None else f.assignment,
            o_up=slots["up"],
            o_phi=slots["token_weight"],
            o_pool=slots["sample_weight"],
            o_gate=at,
            B=f.B,
            T=f.T,
            span=f.span,
            CH=CH,
            n_c=n_c,
            n_g=f.groups,
            n_r=shares,
            S=S,
            M=f.M,
            N=f.N,
            K=f.K,
            R=f.R,
            E=E,
            DOWN=outputs["ddown"],
            UP=outputs["dup"],
            PHI=outputs["dtoken_weight"],
            GATES=gates,
            DPOOL=outputs["dsample_weight"],
            GIVEN=outputs["dgate"],
            S_MANY=many,
            ASSIGN=f.assignment is not None,
            TOKEN=f.token_weight is not None,
            SOFTMAX=f.top_k > 0,
            GATE=f.gate is not None,
            BY_TOKEN=by_token,
            POOL=f.sample_weight is not None,
            PRECISION=f.precision,
            BT=BT,
            BC=BC,
            BR=BR,
            EP=EP,
        )
    )
    _start(
        gradients_kernel,
        (jobs + (every if gates else 0) + n_given * n_given_c,),
        arguments,
        replace(tile, warps=8, stages=2),
    )
