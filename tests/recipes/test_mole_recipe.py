"""The MoLE recipe in its smallest form: every variant is trained, measured and tabled."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from mole_kernels.demo import data
from mole_kernels.io import load_bank, load_expert
from mole_kernels.training.checkpoint import list_checkpoints

os.environ["ACCELERATE_USE_CPU"] = "1"
SPEC = importlib.util.spec_from_file_location(
    "mole_recipe", Path(__file__).parents[2] / "python" / "recipes" / "mole" / "run.py"
)
SMALLEST = {
    "closeups": 8,
    "scenes": 8,
    "expert_steps": 1,
    "gate_steps": 1,
    "batch": 4,
    "held_out": 2,
    "captions": 2,
    "sampling_steps": 1,
}


@pytest.fixture(scope="module")
def recipe():
    module = importlib.util.module_from_spec(SPEC)
    # a dataclass looks its module up by name
    sys.modules[SPEC.name] = module
    SPEC.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_seed_from_pictures_to_the_table(recipe, tmp_path):
    threads = torch.get_num_threads()
    made = recipe.Settings(**SMALLEST)
    first = recipe.run_seed(3, made, tmp_path)
    torch.set_num_threads(threads)
    assert tuple(first["variants"]) == recipe.VARIANTS
    assert [list_checkpoints(tmp_path / "seed3" / f"run_{half}")[-1][0] for half in data.HALVES] == [1, 1]
    assert load_expert(tmp_path / "seed3" / "low.safetensors").ranks() == {16}
    assert load_bank(tmp_path / "seed3" / "mixture_mole.safetensors")[0].names == data.HALVES
    other = {
        **first,
        "variants": {
            name: {key: 2 * value for key, value in row.items()} for name, row in first["variants"].items()
        },
    }
    table = recipe.combine([first, other])
    # a loss is told against its own seed's base
    wanted = 100 * (first["variants"]["sum"]["loss all"] / first["variants"]["none"]["loss all"] - 1)
    assert table["sum"]["loss all"]["mean"] == pytest.approx(wanted) and table["sum"]["loss all"][
        "sd"
    ] == pytest.approx(0, abs=1e-9)
    lines = recipe.markdown(table).splitlines()
    assert len(lines) == 2 + len(recipe.VARIANTS) and lines[2].startswith("| none | – | – | – | – |")
    recipe.plot(table, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
