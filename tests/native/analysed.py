"""clang-tidy over the native code that a CPU runs: the CPU operator, the emulator, the host side of the CUDA
library.

    python -m tests.native.analysed                   # exit 1 where it says anything
    python -m tests.native.analysed --only forward

Which checks are on, and why those that are off are off, is in .clang-tidy; a single line is excused by
`NOLINT(check): reason` behind it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tests.native import scratch

ROOT = scratch.ROOT


def tidy() -> str | None:
    beside = Path(sys.executable).with_name("clang-tidy")
    return str(beside) if beside.exists() else shutil.which("clang-tidy")


def cuda_include() -> list[str]:
    """CUDA's headers, where nvcc is."""
    nvcc = scratch.the_build().find_nvcc(os.environ)
    if nvcc is None:
        return []
    found = list(Path(nvcc).resolve().parents[1].rglob("cuda_runtime.h"))[:1]
    return [f"-isystem{found[0].parent}"] if found else []


def units() -> list[tuple[Path, list[str]]]:
    """(source, the compiler's arguments): those of the build, as far as they change what the code means."""
    build = scratch.the_build()
    torch = [f"-isystem{p}" for p in build.find_torch().include]
    shared = [f"-I{ROOT / 'csrc'}", f"-DTORCH_TARGET_VERSION={build.TARGET_VERSION}", "-std=c++17", "-w"]
    variants = build.isa_variants(platform.machine())
    has = [f"-DMOLE_HAS_{isa.upper()}=1" for isa in variants]
    found = [
        (p, [*shared, *torch, *has])
        for p in sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        if p.name != "kernels.cpp"
    ]
    found.append((ROOT / "csrc/bindings.cpp", [*shared, *torch, *has]))
    for isa, flags in variants.items():
        found.append(
            (
                ROOT / "csrc/cpu/kernels.cpp",
                [*shared, *flags, f"-DMOLE_ISA={isa}", f"-DMOLE_ISA_{isa.upper()}=1"],
            )
        )
    emulator = ["-std=c++20", "-DMOLE_EMULATE", f"-I{ROOT}", "-w"]
    found += [(p, emulator) for p in sorted((ROOT / "csrc/emulator").glob("*.cpp"))]
    if cuda := cuda_include():
        host = sorted([*(ROOT / "csrc/cuda").glob("*.cpp"), *(ROOT / "csrc/cuda/sm90").glob("*.cpp")])
        found += [(p, [*shared, *torch, *cuda]) for p in host]
    return found


def said(program: str, source: Path, arguments: list[str]) -> list[str]:
    """What clang-tidy says of our files."""
    command = [program, "--quiet", "--header-filter=.*/csrc/.*", str(source), "--", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # the compiler's own errors come with a status; its count of warnings in others' headers is noise
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines or ([done.stderr[-2000:]] if done.returncode else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="sources whose path contains this")
    options = parser.parse_args()
    program = tidy()
    if program is None:
        print("clang-tidy was not found: pip install clang-tidy")
        return 2
    count = 0
    for source, arguments in units():
        if options.only not in str(source):
            continue
        lines = said(program, source, arguments)
        count += len([line for line in lines if ": warning:" in line or ": error:" in line])
        isa = next((a.partition("=")[2] for a in arguments if a.startswith("-DMOLE_ISA=")), "")
        print(
            f"{source.relative_to(ROOT)} {isa}: {'clean' if not lines else ''}", *lines, sep="\n", flush=True
        )
    print(f"{count} findings")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
