"""Regions in joint attention, adapter features by region, and the layout drawn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.methods.mix_of_show.adapters import parse_adapter_weights, weigh
from mole_kernels.methods.mix_of_show.joint import joint_mask, regional_flux
from mole_kernels.methods.mix_of_show.regions import Region, shares
from mole_kernels.reports.layout import layout_over_picture
from tests.tiny_models import tiny_flux

REGIONS = [Region("left", box=(0, 0, 1, 0.5)), Region("low", box=(0.5, 0, 1, 1))]


@pytest.mark.parametrize("overlap", ["mean", "overwrite"])
def test_who_sees_whom_one_by_one(overlap):
    table, lengths = shares(REGIONS, 2, 4, overlap=overlap), [2, 3, 1]
    mask = joint_mask(table, lengths)
    owner = [("text", s) for s, n in enumerate(lengths) for _ in range(n)] + [("place", p) for p in range(8)]
    for i, (kind, a) in enumerate(owner):
        for j, (other, b) in enumerate(owner):
            if kind == other == "place":
                want = True
            elif kind == other == "text":
                want = a == b
            else:
                s, p = (a, b) if kind == "text" else (b, a)
                want = bool(table[s, p] > 0)
            assert bool(mask[i, j]) == want, (i, j)
    with pytest.raises(MoleShapeError, match=r"table \[2, places\]"):
        joint_mask(table, [1, 2])


def run(flux, texts, mask, places=6, side=(2, 3)):
    g = torch.Generator().manual_seed(1)
    ids = torch.zeros(places, 3)
    ids[:, 1], ids[:, 2] = torch.arange(places) // side[1], torch.arange(places) % side[1]
    with torch.no_grad():
        return flux(
            hidden_states=torch.randn(1, places, 4, generator=g),
            encoder_hidden_states=texts,
            timestep=torch.tensor([0.5]),
            pooled_projections=torch.ones(1, 20),
            img_ids=ids,
            txt_ids=torch.zeros(texts.shape[1], 3),
            joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
        ).sample


def fake_pipe(flux):
    return SimpleNamespace(transformer=flux, vae_scale_factor=8)


def test_a_text_that_covers_nothing_changes_nothing_and_one_that_covers_does():
    """Through the real transformer; the picture's tokens still see one another, so a region's text reaches
    the others by them.
    """
    flux = tiny_flux()
    g = torch.Generator().manual_seed(2)
    texts = [torch.randn(3, 24, generator=g) for _ in range(3)]
    pooled = torch.ones(1, 20)

    def draw(regions, embeds):
        made = regional_flux(fake_pipe(flux), "x", regions, height=32, width=48, embeds=embeds, pooled=pooled)
        return run(flux, made["prompt_embeds"], made["joint_attention_kwargs"]["attention_mask"])

    thin = Region("thin", box=(0, 0, 0.1, 1))
    alone = run(flux, texts[0][None], None)
    torch.testing.assert_close(draw([thin], texts[:2]), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw([thin], [texts[0], texts[2]]), alone, rtol=1e-4, atol=1e-5)
    everything = draw([Region("all")], texts[:2])
    torch.testing.assert_close(everything, run(flux, texts[1][None], None), rtol=1e-4, atol=1e-5)
    left = [Region("left", box=(0, 0, 1, 1 / 3))]
    a, b = draw(left, texts[:2]), draw(left, [texts[0], texts[2]])
    assert not torch.allclose(a, alone, atol=1e-3) and not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda p: regional_flux(p, "x", [], height=32, width=32), MoleTypeError, "at least one"),
        (
            lambda p: regional_flux(SimpleNamespace(), "x", REGIONS, height=32, width=32),
            MoleTypeError,
            "a transformer of joint",
        ),
        (lambda p: regional_flux(p, "x", REGIONS, height=40, width=32), MoleValueError, "multiples of 16"),
        (
            lambda p: regional_flux(p, "x", REGIONS, height=32, width=32, embeds=[torch.ones(1, 2)]),
            MoleShapeError,
            "3 texts",
        ),
    ],
)
def test_bad_joint_regions_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(fake_pipe(object()))


def test_adapter_weights_by_region():
    weights = parse_adapter_weights("[0, 0, 8, 4]-0.5| [4,0,8,8]-2", 8, 8)
    assert (
        weights == [((0, 0, 1, 0.5), 0.5), ((0.5, 0, 1, 1), 2.0)] and parse_adapter_weights(" ", 8, 8) == []
    )
    big, small = weigh([torch.ones(1, 3, 4, 4), torch.ones(2, 3, 2, 2)], weights, elsewhere=0.25)
    assert (
        small[0, 0].tolist() == [[0.5, 0.25], [2.0, 2.0]]
        and big[0, 1].tolist() == [[0.5, 0.5, 0.25, 0.25]] * 2 + [[2.0] * 4] * 2
    )
    for text, at in (
        ("[0,0,8,4]", 0),
        ("[0,0,8,4]-x", 0),
        ("[0,0,8,8]-1|0,0,8,4-1", 12),
        ("[0,0,8,8]-inf", 0),
    ):
        with pytest.raises(MoleValueError, match=f"character {at}:"):
            parse_adapter_weights(text, 8, 8)
    # past the edge, as the official reader takes it: cut there
    assert parse_adapter_weights("[0,0,9,4]-1", 8, 8) == parse_adapter_weights("[0,0,8,4]-1", 8, 8)
    with pytest.raises(MoleShapeError, match=r"\[B,C,h,w\]"):
        weigh([torch.ones(3, 2, 2)], weights)


def test_the_layout_is_drawn_for_boxes_and_masks():
    mask = torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    made = layout_over_picture(torch.rand(3, 16, 24), [*REGIONS, Region("mask", mask=mask)], "the whole")
    drawn = made.axes[1]
    assert [t.get_text() for t in drawn.get_legend().get_texts()] == ["left", "low", "mask"] and len(
        drawn.collections
    ) == 3
    with pytest.raises(MoleShapeError, match=r"\[3,H,W\]"):
        layout_over_picture(torch.rand(16, 24), REGIONS)
