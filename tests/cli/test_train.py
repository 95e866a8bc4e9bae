"""`mole-kernels train mole`: the three stages from files to files, what they echo, and what stops them before
they begin.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mole_kernels.cli import app
from mole_kernels.errors import MoleValueError
from mole_kernels.io import load_expert, load_gates
from mole_kernels.methods.mole import PRESETS

# bit-for-bit promises are made for a CPU
os.environ["ACCELERATE_USE_CPU"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from pipelines import sd_pipeline, sdxl_pipeline

QUICK = [
    "--steps",
    2,
    "--accumulation",
    1,
    "--batch-size",
    2,
    "--resolution",
    "16",
    "--multiple",
    8,
    "--lr",
    0.01,
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    sd_pipeline().save_pretrained(root / "sd")
    sdxl_pipeline().save_pretrained(root / "sdxl")
    (root / "set").mkdir()
    for i, word in enumerate(("one", "two", "three", "four")):
        Image.new("RGB", (16 + 16 * (i % 2), 16), (60 * i, 9, 90)).save(root / "set" / f"{word}.png")
        (root / "set" / f"{word}.txt").write_text(word)
    return root


@pytest.fixture
def cli(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(stage, *args, code=0):
        monkeypatch.setattr(sys, "argv", ["mole-kernels", "train", "mole", stage, *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        said = capsys.readouterr()
        assert (caught.value.code or 0) == code, said
        return said.out if code == 0 else said.err

    yield run
    torch.set_num_threads(threads)


def common(work, out, model="sd"):
    return ["--model", work / model, "--data", work / "set", "--out", out, "--cache", work / "cache", *QUICK]


def test_all_three_stages_from_files_to_files(work, cli, tmp_path):
    said = cli("unet", *common(work, tmp_path / "base"), "--optimiser", "lion")
    assert (
        "stage 1" in said
        and "optimiser" in said
        and "lion" in said
        and "betas" in said
        and "(0.9, 0.99)" in said
    )
    before, after = (
        load_file(next((path / "unet").glob("*.safetensors"))) for path in (work / "sd", tmp_path / "base")
    )
    assert before.keys() == after.keys() and not any(
        torch.equal(before[key], after[key]) for key in before if key.endswith("weight")
    )
    options = ["--model", tmp_path / "base", *common(work, "x")[2:]]
    for name, rank, dialect in (("hand", 2, "kohya"), ("face", 3, "diffusers")):
        options[options.index("--out") + 1] = tmp_path / f"{name}.safetensors"
        said = cli("expert", *options, "--name", name, "--rank", rank, "--to", dialect)
        assert f"stage 2: expert {name}" in said and "4: 4 of 16x16" in said and "wrote" in said
    hand, face = (load_expert(tmp_path / f"{name}.safetensors") for name in ("hand", "face"))
    assert hand.ranks() == {2} and face.ranks() == {3} and hand.scales() == {1.0}
    assert any(key.startswith("lora_unet_down_blocks_0") for key in load_file(tmp_path / "hand.safetensors"))
    files = [f"hand={tmp_path / 'hand.safetensors'}", f"face={tmp_path / 'face.safetensors'}"]
    given = [part for one in files for part in ("--expert-file", one)]
    for kind, dialect in (("both", "official"), ("token", "native"), ("sample", "native")):
        options[options.index("--out") + 1] = tmp_path / f"{kind}.safetensors"
        cli("gates", *options, *given, "--gate-kind", kind, "--to", dialect)
    official = load_file(tmp_path / "both.safetensors")
    layers = {key.partition(".softmoe.")[0] for key in official}
    assert len(official) == 6 * len(layers) == 6 * len(hand.layers) and all(
        key.startswith("moe_lora_unet_") for key in layers
    )
    # official files have face first, whatever the order of training; ours keep the order given
    assert load_gates(tmp_path / "both.safetensors").expert_names == ("face", "hand")
    assert load_gates(tmp_path / "token.safetensors").expert_names == ("hand", "face")
    options[options.index("--out") + 1] = tmp_path / "x.safetensors"
    refused = cli(
        "gates",
        *options,
        *given,
        "--initial-gates",
        tmp_path / "token.safetensors",
        "--to",
        "official",
        code=2,
    )
    assert "expected token and sample gates in --initial-gates, got one kind of them" in refused
    halves = {
        kind: set(next(iter(load_gates(tmp_path / f"{kind}.safetensors").layers.values())).present())
        for kind in ("token", "sample")
    }
    assert halves == {"token": {"phi", "phi_bias"}, "sample": {"head", "head_bias"}}


def test_sdxl_and_going_on_from_a_checkpoint_and_from_gates(work, cli, tmp_path):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    more = ["--name", "face", "--rank", 2, "--schedule", "constant", "--warmup", 0]
    cli("expert", *common(work, whole, "sdxl"), *more, "--steps", 3)
    cli("expert", *common(work, broken, "sdxl"), *more, "--steps", 1)
    refused = cli("expert", *common(work, broken, "sdxl"), *more, "--steps", 3, code=2)
    assert "already holds checkpoints" in refused and "--resume" in refused
    refused = cli(
        "expert",
        *common(work, broken, "sdxl"),
        *more,
        "--rank",
        4,
        "--alpha",
        2,
        "--steps",
        3,
        "--resume",
        code=2,
    )
    assert "resume: rank: expected '2', got '4'" in refused
    said = cli("expert", *common(work, broken, "sdxl"), *more, "--steps", 3, "--resume")
    assert "of which 0 are to be made" in said
    one, two = load_file(whole), load_file(broken)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    # one expert alone is a mixture too
    gates = tmp_path / "gates.safetensors"
    cli("gates", *common(work, gates, "sdxl"), "--expert-file", f"face={whole}")
    cli(
        "gates",
        *common(work, tmp_path / "more.safetensors", "sdxl"),
        "--expert-file",
        f"face={whole}",
        "--initial-gates",
        gates,
        "--mixed-precision",
        "bfloat16",
    )
    first, second = load_file(gates), load_file(tmp_path / "more.safetensors")
    assert first.keys() == second.keys() and not all(torch.equal(first[key], second[key]) for key in first)


def test_a_dry_run_says_what_would_be_and_writes_nothing(work, cli, tmp_path):
    said = cli(
        "expert",
        *common(work, tmp_path / "x.safetensors"),
        "--name",
        "face",
        "--preset",
        "sd15",
        "--dry-run",
        "--cache",
        tmp_path / "c",
    )
    assert "the cache would take" in said and "256, 64 (scale 0.25)" in said and "mixed_precision" in said
    assert list(tmp_path.iterdir()) == []


def test_presets_are_what_they_say(cli, work, tmp_path):
    out = tmp_path / "x.safetensors"
    said = cli(
        "expert",
        "--model",
        work / "sd",
        "--data",
        work / "set",
        "--out",
        out,
        "--name",
        "hand",
        "--preset",
        "sd15",
        "--dry-run",
    )
    rows = dict(line.split(maxsplit=1) for line in said.splitlines() if len(line.split()) > 1)
    config = PRESETS["sd15"].experts["hand"].config
    assert (
        float(rows["lr"]) == config.lr
        and int(rows["steps"]) == config.steps
        and int(rows["accumulation"]) == config.accumulation
    )
    assert "scale 0.5" in said and "512x512" in said
    with pytest.raises(MoleValueError, match="sdxl has no stage 1"):
        from mole_kernels.cli.train import MoleUnetArgs
        from mole_kernels.cli.train_mole import run_unet

        run_unet(MoleUnetArgs(model="demo", data=tmp_path, out=out, preset="sdxl"))


BAD = {
    "no folder": (["--data", "nowhere"], "expected a folder of pictures"),
    "no model": (["--model", "nowhere/at/all"], "no pipeline can be read from it"),
    "steps": (["--steps", "-1"], "greater than or equal to 0"),
    "optimiser": (["--optimiser", "sgd"], "not one of 'adamw', 'lion'"),
    "resolution": (["--resolution", "wide"], "a side in pixels, or HEIGHTxWIDTH"),
    "multiple": (["--resolution", "20"], "a multiple of 8"),
    "rank": (["--rank", "9999"], "rank"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_said_before_anything_is_trained(case, work, cli, tmp_path):
    args, message = BAD[case]
    assert message in cli(
        "expert", *common(work, tmp_path / "x.safetensors"), "--name", "face", *args, code=2
    )
    assert not (tmp_path / "x.safetensors").exists()


def test_bad_experts_of_the_gates_and_bad_pictures(work, cli, tmp_path):
    options = common(work, tmp_path / "x.safetensors")
    assert "expected NAME=FILE" in cli("gates", *options, "--expert-file", "face.safetensors", code=2)
    assert "two are called face" in cli(
        "gates", *options, "--expert-file", "face=a", "--expert-file", "face=b", code=2
    )
    official = cli(
        "gates", *options, "--expert-file", "low=a", "--expert-file", "high=b", "--to", "official", code=2
    )
    assert "experts face and hand with --gate-kind both, got low, high" in official
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.png").write_text("no picture")
    Image.new("RGB", (16, 16)).save(bad / "y.png")
    (bad / "y.txt").write_text("y")
    options[options.index("--data") + 1] = bad
    assert "x.png has no caption" in cli("expert", *options, "--name", "a", code=2)
    assert "left out" in cli("expert", *options, "--name", "a", "--rank", 2, "--on-bad", "skip")
