"""What `mole-kernels tune` times on a GPU, run in the interpreter."""

from dataclasses import replace

import pytest
import torch

from mole_kernels.cli.measure import TOLERANCE, error, programs
from mole_kernels.dispatch.choose import CANDIDATES, reason_against_candidate
from mole_kernels.dispatch.suite import SuiteCase, gated
from mole_kernels.dispatch.work import Use
from mole_kernels.problem import Problem
from tests.kernels.interpreter import run


@pytest.mark.parametrize("kind", ["none", "mole", "mask", "fixed"])
def test_what_is_timed_is_right(kind):
    """Every candidate of `tune`, run by Triton's interpreter on its own inputs, against the stacked
    backend.
    """
    small = Problem(2, 20, 48, 40, (3, 5), 1, torch.bfloat16, "cpu", **gated(kind))
    for use in (Use(), Use(save=True), Use(backward=True)):
        use = replace(use, by_token=kind == "mask", by_sample=kind == "mask")
        names = [name for name in CANDIDATES if reason_against_candidate(name, small, use) is None]
        runs = programs(SuiteCase("none", small, use), names)
        assert list(runs) == ["plain", *names]
        truth = [t.float() for t in runs["stacked"]()]
        assert runs["plain"]()[0].shape == truth[0].shape
        for name in names:
            with run():
                got = runs[name]()
            assert [t.shape for t in got] == [t.shape for t in truth]
            assert error(got, truth) < TOLERANCE, name
