"""Every reader of strangers' bytes meets its corpus, and a counted number of mutations of it: results or
MoleErrors, nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mole_kernels.errors import MoleFileError
from tests.fuzz import meeting
from tests.fuzz.mutate import mutate

ROOT = Path(__file__).parents[2]
RUNS = 100


@pytest.mark.parametrize("name", meeting.NAMES)
def test_the_corpus_is_met(name: str):
    """What was found once is refused by name, or read, for ever after; the seeds get somewhere."""
    check = meeting.target(name).check
    met = {path.name: meeting.meet(check, path.read_bytes()) for path in meeting.seeds(name)}
    assert [error for path, error in met.items() if path.startswith("seed-")].count(None), (
        "no seed is read: the target sees refusals only"
    )
    assert all(path.startswith(("seed-", "found-")) for path in met)


def test_every_target_has_seeds_and_every_folder_a_target():
    assert {path.name for path in meeting.CORPUS.iterdir()} == set(meeting.NAMES) and len(meeting.NAMES) >= 17
    assert sum(path.stat().st_size for path in meeting.CORPUS.rglob("*") if path.is_file()) < 100_000


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this platform"
)
def test_counted_mutations_find_nothing():
    """The same inputs each time: a fixed seed, a number of runs, and no corpus but the repository's."""
    command = [sys.executable, "tests/fuzz/run.py", "--runs", str(RUNS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    said = dict(line.split()[:2] for line in done.stdout.splitlines() if line.endswith(" ok"))
    assert done.returncode == 0 and set(said) == set(meeting.NAMES), done.stdout + done.stderr[-6000:]


def test_a_find_is_one():
    """Anything but a MoleError passes through, and a MoleError must be fit to be printed."""

    def short(data: bytes) -> object:
        return data[5]

    with pytest.raises(IndexError):
        meeting.meet(short, b"abc")

    def unprintable(data: bytes) -> None:
        raise MoleFileError(data.decode(), "is wrong")

    with pytest.raises(AssertionError, match="control characters"):
        meeting.meet(unprintable, b"\x1b[31m")
    with pytest.raises(AssertionError, match="a message of"):
        meeting.meet(unprintable, b"x" * 5000)
    assert isinstance(meeting.meet(unprintable, b"x"), MoleFileError)


def test_mutations_repeat_and_stay_json():
    text = json.dumps([{"a": 1, "b": [1.5, "x"]}, None]).encode()
    made = [mutate(text, 4096, seed, lambda data, most: data) for seed in range(300)]
    assert made == [mutate(text, 4096, seed, lambda data, most: data) for seed in range(300)]
    assert len(set(made)) > 100

    def reads(data: bytes) -> bool:
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            return False
        return True

    assert sum(map(reads, made)) > 250
