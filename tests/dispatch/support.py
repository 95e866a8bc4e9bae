"""Problems by their sizes and kind of gate, and the GPU that is asked about."""

import torch

from mole_kernels.dispatch.device import known
from mole_kernels.dispatch.suite import gated
from mole_kernels.problem import Problem

H200 = known("h200")


def problem(M=2048, K=1280, N=1280, ranks=(32, 32), B=1, gate="none", dtype=torch.bfloat16, S=1):
    return Problem(B, M // B, K, N, ranks, S, dtype, "cuda", **gated(gate))
