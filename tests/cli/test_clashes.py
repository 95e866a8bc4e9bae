"""`doctor` names packages that do not go together, from metadata and from what only their source says."""

import importlib.metadata
import json

import pytest

from mole_kernels.cli import clashes as module
from mole_kernels.cli import doctor
from mole_kernels.cli.clashes import clashes, installed, transformers_asks_for_peft


def test_what_is_pinned_here_goes_together():
    assert clashes() == []


def test_a_peft_too_old_for_transformers_is_named():
    pytest.importorskip("transformers")
    least = transformers_asks_for_peft()
    assert least is not None and module._numbers(least) >= (0, 10)
    said = module._of_peft_in_transformers({"peft": "0.1.0", "transformers": "5.24.0"}.get, "0.22.0")
    assert len(said) == 1 and "transformers 5.24.0" in said[0] and "peft >= 0.22.0, and 0.1.0" in said[0]
    for peft in ("0.22.0", "0.22.1.dev0", "1.0", None):
        assert not module._of_peft_in_transformers({"peft": peft, "transformers": "5.24.0"}.get, "0.22.0")
    assert any("text encoders" in c for c in clashes(lambda p: "0.1.0" if p == "peft" else installed(p)))


@pytest.mark.parametrize("version, right", [("0.1.0", False), ("99.0", True)])
def test_a_requirement_that_is_not_met_is_named(monkeypatch, version, right):
    requires = {
        "diffusers": ["safetensors>=0.8.0", 'torch>=99; extra == "torch"', "not a requirement !", "gone>=1"]
    }

    def of(package):
        if package not in requires:
            raise importlib.metadata.PackageNotFoundError
        return requires[package]

    monkeypatch.setattr(importlib.metadata, "requires", of)
    monkeypatch.setattr(module, "transformers_asks_for_peft", lambda: None)
    said = clashes({"diffusers": "0.42.1", "safetensors": version, "torch": "2.0"}.get)
    assert said == [] if right else len(said) == 1
    assert right or (
        "diffusers 0.42.1 asks for safetensors>=0.8.0, and 0.1.0 is installed" in said[0]
        and "Hint: pip" in said[0]
    )


def test_doctor_shows_them(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "clashes", lambda: ["diffusers 1 asks for safetensors>=2, and 1 is installed"]
    )
    doctor.show(True)
    assert json.loads(capsys.readouterr().out)["clashes"] == [
        "diffusers 1 asks for safetensors>=2, and 1 is installed"
    ]
    doctor.show(False)
    assert "asks for safetensors>=2" in capsys.readouterr().out.replace("\n", " ")
