"""The oldest and the newest of everything that pyproject.toml promises, each in an environment of its own:
python python/tools/matrix.py

python python/tools/matrix.py [--only oldest|newest] [--all]

Both see this environment's torch and test tools and install only what differs, some tens of megabytes. torch
itself cannot be varied
where one CPU build is all that installs: the library's promise from 2.11 on rests on its stable ABI
(docs/packaging.md).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if sys.version_info >= (3, 11):
    import tomllib
else:
    raise SystemExit("python 3.11 or later reads pyproject.toml")
VARIED = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "triton")
# what transformers imports by itself where it is installed, of the same age; ours needs none of it
COMPANIONS = ("kernels==0.9.0",)
# patching, files and acceleration: what touches these packages; and the Triton kernels in their interpreter
CHOSEN = (
    "tests/peft/test_accelerate.py",
    "tests/patching/test_patch.py",
    "tests/io/test_with_diffusers.py",
    "tests/kernels/test_dense.py",
)


def promised() -> dict[str, tuple[str, str]]:
    """package -> (oldest, first that is not promised or ""), from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, tuple[str, str]] = {}
    for line in [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]:
        match = re.match(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", line)
        if match and match[1] in VARIED:
            found[match[1]] = (match[2], match[3] or "")
    return found


def wanted(which: str) -> list[str]:
    """Requirements for pip: exactly the oldest, or the newest below the bound."""
    if which == "oldest":
        return [*(f"{name}=={oldest}" for name, (oldest, _) in promised().items()), *COMPANIONS]
    return [f"{name}<{bound}" if bound else name for name, (_, bound) in promised().items()]


def environment(which: str, where: Path) -> Path:
    """An environment that sees this one's packages behind its own; made anew where the promise changed."""
    stamp, asked = where / "asked.txt", "\n".join(wanted(which))
    python = where / "bin/python"
    if stamp.exists() and stamp.read_text() == asked:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(where)], check=True)
    inside = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(inside) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--upgrade",
        "--upgrade-strategy",
        "only-if-needed",
    ]
    subprocess.run([*pip, torch, *wanted(which)], check=True)
    stamp.write_text(asked)
    return python


def versions(python: Path) -> str:
    code = f"import importlib.metadata as m; print(', '.join(f'{{n}} {{m.version(n)}}' for n in {('torch', *VARIED)!r}))"
    return subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("oldest", "newest"))
    parser.add_argument("--all", action="store_true", help="the whole suite, not the chosen part")
    given = parser.parse_args()
    failed = []
    for which in [given.only] if given.only else ["oldest", "newest"]:
        python = environment(which, ROOT / "build" / "matrix" / which)
        print(f"{which}: {versions(python)}", flush=True)
        began = time.monotonic()
        tests = ["tests"] if given.all else [*CHOSEN]
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        if subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
        ).returncode:
            failed.append(which)
        print(f"{which}: {time.monotonic() - began:.0f} s{', FAILED' if which in failed else ''}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
