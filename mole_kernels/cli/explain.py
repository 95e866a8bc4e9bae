"""`mole-kernels explain`: what would compute a call on a GPU, and why the other ways would not. Needs no
GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from mole_kernels.cli.machine import ExplainArgs
from mole_kernels.cli.screen import facts, number, out, table
from mole_kernels.dispatch import tables
from mole_kernels.dispatch.choose import MEANING, Candidate, Choice, candidates_of, choose
from mole_kernels.dispatch.device import Device, known, present
from mole_kernels.dispatch.work import Use
from mole_kernels.errors import MoleStateError, MoleValueError, printable
from mole_kernels.problem import Problem

GATES = {
    "none": (),
    "constant": ("given",),
    "mask": ("given", "by_token"),
    "local": ("token",),
    "global": ("sample",),
    "mole": ("token", "sample"),
    "softmax": ("token",),
}
MOST_EXPERTS = 64


def question(asked: ExplainArgs) -> tuple[Problem, Use]:
    """The Problem and Use that the options name.

    Raises:
        MoleValueError: Options that are none, or do not fit each other.
    """
    M, K, N = _numbers("--shape", asked.shape, "M,K,N", 3)
    of_each = _numbers("--ranks", asked.ranks, "the rank of each expert, as in 64,64")
    if len(of_each) > MOST_EXPERTS:
        raise MoleValueError("--ranks", expected=f"at most {MOST_EXPERTS} experts", got=len(of_each))
    words = asked.gate.split("+")
    largest = [k for k in range(1, len(of_each) + 1) if f"top-{k}" in words]
    if any(word not in GATES and word not in {f"top-{k}" for k in largest} for word in words):
        known_ones = ", ".join((*GATES, f"top-1 … top-{len(of_each)}"))
        raise MoleValueError(
            "--gate", expected=f"{known_ones}, joined by '+'", got=repr(printable(asked.gate, 60))
        )
    routed = [word for word in words if word == "softmax" or word.startswith("top-")]
    if len(routed) > 1 or (routed and {"local", "mole"} & set(words)):
        raise MoleValueError(
            "--gate",
            expected="one kind of token gate: local, mole, softmax or top-k",
            got=repr(printable(asked.gate, 60)),
        )
    top_k = len(of_each) if routed == ["softmax"] else sum(largest)
    if asked.sets and asked.per_sample:
        raise MoleValueError(
            "--sets", expected="a number of sets, and no --per-sample beside it", got=asked.sets
        )
    dtype = getattr(torch, asked.dtype or "bfloat16")
    if asked.tf32 and dtype != torch.float32:
        raise MoleValueError("--tf32", expected="--dtype float32 with it", got=f"--dtype {asked.dtype}")
    batch = asked.batch_size
    if M % batch:
        raise MoleValueError("--batch-size", expected=f"a number that divides M = {M}", got=batch)
    if asked.backward and asked.training:
        raise MoleValueError("--training", "is about the forward", hint="leave it out with --backward")
    kinds = {kind for word in words for kind in GATES.get(word, GATES["softmax"])}
    problem = Problem(
        batch,
        M // batch,
        K,
        N,
        of_each,
        asked.sets or (batch if asked.per_sample else 1),
        dtype,
        "cuda",
        token_gate="token" in kinds,
        sample_gate="sample" in kinds,
        given_gate="given" in kinds,
        top_k=top_k,
        assigned=asked.sets > 0,
    )
    by_token = "by_token" in kinds
    return problem, Use(asked.backward, asked.training, by_token, by_token, asked.tf32)


def _numbers(option: str, text: str, expected: str, count: int | None = None) -> tuple[int, ...]:
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    good = all(part.isascii() and part.isdigit() and len(part) < 10 and int(part) > 0 for part in parts)
    if not good or (count is not None and len(parts) != count):
        raise MoleValueError(option, expected=expected, got=repr(printable(text, 60)))
    return tuple(int(part) for part in parts)


def device_of(name: str) -> tuple[Device, str]:
    """The named GPU, or the one here; without one an H200. And what was assumed, in words."""
    if name != "auto":
        return known(name), ""
    try:
        return present(), ""
    except MoleStateError:
        return known("h200"), "none is here; --device names another"


def show(problem: Problem, use: Use, name: str, file: Path | None, as_json: bool) -> None:
    """Print the choice; `file` is a table to ask instead of the installed one."""
    device, assumed = device_of(name)
    path = file or tables.path_of(device)
    measured = tables.of_device(tables.load(path), device) if path is not None else None
    choice = choose(problem, device, measured, use, candidates_of(device))
    if as_json:
        print(json.dumps(as_data(choice, problem, device, use), indent=2))
        return
    console = out()
    gates, dtype = tables.gate_kind(problem, use), "tf32" if use.tf32 else str(problem.dtype)[6:]
    ranks = ",".join(map(str, problem.ranks))
    size = f"x [{problem.B},{problem.T},{problem.K}] → {problem.N}, ranks {ranks}, S={problem.S}"
    size += " by assignment" if problem.assigned else ""
    if problem.top_k:
        gates = gates.replace("token", problem.token_kind)
    call = f"{size}, gates {gates}, {dtype}, {use.direction}"
    rows: list[tuple[str, object]] = [
        ("call", call),
        ("gpu", device.name + (f"  ({assumed})" if assumed else "")),
    ]
    rows += [("plain layer", f"{number(choice.plain)} µs"), ("taken", _taken(choice))]
    console.print(facts([*rows, ("by", _source(choice, path))]), "")
    columns = ("candidate", "launches", "predicted µs", "measured µs", "added %", "why not")
    ordered = sorted(
        choice.considered, key=lambda c: (c.name != choice.name, not c.possible, _time(c, choice))
    )
    console.print(table("Candidates", columns, (_line(c, choice) for c in ordered), numbers=columns[1:5]))


def _time(c: Candidate, choice: Choice) -> float:
    time = c.predicted if choice.source == "model" else c.measured
    return inf if time is None else time


def _taken(choice: Choice) -> Text:
    return Text.assemble((choice.name, "bold green"), f"  {MEANING[choice.name]}")


def _source(choice: Choice, path: Path | None) -> str:
    if choice.bucket is not None:
        return f"measurements of {choice.bucket} ({path})"
    without = "no table of measurements for this GPU" if path is None else "no measured shape is near enough"
    return f"predictions of the cost model: {without}"


def added_percent(c: Candidate, choice: Choice) -> float | None:
    """Percent over the plain layer, by the choice's own source."""
    time = c.predicted if choice.source == "model" else c.measured
    return None if time is None else (time / choice.plain - 1) * 100


def _line(c: Candidate, choice: Choice) -> list[Text]:
    style = "bold green" if c.name == choice.name else "" if c.possible else "dim"
    percent = added_percent(c, choice)
    predicted, measured = ("–" if time is None else f"{time:.1f}" for time in (c.predicted, c.measured))
    cells = (
        c.name,
        str(c.launches),
        predicted,
        measured,
        "–" if percent is None else f"{percent:+.0f}",
        c.lost or "taken",
    )
    return [Text(cell, style=style) for cell in cells]


def as_data(choice: Choice, problem: Problem, device: Device, use: Use) -> dict[str, Any]:
    asked = asdict(problem) | {"dtype": str(problem.dtype)[6:], "ranks": list(problem.ranks)}
    considered = [asdict(c) | {"added_percent": added_percent(c, choice)} for c in choice.considered]
    bucket = (
        asdict(choice.bucket) | {"ranks": list(choice.bucket.ranks)} if choice.bucket is not None else None
    )
    return {
        "call": asked | asdict(use),
        "gpu": device.key,
        "taken": choice.name,
        "source": choice.source,
        "plain_us": choice.plain,
        "bucket": bucket,
        "considered": considered,
    }
