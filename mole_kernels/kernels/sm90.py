"""What the compiled Hopper kernels (csrc/cuda/sm90) can do: their tiles and what each way refuses. From sizes
alone; needs no GPU.

The same lists as csrc/cuda/sm90/tile.h, which makes the choice at run time; a test compares the two.
"""

from __future__ import annotations

import torch

from mole_kernels.problem import Problem

WAYS = ("cluster", "persistent", "recompute")
CLUSTERS = (2, 4, 8)
DTYPES = (torch.bfloat16, torch.float16)
MOST_EXPERTS, LOGITS = 16, 8
# warp groups of 64 rows, columns of y, columns of h and logits; of dX (`_dx`) columns of dX, columns of V
SHAPES = {
    "cluster": (
        (2, 128, 16),
        (2, 128, 24),
        (2, 128, 40),
        (2, 128, 72),
        (2, 160, 16),
        (2, 160, 24),
        (2, 160, 40),
        (2, 160, 72),
        (2, 192, 16),
        (2, 192, 24),
        (2, 192, 40),
        (1, 128, 16),
        (1, 128, 32),
        (1, 128, 40),
        (1, 128, 72),
    ),
    "persistent": (
        (2, 128, 40),
        (2, 128, 136),
        (2, 160, 40),
        (2, 160, 136),
        (2, 192, 40),
        (2, 192, 136),
        (2, 256, 40),
        (2, 256, 136),
        (1, 128, 40),
        (1, 128, 136),
    ),
    "recompute": (
        (2, 128, 24),
        (2, 128, 40),
        (2, 160, 24),
        (2, 160, 40),
        (2, 192, 24),
        (2, 192, 40),
        (1, 128, 24),
        (1, 128, 40),
    ),
    "cluster_dx": (
        (2, 128, 16),
        (2, 128, 32),
        (2, 160, 16),
        (2, 160, 32),
        (2, 160, 64),
        (2, 192, 16),
        (2, 192, 32),
        (1, 128, 16),
        (1, 128, 32),
    ),
    "persistent_dx": (
        (2, 128, 128),
        (2, 160, 32),
        (2, 160, 128),
        (2, 192, 128),
        (2, 256, 32),
        (2, 256, 128),
        (1, 128, 32),
        (1, 128, 128),
    ),
    "recompute_dx": (
        (2, 128, 16),
        (2, 128, 32),
        (2, 160, 16),
        (2, 160, 32),
        (2, 192, 16),
        (2, 192, 32),
        (1, 128, 32),
    ),
}


def reason_against_problem(problem: Problem, backward: bool = False) -> str | None:
    """Why none of the ways computes `problem` on a Hopper GPU (backward: its dX), or None."""
    if problem.dtype not in DTYPES:
        return f"has no kernels for {problem.dtype}"
    if 0 in (problem.M, problem.K, problem.N, problem.R, problem.S):
        return "there is nothing to compute"
    if problem.M >= 1 << 31:
        return "takes fewer than 2^31 rows"
    for name, size in (("K", problem.K), ("N", problem.N), ("R", problem.R)):
        if size % 8:
            return f"{name} = {size} is no multiple of 8 (TMA)"
    if backward and problem.sample_gate:
        return "the sample gate's gradient needs every token of a sample before the first dX"
    most = LOGITS if problem.token_gate else MOST_EXPERTS
    if most < problem.E:
        return f"{problem.E} experts are more than the kernel's columns for their gates ({most})"
    return None
