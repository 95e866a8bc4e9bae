"""The script that made the shipped weights runs from scratch, and its base learns."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from mole_kernels.demo import evaluate
from mole_kernels.demo.model import load_pipeline, read_facts

TOOL = Path(__file__).parents[2] / "python" / "tools" / "train_demo_base.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_demo_base", TOOL)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_a_short_run_from_nothing_gives_a_pipeline_and_lowers_the_loss(tool, tmp_path):
    facts = tool.make_assets(tmp_path, tool.QUICK, seed=0)
    first, last = facts["base_loss"]
    assert last < 0.5 * first
    assert read_facts(tmp_path) == facts
    assert evaluate.generate_pictures(load_pipeline(tmp_path), ["one two three"], seed=0, steps=2).shape == (
        1,
        3,
        24,
        72,
    )


def test_the_average_swaps_in_and_out(tool):
    p = torch.nn.Parameter(torch.zeros(3))
    average = tool.Average([p], decay=0.5)
    p.data.fill_(4.0)
    average.update()
    average.swap()
    # the first step's decay is 2/11, not 0.5, so that the random start is soon forgotten
    assert torch.allclose(p.data, torch.full((3,), 4 * 9 / 11))
    average.swap()
    assert torch.equal(p.data, torch.full((3,), 4.0))


def test_the_rate_rises_and_falls(tool):
    rates = [tool.rate(i / 100) for i in range(101)]
    assert rates[0] < 0.1 < 0.9 < rates[2] and rates[100] < 0.03
    assert rates[2:] == sorted(rates[2:], reverse=True)
