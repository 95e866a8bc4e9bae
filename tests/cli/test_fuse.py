"""`mole-kernels fuse` on a pipeline saved to a folder."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mole_kernels.cli.app import app
from mole_kernels.errors import MoleError
from mole_kernels.io import load_expert
from mole_kernels.methods.mix_of_show.concept import save_concept
from tests.methods.concepts import random_concept
from tests.training.pipelines import sd_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuse")
    pipe = sd_pipeline()
    pipe.save_pretrained(root / "model")
    entries = []
    for i in range(2):
        concept = random_concept(pipe, i)
        save_concept(concept, root / f"{i}.pth")
        entries.append(
            {
                "lora_path": f"{i}.pth",
                "unet_alpha": 1.0,
                "text_encoder_alpha": 0.5,
                "concept_name": concept.name,
            }
        )
    (root / "config.json").write_text(json.dumps(entries))
    return root


def call(folder, *more):
    arguments = [
        "fuse",
        str(folder / "config.json"),
        "--model",
        str(folder / "model"),
        "--out",
        str(folder / "out"),
    ]
    return CliRunner().invoke(
        app, [*arguments, "--sampling-steps", "1", "--resolution", "16", "--template", "{}", *more]
    )


def test_a_folder_is_written_and_the_report_shown(folder):
    result = call(folder, "--dense", "--memory-mb", "0.1")
    assert result.exit_code == 0, result.output
    assert (
        "weight fusion" in " ".join(result.output.split())
        and "text encoder" in result.output
        and "rank up to 4" in result.output
    )
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {
        "fused.safetensors",
        "fused.embeddings.safetensors",
        "new_concept_cfg.json",
        "report.json",
        "pipeline",
    }
    assert len(load_expert(folder / "out/fused.safetensors").layers) == 40
    assert (folder / "out/pipeline/new_concept_cfg.json").read_text() == (
        folder / "out/new_concept_cfg.json"
    ).read_text()


def test_the_papers_optimiser_stands_beside_every_layer(folder, tmp_path):
    result = call(folder, "--lbfgs", "200", "--out", str(tmp_path))
    assert result.exit_code == 0 and "LBFGS" in result.output
    layers = json.loads((tmp_path / "report.json").read_text())["layers"]
    assert len(layers) == 40
    for layer in layers:
        # float32 as in the paper's code, so it may end a rounding above; never below
        assert layer["gradient"] <= layer["lbfgs"] + 1e-6 * layer["base"] <= layer["base"] * (1 + 1e-5)
        assert layer["lbfgs_seconds"] > 0 and layer["seconds"] > 0
    assert sum(layer["lbfgs"] < 0.9 * layer["by_weights"] for layer in layers) > 20


def test_a_plan_does_nothing(folder, tmp_path):
    result = call(folder, "--dry-run", "--memory-mb", "0.01", "--out", str(tmp_path / "new"))
    assert result.exit_code == 0 and "sampling runs" in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--resolution", "big"], "--resolution"),
        (["--memory-mb", "0"], "--memory-mb"),
        (["--memory-mb", "0.000001"], "at least"),
        (["--template", "a cat"], "templates"),
        (["--model", "/nowhere/at/all"], "no pipeline"),
    ],
)
def test_bad_options_are_named(folder, more, match):
    result = call(folder, *more)
    assert isinstance(result.exception, MoleError) and match in str(result.exception)
