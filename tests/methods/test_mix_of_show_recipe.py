"""The recipe's concepts are what their captions say, and one seed of it runs from pictures to table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mole_kernels.demo import data

pytest.importorskip("sklearn")
RECIPE = Path(__file__).parents[2] / "python/recipes/mix_of_show/run.py"
# dataclasses look their module up, so it has to be known by its name
spec = importlib.util.spec_from_file_location("mix_of_show_recipe", RECIPE)
assert spec is not None and spec.loader is not None
run = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
known = run.known


@pytest.mark.parametrize("name", known.NAMES)
def test_pictures_show_the_concept_in_its_slot_and_colours(name):
    made = known.pictures(name, 6, torch.Generator().manual_seed(0))
    tokens, digit, place, card, _ = known.CONCEPTS[name]
    assert made.pixels.shape == (6, 3, 24, 72) and made.pixels.abs().max() <= 1
    for caption, labels in zip(made.captions, made.labels.tolist()):
        assert caption == f"{data.caption_of(labels[:1])} {' '.join(tokens)}" and labels[place] == digit
        assert [k for k in range(1, 3) if labels[k] >= 0] == [place]
    inside = (made.pixels[:, :, 6:18, 24 * place + 6 : 24 * place + 18] + 1) / 2
    # what is no ink; ink fades into the card
    near = (inside - torch.tensor(card)[:, None, None]).abs().amax(1) < 0.2
    assert near.float().mean() > 0.15


def test_one_seed_runs_and_goes_on(tmp_path):
    made = run.Settings(
        seeds=1,
        pictures=4,
        steps=1,
        batch=2,
        drawn=2,
        sampling_steps=1,
        fusion_steps=1,
        noise_runs=1,
        classifier_steps=1,
    )
    found = run.run_seed(0, made, tmp_path)
    assert set(found["ways"]) == set(run.WAYS) and len(found["ways"]["gradient fusion"]) == 4
    table = run.combine([found, found])
    assert run.markdown(table).count("\n") == 16 and "–" in run.markdown(table)
    names = {path.name for path in (tmp_path / "seed0").iterdir()}
    assert {"amber.pth", "navy.pth", "fused", "pictures.png", "run_amber"} <= names
    run.plot(table, tmp_path / "plot.png")
    assert found["objective"]["unet"]["fused"] <= found["objective"]["unet"]["by_weights"]
