"""The compiled CPU operator."""

from __future__ import annotations

from mole_kernels.problem import Problem

name = "cpu"


def reject(problem: Problem) -> str | None:
    return "the compiled library is not there"


def forward(*args):
    raise RuntimeError("rejected")


def backward(*args):
    raise RuntimeError("rejected")
