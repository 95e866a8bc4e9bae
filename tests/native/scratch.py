"""The CPU operator compiled beside the installed one, with other flags or from changed sources; kept by what
went into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "csrc/bindings.cpp",
    "csrc/describe.h",
    "csrc/tensors.h",
    *sorted(f"csrc/cpu/{p.name}" for p in (ROOT / "csrc/cpu").iterdir()),
)


def the_build() -> ModuleType:
    """setup.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("mole_scratch_build", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def why_not() -> str | None:
    """None where a compiler and ninja are at hand."""
    tools = the_build().find_toolchain(os.environ)
    return tools if isinstance(tools, str) else None


def library(name: str, texts: dict[str, str], flags: str, compiler: str = "", machine: str = "") -> Path:
    """build/<name>-<digest>/lib<name>.so of the CPU operator, `texts` in the place of its sources; no CUDA.

    flags come after setup.py's own, `compiler` after the compiler's name, for linking too; machine: whose
    instruction sets, "" only the
    plainest. Raises RuntimeError with the compiler's words.
    """
    build = the_build()
    tools = build.find_toolchain({**os.environ, "MOLE_SKIP_CUDA_BUILD": "1", "MOLE_FORCE_CUDA": ""})
    if isinstance(tools, str):
        raise RuntimeError(tools)
    torch = build.find_torch()
    whole = {path: texts.get(path, (ROOT / path).read_text()) for path in SOURCES}
    words = [
        *whole.values(),
        flags,
        compiler,
        machine,
        tools.cxx,
        torch.version,
        (ROOT / "setup.py").read_text(),
    ]
    folder = ROOT / "build" / f"{name}-{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:16]}"
    out = folder / f"lib{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # the workers of one test run wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            _compile(
                build,
                torch,
                tools._replace(cxx=f"{tools.cxx} {compiler}".strip()),
                folder,
                whole,
                out,
                flags,
                machine,
            )
    return out


def _compile(
    build, torch, tools, folder: Path, whole: dict[str, str], out: Path, flags: str, machine: str
) -> None:
    for path, text in whole.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    build.ROOT = folder
    partial = out.with_suffix(".partial")
    (folder / "build.ninja").write_text(build.ninja_file(torch, tools, partial, {"CXXFLAGS": flags}, machine))
    done = subprocess.run(
        [tools.ninja, "-j", os.environ.get("MAX_JOBS", "2")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:])
    partial.rename(out)
