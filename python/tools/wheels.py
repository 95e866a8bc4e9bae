"""Wheel and source distribution, and proof that they work elsewhere: python python/tools/wheels.py
build|sdist|install [--dist dist]

build    a wheel from here (--source: from the source distribution instead, unpacked in a folder of its own),
         its tag from what the library
         needs of the system, its contents checked
sdist    the source distribution, its contents checked
install  torch by its pin, then the newest wheel, into an empty environment: pip check, doctor, the demo's
         pipeline drawn once
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# torch brings them, and is in the process before the library is loaded
FROM_TORCH = {"libtorch.so", "libtorch_cpu.so"}
# glibc of Debian 12 and its siblings: the newest that a published wheel should ask for
NEWEST_SYSTEM = (2, 36)
WANTED = {
    "mole_kernels/__init__.py",
    "mole_kernels/libmole_kernels.json",
    "mole_kernels/demo/assets/unet.safetensors",
}
FOREIGN = re.compile(r"(^|/)(tests|build|\.git|__pycache__|\.venv)(/|$)|\.(o|pyc)$")


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """A program's output; what it says where it fails."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def build(dist: Path, source: Path | None) -> Path:
    """dist/mole_kernels-<version>-py3-none-manylinux_….whl"""
    with tempfile.TemporaryDirectory() as folder:
        where = ROOT if source is None else _unpacked(source, Path(folder) / "source")
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            folder,
            where,
            MOLE_REQUIRE_EXTENSION="1",
        )
        (made,) = Path(folder).glob("*.whl")
        tag = system_tag(json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", made)))
        name = (
            run(
                sys.executable,
                "-m",
                "wheel",
                "tags",
                "--remove",
                "--platform-tag",
                tag,
                made,
                cwd=Path(folder),
            )
            .strip()
            .splitlines()[-1]
        )
        check_wheel(Path(folder) / name)
        dist.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(Path(folder) / name, dist / name))


def _unpacked(source: Path, folder: Path) -> Path:
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def system_tag(found: dict[str, Any]) -> str:
    """The manylinux tag that the library's symbols allow, from what `auditwheel show --json` says.

    The libraries that torch brings are left out, as `auditwheel repair --exclude` would; then there is
    nothing to copy or to repair.
    """
    if foreign := set(found["external_libs"]) - FROM_TORCH:
        raise SystemExit(f"the library needs {sorted(foreign)}, which neither the system nor torch brings")
    if found["unsupported_isa"]:
        raise SystemExit("the library's base code needs newer processors than the tag says")
    tag = str(found["sym_tag"])
    version = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", tag)
    if version is None or (int(version[1]), int(version[2])) > NEWEST_SYSTEM:
        raise SystemExit(
            f"the library needs {tag}, newer than manylinux_{NEWEST_SYSTEM[0]}_{NEWEST_SYSTEM[1]}: build on an older system"
        )
    return tag


def check_wheel(wheel: Path) -> None:
    """What belongs in is in, nothing else is; CUDA is in it where it was built with nvcc; the tag has no
    Python ABI.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        report = json.loads(archive.read("mole_kernels/libmole_kernels.json"))
        library = archive.read("mole_kernels/libmole_kernels.so")
    if missing := WANTED - names:
        raise SystemExit(f"{wheel.name} lacks {sorted(missing)}")
    if foreign := [n for n in names if FOREIGN.search(n) or not n.startswith("mole_kernels")]:
        raise SystemExit(f"{wheel.name} holds {sorted(foreign)[:5]}")
    if "-py3-none-" not in wheel.name or not report["built"]:
        raise SystemExit(f"{wheel.name}: expected py3-none with the library built, got {report}")
    if report["cuda"] and b".nv_fatbin" not in library:
        raise SystemExit(f"{wheel.name}: the report names CUDA {report['cuda']}, the library holds none")
    where = {str(ROOT).encode(), str(Path.home()).encode() + b"/"}
    if said := [path for path in where if path in library]:
        raise SystemExit(f"{wheel.name}: the library names folders of this machine: {said}")
    print(
        f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files, CUDA for {report['cuda'] or 'nothing'}"
    )


def sdist(dist: Path) -> Path:
    """dist/mole_kernels-<version>.tar.gz"""
    dist.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(dist.resolve())!r}))"
    made = dist / run(sys.executable, "-c", code).strip().splitlines()[-1]
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "csrc/bindings.cpp",
        "csrc/cuda/device.cu",
    } | WANTED
    if missing := wanted - {"mole_kernels/libmole_kernels.json"} - names:
        raise SystemExit(f"{made.name} lacks {sorted(missing)}")
    built = [n for n in names if n.endswith((".so", ".o", "libmole_kernels.json"))]
    if built:
        raise SystemExit(f"{made.name} holds what was built: {built}")
    print(f"{made.name}: {made.stat().st_size / 1e6:.1f} MB, {len(names)} files")
    return made


def install(wheel: Path, where: Path) -> None:
    """An empty environment with torch, the wheel and what it needs; everything is tried from another
    folder.
    """
    shutil.rmtree(where, ignore_errors=True)
    run(sys.executable, "-m", "venv", where)
    python, pins = where / "bin/python", ["-c", str(ROOT / "constraints.txt")]
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins]
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    run(*pip, torch)
    run(*pip, f"{wheel.resolve()}[diffusers]")
    print(run(python, "-m", "pip", "check").strip())
    outside = where / "elsewhere"
    outside.mkdir()
    print(run(where / "bin/mole-kernels", "doctor", cwd=outside))
    facts = json.loads(run(where / "bin/mole-kernels", "doctor", "--json", cwd=outside))
    if not facts["extension"]["usable"] or facts["in_use"]["cpu"] != "cpu" or not facts["healthy"]:
        raise SystemExit(f"doctor: {facts['extension']}")
    code = (
        "from mole_kernels.demo.model import load_pipeline; import mole_kernels, torch; pipe = load_pipeline(); "
        "print(mole_kernels.__version__, pipe('four seven blank', num_inference_steps=2).images[0].size)"
    )
    print(run(python, "-c", code, cwd=outside).strip())


def newest(dist: Path, pattern: str) -> Path:
    found = sorted(dist.glob(pattern), key=lambda p: p.stat().st_mtime)
    if not found:
        raise SystemExit(f"there is no {pattern} in {dist}")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("build", "sdist", "install"))
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--source", action="store_true", help="build: from the newest source distribution in --dist"
    )
    parser.add_argument("--env", type=Path, default=ROOT / "build/wheel-env")
    given = parser.parse_args()
    if given.what == "build":
        build(given.dist, newest(given.dist, "*.tar.gz") if given.source else None)
    elif given.what == "sdist":
        sdist(given.dist)
    else:
        install(newest(given.dist, "*.whl"), given.env)


if __name__ == "__main__":
    main()
