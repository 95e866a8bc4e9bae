"""`mole-kernels merge` and `compress` as a user sees them."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mole_kernels.cli import app
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.writer import atomic_save
from mole_kernels.io import load_expert, save_expert

PATHS = [f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qkv"]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the entry point; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mole-kernels", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for seed, path in enumerate(found):
        draw = torch.Generator().manual_seed(seed)
        save_expert(
            Expert(
                {
                    p: LowRank(torch.randn(4, 20, generator=draw), torch.randn(24, 4, generator=draw), 0.5)
                    for p in PATHS
                }
            ),
            path,
        )
    return found


def test_merge(cli, files, tmp_path):
    code, out, err = cli("merge", *files, "--out", tmp_path / "m.safetensors")
    assert code == 0 and "3 layers, delta_mean: 0.5 one, 0.5 two" in out
    # no progress where the output is no terminal: the summary line alone
    assert err == "" and len(out.splitlines()) == 1
    assert load_expert(tmp_path / "m.safetensors").ranks() == {8}
    code, out, _ = cli(
        "merge",
        *files,
        "--out",
        tmp_path / "m.safetensors",
        "--mode",
        "ties",
        "--density",
        "0.5",
        "--weights",
        "1,-0.25",
        "--sign",
        "frequency",
        "--dtype",
        "float16",
        "--to",
        "kohya",
    )
    assert code == 0 and "ties: 1 one, -0.25 two" in out
    made = load_expert(tmp_path / "m.safetensors")
    assert made.dialect == "kohya" and made.layers[PATHS[0]].up.dtype == torch.float16
    code, out, _ = cli("merge", *files, "--out", tmp_path / "m.safetensors", "--mode", "svd", "--rank", "3")
    assert code == 0 and load_expert(tmp_path / "m.safetensors").ranks() == {3}


def test_compress_report_and_spectrum(cli, files, tmp_path):
    out_file = tmp_path / "c.safetensors"
    asked = ["compress", files[0], "--out", out_file, "--rank", 2, "--spectrum"]
    code, out, err = cli(*asked, "--layers", "--device", "a100", "--tokens", 1024)
    assert (
        code == 0
        and "4 → 2" in out
        and "1024 tokens on a100" in out
        and "not measured" in out
        and PATHS[0] in out
    )
    assert err == "" and "99.9%" in out
    assert load_expert(out_file).ranks() == {2}
    code, out, err = cli(*asked, "--device", "a100", "--json")
    assert code == 0 and err == ""
    data = json.loads(out)
    assert [layer["rank_after"] for layer in data["layers"]] == [2, 2, 2]
    assert data["predicted_for"]["device"] == "a100"
    assert [len(layer["values"]) for layer in data["spectrum"]["layers"]] == [4, 4, 4]
    before = sorted(os.listdir(tmp_path))
    code, out, _ = cli("compress", files[0], "--max-error", 0.3)
    assert (
        code == 0 and "largest rank" in out and PATHS[0] not in out and sorted(os.listdir(tmp_path)) == before
    )
    code, out, _ = cli("compress", files[0], "--spectrum")
    assert code == 0 and "largest rank" not in out and PATHS[0] in out
    code, out, _ = cli("compress", files[0], "--spectrum", "--json")
    assert code == 0 and list(json.loads(out)) == ["spectrum"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "{0}", "{1}", "--out", "{0}"], "the output is one of the inputs"),
        (["merge", "{0}", "--out", "{2}", "--mode", "mean"], "'mean' is not one of 'delta_mean'"),
        (["merge", "{0}", "{1}", "--out", "{2}", "--weights", "1,x"], "numbers joined by commas"),
        (["merge", "{0}", "{1}", "--out", "{2}", "--weights", "1"], "expected 2 numbers"),
        (["merge", "{0}", "{1}", "--out", "{2}", "--mode", "dare_ties", "--density", "2"], "in (0, 1]"),
        (["compress", "{0}", "--out", "{2}"], "exactly one of rank, energy and max_error"),
        (["compress", "{0}", "--out", "{2}", "--spectrum"], "exactly one of rank, energy"),
        (["compress", "{0}", "--spectrum", "{2}"], "extra argument"),
        (["compress", "{0}", "--rank", "2", "--report", "{2}"], "--report is now --json > FILE"),
        (["merge", "{0}", "{1}", "--out", "{0}/x/m.safetensors"], "one.safetensors is a file"),
        (
            ["merge", "{0}", "{1}", "--out", "{2}", "--pipeline", "NoPipeline"],
            "--pipeline: expected a pipeline class",
        ),
        (
            ["merge", "{0}", "{1}", "--out", "{2}", "--scale", "text_encoder=0.5"],
            "expected components among unet",
        ),
        (["merge", "{0}", "{1}", "--out", "{2}", "--scale", "unet:2"], "--scale: expected a number, or"),
        (["compress", "{0}", "--rank", "2", "--energy", "0.5"], "got rank, energy"),
        (["compress", "{0}", "--rank", "2", "--device", "abacus"], "one of h200"),
        (["compress", "{2}", "--rank", "2"], "no such file"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None,
)
def test_bad_input_is_two_lines_and_writes_nothing(arguments, words, cli, files, tmp_path):
    names = [*map(str, files), str(tmp_path / "out.safetensors")]
    code, _, err = cli(*(word.format(*names) for word in arguments))
    assert code == 2 and words in err and "Traceback" not in err and "\x1b" not in err
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "two.safetensors"]


def test_76_ctrl_c(cli, files, tmp_path, monkeypatch):
    @contextmanager
    def interrupted(title):
        def on_layer(i, total, path):
            if i == 2:
                raise KeyboardInterrupt

        yield on_layer

    monkeypatch.setattr("mole_kernels.cli.merge.layer_bar", interrupted)
    code, _, err = cli("merge", *files, "--out", tmp_path / "out.safetensors")
    assert code not in (0, 2) and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "two.safetensors"]


def test_two_dialects_of_one_model_and_scales_by_component(cli, tmp_path):
    """The pipeline is named as in Python; told from the keys where they tell it."""
    down, up = torch.randn(2, 8), torch.randn(24, 2)
    comfy = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": down,
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": up,
    }
    own = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": LowRank(torch.ones(1, 4), torch.ones(4, 1))}
    own["transformer.transformer_blocks.0.attn.to_q"] = LowRank(torch.ones(1, 8), torch.ones(8, 1))
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    atomic_save(comfy, files[0])
    save_expert(Expert(own), files[1])
    out = tmp_path / "m.safetensors"
    asked = ("merge", *files, "--out", out, "--weights", "1,1", "--scale", "text_encoder=0.5")
    code, _, err = cli(*asked)
    assert code == 2 and "--pipeline FluxPipeline" in err and not out.exists()
    assert cli(*asked, "--pipeline", "FluxPipeline")[0] == 0
    merged = load_expert(out).layers
    query = merged["transformer.transformer_blocks.0.attn.to_q"].delta()
    torch.testing.assert_close(query, up[:8] @ down + torch.ones(8, 8))
    assert torch.equal(
        merged["text_encoder.text_model.encoder.layers.0.mlp.fc1"].delta(), torch.full((4, 4), 0.5)
    )
    # commands that only look take the names as they are where the keys do not tell
    assert cli("inspect", files[0])[0] == 0
    assert cli("report", files[0], "--out", tmp_path / "r.html")[0] == 0
