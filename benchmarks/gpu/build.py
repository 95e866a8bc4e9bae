"""The compiled extension, with nvcc where it is found, before anything is verified; that it fails is
recorded, and the rest goes on.

With setuptools and ninja: `setup.py build_ext --inplace`. Without ninja the same commands are run here, many
at a time: a machine that
has torch and a compiler needs nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.processes import limited

ROOT = Path(__file__).resolve().parents[2]
Facts = dict[str, Any]


def arch() -> str:
    """The present GPU's architecture, with its own features (9.0a) where it has them: one architecture builds
    in a fraction of the time.
    """
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def build(limit: float, gpu: bool) -> Facts:
    """{"built", "seconds", "how", "error", "arch"}; what fails is recorded, and tried once more without CUDA.
    Never raises for a build.
    """
    begin, env = time.monotonic(), dict(os.environ)
    if gpu and "TORCH_CUDA_ARCH_LIST" not in env:
        env["TORCH_CUDA_ARCH_LIST"] = arch()
    env.setdefault("MAX_JOBS", str(os.cpu_count() or 2))
    how, error = attempt(limit, env)
    first = error
    if error and "MOLE_SKIP_CUDA_BUILD" not in env:
        how, error = attempt(limit - (time.monotonic() - begin), env | {"MOLE_SKIP_CUDA_BUILD": "1"})
        how += ", without CUDA"
    seconds = round(time.monotonic() - begin, 1)
    return {
        "built": not error,
        "how": how,
        "seconds": seconds,
        "error": first,
        "arch": env.get("TORCH_CUDA_ARCH_LIST", ""),
    }


def attempt(limit: float, env: dict[str, str]) -> tuple[str, str]:
    """How it was built, and what went wrong ("": nothing, and the library loads)."""
    how = "setup.py"
    try:
        setup = load_setup()
        if setup.find_ninja(env) is not None:
            how, error = "setup.py build_ext --inplace", with_ninja(limit, env)
        else:
            how, error = "the same commands without ninja", without_ninja(setup, limit, env)
        return how, error or loads(limit)
    # setuptools may be missing, or what setup.py asks for
    except (Exception, SystemExit) as raised:
        return how, f"{type(raised).__name__}: {raised}"[:600]


def loads(limit: float) -> str:
    """Why the library does not load, asked of a process of its own; "" where it does."""
    ask = "from mole_kernels import extension; print(extension.reason_against_library() or '')"
    code, said = limited([sys.executable, "-c", ask], max(30.0, limit), cwd=ROOT)
    return said.strip()[:600] if code == 0 else tail(said)


def load_setup() -> Any:
    """setup.py as a module; it builds only where it is run."""
    spec = importlib.util.spec_from_file_location("mole_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mole_setup"] = module
    spec.loader.exec_module(module)
    return module


def with_ninja(limit: float, env: dict[str, str]) -> str:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code, said = limited(command, limit, cwd=ROOT, env=env)
    return "" if code == 0 else f"not done within {limit:.0f} s" if code is None else tail(said)


def tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower()]
    return " | ".join((named or lines)[-3:])[:600] or "failed and said nothing"


def without_ninja(setup: Any, limit: float, env: dict[str, str]) -> str:
    """The commands of setup.py's own build.ninja, objects in parallel, then the link."""
    cxx = setup.find_program([env.get("CXX", ""), "c++", "g++", "clang++"], env)
    if cxx is None:
        return "no C++ compiler was found"
    found, why = setup.choose_nvcc(env)
    library = ROOT / "mole_kernels" / setup.LIBRARY
    made = library.with_suffix(".new")
    work = ROOT / "build" / f"plain-{platform.machine()}"
    work.mkdir(parents=True, exist_ok=True)
    text = setup.ninja_file(
        setup.find_torch(), setup.Toolchain(cxx, "", found, why), made, env, platform.machine()
    )
    steps = commands(text)
    until = time.monotonic() + limit
    with ThreadPoolExecutor(int(env["MAX_JOBS"])) as pool:
        errors = [e for e in pool.map(lambda command: run(command, work, until), steps[:-1]) if e]
    error = errors[0] if errors else run(steps[-1], work, until)
    if not error:
        # in one step, so that a process that has the old one open keeps it
        made.replace(library)
        report = {
            "built": True,
            "torch": torch.__version__,
            "cuda": env.get("TORCH_CUDA_ARCH_LIST", "") if found else "",
            "no_cuda": why,
        }
        library.with_name(setup.REPORT).write_text(json.dumps(report) + "\n")
    return error


def run(command: str, work: Path, until: float) -> str:
    code, said = limited(["/bin/sh", "-c", command], until - time.monotonic(), cwd=work)
    return "" if code == 0 else "not done in time" if code is None else tail(said)


def commands(text: str) -> list[str]:
    """The shell commands of a build.ninja as setup.py writes it (rules with a command, builds with
    variables), in its order.
    """
    variables: dict[str, str] = {}
    rules: dict[str, str] = {}
    builds: list[tuple[str, str, str, dict[str, str]]] = []
    inside: tuple[str, str] = ("", "")
    for line in text.splitlines():
        if line.startswith("  "):
            name, _, value = line.strip().partition(" = ")
            if inside[0] == "rule" and name == "command":
                rules[inside[1]] = value
            elif inside[0] == "build":
                builds[-1][3][name] = value
        elif line.startswith("rule "):
            inside = ("rule", line[5:])
        elif line.startswith("build "):
            out, _, rest = line[6:].partition(": ")
            rule, _, sources = rest.partition(" ")
            builds.append((out, rule, sources, {}))
            inside = ("build", out)
        elif " = " in line:
            name, _, value = line.partition(" = ")
            variables[name] = value
    return [
        _expanded(rules[rule], variables | own | {"in": sources, "out": out})
        for out, rule, sources, own in builds
    ]


def _expanded(command: str, variables: dict[str, str]) -> str:
    # longest names first: $in is the beginning of no other, but a name may come to be
    for _ in range(2):
        for name in sorted(variables, key=len, reverse=True):
            command = command.replace(f"${name}", variables[name])
    return command.replace("$ ", "\\ ").replace("$:", ":").replace("$$", "$")
