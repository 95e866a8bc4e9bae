"""Programs of this folder, compiled by python/tools/emulate.py and run on files that a test writes and
reads.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _load_tool() -> ModuleType:
    name = "mole_emulate_tool"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "python/tools/emulate.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


emulate = _load_tool()


def build(name: str, flavour: str = "check") -> Path:
    return emulate.build(HERE / "programs" / f"{name}.cpp", flavour)


def run(program: Path, **arguments):
    """The outcome of a program with name=value arguments."""
    return emulate.run(program, [f"{k}={v}" for k, v in arguments.items()], timeout=120)


def probe(program: Path, folder: Path, image: np.ndarray, dtype, **arguments) -> np.ndarray:
    """What a probe program wrote, given this input image."""
    source, target = folder / "in", folder / "out"
    image.tofile(source)
    outcome = run(program, **{"in": source}, out=target, **arguments)
    assert outcome.ok, outcome.output
    return np.fromfile(target, dtype)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float -> bf16 bits; exact for the small whole numbers of these tests."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def to_16(x: np.ndarray, half: bool) -> np.ndarray:
    return np.asarray(x, np.float16).view(np.uint16) if half else to_bf16(x)
