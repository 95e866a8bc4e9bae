"""The CPU operator under AddressSanitizer and UndefinedBehaviorSanitizer: odd sizes by every instruction set
of this CPU, all of the
operator's tests by the best of them; before that a planted overrun, which must be reported.

    python -m tests.native.sanitized                  # builds into build/, runs, exit 1 at the first finding
    python -m tests.native.sanitized --only avx2 -k assignment

The library is compiled anew with the sanitizers; torch and Python are as they are, but their allocations go
through AddressSanitizer,
so a read beside a tensor is found. As a pytest plugin (`-p tests.native.sanitized`) it puts that library in
the place of the usual one.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

from tests.native import scratch
from tests.planting import replaced

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=vptr"
EDGES = ("tests/native/test_edges.py",)
TESTS = ("tests/backends", "tests/ops/test_ops.py", *EDGES)
# runs processes of its own, with the usual library
LEFT_OUT = "cpu and not test_every_instruction_set"
LIBRARY = "MOLE_SANITIZED_LIBRARY"
SETS = ("avx512bf16", "avx512", "avx2", "base")


def build() -> Path:
    return scratch.library("sanitized", {}, FLAGS, SANITIZERS, platform.machine())


def preloaded() -> str:
    """The runtimes that must come before everything else in a process whose program was not compiled with
    them.
    """
    cxx = scratch.the_build().find_toolchain(os.environ).cxx
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [cxx, f"-print-file-name={n}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for n in names
    ]
    return " ".join(found)


def environment(library: Path, instruction_set: str) -> dict[str, str]:
    return {
        **os.environ,
        LIBRARY: str(library),
        "LD_PRELOAD": preloaded(),
        # what Python and torch keep until the end is no leak of ours; a vector past its size is one
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:detect_stack_use_after_return=1:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MOLE_INSTRUCTION_SET": instruction_set,
        "OMP_NUM_THREADS": "2",
    }


def pytest_configure(config) -> None:
    """As a plugin: the sanitized library, loaded where the usual one would be."""
    import torch

    from mole_kernels import extension

    extension.LIBRARY = Path(os.environ[LIBRARY])
    wanted = os.environ["MOLE_INSTRUCTION_SET"]
    if extension.reason_against_library() is not None:
        raise RuntimeError(extension.reason_against_library())
    if torch.ops.mole_cpu.instruction_set() != wanted:
        import pytest

        pytest.exit(f"this CPU has no {wanted}", returncode=77)


def run(library: Path, instruction_set: str, tests: tuple[str, ...], k: str = "") -> tuple[int, list[str]]:
    """pytest's status (77: this CPU has no such instruction set) and what it said."""
    chosen = f"{LEFT_OUT} and ({k})" if k else LEFT_OUT
    # nothing is captured: a report is the last thing the process says
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.native.sanitized",
        *tests,
        "-k",
        chosen,
    ]
    env = environment(library, instruction_set)
    done = subprocess.run(command, cwd=scratch.ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


def notices_an_overrun() -> bool:
    """One element past the end of y: without this, silence would say nothing."""
    path, old, new = (
        "csrc/cpu/microkernel.h",
        "for (int64_t i = 0; i < n; ++i) {",
        "for (int64_t i = 0; i <= n; ++i) {",
    )
    text = (scratch.ROOT / path).read_text()
    status, said = run(
        scratch.library("overrun", {path: replaced(text, old, new, path)}, FLAGS, SANITIZERS), "base", EDGES
    )
    return status != 0 and any("AddressSanitizer: heap-buffer-overflow" in line for line in said)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="one instruction set, all tests")
    parser.add_argument("-k", default="", help="these tests alone")
    options = parser.parse_args()
    if not options.only:
        if not notices_an_overrun():
            print("a planted overrun was not reported: the sanitizers are not at work")
            return 1
        print("a planted overrun is reported", flush=True)
    library, best = build(), True
    for name in (
        [options.only] if options.only else SETS if platform.machine() in ("x86_64", "AMD64") else ("base",)
    ):
        status, said = run(library, name, TESTS if best else EDGES, options.k)
        if status == 77:
            print(f"{name:11} not on this CPU")
            continue
        best = False
        last = next((line for line in reversed(said) if "passed" in line or "failed" in line), "")
        print(f"{name:11} {last}" if status == 0 else "\n".join(said[-60:]), flush=True)
        if status:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
