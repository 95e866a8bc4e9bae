"""`mole-kernels evaluate` on small folders with models of random weights."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from mole_kernels.cli.app import app

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    for name, shift in (("ours", 0), ("theirs", 40), ("real", 80)):
        (root / name).mkdir()
        rows = []
        for i in range(4):
            Image.new("RGB", (24, 24), (30 * i + shift, 60, 90)).save(root / name / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": f"picture {i % 2}"})
        (root / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def call(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_figures_comparison_page_and_sheet(root, tmp_path):
    out, html, sheet = tmp_path / "f.json", tmp_path / "p.html", tmp_path / "s.png"
    arguments = ["--metric", "clip-t=random", "--metric", "clip-i=random", "--metric", "diversity=random"]
    arguments += ["--reference", root / "real", "--against", f"theirs={root / 'theirs'}"]
    result = call(root / "ours", *arguments, "--out", out, "--html", html, "--sheet", sheet)
    assert result.exit_code == 0, result.output
    assert "CLIP-T" in result.output and "seed 0" in result.output
    figures = json.loads(out.read_text())
    assert [row["metric"] for row in figures["results"]["pictures"]] == ["CLIP-T", "CLIP-I", "diversity"]
    assert figures["results"]["theirs"][0]["revision"] == "seed 0"
    # diversity has no value for a picture, so nothing to pair
    assert [c["metric"] for c in figures["against"]["theirs"]] == ["CLIP-T", "CLIP-I"]
    assert html.read_text().startswith("<!doctype html>") and Image.open(sheet).width > 100
    printed = json.loads(call(root / "ours", *arguments, "--json").output)
    assert printed == figures


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--metric", "beauty=random"], "clip-t, clip-i"),
        (["--metric", "clip-t"], "METRIC=MODEL"),
        (["--metric", "dino=random"], "--reference"),
        (["--metric", "clip-t=NOWHERE"], "no model can be read"),
        (["--metric", "face=NOWHERE", "--reference", "REAL"], "InsightFace"),
        (["--metric", "fid=none.pth", "--reference", "REAL"], "Inception"),
        (["--metric", "image-reward=NOWHERE"], "med_config"),
        (["--metric", "clip-t=random", "--against", "pictures=REAL"], "another name"),
        (["--metric", "clip-t=random", "--against", "few=FEW"], "same prompts"),
        (["--metric", "clip-t=random", "--against", "none=NOWHERE"], "no folder"),
    ],
)
def test_what_cannot_be_done_is_named_and_nothing_is_written(root, tmp_path, arguments, match):
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (8, 8)).save(few / "0.png")
    words = {"REAL": root / "real", "NOWHERE": tmp_path / "nowhere", "FEW": few}
    filled = []
    for argument in arguments:
        for word, path in words.items():
            argument = argument.replace(word, str(path))
        filled.append(argument)
    result = call(root / "ours", *filled, "--out", tmp_path / "out.json")
    assert result.exit_code != 0 and match in str(result.exception)
    assert not (tmp_path / "out.json").exists()


def test_fid_and_kid(root):
    pytest.importorskip("torchmetrics")
    result = call(
        root / "ours",
        "--metric",
        "fid=random",
        "--metric",
        "kid=random",
        "--reference",
        root / "real",
        "--json",
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["results"]["pictures"]
    assert [row["better"] for row in rows] == ["lower", "lower"] and rows[0]["value"] > 0
