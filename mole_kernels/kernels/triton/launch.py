"""Launches: a fused product by two kernels or by one. Each function is one launch (`two_pass` two)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels.kernels.triton.dense import delta_kernel, dense_kernel
from mole_kernels.kernels.triton.expand import expand_kernel
from mole_kernels.kernels.triton.fused import (
    Buffers,
    Fused,
    buffers,
    common_arguments,
    descriptors,
    first_columns,
)
from mole_kernels.kernels.triton.merge import merge_kernel
from mole_kernels.kernels.triton.persistent import persistent_kernel
from mole_kernels.kernels.triton.recompute import recompute_kernel
from mole_kernels.kernels.triton.shrink import shrink_kernel
from mole_kernels.kernels.triton.tiles import Tile, next_power

# of each thread: autograd's may launch while another records
_thread = threading.local()


@contextmanager
def recording() -> Iterator[list[tuple[Any, Any, tuple[int, ...], dict[str, object]]]]:
    """What this thread launches inside: (kernel, compiled or None, grid, arguments by name)."""
    launches: list[tuple[Any, Any, tuple[int, ...], dict[str, object]]] = []
    _thread.recorded = launches
    try:
        yield launches
    finally:
        _thread.recorded = None


def descriptor(t: Tensor | None, shape: list[int], strides: list[int], block: list[int]) -> object:
    """A tensor descriptor of `t`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, shape, strides, block)


def _start(
    kernel, grid: tuple[int, ...], arguments: Mapping[str, object], tile: Tile, **options: object
) -> None:
    """Launch with those of `arguments` that the kernel names."""
    device = arguments["cols"].device  # type: ignore[attr-defined]
    named = {name: arguments[name] for name in kernel.arg_names}
    if device.type == "cuda":
        with torch.cuda.device(device):
            compiled = kernel[grid](**named, num_warps=tile.warps, num_stages=tile.stages, **options)
    else:
        compiled = kernel[grid](**named)
    recorded = getattr(_thread, "recorded", None)
    if recorded is not None:
        recorded.append((kernel, compiled, grid, named))


def shrink(f: Fused, b: Buffers, tile: Tile) -> None:
    """h, or V, with all that follows from it: one launch."""
    BR, n_r = f.columns(tile)
    n_t = f.row_tiles(tile.BS)
    BK = min(tile.BK, next_power(f.K))
    arguments = common_arguments(f, b) | dict(
        n_t=n_t,
        n_r=n_r,
        arrived=b.flags,
        BM=tile.BS,
        BR=BR,
        BK=BK,
        EVEN_K=f.K % BK == 0,
        PDL=tile.pdl,
        BIAS=f.token_bias is not None,
    )
    _start(shrink_kernel, (f.groups * n_t, n_r), arguments, tile)


def _product_arguments(f: Fused, b: Buffers, tile: Tile) -> dict[str, object]:
    described = descriptors(f, tile) if tile.tma else None
    arguments = common_arguments(f, b) | dict(
        BM=tile.BM,
        BN=tile.BN,
        BX=tile.BX,
        BK=tile.BK,
        BZ=min(tile.BZ, next_power(f.R)),
        GROUP=tile.group,
        PDL=tile.pdl,
        EVEN_K=f.K % tile.BK == 0,
        TMA=described is not None,
        W_ROWS=True,
    )
    if described is not None:
        arguments["x"], arguments["w"], arguments["w2"], arguments["W_ROWS"] = described
    return arguments


def expand(f: Fused, b: Buffers, tile: Tile, add: bool = False) -> None:
    """Base product and the low-rank part that `shrink` left in z: one launch. With `add` the base is in y
    already.
    """
    n_t = f.row_tiles(tile.BM)
    n_m = f.groups * n_t
    arguments = _product_arguments(f, b, tile) | dict(n_t=n_t, n_m=n_m, n_r=f.columns(tile)[1], ADD=add)
    _start(
        expand_kernel,
        (n_m * -(-f.N // tile.width),),
        arguments,
        tile,
        **({"launch_pdl": True} if tile.pdl else {}),
    )


def two_pass(f: Fused, tile: Tile) -> Buffers:
    """Two launches: shrink, then expand."""
    b = buffers(f, tile, tile.BS)
    shrink(f, b, tile)
    expand(f, b, tile)
    return b


def persistent(f: Fused, tile: Tile) -> Buffers:
    """One launch: h first, then y, handed over by flags."""
    BH = tile.BH or tile.BM
    b = buffers(f, tile, BH)
    BR, n_r = f.columns(tile)
    n_t, n_th = f.row_tiles(tile.BM), f.row_tiles(BH)
    n_m = f.groups * n_t
    n_tiles = n_m * -(-f.N // tile.width)
    arguments = _product_arguments(f, b, tile) | dict(
        n_t=n_t, n_th=n_th, n_m=n_m, n_r=n_r, n_b=f.groups, BH=BH, BR=BR, flags=b.flags
    )
    if arguments["TMA"]:
        x: Any = arguments["x"]
        arguments["x2"] = x if BH == tile.BM else descriptor(f.x, x.shape, x.strides, [BH, tile.BK])
    # a program of four warps leaves room for a second one; more programs than the GPU holds would be right
    # too
    programs = tile.programs or _processors(f.x) * max(1, 8 // tile.warps)
    _start(persistent_kernel, (min(programs, max(n_tiles, f.groups * n_th * n_r)),), arguments, tile)
    return b


def added(f: Fused, tile: Tile) -> Buffers:
    """Three launches: shrink, the base by torch's own product, and the low-rank part added to it (y is
    rounded once more).
    """
    b = buffers(f, tile, tile.BS)
    b.y = F.linear(f.x, f.w, f.bias).contiguous()
    shrink(f, b, tile)
    expand(replace(f, bias=None), b, replace(tile, pdl=False, BX=0), add=True)
    return b


def recompute(f: Fused, tile: Tile) -> Buffers:
    """One launch: every output tile makes its own h. No sample gate, and R small."""
    b = buffers(f, tile, tile.BM)
    n_t = f.row_tiles(tile.BM)
    n_m = f.groups * n_t
    arguments = _product_arguments(f, b, tile) | dict(n_t=n_t, n_m=n_m, BR=next_power(f.R))
    _start(recompute_kernel, (n_m * -(-f.N // tile.BN),), arguments, tile)
    return b


def merged_weight(f: Fused, tile: Tile) -> Buffers:
    """Two launches: W with the experts merged in, for each sample where they differ, and torch's product. No
    h, so nothing to save.
    """
    many = f.down.shape[0] > 1 or f.assignment is not None or (f.gate is not None and f.gate.shape[0] > 1)
    G = f.B if many else 1
    merged = torch.empty((G, f.N, f.K), dtype=f.x.dtype, device=f.x.device)
    b = buffers(replace(f, store_z=False), tile, tile.BM, y=False)
    BN, BK = min(tile.BN, 64), min(tile.BK, 64)
    arguments = common_arguments(f, b) | dict(merged=merged, BN=BN, BK=BK, BZ=min(tile.BZ, next_power(f.R)))
    _start(merge_kernel, (-(-f.N // BN) * -(-f.K // BK), G), arguments, tile)
    if many:
        b.y = torch.baddbmm(f.bias, f.x, merged.mT) if f.bias is not None else torch.bmm(f.x, merged.mT)
    else:
        b.y = F.linear(f.x, merged[0], f.bias)
    return b


def dense(f: Fused, tile: Tile) -> Buffers:
    """Two launches: each ΔW_e = s_e·B_e A_e (and the token gate), then the base and all of them, gated per
    token. No h.
    """
    b = buffers(replace(f, store_z=False), tile, tile.BM)
    # rows of whole 16 bytes, as descriptors want them
    swd = -(-f.K // 8) * 8
    delta = torch.empty((f.E * f.N, swd), dtype=f.x.dtype, device=f.x.device)
    n_t, BN, BK = f.row_tiles(tile.BS), min(tile.BN, 64), min(tile.BK, 64)
    more = dict(delta=delta, delta2=delta, swd=swd, first=first_columns(f.ranks, f.x.device))
    arguments = (
        common_arguments(f, b)
        | more
        | dict(
            n_t=n_t,
            BM=tile.BS,
            BN=BN,
            BK=BK,
            BZ=min(tile.BZ, next_power(max(f.ranks))),
            EVEN_K=f.K % BK == 0,
            PDL=tile.pdl,
        )
    )
    programs = f.E * -(-f.N // BN) * -(-f.K // BK) + (n_t if f.token_weight is not None else 0)
    _start(delta_kernel, (programs,), arguments, tile)
    n_m = f.groups * f.row_tiles(tile.BM)
    arguments = _product_arguments(f, b, tile) | more | dict(n_t=f.row_tiles(tile.BM), n_m=n_m)
    if arguments["TMA"]:
        shape, strides = [f.E * f.N, f.K], [swd, 1]
        arguments["delta"] = descriptor(delta, shape, strides, [tile.BN, tile.BK])
        arguments["delta2"] = descriptor(delta, shape, strides, [tile.BX or tile.BN, tile.BK])
    _start(
        dense_kernel,
        (n_m * -(-f.N // tile.width),),
        arguments,
        tile,
        **({"launch_pdl": True} if tile.pdl else {}),
    )
    return b


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 4
