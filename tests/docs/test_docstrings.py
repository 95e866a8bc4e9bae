"""Every public object says its arguments and what it returns, where the user stands."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

import mole_kernels as mk

DOORS = ("gates", "io", "methods", "training")


def public() -> dict[str, Any]:
    names = {f"mk.{name}": getattr(mk, name) for name in mk.__all__ if name not in (*DOORS, "__version__")}
    for door in DOORS:
        room = importlib.import_module(f"mole_kernels.{door}")
        names |= {f"mk.{door}.{name}": getattr(room, name) for name in room.__all__}
    return {name: thing for name, thing in names.items() if callable(thing)}


PUBLIC = public()


def test_there_are_many():
    assert len(PUBLIC) > 80 and "mk.patch" in PUBLIC and "mk.methods.train_gates" in PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_and_results_are_documented(name: str):
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing) or ""
    made = thing.__init__ if inspect.isclass(thing) and "__init__" in vars(thing) else thing
    try:
        signature = inspect.signature(made)
    except (TypeError, ValueError):
        signature = inspect.Signature()
    arguments = [
        p
        for p in signature.parameters.values()
        if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if arguments:
        assert "Args:" in doc or "Attributes:" in doc, f"{name} does not say what {arguments[0].name} is"
    if not inspect.isclass(thing) and signature.return_annotation not in (
        None,
        "None",
        inspect.Signature.empty,
    ):
        assert "Returns:" in doc or len(doc.splitlines()) <= 3, f"{name} does not say what it returns"
