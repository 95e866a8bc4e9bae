"""Measures of the demo: right on cases with known answers."""

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from sklearn.metrics import roc_auc_score

from mole_kernels.demo import classifier, data, evaluate, metrics
from mole_kernels.demo.model import load_pipeline


def test_auc_agrees_with_scikit_learn_ties_included():
    g = torch.Generator().manual_seed(0)
    score, positive = torch.randint(0, 20, (500,), generator=g).float(), torch.rand(500, generator=g) < 0.3
    assert evaluate.auc(score, positive) == pytest.approx(
        roc_auc_score(positive.numpy(), score.numpy()), abs=1e-9
    )
    assert math.isnan(evaluate.auc(score, torch.zeros(500, dtype=torch.bool)))


def test_perfect_maps_have_auc_one_and_swapped_maps_zero():
    boxes = data.scenes(data.load_split("held"), 32, torch.Generator().manual_seed(0)).boxes
    cover = torch.nn.functional.adaptive_avg_pool2d(boxes, (6, 18))
    maps = [{"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": cover}]
    table = evaluate.gate_auc(maps, boxes)
    assert table["attn1.to_q"] == {"own_vs_rest": 1.0, "own_vs_other": 1.0} == table["mean map"]
    swapped = evaluate.gate_auc([{"proj_in": cover.flip(1)}], boxes)
    assert swapped["proj_in"]["own_vs_other"] < 0.01


def test_gates_over_words_make_no_maps():
    assert (
        evaluate.demo_grid(108) == (6, 18)
        and evaluate.demo_grid(27) == (3, 9)
        and evaluate.demo_grid(5) is None
    )
    assert list(evaluate.picture_maps({"a": torch.zeros(2, 108, 2), "b": torch.zeros(2, 5, 2)})) == ["a"]
    assert (
        evaluate.picture_maps({"a": torch.arange(2 * 108 * 2.0).view(2, 108, 2)})["a"][1, 0, 2, 5]
        == (108 + 2 * 18 + 5) * 2
    )


def test_the_mean_map_weighs_layers_alike():
    fine, coarse = torch.zeros(1, 2, 6, 18), torch.ones(1, 2, 3, 9)
    assert torch.equal(evaluate.mean_map({"a": fine, "b": coarse}), torch.full((1, 2, 6, 18), 0.5))


def test_region_weights_share_out_the_picture():
    held = evaluate.make_held_out(load_pipeline(), 8)
    assert torch.allclose(held.regions[:, 1:].sum(1), held.regions[:, 0])
    assert held.noise.shape == (len(evaluate.TIMES), *held.latents.shape)


def test_losses_are_those_of_the_noise_prediction():
    pipe = load_pipeline()
    held = evaluate.make_held_out(pipe, 4)
    found = evaluate.region_loss(evaluate.scene_losses(pipe, held), held)
    errors = []
    for time, noise in zip(evaluate.TIMES, held.noise, strict=True):
        t = torch.full((4,), time)
        errors.append(
            (pipe.unet(pipe.scheduler.add_noise(held.latents, noise, t), t, held.text).sample - noise)
            .square()
            .mean()
        )
    assert found["all"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_captions_encode_one_by_one_as_together():
    pipe, captions = load_pipeline(), ["three blank seven", "one", "three blank seven", ""]
    together = evaluate.encode_captions(pipe, captions)
    assert torch.equal(together[0], together[2])
    assert torch.allclose(together[1:2], evaluate.encode_captions(pipe, ["one"]), atol=1e-5)


def test_accuracy_counts_slots_by_what_was_asked():
    labels, seen = torch.tensor([[1, 7, -1], [4, -1, 9]]), torch.tensor([[1, 2, -1], [4, 3, 9]])
    assert classifier.accuracy(seen, labels) == {"digits": 0.75, "low": 1.0, "high": 0.5, "blank": 0.5}


def seed_result(seed: int, base: float, both: float) -> dict:
    def regions(value: float) -> dict:
        return dict.fromkeys(evaluate.REGIONS, value)

    read = dict.fromkeys(metrics.READ, 0.5)
    return {
        "seed": seed,
        "loss": {
            "base": regions(base),
            "constant 0.1": regions(base * 0.99),
            "constant 0.2": regions(base * 0.97),
            "both": regions(both),
        },
        "scene_loss": {"base": [base + 0.01, base - 0.01, base], "both": [both + 0.012, both - 0.012, both]},
        "reading": {"base": read, "both": read},
        "gates": {"both": {"mean map": {"own_vs_rest": 0.7, "own_vs_other": 0.6}}},
        "constants": None,
        "seconds": {},
    }


def test_seeds_are_compared_with_their_own_base():
    found = metrics.combine_seeds([seed_result(0, 1.0, 0.9), seed_result(1, 2.0, 1.9)], "both")
    change = found["loss"]["both"]["all"]
    assert change["change_mean"] == pytest.approx(-7.5) and change["change_sd"] == pytest.approx(
        math.sqrt(12.5)
    )
    assert found["loss"]["best constant"]["which"] == "constant 0.2"
    assert all(z > 2 for z in found["paired_z"]["base"])
    assert found["reading"]["both"]["digits"] == {"mean": 0.5, "sd": 0.0, "seeds": [0.5, 0.5]}
