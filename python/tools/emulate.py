"""Compile CUDA kernels for the emulator (csrc/emulator) and run them over many schedules on a CPU.

    python python/tools/emulate.py                     # every program, every case, every seed
    python python/tools/emulate.py --only plain --seeds 3 --flavour address
    python python/tools/emulate.py --run tests/emulator/programs/gemm_wgmma.cpp m=100 seed=7

A program is a C++ file with a main that launches kernels (docs/kernels/emulator.md) and returns 0 if they
computed the right thing.
To register one, add a line to PROGRAMS.

Flavours: `check` compiles the kernel with the compiler's thread instrumentation and links it with the
emulator in the place of
ThreadSanitizer's runtime, so that every load and store is checked; `address` is AddressSanitizer and
UndefinedBehaviorSanitizer over
kernel and emulator; `fast` has neither.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "csrc/emulator"
CACHE = Path(os.environ.get("MOLE_EMULATOR_CACHE", ROOT / "build/emulator"))
COMMON = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-psabi"]
# a static, fixed address: reports name lines by addr2line. No loops turned into memset: it would hide stores
# from the hooks
KERNEL = {
    "check": [
        "-O1",
        "-g1",
        "-fsanitize=thread,alignment,bounds",
        "-fno-sanitize-recover=all",
        "-fno-tree-loop-distribute-patterns",
    ],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "fast": ["-O2", "-g1"],
}
RUNTIME = {
    "check": ["-O3", "-march=native", "-g1"],
    "address": ["-O2", "-march=native", "-g1", "-fsanitize=address"],
    "fast": ["-O3", "-march=native", "-g1"],
}
LINK = {"check": [], "address": ["-fsanitize=address,undefined"], "fast": []}


@dataclass(frozen=True)
class Program:
    """A program, the argument lists it is run with, and how many schedules of each; `quick` are the cases of
    `make test`.
    """

    name: str
    source: str
    cases: Sequence[str] = ("",)
    seeds: int = 20
    quick: Sequence[str] = ()
    quick_seeds: int = 2
    defines: Sequence[str] = field(default=())


PROGRAMS: list[Program] = [
    Program(
        "gemm_portable",
        "tests/emulator/programs/gemm_portable.cpp",
        ("m=64 n=64 k=64", "m=100 n=72 k=136"),
        quick=("m=100 n=72 k=136",),
    ),
    Program(
        "gemm_wgmma",
        "tests/emulator/programs/gemm_wgmma.cpp",
        ("m=128 n=128 k=256", "m=100 n=72 k=136"),
        quick=("m=100 n=72 k=136",),
    ),
    Program(
        "sm90_cluster",
        "tests/cuda/fused.cpp",
        (
            "way=cluster b=2 n=264",
            "way=cluster groups=2 cluster=4 t=200 k=200 n=304",
            "way=cluster pooled=1 b=2 sets=2 groups=2 t=150 ranks=3,5,24",
            "way=cluster mask=1 dtype=fp16 ranks=1,3,4 narrow=1 n=104",
            "way=cluster token=0 ranks=32,8 k=8 n=136 t=1",
            "way=cluster b=2 n=136 topk=2 ranks=8,3,5",
        ),
        quick=("way=cluster groups=2 b=2 pooled=1 n=136",),
    ),
    Program(
        "sm90_persistent",
        "tests/cuda/fused.cpp",
        (
            "way=persistent b=2 n=264",
            "way=persistent groups=2 t=200 k=200 n=304 ranks=96,64",
            "way=persistent pooled=1 b=3 sets=3 t=150 ranks=3,5,24",
            "way=persistent mask=1 dtype=fp16 ranks=1,3,4 narrow=1 n=104",
            "way=persistent token=0 k=8 n=72 t=1",
            "way=persistent b=3 pooled=1 sets=2 assigned=1 topk=2 ranks=5,11,8",
            "way=persistent b=2 pooled=1 resident=1",
            "way=persistent b=2 t=130 resident=2",
        ),
        quick=("way=persistent groups=2 b=2 pooled=1 n=136",),
    ),
    Program(
        "sm90_recompute",
        "tests/cuda/fused.cpp",
        (
            "way=recompute b=2 n=264 ranks=8,8",
            "way=recompute groups=2 t=200 k=200 n=304 ranks=5,11 sets=1 mask=1",
            "way=recompute b=2 sets=2 token=0 ranks=24 dtype=fp16 t=17",
            "way=recompute narrow=1 ranks=8 k=320 n=40",
            "way=recompute b=3 sets=5 assigned=1 topk=9 ranks=3,5,8",
        ),
        quick=("way=recompute groups=2 b=2 sets=2 mask=1 ranks=8,8",),
    ),
    Program(
        "sm90_dx",
        "tests/cuda/dx.cpp",
        (
            "way=cluster b=2 k=264",
            "way=cluster groups=2 cluster=4 t=200 n=200 k=304 ranks=40,24",
            "way=cluster mask=2 b=3 t=33 sets=3 topk=2 ranks=8,3,5",
            "way=cluster wide=1 t=90 b=2 sets=4 assigned=1 topk=9 ranks=40,1,7,6,2,8,4,4",
            "way=cluster token=0 ranks=32,8 n=8 t=1 dtype=fp16",
            "way=persistent groups=2 t=150 n=136 k=304 ranks=40,24",
            "way=persistent b=3 sets=3 t=150 topk=2 ranks=3,5,24",
            "way=persistent mask=2 dtype=fp16 ranks=1,3,4 narrow=1 k=104 b=2",
            "way=persistent b=3 sets=2 assigned=1 topk=2 ranks=5,11,8",
            "way=persistent token=0 n=8 k=72 t=1",
            "way=persistent b=2 t=130 resident=1",
            "way=recompute groups=2 t=150 n=200 k=304 ranks=5,11 mask=1",
            "way=recompute b=2 sets=2 token=0 ranks=24 dtype=fp16 t=17",
            "way=recompute b=3 sets=5 assigned=1 topk=9 ranks=3,5,8 wide=1",
            "way=recompute narrow=1 ranks=8 n=320 k=40 d=0 dh=0",
        ),
        quick=(
            "way=cluster b=2 k=136",
            "way=persistent groups=2 b=2 topk=1",
            "way=recompute b=2 sets=2 mask=1",
        ),
    ),
    Program(
        "sm90_ladder",
        "tests/cuda/ladder.cpp",
        ("step=1", "step=2 groups=2 m=300", "step=3 groups=2 m=70", "step=4 r=72", "step=4 m=1 n=8 k=8 r=8"),
        quick=("step=4",),
    ),
]


class BuildError(RuntimeError):
    """The compiler's own words."""


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise BuildError("no C++ compiler was found (CXX, g++, c++)")
    return found


def shell(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(" ".join(map(str, command)) + "\n" + done.stderr)


def digest(files: Sequence[Path], words: Sequence[str]) -> str:
    h = hashlib.sha256("\0".join(words).encode())
    for f in sorted(files):
        h.update(f.name.encode() + f.read_bytes())
    return h.hexdigest()[:16]


def host() -> str:
    """What -march=native depends on."""
    try:
        return next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        )
    except (OSError, StopIteration):
        return ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: the others find the result."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_runtime(flavour: str) -> Path:
    """The emulator as one archive, compiled once."""
    sources, headers = sorted(EMULATOR.glob("*.cpp")), sorted(EMULATOR.glob("*.h"))
    if flavour != "check":
        sources = [s for s in sources if s.name != "hooks.cpp"]
    flags = [*COMMON, *RUNTIME[flavour]]
    folder = CACHE / f"runtime-{flavour}-{digest(sources + headers, [compiler(), host(), *flags])}"
    archive = folder / "libemulator.a"
    if archive.exists():
        return archive
    with locked(folder):
        if not archive.exists():
            _compile_runtime(sources, flags, folder, archive)
    return archive


def _compile_runtime(sources: Sequence[Path], flags: Sequence[str], folder: Path, archive: Path) -> None:
    # one translation unit: most of the time would go into the standard library's headers
    whole, compiled = folder / f"{os.getpid()}.cpp", folder / f"{os.getpid()}.o"
    whole.write_text("".join(f'#include "{s}"\n' for s in sources))
    shell([compiler(), *flags, "-c", str(whole), "-o", str(compiled)])
    partial = folder / f"{os.getpid()}.a"
    shell(["ar", "rcs", str(partial), str(compiled)])
    partial.rename(archive)


def build(source: str | Path, flavour: str = "check", defines: Sequence[str] = ()) -> Path:
    """source compiled and linked; unchanged sources are not compiled again. Raises BuildError."""
    path = Path(source) if Path(source).is_absolute() else ROOT / source
    runtime = build_runtime(flavour)
    flags = [*COMMON, *KERNEL[flavour], "-DMOLE_EMULATE", "-I", str(ROOT), *(f"-D{d}" for d in defines)]
    headers = [
        *(ROOT / "csrc/cuda").rglob("*.h"),
        *(ROOT / "csrc/cuda").rglob("*.cuh"),
        *EMULATOR.glob("*.h"),
        *path.parent.glob("*.h"),
    ]
    folder = CACHE / f"{path.stem}-{flavour}-{digest([path, *headers], [compiler(), str(runtime), *flags])}"
    program = folder / path.stem
    if program.exists():
        return program
    with locked(folder):
        if not program.exists():
            _compile(path, flags, flavour, runtime, folder, program)
    return program


def _compile(
    path: Path, flags: Sequence[str], flavour: str, runtime: Path, folder: Path, program: Path
) -> None:
    partial = folder / f"{os.getpid()}-{path.stem}"
    shell([compiler(), *flags, "-no-pie", "-c", str(path), "-o", f"{partial}.o"])
    # no libtsan: the archive holds what the instrumentation calls; it comes first so that shared templates
    # are its own, uninstrumented ones
    whole = ["-Wl,--whole-archive", str(runtime), "-Wl,--no-whole-archive"]
    shell([compiler(), *LINK[flavour], "-no-pie", *whole, f"{partial}.o", "-o", str(partial), "-lpthread"])
    Path(f"{partial}.o").unlink()
    partial.rename(program)


@dataclass
class Outcome:
    """One run of one program."""

    name: str
    arguments: list[str]
    code: int
    output: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.code == 0


def run(program: Path, arguments: Sequence[str], name: str = "", timeout: float = 300) -> Outcome:
    begun = time.monotonic()
    try:
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=timeout)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, output = 124, f"still running after {timeout:.0f} s"
    return Outcome(name or program.name, list(arguments), code, output, time.monotonic() - begun)


def work(programs: Sequence[Program], quick: bool, seeds: int | None) -> Iterator[tuple[Program, list[str]]]:
    for p in programs:
        for case in p.quick if quick else p.cases:
            for seed in range(seeds or (p.quick_seeds if quick else p.seeds)):
                yield p, [*case.split(), f"seed={seed}"]


def run_all(
    programs: Sequence[Program], flavour: str, quick: bool, seeds: int | None, jobs: int
) -> list[Outcome]:
    """Builds and runs; prints a line for each program and the words of each failure."""
    with ThreadPoolExecutor(jobs) as pool:
        built = dict(
            zip([p.name for p in programs], pool.map(lambda p: build(p.source, flavour, p.defines), programs))
        )
        outcomes = list(
            pool.map(
                lambda item: run(built[item[0].name], item[1], item[0].name), work(programs, quick, seeds)
            )
        )
    for p in programs:
        mine = [o for o in outcomes if o.name == p.name]
        bad = [o for o in mine if not o.ok]
        print(
            f"{p.name:32} {len(mine):4} runs  {sum(o.seconds for o in mine):7.1f} s  {'ok' if not bad else f'{len(bad)} FAILED'}",
            flush=True,
        )
        for o in bad[:3]:
            words = "\n    ".join(o.output.splitlines()[-30:])
            print(f"  {' '.join(o.arguments)}: status {o.code}\n    {words}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="programs whose name contains this")
    parser.add_argument(
        "--seeds", type=int, help="schedules of each case, instead of the program's own number"
    )
    parser.add_argument("--flavour", choices=KERNEL, default="check")
    parser.add_argument("--quick", action="store_true", help="the cases of `make test` alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="one program's source and its arguments")
    options = parser.parse_args()
    if options.run:
        outcome = run(build(options.run[0], options.flavour), options.run[1:])
        print(outcome.output, end="")
        return outcome.code
    programs = [p for p in PROGRAMS if not options.only or options.only in p.name]
    begun = time.monotonic()
    try:
        outcomes = run_all(programs, options.flavour, options.quick, options.seeds, options.jobs)
    except BuildError as e:
        print(e, file=sys.stderr)
        return 2
    failed = sum(not o.ok for o in outcomes)
    print(f"{len(outcomes)} runs, {failed} failed, {time.monotonic() - begun:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([vars(o) for o in outcomes]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
