"""The DiffLoRA recipe in its smallest form: from folders of cards to the table; started again, nothing is
trained twice.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["ACCELERATE_USE_CPU"] = "1"
FOLDER = Path(__file__).parents[2] / "python" / "recipes" / "difflora"
SMALLEST = {
    "hands": 3,
    "unseen": 2,
    "cards": 4,
    "asked": 2,
    "expert_steps": 1,
    "autoencoder_steps": 1,
    "denoiser_steps": 1,
}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("difflora_recipe", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_errors_are_one_for_the_mean_and_none_for_the_thing_itself(recipe):
    wanted, mean = torch.randn(4, 500), torch.randn(500)
    assert all(
        value == pytest.approx(1) for value in recipe.errors(mean.expand_as(wanted), wanted, mean).values()
    )
    assert all(value == 0 for value in recipe.errors(wanted, wanted, mean).values())
    # an error where the vector differs most counts in the first figure alone
    away = (wanted - mean).abs()
    got = wanted.clone()
    got.view(-1)[away.flatten().argmax()] += 10
    found = recipe.errors(got, wanted, mean)
    assert found["error of the top 1 %"] > 0.5 and found["error of the rest"] == 0


def test_hands_differ_by_their_hand_alone(recipe):
    one, other = recipe.draw_styles(2, 0)
    pixels = [
        recipe.cards(style, "train", 3, torch.Generator().manual_seed(1)) for style in (one, other, one)
    ]
    assert (
        pixels[0][1] == pixels[1][1]
        and torch.equal(pixels[0][0], pixels[2][0])
        and not torch.equal(pixels[0][0], pixels[1][0])
    )
    assert pixels[0][0].shape == (3, 3, 24, 24) and pixels[0][0].abs().max() <= 1
    assert recipe.draw_styles(1, 0) == [one] and recipe.draw_styles(1, 1) != [one]


@pytest.mark.slow
def test_a_seed_from_cards_to_the_table(recipe, tmp_path):
    plan = recipe.Plan(seeds=1, **SMALLEST)
    first = recipe.run_seed(plan, tmp_path, 0)
    table = recipe.combine([first["figures"]] * 2)
    assert "| predicted |" in recipe.markdown(table) and table["times faster"]["mean"] > 0
    folder = tmp_path / "seed0/loras/experts"
    experts = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    # beside each file how long it took
    assert {path.with_suffix(".json") for path in experts} | set(experts) == set(folder.iterdir())
    again = recipe.run_seed(plan, tmp_path, 0)["figures"]
    assert len(experts) == 5 and all(path.stat().st_mtime_ns == when for path, when in experts.items())
    assert all(
        again[key] == value for key, value in first["figures"].items() if key.startswith(("loss", "error"))
    )
    recipe.gallery(tmp_path, tmp_path / "pictures.png")
