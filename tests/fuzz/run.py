"""Fuzz the readers with atheris: python tests/fuzz/run.py [--seconds 60 | --runs 2000] [target …]

One process for each target, one after the other. An input that fails is kept under build/fuzz/<target>/ and
said at the end; put into
tests/fuzz/corpus/<target>/found-<what> it is met by every test run from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_INTERPRET", "1")

import atheris  # noqa: E402

INSTRUMENTED = ["errors", "files", "io", "experts", "methods", "dispatch.tables", "training.captions"]
# it names every module that it instruments
with (
    contextlib.redirect_stderr(io.StringIO()),
    atheris.instrument_imports(include=[f"mole_kernels.{name}" for name in INSTRUMENTED]),
):
    from tests.fuzz import meeting

    TARGETS = {name: meeting.target(name) for name in meeting.NAMES}

from tests.fuzz.mutate import mutate  # noqa: E402

# of one input: no file of a few kilobytes needs more
MOST_MEMORY = 256 * 2**20
MOST_BYTES = 8192


def fuzz(name: str, limit: list[str], seed: int, out: Path, grown: Path) -> None:
    """Never returns: libFuzzer ends the process, with 0 where nothing was found."""
    target = TARGETS[name]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MOST_MEMORY

    def one(data: bytes) -> None:
        meeting.meet(target.check, data)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < most, (
            "this much input takes this much memory"
        )

    options = (
        {"custom_mutator": lambda data, size, seed: mutate(data, size, seed, atheris.Mutate)}
        if target.JSON
        else {}
    )
    flags = [
        *limit,
        f"-seed={seed}",
        f"-max_len={MOST_BYTES}",
        "-timeout=60",
        "-rss_limit_mb=0",
        "-verbosity=0",
        f"-artifact_prefix={out}/",
    ]
    atheris.Setup([sys.argv[0], *flags, str(grown), str(meeting.CORPUS / name)], one, **options)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    parser.add_argument(
        "--runs", type=int, help="of each target, instead of a time: the same inputs every time"
    )
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if unknown := set(asked.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    names, failed = asked.targets or list(TARGETS), []
    for name in names:
        out = ROOT / "build" / "fuzz" / name
        out.mkdir(parents=True, exist_ok=True)
        each = max(1, round(asked.seconds / len(names)))
        limit = [f"-max_total_time={each}"] if asked.runs is None else [f"-runs={asked.runs}"]
        with tempfile.TemporaryDirectory() as empty:
            # what a longer run found worth keeping is where the next one begins; counted runs begin at the
            # corpus alone
            grown = Path(empty) if asked.runs is not None else out / "grown"
            grown.mkdir(exist_ok=True)
            child = os.fork()
            if child == 0:
                fuzz(name, limit, asked.seed, out, grown)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{name:20} {'ok' if status == 0 else f'FAILED ({status})'}", flush=True)
        if status:
            failed.append(name)
    for name in failed:
        inputs = sorted((ROOT / "build" / "fuzz" / name).glob("[clot]*-*"), key=lambda p: p.stat().st_mtime)
        print(f"{name}: {inputs[-1].relative_to(ROOT) if inputs else 'no input was kept'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
