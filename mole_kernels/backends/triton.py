"""The operator in Triton, for NVIDIA GPUs from Ampere on: forward in one launch, backward in two.

Importing this module does not import Triton; the first call does. Which way computes a call:
`dispatch/choose.py`, asked once for
every kind of call; nothing is measured at run time.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from mole_kernels.backends import stacked
from mole_kernels.dispatch import device as devices
from mole_kernels.dispatch.choose import choose
from mole_kernels.dispatch.tables import for_device
from mole_kernels.dispatch.work import Use
from mole_kernels.problem import Problem

name = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 6)
MOST_EXPERTS = 64
# offsets within a tile are 32 bits wide
WIDEST = 1 << 22


@lru_cache(maxsize=1)
def why_not_triton() -> str | None:
    """Why Triton cannot be used here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton has no version"
    if tuple(int(n) for n in found.split("+")[0].split(".")[:2]) < OLDEST:
        return f"needs Triton {'.'.join(map(str, OLDEST))}, found {found}"
    return None


@lru_cache(maxsize=1)
def why_not_device() -> str | None:
    """Why the current GPU cannot be used, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs compute capability 8.0 (Ampere), this GPU has {major}.{minor}"


def reject(problem: Problem) -> str | None:
    """Why it does not take `problem`, or None."""
    if problem.device != "cuda":
        return f"computes on CUDA devices only, x is on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"has no kernels for {problem.dtype}"
    if problem.E > MOST_EXPERTS:
        return f"takes at most {MOST_EXPERTS} experts, the call has {problem.E}"
    if max(problem.K, problem.N) > WIDEST or problem.M >= 1 << 31:
        return f"takes K and N up to {WIDEST} and fewer than 2^31 rows"
    return why_not_triton() or why_not_device()


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _tame(t: Tensor) -> Tensor:
    """t, or a contiguous copy where its last stride is so long that an offset within a tile would not fit in
    32 bits.
    """
    return t if t.stride(-1) < WIDEST else t.contiguous()


def _call(
    x, weight, bias, down, up, scale, ranks, gate, phi, phi_bias, pool, pool_bias, assignment, top_k, save
):
    from mole_kernels.kernels.triton.fused import Fused

    bias, scale, phi_bias, pool, pool_bias, assignment = (
        _flat(t) for t in (bias, scale, phi_bias, pool, pool_bias, assignment)
    )
    top_k = min(top_k, len(ranks)) if phi is not None else 0
    return Fused(
        _tame(x),
        weight,
        bias,
        down,
        up,
        scale,
        tuple(ranks),
        gate,
        phi,
        phi_bias,
        pool,
        pool_bias,
        assignment,
        top_k,
        save,
    )


@lru_cache(maxsize=16)
def _device(index: int | None) -> devices.Device:
    """The GPU; without one (tests only) an A100."""
    return devices.present(index) if torch.cuda.is_available() else devices.KNOWN["a100"]


@lru_cache(maxsize=4096)
def _chosen(
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
    tf32: bool,
) -> str:
    """The way for a kind of call; gate: whether the given one varies by sample and by token."""
    problem = Problem(B, T, K, N, ranks, S, dtype, "cuda", token, sample, gate is not None, top_k, assigned)
    by_sample, by_token = gate or (False, False)
    device = _device(index)
    return choose(problem, device, for_device(device), Use(backward, save, by_token, by_sample, tf32)).name


def way_of(
    x,
    weight,
    down,
    ranks,
    gate,
    phi,
    pool,
    save: bool,
    backward: bool = False,
    assigned: bool = False,
    top_k: int = 0,
) -> str:
    """What `choose` says for the call that these tensors make: a name in `strategies.WAYS`, or "stacked"."""
    varies = None if gate is None else (gate.shape[0] > 1, gate.shape[1] > 1)
    return _chosen(
        x.device.index,
        *x.shape,
        weight.shape[0],
        tuple(ranks),
        down.shape[0],
        x.dtype,
        phi is not None,
        pool is not None,
        varies,
        top_k if phi is not None else 0,
        assigned,
        save,
        backward,
        _tf32(x),
    )


def _tf32(x: Tensor) -> bool:
    """Whether x's products are to be made in tf32: torch's own switch says."""
    # not allow_tf32: reading that raises where the newer switch was set
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _tile(f, way: str = ""):
    from mole_kernels.kernels.triton.tiles import choose as tile_for
    from mole_kernels.kernels.triton.tiles import fitted, for_dense, for_recompute, rows_of_h

    device = _device(f.x.device.index)
    gates = sum(g is not None for g in (f.phi, f.pool, f.gate))
    # D is made for a scale's gradient too
    tile = tile_for(f.M, f.K, f.N, f.R, f.x.dtype, device.capability, device.processors, way == "recompute")
    tile = fitted(tile, device.capability, f.backward, gates + f.backward, f.top_k > 0)
    if way == "dense":
        return for_dense(tile, device.capability)
    if way == "recompute":
        return for_recompute(tile, device.capability, gates)
    return rows_of_h(tile, f.groups * f.row_tiles(tile.BM), -(-f.N // tile.width), f.R, device.processors)


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
    tile=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, l, G; see docs/design.md section 3. `way` and `tile` override the choice."""
    # where a size is 0 there is nothing for a kernel to do
    empty = 0 in (x.numel(), weight.shape[0], down.shape[0], down.shape[1])
    if way is None and not empty:
        way = way_of(x, weight, down, ranks, gate, phi, pool, save, False, assignment is not None, top_k)
    if empty or way == "stacked":
        return stacked.forward(
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
    assert way is not None
    from mole_kernels.kernels.triton import plan
    from mole_kernels.kernels.triton.fused import Fused
    from mole_kernels.kernels.triton.strategies import WAYS

    ranks, top_k = tuple(ranks), min(top_k, len(ranks)) if phi is not None else 0
    flat = (_flat(t) for t in (phi_bias, pool, pool_bias, assignment))
    operands = (_tame(x), weight, _flat(bias), down, up, _flat(scale), gate, phi, *flat)
    key = plan.key_of(way, tile, operands, ranks, top_k, save, _tf32(x)) if way in plan.PLANNED else None
    found = plan.known(key)
    if found is not None:
        return found.run(operands)
    f = Fused(*operands[:6], ranks, *operands[6:], top_k, save)  # type: ignore[arg-type, call-arg]
    tile = tile or _tile(f, way)
    b = WAYS[way](f, tile) if key is None else plan.record(key, way, f, tile)
    return b.y, b.h if save else x.new_empty(0), b.token_gate, b.sample_gate


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
    tile=None,
    first=None,
) -> tuple[Tensor, ...]:
    """The nine gradients; what nobody needs is empty. Deterministic: two runs are bit-equal.

    `way` ("persistent", "two_pass", "stacked") and `tile` override the choice, which only dX leaves open.
    first: dX, dh and shares of D
    where another kernel made them (kernels/triton/backward.py), so that only the sums over tokens are left.
    """
    empty = 0 in (x.numel(), weight.shape[0], down.shape[0], down.shape[1])
    if way is None and not empty and need[0] and first is None:
        way = way_of(x, weight, down, ranks, gate, phi, pool, False, True, assignment is not None, top_k)
    if empty or way == "stacked":
        return stacked.backward(
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
    from dataclasses import replace

    from mole_kernels.kernels.triton.backward import Need, swapped
    from mole_kernels.kernels.triton.backward import backward as run

    f = _call(x, weight, None, down, up, scale, ranks, gate, phi, None, pool, None, assignment, top_k, False)
    f = replace(f, h=h.contiguous(), token_gate=token_gate, sample_gate=sample_gate)
    dy = _tame(dy)
    return run(f, dy, Need(*need), tile or _tile(swapped(dy, f.w, f.down, f.up, f)), way != "two_pass", first)
