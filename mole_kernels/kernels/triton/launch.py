"""Launches: a fused product by two kernels or by one. Each function is one launch (`two_pass` two)."""

from __future__ import annotations

import torch
from torch import Tensor

from mole_kernels.kernels.triton.expand import expand_kernel
from mole_kernels.kernels.triton.fused import Buffers, Fused, buffers, common_arguments, descriptors
from mole_kernels.kernels.triton.persistent import persistent_kernel
from mole_kernels.kernels.triton.shrink import shrink_kernel
from mole_kernels.kernels.triton.tiles import Tile


def _start(kernel, grid: tuple[int, ...], arguments: dict[str, object], tile: Tile, **options: object) -> None:
    """Launch with those of `arguments` that the kernel names."""
    device = arguments["cols"].device  # type: ignore[attr-defined]
    named = {name: arguments[name] for name in kernel.arg_names}
    if device.type != "cuda":
        kernel[grid](**named)
        return
    with torch.cuda.device(device):
        kernel[grid](**named, num_warps=tile.warps, num_stages=tile.stages, **options)


def shrink(f: Fused, b: Buffers, tile: Tile) -> None:
    """h, or V, with all that follows from it: one launch."""
    BR, n_r = f.columns(tile)
    n_t = f.row_tiles(tile.BS)
    BK = min(tile.BK, max(16, 1 << (f.K - 1).bit_length()))
    arguments = common_arguments(f, b) | dict(
        n_t=n_t, n_r=n_r, arrived=b.flags, BM=tile.BS, BR=BR, BK=BK, EVEN_K=f.K % BK == 0, PDL=tile.pdl, BIAS=f.phi_bias is not None
    )
    _start(shrink_kernel, (f.groups * n_t, n_r), arguments, tile)


def _product_arguments(f: Fused, b: Buffers, tile: Tile) -> dict[str, object]:
    described = descriptors(f, tile) if tile.tma else None
    arguments = common_arguments(f, b) | dict(
        BM=tile.BM, BN=tile.BN, BK=tile.BK, BZ=min(tile.BZ, max(16, 1 << (f.R - 1).bit_length())), GROUP=tile.group, PDL=tile.pdl,
        EVEN_K=f.K % tile.BK == 0, TMA=described is not None, W_ROWS=True,
    )  # fmt: skip
    if described is not None:
        arguments["x"], arguments["w"], arguments["W_ROWS"] = described
    return arguments


def expand(f: Fused, b: Buffers, tile: Tile) -> None:
    """Base product and the low-rank part that `shrink` left in z: one launch."""
    n_t = f.row_tiles(tile.BM)
    n_m = f.groups * n_t
    arguments = _product_arguments(f, b, tile) | dict(n_t=n_t, n_m=n_m, n_r=f.columns(tile)[1])
    _start(expand_kernel, (n_m * -(-f.N // tile.BN),), arguments, tile, **({"launch_pdl": True} if tile.pdl else {}))


def two_pass(f: Fused, tile: Tile) -> Buffers:
    """Two launches: shrink, then expand."""
    b = buffers(f, tile, tile.BS)
    shrink(f, b, tile)
    expand(f, b, tile)
    return b


def persistent(f: Fused, tile: Tile) -> Buffers:
    """One launch: h first, then y, handed over by flags."""
    b = buffers(f, tile, tile.BM)
    BR, n_r = f.columns(tile)
    n_t = f.row_tiles(tile.BM)
    n_m = f.groups * n_t
    n_tiles = n_m * -(-f.N // tile.BN)
    arguments = _product_arguments(f, b, tile) | dict(n_t=n_t, n_m=n_m, n_r=n_r, n_b=f.groups, BR=BR, flags=b.flags)
    programs = tile.programs or _processors(f.x)
    _start(persistent_kernel, (min(programs, max(n_tiles, n_m * n_r)),), arguments, tile)
    return b


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 4
