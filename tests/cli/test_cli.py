"""The commands as a user sees them: what they print, what they return, and how they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import mole_kernels
from mole_kernels.cli import app, doctor
from mole_kernels.errors import MoleWarning
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import GateFile, GateTensors, load_expert, save_bank, save_expert, save_gates
from tests.raw import entry, raw, write

ESC = "\x1b"


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


def expert(k: int = 320, n: int = 320) -> Expert:
    base = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    layers = {f"{base}.to_{x}": LowRank(torch.ones(2, k), torch.full((n, 2), 0.5), 0.25) for x in "qk"}
    proj = LowRank(torch.ones(4, k), torch.ones(n, 4), 1.0, conv=True)
    return Expert(
        layers | {"unet.down_blocks.0.attentions.0.proj_in": proj},
        metadata={"note": f"{ESC}[31m[bold]x[/bold] <b>"},
    )


def gates(k: int = 320, n: int = 320) -> GateFile:
    layer = GateTensors(
        torch.ones(2, k), torch.tensor([0.0, 2.0]), torch.ones(2, n), torch.tensor([-2.0, 0.0])
    )
    return GateFile(dict.fromkeys(list(expert().layers), layer), ("face", "hand"))


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_inspect_an_expert(dialect: str, cli, tmp_path: Path):
    save_expert(expert(), tmp_path / "face.safetensors", dialect)  # type: ignore[arg-type]
    code, out, err = cli("inspect", tmp_path / "face.safetensors")
    assert (code, err) == (0, "")
    found = rows(out)
    assert ["dialect", dialect] in found
    # ‖ΔW‖ of to_q and to_k is 0.25·2·0.5·320 = 80 each, of proj_in 4·320 = 1280
    # a kohya file has one alpha, here 0.5
    scales = ["0.125,", "0.25"] if dialect == "kohya" else ["0.25,", "1"]
    assert ["face", "3", "unet", "2,", "4", *scales, "1285", "5,120"] in found
    assert ["unet", "…attn1.to_q", "1", "320", "→", "320", "2", "0.25", "80"] in found
    assert [
        "unet",
        "…proj_in",
        "1",
        "320",
        "→",
        "320",
        "4",
        scales[0].strip(",") if dialect == "kohya" else "1",
        "1280",
    ] in found
    assert ESC not in out and "\\x1b[31m[bold]x[/bold] <b>" in out


def test_inspect_every_layer(cli, tmp_path: Path):
    save_expert(expert(), tmp_path / "face.safetensors")
    _, out, _ = cli("inspect", tmp_path / "face.safetensors", "--layers")
    for path in expert().layers:
        assert path in out


def test_inspect_gates_and_single_file(cli, tmp_path: Path):
    save_gates(gates(), tmp_path / "g.safetensors", "official")
    save_bank(ExpertBank({"face": expert(), "hand": expert()}), tmp_path / "b.safetensors", gates())
    for file, dialect in (("g", "official (JiePKU/MoLE)"), ("b", "native; experts from memory")):
        code, out, _ = cli("inspect", tmp_path / f"{file}.safetensors", "--layers")
        assert code == 0
        assert ["dialect", *dialect.split()] in rows(out)
        # sigmoid of the biases: 0 and 2 of the token gates, -2 and 0 of the sample gates
        face = next(line for line in out.splitlines() if line.startswith("face") and "‖Φ‖" in line)
        assert "0.50 (0.50 to 0.50)" in face and "0.12 (0.12 to 0.12)" in face
        assert "phi [2, 320], phi_bias [2], head [2, 320], head_bias [2]" in out


@pytest.mark.parametrize("model", ["sd15", "folder", "unet-folder"])
def test_inspect_against_a_model(model: str, cli, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    from mole_kernels.cli.models import KNOWN

    if model != "sd15":
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(KNOWN["sd15"]["unet"][2])
        unet.save_config(tmp_path / "pipe" / "unet")
        index = {
            "_class_name": "X",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["os", "system"],
            "extra": [None, None],
        }
        (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
        model = str(tmp_path / "pipe" / ("unet" if model == "unet-folder" else ""))
    save_bank(ExpertBank({"face": expert(), "hand": expert()}), tmp_path / "b.safetensors", gates())
    code, out, _ = cli("inspect", tmp_path / "b.safetensors", "--model", model)
    assert code == 0
    assert rows(out)[-3:] == [
        ["face", "3", "of", "3", "all"],
        ["hand", "3", "of", "3", "all"],
        ["gates", "3", "of", "3", "all"],
    ]


def test_inspect_what_does_not_fit_the_model(cli, tmp_path: Path):
    pytest.importorskip("diffusers")
    save_expert(expert(k=7), tmp_path / "wide.safetensors")
    code, out, err = cli("inspect", tmp_path / "wide.safetensors", "--model", "sd15")
    assert code == 2 and "does not fit" in out
    assert "expected down [R,320] and up [320,R]" in err
    part = Expert(dict(expert().layers) | {"unet.nowhere.to_q": LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    save_expert(part, tmp_path / "part.safetensors")
    code, out, err = cli("inspect", tmp_path / "part.safetensors", "--model", "sd15")
    assert code == 0 and ["part", "3", "of", "4", "all", "but", "1"] in rows(out)
    assert rows(out)[-1] == ["unet.nowhere.to_q"]
    save_gates(gates(k=7), tmp_path / "g.safetensors")
    _, out, _ = cli("inspect", tmp_path / "g.safetensors", "--model", "sd15")
    assert ["gates", "0", "of", "3", "all", "but", "3"] in rows(out)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.safetensors", b"", "an empty file"),
        ("text.safetensors", b"hello, this is no model", "header says"),
        ("x.ckpt", b"", "mole-kernels convert"),
        ("key.safetensors", raw({f"{ESC}]0;owned": entry()}, bytes(4)), "\\x1b]0;owned"),
        ("stray.safetensors", raw({"[red]stray[/red]": entry()}, bytes(4)), "'[red]stray[/red]'"),
        ("none", None, "no such file"),
    ],
)
def test_inspect_a_broken_file(name: str, content: bytes | None, words: str, cli, tmp_path: Path):
    path = tmp_path / name if content is None else write(tmp_path, content, name)
    code, out, err = cli("inspect", path)
    assert (code, out) == (2, "")
    assert str(path) in err and words in err
    assert "Traceback" not in err and ESC not in err
    assert len(err.splitlines()) <= 2


@pytest.mark.parametrize("model", ["sd99", "/nowhere", "empty", "bad-index", "bad-config", "no-model"])
def test_inspect_against_no_model(model: str, cli, tmp_path: Path):
    pytest.importorskip("diffusers")
    save_expert(expert(), tmp_path / "face.safetensors")
    folder = tmp_path / model.strip("/")
    if model not in ("sd99", "/nowhere"):
        folder.mkdir()
        model = str(folder)
    if model.endswith("bad-index"):
        (folder / "model_index.json").write_text("[" * 100_000)
    if model.endswith("bad-config"):
        (folder / "config.json").write_text("[]")
    if model.endswith("no-model"):
        (folder / "config.json").write_text('{"_class_name": "DiffusionPipeline"}')
    code, _, err = cli("inspect", tmp_path / "face.safetensors", "--model", model)
    assert code == 2
    assert "Traceback" not in err and len(err.splitlines()) <= 2


def test_doctor(cli):
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    for word in ("torch", torch.__version__, "python", "extension", "stacked", "reference", "in use"):
        assert word in out


def test_doctor_as_json(cli):
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["healthy"] is True
    assert found["versions"]["torch"] == torch.__version__
    checks = {(check["backend"], check["device"]): check for check in found["backends"]}
    assert {"reference", "stacked", "cpu"} <= {name for name, _ in checks}
    for check in checks.values():
        assert check["usable"] == (check["reason"] is None) == (check["right"] is not None)
        assert check["error"] is None or 0 <= check["error"] < 1e-5
    assert found["in_use"]["cpu"] == next(
        c["backend"] for c in found["backends"] if c["device"] == "cpu" and c["usable"]
    )
    assert found["extension"]["usable"] == checks["cpu", "cpu"]["usable"]


def test_doctor_finds_a_backend_that_computes_wrongly(cli, monkeypatch: pytest.MonkeyPatch):
    from mole_kernels.backends.select import BACKENDS

    real = BACKENDS["stacked"]
    wrong = types.SimpleNamespace(
        name="stacked",
        reason_against=real.reason_against,
        backward=real.backward,
        forward=lambda call: (lambda out: out._replace(y=out.y + 1e-3))(real.forward(call)),
    )
    monkeypatch.setitem(BACKENDS, "stacked", wrong)
    code, out, _ = cli("doctor")
    assert code == 1 and "WRONG" in out
    assert not json.loads(cli("doctor", "--json")[1])["healthy"]


def test_doctor_says_why_a_backend_is_not_usable(cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "report", lambda device: {"cpu": f"no {ESC}[31mcompiler", "stacked": None})
    code, out, _ = cli("doctor")
    assert code == 0 and "compiler" in out and ESC not in out


def test_convert(cli, tmp_path: Path):
    save_expert(expert(), tmp_path / "a.safetensors", "kohya")
    code, out, _ = cli(
        "convert",
        tmp_path / "a.safetensors",
        "--out",
        tmp_path / "b.safetensors",
        "--to",
        "diffusers",
        "--dtype",
        "bfloat16",
    )
    assert code == 0 and f"wrote {tmp_path / 'b.safetensors'}" in out and "3 layers, kohya → diffusers" in out
    found = load_expert(tmp_path / "b.safetensors")
    assert found.dialect == "diffusers"
    assert {layer.down.dtype for layer in found.layers.values()} == {torch.bfloat16}
    code, _, err = cli(
        "convert", tmp_path / "none.safetensors", "--out", tmp_path / "c.safetensors", "--to", "kohya"
    )
    assert code == 2 and "no such file" in err
    code, _, err = cli(
        "convert", tmp_path / "a.safetensors", "--out", tmp_path / "c.safetensors", "--to", "peft"
    )
    assert code == 2 and "--to" in err


def test_demo_is_called_with_what_was_said(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []
    monkeypatch.setitem(
        sys.modules,
        "mole_kernels.demo.run",
        types.SimpleNamespace(run_demo=lambda **given: seen.append(given)),
    )
    assert cli("demo", "--out", tmp_path / "x", "--quick", "--seeds", 5)[0] == 0
    assert seen == [{"out": tmp_path / "x", "quick": True, "seeds": 5}]
    assert cli("demo", "--seeds", 0)[0] == 2


def test_demo_without_its_packages(cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mole_kernels.demo.run", None)
    code, _, err = cli("demo")
    assert code == 2 and "mole-kernels[demo]" in err


def test_warnings_are_one_yellow_line(cli, tmp_path: Path):
    zero = Expert({"unet.a.b": LowRank(torch.ones(1, 2), torch.ones(2, 1), 0.0)})
    save_expert(zero, tmp_path / "z.safetensors", "diffusers")
    code, _, err = cli("inspect", tmp_path / "z.safetensors")
    assert code == 0
    assert err.startswith("Warning: ") and "alpha is 0 on 1 layers" in err and len(err.splitlines()) == 1
    assert MoleWarning.__name__ not in err


def test_as_a_program(tmp_path: Path):
    """Through the interpreter: the exit code and the streams, and no torch before a command needs it."""
    environment = os.environ | {"PYTHONPATH": str(Path(mole_kernels.__file__).parents[1]), "NO_COLOR": "1"}
    command = [sys.executable, "-X", "importtime", "-m", "mole_kernels.cli.app"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment, check=True)
    assert all(word in helped.stdout for word in ("inspect", "doctor", "convert", "demo"))
    assert "mole_kernels.cli.screen" in helped.stderr and "torch" not in helped.stderr
    command = [sys.executable, "-m", "mole_kernels.cli.app", "inspect", str(tmp_path)]
    failed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith(str(tmp_path)) and "a folder" in failed.stderr
