"""The correctness rules as numbers: what a result breaks, each with its figure and its limit. Truth is
float64.

G1 NaN and Inf where the truth has them, nowhere else
G2 relative Frobenius error ≤ 1.25·√r·e_round, r roundings on the path; float32 ≤ 1e-6
G3 every row and every column ≤ 4 times that
G4 largest error ≤ 2 times that of eager torch in the same dtype, plus 2 ulp
G6 small integers bit-equal; G7 two runs bit-equal (`same`)
G5 (the low-rank part alone, each expert alone) and G8 (planted faults) are how `verify.py` applies these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# unit roundoff: half the distance from 1 to the next number
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
FP32, TF32 = 1e-6, 1e-3


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """e_round = ‖round(truth) − truth‖ / ‖truth‖"""
    return ((truth.to(dtype).double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def limit(truth: Tensor, dtype: torch.dtype, roundings: int, tf32: bool = False) -> float:
    if dtype == torch.float32:
        return TF32 if tf32 else FP32
    return 1.25 * math.sqrt(roundings) * rounding(truth, dtype)


def relative(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖; infinite where that is no number."""
    error = ((got.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()
    return error if error == error else math.inf


def broken(
    got: Tensor, truth: Tensor, dtype: torch.dtype, roundings: int, eager: Tensor | None = None
) -> list[str]:
    """The rules that `got` breaks, in words; all tensors on one device, truth in float64."""
    if got.shape != truth.shape or got.dtype != dtype:
        return [f"G1: {dtype} {list(truth.shape)} expected, got {got.dtype} {list(got.shape)}"]
    if not torch.equal(got.isnan(), truth.isnan()) or not torch.equal(got.isinf(), truth.isinf()):
        return [
            f"G1: {int(got.isnan().sum())} NaN and {int(got.isinf().sum())} Inf; the truth has {int(truth.isnan().sum())}"
        ]
    if truth.numel() == 0:
        return []
    if not truth.norm() > 0:
        return [] if not got.double().abs().sum() > 0 else ["G2: the truth is zero"]
    most, found = limit(truth, dtype, roundings), []
    error = got.double() - truth
    if not (whole := relative(got, truth)) <= most:
        found.append(f"G2: relative error {whole:.2e} > {most:.2e}")
    found += lines(error, truth, most)
    if eager is not None and dtype != torch.float32:
        ulp = 2 * ROUNDOFF[dtype] * truth.abs().max().item()
        allowed = 2 * (eager.double() - truth).abs().max().item() + 2 * ulp
        if not (worst := error.abs().max().item()) <= allowed:
            found.append(f"G4: largest error {worst:.2e} > {allowed:.2e}")
    return found


def lines(error: Tensor, truth: Tensor, most: float) -> list[str]:
    """G3. A line much smaller than the others is judged against the typical one: its rounding has theirs in
    it.
    """
    matrix, off, found = truth.reshape(-1, truth.shape[-1]), error.reshape(-1, truth.shape[-1]), []
    for axis, word in ((1, "row"), (0, "column")):
        floor = truth.norm() / math.sqrt(matrix.shape[1 - axis])
        worst = (off.norm(dim=axis) / torch.maximum(matrix.norm(dim=axis), floor)).max().item()
        if not worst <= 4 * most:
            found.append(f"G3: worst {word} {worst:.2e} > {4 * most:.2e}")
    return found


def broken_gradient(got: Tensor, truth: Tensor, dtype: torch.dtype, size: float, roundings: int) -> list[str]:
    """G1 and G2 of a gradient against its size (or its terms'); twice as loose as y, for its operands were
    rounded on the way forward.
    """
    if got.shape != truth.shape:
        return [f"G1: shape {list(got.shape)}, expected {list(truth.shape)}"]
    if not bool(got.isfinite().all()):
        return [f"G1: {int((~got.isfinite()).sum())} numbers are not finite"]
    if truth.numel() == 0 or size == 0:
        return ["G2: the truth is zero"] if got.double().abs().sum() > 0 else []
    eps = FP32 if dtype == torch.float32 else ROUNDOFF[dtype]
    most, error = 2 * 1.25 * eps * math.sqrt(roundings), (got.double() - truth).norm().item() / size
    return [] if error <= most else [f"G2: relative error {error:.2e} > {most:.2e}"]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN being equal to itself."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
