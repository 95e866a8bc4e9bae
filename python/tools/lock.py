"""The hashes of everything that constraints.txt pins, into constraints.lock: python python/tools/lock.py

pip itself says which file it would take for each pin, from whatever index it is set up with, and that file's
sha256. One file each, for the
platform and the Python this runs on. torch is not among them: its wheel for CPUs is another file on another
index, so it is pinned by
version alone and installed first (`Makefile`).
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS, LOCK = ROOT / "constraints.txt", ROOT / "constraints.lock"
APART = ("torch",)
HEAD = """# made by `make lock` from constraints.txt; do not edit. One file for each pin: {platform}
# torch is pinned by version alone and installed first: its wheels for CPUs and GPUs are other files on other indexes
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Package -> version, of constraints.txt without torch."""
    lines = [line.split("#")[0].strip() for line in PINS.read_text().splitlines()]
    found = dict(line.split("==") for line in lines if "==" in line)  # type: ignore[misc]
    return {name: version for name, version in found.items() if normal(name) not in APART}


def locked() -> dict[str, tuple[str, list[str]]]:
    """Normal name -> (version, sha256 sums) of constraints.lock."""
    lines = LOCK.read_text().replace("\\\n", " ").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            pin, *hashes = line.split()
            name, version = pin.split("==")
            found[normal(name)] = version, [h.removeprefix("--hash=sha256:") for h in hashes]
    return found


def resolve() -> dict[str, str]:
    """Normal name -> sha256 of the file that pip takes."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in pins().items()))
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
        ]
        subprocess.run([*pip, "--report", str(report), "-r", str(wanted)], check=True)
        items = json.loads(report.read_text())["install"]
    return {
        normal(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for item in items
    }


def main() -> None:
    sums = resolve()
    here = (
        f"{platform.system()} {platform.machine()}, Python {sys.version_info.major}.{sys.version_info.minor}"
    )
    lines = [f"{name}=={version} --hash=sha256:{sums[normal(name)]}\n" for name, version in pins().items()]
    LOCK.write_text(HEAD.format(platform=here) + "".join(lines))
    print(f"{len(lines)} files: {LOCK.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
