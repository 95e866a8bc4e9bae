"""What the caller gave as experts and gates, as Expert and GateFile objects."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from mole_kernels.errors import MoleTypeError, MoleValueError, printable
from mole_kernels.experts.bank import ExpertBank, check_name
from mole_kernels.experts.checks import check_values
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import Expert
from mole_kernels.gates.gate import Gate
from mole_kernels.io.bank import load_bank
from mole_kernels.io.experts import load_expert
from mole_kernels.io.gates import GateFile, load_gates
from mole_kernels.io.resolve import pipeline_for
from mole_kernels.patching.families import completed

Path: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = Path | Mapping[str, Tensor] | Expert
GateMaker: TypeAlias = Callable[[str, nn.Module, LayerExperts], Gate | None]
FRESH_GATES = ("mole", "local", "global", "constant", "softmax", "top-1", "top-2")
# what the same gates are called elsewhere in this package and in papers
_MEANT = {"token": ["local"], "sample": ["global"], "pooled": ["global"], "both": ["mole"]}


def read_experts(experts: object, model: object) -> tuple[dict[str, Expert], GateFile | None]:
    """Experts by name, and the gates of our own single file if that is what was given.

    experts  {name: path | tensors | Expert}, pairs of the same, an ExpertBank, or the path of a file that
             `Handle.save` wrote
    """
    if isinstance(experts, ExpertBank):
        for name, expert in experts.experts.items():
            check_values(f"expert {name!r}", expert)
        return {name: completed(expert, model) for name, expert in experts.experts.items()}, None
    if isinstance(experts, str | os.PathLike):
        bank, gates = load_bank(experts)
        return dict(bank.experts), gates
    pairs = _pairs(experts)
    if not pairs:
        raise MoleValueError(
            "experts", expected="at least one expert", got="none", hint='experts={"face": "face.safetensors"}'
        )
    names: set[str] = set()
    for name, source in pairs:
        if isinstance(source, Tensor):
            raise MoleTypeError(
                "experts",
                expected="{name: source}",
                got="the tensors of one file",
                hint='give it a name: {"face": tensors}',
            )
        check_name(name)
        if name in names:
            raise MoleValueError("experts", expected="names that differ", got=f"{printable(name)} twice")
        names.add(name)
    return {name: read_expert(name, source, model) for name, source in pairs}, None


def read_expert(name: str, source: Source, model: object) -> Expert:
    """One expert from a path, a mapping of tensors, or as it is; completed by the model's weights."""
    if isinstance(source, Expert):
        check_values(f"expert {name!r}", source)
        return completed(source, model)
    if not isinstance(source, str | os.PathLike | Mapping):
        raise MoleTypeError(
            f"expert {name!r}",
            expected="a path, a mapping of tensors or an Expert",
            got=type(source).__name__,
        )
    known = pipeline_for(model) if isinstance(model, nn.Module) else hasattr(model, "lora_state_dict")
    return completed(load_expert(source, pipeline=model if known else None), model)


def read_gates(gates: object) -> GateFile | GateMaker | str | None:
    """None, a word for fresh gates, a maker, or the gates of a file."""
    if gates is None or isinstance(gates, GateFile) or (isinstance(gates, str) and gates in FRESH_GATES):
        return gates
    if isinstance(gates, str) and _is_word(gates):
        near = _MEANT.get(gates.lower()) or difflib.get_close_matches(gates.lower(), FRESH_GATES, 1, 0.5)
        raise MoleValueError(
            "gates",
            expected=f"one of {', '.join(map(repr, FRESH_GATES))}, or a file",
            got=repr(printable(gates, 60)),
            hint=f"did you mean {near[0]!r}?" if near else "",
        )
    if isinstance(gates, str | os.PathLike):
        return load_gates(gates)
    if callable(gates):
        return gates
    raise MoleTypeError(
        "gates",
        expected=f"None, a path, a GateFile, {', '.join(map(repr, FRESH_GATES))} or a callable",
        got=type(gates).__name__,
    )


def _is_word(gates: str) -> bool:
    """Whether a str can only be meant as a word: no file of that name, no folder in it, no ending."""
    return not os.path.exists(gates) and not os.path.dirname(gates) and not os.path.splitext(gates)[1]


def _pairs(experts: Any) -> list[tuple[Any, Any]]:
    if isinstance(experts, Mapping):
        return list(experts.items())
    if isinstance(experts, Sequence) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in experts):
        return list(experts)
    raise MoleTypeError(
        "experts",
        expected="{name: path | tensors | Expert}, an ExpertBank or a path",
        got=type(experts).__name__,
    )
