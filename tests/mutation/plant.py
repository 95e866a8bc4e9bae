"""Plants a fault into a Python module of the package: its functions are made anew from changed source,
wherever they are held.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from tests.mutation.faults import Planted
from tests.planting import replaced

ROOT = Path(__file__).resolve().parents[2]


def changed(planted: Planted) -> str:
    """The source with the fault in it. Raises ValueError where it does not hold `old` exactly once."""
    text = (ROOT / planted.file).read_text()
    return replaced(text, planted.old, planted.new, f"{planted.fault}: {planted.file}")


@contextmanager
def planted_in(planted: Planted) -> Iterator[None]:
    """As if the module had been imported with the fault: every module that holds one of its functions gets
    the new one.
    """
    name = planted.file.removesuffix(".py").replace("/", ".")
    module = sys.modules[name]
    made: dict[str, Any] = {**{k: v for k, v in vars(module).items() if k.startswith("__")}}
    exec(compile(changed(planted), planted.file, "exec"), made)
    ours = {n: f for n, f in vars(module).items() if isinstance(f, FunctionType) and f.__module__ == name}
    new = {f: made[n] for n, f in ours.items()}
    undo: list[tuple[ModuleType, str, FunctionType]] = []
    for holder in [m for n, m in sys.modules.items() if n.startswith(("mole_kernels", "tests"))]:
        for attribute, value in list(vars(holder).items()):
            if isinstance(value, FunctionType) and value in new:
                undo.append((holder, attribute, value))
                setattr(holder, attribute, new[value])
    try:
        yield
    finally:
        for holder, attribute, value in undo:
            setattr(holder, attribute, value)
