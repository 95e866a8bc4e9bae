"""`mole-kernels train edlora`: from captioned pictures to a concept that `fuse` and `load_concept` read."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_kernels.cli import app
from mole_kernels.methods.mix_of_show.concept import load_concept
from tests.training.pipelines import sd_pipeline

# bit-for-bit promises are made for a CPU
os.environ["ACCELERATE_USE_CPU"] = "1"
TOKENS = ("--token", "<cat1>=<rand-0.013>", "--token", "<cat2>=one")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edlora")
    sd_pipeline().save_pretrained(root / "sd")
    (root / "set").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 9, 90)).save(root / "set" / f"{i}.png")
        (root / "set" / f"{i}.txt").write_text("<TOK>")
    return root


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path):
    """Run the command; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(out: Path, *args: object) -> tuple[int, str, str]:
        common = ["--model", work / "sd", "--data", work / "set", "--out", out, "--resolution", "16"]
        quick = ["--multiple", 8, "--steps", 2, "--batch-size", 2]
        words = ["mole-kernels", "train", "edlora", *common, *quick, *args]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as caught:
            app.main()
        out_text, err = capsys.readouterr()
        return caught.value.code or 0, out_text, err

    yield run
    torch.set_num_threads(threads)


def test_a_concept_is_trained_written_and_gone_on_with(cli, tmp_path: Path):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    code, out, err = cli(whole, *TOKENS, "--rank", 2, "--steps", 3, "--schedule", "constant")
    assert code == 0, err
    assert "<cat1> from <rand-0.013> <cat2> from one" in out and "concept <cat1> <cat2>: 2 tokens" in out
    concept = load_concept(whole)
    assert set(concept.embeddings) == {"<cat1>", "<cat2>"} and concept.expert.ranks() == {2}
    same = ("--rank", 2, "--schedule", "constant")
    assert cli(broken, *TOKENS, *same, "--steps", 1)[0] == 0
    assert "--resume" in cli(broken, *TOKENS, *same, "--steps", 3)[2]
    code, _, err = cli(broken, *TOKENS, *same, "--steps", 3, "--resume")
    assert code == 0, err
    again = load_concept(broken)
    for path, layer in concept.expert.layers.items():
        assert torch.equal(layer.up, again.expert.layers[path].up), path


def test_a_dry_run_checks_and_writes_nothing(cli, tmp_path: Path):
    code, out, err = cli(tmp_path / "x.pth", *TOKENS, "--dry-run")
    assert code == 0 and "nothing trained" in out and list(tmp_path.iterdir()) == [], err


BAD = {
    "no start": (["--token", "<cat1>"], "--token: expected TOKEN=START"),
    "twice": (["--token", "<a>=one", "--token", "<a>=one"], "two are called <a>"),
    "no masks": ([*TOKENS, "--attention", 0.01], "masks"),
    "alpha": ([*TOKENS, "--alpha", "nan"], "--alpha: expected a finite number"),
    "not in the captions": (["--token", "<dog>=nosuchwordatall"], ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_before_training(case: str, cli, tmp_path: Path):
    more, words = BAD[case]
    code, _, err = cli(tmp_path / "x.safetensors", *more)
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "x.safetensors").exists()


def test_the_name_of_the_output_says_its_kind(cli, tmp_path: Path):
    code, _, err = cli(tmp_path / "x.bin", *TOKENS)
    assert code == 2 and ".safetensors or .pth" in err
