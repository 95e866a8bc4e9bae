"""One grammar for all commands: the same option means the same everywhere, and an old spelling names the new one."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer

from mole_kernels.cli import app, difflora, files, machine, selma, train
from mole_kernels.cli.grammar import COMMANDS, OPTIONS
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import save_expert

# options whose choices depend on what the command writes or trains
CHOICES_DIFFER = {"--to"}
# commands that only print, or write into the folder of their run
WITHOUT_OUT = {
    "inspect",
    "doctor",
    "explain",
    "selma prompts",
    "selma pictures",
    "selma merge",
    "selma status",
    "train config",
    "train selma",
    "train-many",
}
JSON = {"inspect", "doctor", "explain", "compress", "evaluate", "selma evaluate"}


def commands() -> dict[str, Any]:
    """'train mole unet' -> the command, for every command of the app."""
    found: dict[str, Any] = {}

    def walk(name: str, command: Any) -> None:
        for word, inner in getattr(command, "commands", {}).items():
            walk(f"{name} {word}".strip(), inner)
        if not hasattr(command, "commands"):
            found[name] = command

    walk("", typer.main.get_command(app.app))
    return found


COMMANDS_BY_NAME = commands()


def options(command: Any) -> dict[str, Any]:
    return {
        parameter.opts[0]: parameter
        for parameter in command.params
        if parameter.opts[0].startswith("--") and parameter.opts[0] != "--help"
    }


def arguments() -> dict[str, list[tuple[str, Any]]]:
    """option -> (class of a command's arguments, the option's type without None) of every class that has it."""
    found: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for module in (files, machine, train, selma, difflora):
        for cls in vars(module).values():
            if is_dataclass(cls) and isinstance(cls, type) and cls.__module__ == module.__name__:
                for name, hint in get_type_hints(cls).items():
                    inner = [part for part in get_args(hint) if part is not type(None)]
                    optional = type(None) in get_args(hint)
                    found[name].append((cls.__name__, inner[0] if optional else hint))
    return found


def test_every_command_is_walked():
    names = set(COMMANDS_BY_NAME)
    assert {"merge", "train mole gates", "train edlora", "train selma", "train difflora predictor"} <= names
    assert {"selma prompts", "difflora generate", "doctor"} <= names and len(names) >= 24


def test_an_option_has_one_type():
    for name, several in arguments().items():
        if f"--{name}" not in CHOICES_DIFFER:
            assert len({str(kind) for _, kind in several}) == 1, (name, several)


def test_an_option_has_one_meaning():
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, command in COMMANDS_BY_NAME.items():
        for option, parameter in options(command).items():
            if option not in CHOICES_DIFFER:
                seen[option][parameter.help].append(name)
    assert not {option: dict(meanings) for option, meanings in seen.items() if len(meanings) > 1}


def test_every_command_with_an_output_names_it_out():
    for name, command in COMMANDS_BY_NAME.items():
        assert ("--out" in options(command)) == (name not in WITHOUT_OUT), name
        arguments = [parameter.name for parameter in command.params if not parameter.opts[0].startswith("--")]
        assert not {"out", "target"} & set(arguments), name


def test_every_option_and_command_has_a_help_of_one_line():
    for name, command in COMMANDS_BY_NAME.items():
        assert command.help and "\n" not in command.help.strip(), name
        for parameter in command.params:
            assert parameter.opts[0] == "--help" or parameter.help, f"{name} {parameter.opts[0]}"


def test_commands_that_train_have_the_options_of_a_run():
    for name, command in COMMANDS_BY_NAME.items():
        if name.startswith(("train mole", "train edlora")):
            assert {"--dry-run", "--resume", "--run-dir", "--seed", "--batch-size", "--model"} <= set(
                options(command)
            )


def test_completion_can_be_installed():
    root = typer.main.get_command(app.app)
    assert {"--install-completion", "--show-completion"} <= {p.opts[0] for p in root.params}


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


@pytest.mark.parametrize("old", OPTIONS)
def test_an_old_option_names_the_new_one(old: str, cli):
    new_names = OPTIONS[old].replace(" > FILE", "").replace(" HEIGHTxWIDTH", "").split(" or ")
    tried = 0
    for name, command in COMMANDS_BY_NAME.items():
        own = options(command)
        if old not in own and any(new in own for new in new_names):
            code, _, err = cli(*name.split(), old, "x")
            assert code == 2 and f"{old} is now " in err and "Traceback" not in err, name
            assert any(new in err for new in new_names)
            tried += 1
    assert tried


@pytest.mark.parametrize("old", COMMANDS, ids=" ".join)
def test_an_old_command_names_the_new_one(old: tuple[str, str], cli):
    assert COMMANDS[old] in COMMANDS_BY_NAME
    code, _, err = cli(*old, "x")
    assert code == 2 and f"mole-kernels {COMMANDS[old]}" in err


def test_an_output_given_by_place_is_answered_with_out(cli, tmp_path: Path):
    for args in (
        ["convert", "a", "b", "--to", "kohya"],
        ["selma", "draw", "q.csv", "folder", "--model", "demo"],
    ):
        code, _, err = cli(*args)
        assert code == 2 and "--out" in err


def expert_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    layer = LowRank(torch.ones(2, 8), torch.ones(8, 2), 0.5)
    save_expert(Expert({"unet.mid_block.attentions.0.proj_in": layer}), path)
    return path


def test_json_prints_json_and_nothing_else(cli, tmp_path: Path):
    path = expert_file(tmp_path)
    runs = {
        "inspect": ["inspect", path],
        "doctor": ["doctor"],
        "explain": ["explain", "--shape", "64,64,64", "--ranks", "4"],
        "compress": ["compress", path, "--rank", 1, "--out", tmp_path / "b.safetensors"],
    }
    assert {name for name, command in COMMANDS_BY_NAME.items() if "--json" in options(command)} == JSON
    assert set(runs) | {"evaluate", "selma evaluate"} == JSON
    for args in runs.values():
        code, out, err = cli(*args, "--json")
        assert code == 0 and err == ""
        assert isinstance(json.loads(out), dict)


def test_inspect_says_where_the_strength_stands(cli, tmp_path: Path):
    path = expert_file(tmp_path)
    code, out, _ = cli("inspect", path)
    assert code == 0 and "lora_adapter_metadata" in out and "Stable Diffusion" in out
    folder = tmp_path / "peft"
    folder.mkdir()
    from safetensors.torch import save_file

    key = "base_model.model.mid_block.attentions.0.proj_in.lora_"
    save_file(
        {f"{key}A.weight": torch.ones(2, 8), f"{key}B.weight": torch.ones(8, 2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    code, out, _ = cli("inspect", folder, "--json")
    (expert,) = json.loads(out)["experts"].values()
    assert code == 0 and "adapter_config.json" in expert["strength"]
    assert [layer["scale"] for layer in expert["layers"].values()] == [3.0]


@pytest.mark.parametrize("name", ["convert", "merge", "compress", "report"])
def test_an_output_that_cannot_be_made_is_said_at_once(name: str, cli, tmp_path: Path):
    path = expert_file(tmp_path)
    (tmp_path / "file").write_text("")
    more = {"convert": ["--to", "kohya"], "compress": ["--rank", 1]}.get(name, [])
    for out in (tmp_path / "file" / "x" / "out.html", tmp_path / "file" / "out.html"):
        code, _, err = cli(name, path, "--out", out, *more)
        assert code == 2 and f"{tmp_path / 'file'} is a file" in err and "Traceback" not in err
    code, _, err = cli(name, path, "--out", tmp_path, *more)
    assert code == 2 and "got a folder" in err
    code, _, _ = cli(name, path, "--out", tmp_path / "new" / "folder" / "out.safetensors", *more)
    assert code == 0 and (tmp_path / "new" / "folder" / "out.safetensors").is_file()
