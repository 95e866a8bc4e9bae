"""Run other packages' own LoRA tests with every PEFT layer computing through our operator.

    python python/tools/diffusers_suite.py --source DIR          diffusers' model-level LoRA tests (DIR: a
    checkout, bare ones too)
    python python/tools/diffusers_suite.py --suite peft          PEFT's LoRA tests, from its source
    distribution on PyPI

Each suite runs twice, as it is and accelerated. Exit 0: nothing fails that passes without us, and calls went
through us. 1: otherwise.
2: the tests are not to be had (diffusers' source distribution does not contain them; without --source they
are cloned).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "tests" / "diffusers_suite"
DIFFUSERS = "https://github.com/huggingface/diffusers"
# small pure-Python packages that the suites import; put beside the cache, never into the environment
HELPERS = {"parameterized": "parameterized", "requests_mock": "requests-mock", "attr": "attrs"}
# the LoRA tests that need no model hub; the others wait for it a minute each
PEFT_FILES = "custom_models mixed loraplus lorafa bdlora".split()
# of test_custom_models only the LoRA configurations, and not what never runs a forward
OTHER_CONFIGS = (
    "AdaLoraConfig",
    "RandLoraConfig",
    "VBLoRAConfig",
    "UniLoraConfig",
    "DeloraConfig",
    "Fsdp",
    "test_adapter_dtype_autocast",
)
PEFT_CHOICE = f"not test_custom_models or (LoraConfig and not {' and not '.join(OTHER_CONFIGS)})"


@dataclass(frozen=True)
class Suite:
    """Where to run pytest, and with which arguments."""

    name: str
    folder: Path
    arguments: list[str]


class Unavailable(Exception):
    """The tests cannot be had here, and what would help."""


def diffusers_suite(cache: Path, source: Path | None) -> Suite:
    """Its tests/ folder alone: beside its src/, the tests would import that instead of the installed
    diffusers.
    """
    folder = cache / "diffusers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = source or _clone(cache / "diffusers-checkout")
    if (source / "tests").is_dir():
        shutil.copytree(source / "tests", folder / "tests")
    else:
        archive = subprocess.run(["git", "-C", str(source), "archive", "HEAD", "tests"], capture_output=True)
        if archive.returncode:
            raise Unavailable(
                f"{source}: expected a checkout of diffusers with tests/, or its bare repository"
            )
        subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    files = sorted(
        p for p in (folder / "tests" / "models").rglob("test_*.py") if "LoraTesterMixin" in p.read_text()
    )
    if not files:
        raise Unavailable(
            f"{source}: no model-level LoRA tests in tests/models; expected diffusers 0.37 or later"
        )
    (folder / "pytest.ini").write_text("[pytest]\n")
    return Suite("diffusers", folder, [*(str(p.relative_to(folder)) for p in files), "-m", "lora"])


def _clone(into: Path) -> Path:
    if not into.exists():
        tag = f"v{version('diffusers')}"
        done = subprocess.run(
            ["git", "clone", "-q", "--depth", "1", "--branch", tag, DIFFUSERS, str(into)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Unavailable(
                f"cannot clone {tag} of {DIFFUSERS}: {done.stderr.strip()}\nPass --source with a checkout of it."
            )
    return into


def peft_suite(cache: Path) -> Suite:
    """The tests inside the source distribution of the installed version."""
    folder = cache / f"peft-{version('peft')}"
    if not folder.exists():
        wanted = f"peft=={version('peft')}"
        done = _pip(
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "-d",
            str(cache),
            wanted,
        )
        if done.returncode:
            raise Unavailable(f"cannot download {wanted}: {done.stderr.strip()}")
        with tarfile.open(next(cache.glob("peft-*.tar.gz"))) as archive:
            archive.extractall(cache, filter="data")
    (folder / "tests" / "__init__.py").touch()
    files = [f"tests/test_{name}.py" for name in PEFT_FILES]
    return Suite("peft", folder, [*files, "-k", PEFT_CHOICE, "-o", "addopts="])


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
    )


def helpers(cache: Path) -> Path:
    """A folder with the test helpers that this environment lacks."""
    folder = cache / "helpers"
    lacking = {
        module: package for module, package in HELPERS.items() if importlib.util.find_spec(module) is None
    }
    missing = [package for module, package in lacking.items() if not any(folder.glob(f"{module}*"))]
    if missing and (done := _pip("install", "-q", "--no-deps", "--target", str(folder), *missing)).returncode:
        print(f"without {', '.join(missing)}: {done.stderr.strip()}", file=sys.stderr)
    return folder


def run(suite: Suite, cache: Path, on: bool, extra: list[str]) -> dict:
    """The plugin's report of one run: outcomes of each test, and the counts."""
    report = cache / f"{suite.name}-{'on' if on else 'off'}.json"
    report.unlink(missing_ok=True)
    # nothing is fetched: tests that want the hub fail in both runs alike
    path = os.pathsep.join(map(str, [ROOT, PLUGIN, helpers(cache)]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "plugin",
        "--mole-report",
        str(report),
        "--rootdir",
        str(suite.folder),
    ]
    command += [
        *suite.arguments,
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        *([] if on else ["--mole-off"]),
        *extra,
    ]
    log = report.with_suffix(".log")
    print(f"{suite.name}, {'accelerated' if on else 'as it is'} … (log: {log})", flush=True)
    with log.open("w") as out:
        code = subprocess.run(
            command, cwd=suite.folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        ).returncode
    if not report.exists():
        raise SystemExit(f"pytest did not come to an end (exit code {code}), see {log}")
    return json.loads(report.read_text())


def compare(off: dict, on: dict) -> list[str]:
    """Prints both runs side by side; returns what speaks against us."""
    columns = [Counter(report["outcomes"].values()) for report in (off, on)]
    print(f"{'':10}{'as it is':>10}{'accelerated':>13}")
    for outcome in sorted(set().union(*columns)):
        print(f"{outcome:10}{columns[0][outcome]:>10}{columns[1][outcome]:>13}")
    status = on["status"]
    print(f"calls through our operator: {status['accelerated']}")
    for reason, count in status["fallbacks"].items():
        print(f"  through PEFT's forward:   {count}  {reason}")
    good = ("passed", "xpassed", "xfailed", "skipped")
    against = [
        f"{test}: {was} without us, {on['outcomes'].get(test, 'missing')} with us"
        for test, was in off["outcomes"].items()
        if was in good and on["outcomes"].get(test) not in good
    ]
    if not status["accelerated"]:
        against.append("no call went through our operator")
    if not columns[0]["passed"]:
        against.append("no test passed even without us")
    return against


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("diffusers", "peft"), default="diffusers")
    parser.add_argument("--source", type=Path, help="a checkout of diffusers")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "suites")
    parser.add_argument("extra", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    try:
        suite = peft_suite(cache) if options.suite == "peft" else diffusers_suite(cache, options.source)
    except Unavailable as reason:
        print(f"NOT RUN: {reason}", file=sys.stderr)
        return 2
    off, on = (run(suite, cache, accelerated, options.extra) for accelerated in (False, True))
    against = compare(off, on)
    print("\n".join(against) or f"{suite.name}: nothing fails that passes without us")
    return 1 if against else 0


if __name__ == "__main__":
    sys.exit(main())
