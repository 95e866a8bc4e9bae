"""Regions: the paper's string and JSON, what is malformed named by its place, boxes and masks on grids."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mole_kernels.errors import MoleError, MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.methods.mix_of_show.regions import Region, parse_regions, read_regions, shares, token_grid


def test_the_papers_string():
    text = "[a <potter1>, near the castle]-*-[low quality]-*-[0, 0, 256, 128] | [a cat]-*-[]-*-[]|[x]-*-[y]-*-[1.5,2,512.0,.5e0]".replace(
        ".5e0", "3"
    )
    first, second, third = parse_regions(text, 512, 256)
    assert (first.prompt, first.negative, first.box) == (
        "a <potter1>, near the castle",
        "low quality",
        (0, 0, 0.5, 0.5),
    )
    assert (second.prompt, second.negative, second.box) == ("a cat", "", (0, 0, 1, 1))
    assert third.box == (1.5 / 512, 2 / 256, 1.0, 3 / 256)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("[a]-*-[b]-*-[]|", [("a", "b", (0, 0, 1, 1))]),
        ("[a]-*-[]-*-[]| \n", [("a", "", (0, 0, 1, 1))]),
        ("[a]-*-[b]-*-[]||[c]-*-[d]-*-[]", [("a", "b", (0, 0, 1, 1))]),
        ("[a]-*-[b]-*-[12, 36, 1100, 600]", [("a", "b", (12 / 1024, 36 / 2048, 1, 600 / 2048))]),
        ("a <x1>, by -the- sea-*-b-*-[0, 0, 512, 4000]", [("a <x1>, by -the- sea", "b", (0, 0, 0.5, 1))]),
        ("[a [b] c]-*-d]-*-[0,0,1.024e3,1]", [("a b c", "d", (0, 0, 1, 1 / 2048))]),
    ],
)
def test_the_papers_irregular_strings_are_read_as_its_code_reads_them(text, want):
    regions = parse_regions(text, 1024, 2048)
    assert [(r.prompt, r.negative, r.box) for r in regions] == want


@pytest.mark.parametrize(
    "text, at, words",
    [
        ("", 0, "three fields"),
        ("[a]-*-[b]", 0, r"three fields .*, got 2"),
        ("[a]-*-[b]-*-[0,0,1,1]|[c]-*-[d]", 22, "three fields"),
        ("[]-*-[b]-*-[]", 0, "a prompt, got none"),
        ("[a]-*-[b]-*-0,0,8,8", 12, r"the box in \[ \]"),
        ("|[a]-*-[b]-*-[]", 0, "three fields"),
        ("[a]-*-[b]-*-[0,0,1]", 13, "four numbers"),
        ("[a]-*-[b]-*-[0,0,1,__import__('os')]", 19, "a number of pixels"),
        ("[a]-*-[b]-*-[0,0,1e9999,1]", 17, "a number of pixels"),
        ("[a]-*-[b]-*-[0,0,0,8]", 13, "y0 < y1"),
        ("[a]-*-[b]-*-[9,0,12,8]", 13, "inside the 8 x 8 picture"),
        ("[a]-*-[b]-*-[-1,0,8,8]", 13, "inside"),
        ("[a]-*-[b]-*-[6,0,2,8]", 13, "y0 < y1"),
    ],
)
def test_malformed_strings_name_the_place(text, at, words):
    with pytest.raises(MoleValueError, match=rf"character {at}\b.*{words}"):
        parse_regions(text, 8, 8)


@given(st.text(alphabet="[]-*|,.0123456789 ab'\n_(", max_size=60))
def test_no_string_does_anything_but_parse_or_be_refused(text):
    try:
        regions = parse_regions(text, 64, 64)
    except MoleError:
        return
    assert all(region.prompt for region in regions)


def test_the_json_form():
    held = [
        {"prompt": "a", "negative": "b", "box": [0, 0.25, 1, 0.5], "experts": {"anna": 0.8}},
        {"prompt": "c"},
    ]
    for source in (held, json.dumps(held)):
        first, second = read_regions(source)
        assert (first.prompt, first.negative, first.box, first.experts) == (
            "a",
            "b",
            (0, 0.25, 1, 0.5),
            {"anna": 0.8},
        )
        assert (second.box, second.experts) == ((0, 0, 1, 1), None)


@pytest.mark.parametrize(
    "source, error, words",
    [
        ("[{", MoleValueError, "character 2.*no JSON"),
        ('{"prompt": "a"}', MoleTypeError, "a list of regions, got dict"),
        ("[3]", MoleTypeError, r"regions\[0\].*got int"),
        ('[{"prompt": "a"}, {"negative": "b"}]', MoleValueError, r'regions\[1\]: expected a "prompt"'),
        ('[{"prompt": " "}]', MoleValueError, "a prompt, got none"),
        ('[{"prompt": "a", "colour": 1}]', MoleValueError, "got colour"),
        ('[{"prompt": "a", "box": [0, 0, 1]}]', MoleValueError, "four finite numbers"),
        ('[{"prompt": "a", "box": [0, 0, NaN, 1]}]', MoleValueError, "four finite numbers"),
        ('[{"prompt": "a", "box": [0, 0, 2, 1]}]', MoleValueError, "inside the picture"),
        ('[{"prompt": "a", "experts": {"x": "much"}}]', MoleValueError, r"experts\.x"),
    ],
)
def test_bad_json_names_region_and_field(source, error, words):
    with pytest.raises(error, match=words):
        read_regions(source)


@pytest.mark.parametrize(
    "box, want",
    [
        ((0, 0, 1, 1), (0, 0, 4, 6)),
        ((0.25, 0, 0.75, 0.5), (1, 0, 3, 3)),
        ((0.3, 0.3, 0.9, 0.9), (2, 2, 3, 5)),
        ((0.0, 0.0, 0.2, 1.0), (0, 0, 0, 6)),
    ],
)
def test_boxes_cover_whole_places_only(box, want):
    y0, x0, y1, x1 = want
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[y0:y1, x0:x1] = True
    assert torch.equal(Region("a", box=box).cover(4, 6), expected)


def test_touching_boxes_share_no_place_and_leave_none_out():
    for n in (8, 10, 30, 64):
        parts = [Region("a", box=(0, i / n, 1, (i + 1) / n)).cover(2, n) for i in range(n)]
        assert torch.equal(torch.stack(parts).sum(0), torch.ones(2, n, dtype=torch.int64))


def test_masks_of_any_size_cover_by_half():
    mask = torch.zeros(8, 8)
    mask[:, :3] = 1
    assert Region("a", mask=mask).cover(2, 4)[0].tolist() == [True, True, False, False]
    assert Region("a", mask=mask).cover(16, 16).sum() == 16 * 6
    with pytest.raises(MoleShapeError, match=r"\[H,W\]"):
        Region("a", mask=torch.ones(1, 2, 2))


def test_shares_by_a_loop_over_places():
    regions = [
        Region("a", box=(0, 0, 0.5, 0.75)),
        Region("b", box=(0.25, 0.25, 1, 1)),
        Region("c", box=(0.25, 0.25, 0.5, 0.5)),
        Region("thin", box=(0, 0, 0.1, 1)),
    ]
    for overlap in ("mean", "overwrite"):
        table = shares(regions, 4, 8, overlap=overlap)
        for y in range(4):
            for x in range(8):
                covering = [i for i, r in enumerate(regions) if r.cover(4, 8)[y, x]]
                want = torch.zeros(5)
                if not covering:
                    want[0] = 1
                elif overlap == "mean":
                    want[[i + 1 for i in covering]] = 1 / len(covering)
                else:
                    want[covering[-1] + 1] = 1
                assert torch.equal(table[:, 8 * y + x], want)
    with pytest.raises(MoleValueError, match="'mean' or 'overwrite'"):
        shares(regions, 4, 8, overlap="blend")


@pytest.mark.parametrize(
    "tokens, size, want",
    [
        (4096, (512, 512), (64, 64)),
        (1024, (512, 512), (32, 32)),
        (77 * 128, (77 * 8, 1024), (77, 128)),
        (24, (256, 384), (4, 6)),
        (15, (40, 24), (5, 3)),
    ],
)
def test_grids_of_tokens(tokens, size, want):
    assert token_grid(tokens, *size) == want


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(MoleShapeError, match="a grid of 77 tokens"):
        token_grid(77, 512, 512)
