"""What every item of work is given, and what it gives back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.device import Device, device

# an item of work: {"id", "kind", …}, plain data, so that it can travel to another process
Item = dict[str, Any]


@dataclass
class Context:
    """The device, methods and backends from the user's own file, and where to say what is being run.

    at       called with a method's name before it runs: if nothing more is heard, that one hangs
    skip     methods that hung or broke the device before
    seconds  roughly how long one measured case may take
    """

    device: Device
    methods: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    at: Callable[[str], None] = lambda name: None
    skip: frozenset[str] = frozenset()
    seconds: float = 1.0
    ceilings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(cls, kind: str, peers: str | None = None, **named: Any) -> Context:
        """`peers`: a Python file that may define METHODS {name: Layer -> module} and BACKENDS {name:
        backend}.
        """
        methods: dict[str, Callable[[Any], Any]] = {}
        if peers is not None:
            spec = importlib.util.spec_from_file_location("benchmarks_peers_file", Path(peers))
            assert spec is not None and spec.loader is not None, peers
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            methods = dict(getattr(module, "METHODS", {}))
            ours.BACKENDS.update(getattr(module, "BACKENDS", {}))
        ours.register()
        return cls(device(kind), methods, **named)


@dataclass
class Outcome:
    """rows of the result file; failures {id, method, stage, error}; refused {method: reason}; passed: how
    many checks were right.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    passed: int = 0

    def fail(self, item: Item, method: str, stage: str, error: BaseException | str) -> None:
        self.failures.append({"id": str(item["id"]), "method": method, "stage": stage, "error": short(error)})

    def judge(self, item: Item, method: str, stage: str, broken: Sequence[str]) -> None:
        """One check: passed, or a failure that names the rules."""
        if broken:
            self.fail(item, method, stage, "; ".join(broken))
        else:
            self.passed += 1

    def plain(self) -> dict[str, Any]:
        return {"rows": self.rows, "failures": self.failures, "refused": self.refused, "passed": self.passed}


def short(error: BaseException | str) -> str:
    """One line of it."""
    if isinstance(error, str):
        return error[:600]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:600]
