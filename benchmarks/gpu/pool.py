"""Items shared out among processes, each under a time limit: what hangs or crashes costs itself, and is
recorded.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.context import Item, Outcome

ROOT = Path(__file__).resolve().parents[2]
# a process that has not said that it is ready by then (torch's import, the device's first use) is started
# anew
START = 90.0
POLL = 0.05
MOST_TRIES = 3


@dataclass
class Results:
    """What the items gave; those that were never begun are `dropped`, with the reason."""

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: list[dict[str, str]] = field(default_factory=list)

    @property
    def failures(self) -> list[dict[str, str]]:
        return [f for o in self.outcomes.values() for f in o["failures"]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [r for o in self.outcomes.values() for r in o["rows"]]

    @property
    def passed(self) -> int:
        return sum(o["passed"] for o in self.outcomes.values())

    def drop(self, items: Sequence[Item], why: str) -> None:
        self.dropped += [{"id": str(item["id"]), "why": why} for item in items]

    def add(self, other: Results) -> None:
        self.outcomes |= other.outcomes
        self.dropped += other.dropped


@dataclass
class Job:
    """What every process of a run is told; `limit` seconds for one item (an item's own "limit" overrides
    it).
    """

    device: str
    limit: float
    peers: str | None = None
    seconds: float = 1.0
    ceilings: dict[str, float] = field(default_factory=dict)
    start: float = START
    prefix: tuple[str, ...] = ()


class Worker:
    """One process and its list, restarted after the item that hung or crashed it."""

    def __init__(self, items: list[Item], job: Job, folder: Path, name: str, results: Results) -> None:
        self.left, self.job, self.results = items, job, results
        self.files = [folder / f"{name}.{end}" for end in ("json", "jsonl", "log")]
        self.started = 0
        self.process: Any = None
        self.start()

    def start(self) -> None:
        job, out, log = self.files
        job.write_text(
            json.dumps(
                {
                    **{n: getattr(self.job, n) for n in ("device", "peers", "seconds", "ceilings")},
                    "items": self.left,
                }
            )
        )
        out.write_text("")
        self.started += 1
        self.read, self.item, self.method, self.heard, self.ready = 0, None, "", time.monotonic(), False
        command = [*self.job.prefix, sys.executable, "-m", "benchmarks.gpu.worker", str(job), str(out)]
        with log.open("ab") as file:
            self.process = processes.start(command, cwd=ROOT, stdout=file, stderr=file)

    def poll(self) -> bool:
        """Read what was said; restart where needed. False when nothing is left to do."""
        assert self.process is not None
        ended = self.process.poll() is not None
        self.listen()
        if ended:
            if self.item is not None:
                self.blame(f"the process ended with code {self.process.returncode}: {self.last_words()}")
            elif self.process.returncode not in (0, 75) and self.left:
                return self.give_up(
                    f"its process does not start: code {self.process.returncode}: {self.last_words()}"
                )
            return self.again()
        limit = self.job.start if not self.ready else float((self.item or {}).get("limit", self.job.limit))
        if time.monotonic() - self.heard > limit:
            self.stop()
            if self.item is None:
                return self.give_up(f"its process said nothing for {limit:.0f} s")
            self.blame(f"no answer within {limit:.0f} s")
            return self.again()
        return True

    def listen(self) -> None:
        text = self.files[1].read_bytes()
        complete = text.rfind(b"\n") + 1
        for raw in text[self.read : complete].splitlines():
            said = json.loads(raw)
            self.heard, self.ready = time.monotonic(), True
            if "begin" in said:
                self.item, self.method = self.left[0], ""
            elif "at" in said:
                self.method = said["at"]
            elif "end" in said:
                self.results.outcomes[said["end"]] = merged(
                    self.results.outcomes.get(said["end"]), said["outcome"]
                )
                self.left, self.item = self.left[1:], None
        self.read = complete

    def blame(self, why: str) -> None:
        """The item failed; where it named a method and others remain, it is tried again without that one."""
        item = self.item
        assert item is not None
        outcome = Outcome()
        outcome.fail(item, self.method or str(item.get("backend", item["kind"])), "run", why)
        self.results.outcomes[item["id"]] = merged(self.results.outcomes.get(item["id"]), outcome.plain())
        skip = [*item.get("skip", ()), self.method]
        retry = self.method and len(skip) <= MOST_TRIES and self.method not in ("", "plain")
        self.left = [*([{**item, "skip": skip}] if retry else []), *self.left[1:]]
        self.item = None

    def again(self) -> bool:
        if self.left:
            self.start()
        return bool(self.left)

    def give_up(self, why: str) -> bool:
        self.results.drop(self.left, why)
        outcome = Outcome()
        outcome.fail(self.left[0], "process", "start", why)
        self.results.outcomes.setdefault(self.left[0]["id"], outcome.plain())
        self.left = []
        return False

    def stop(self) -> None:
        assert self.process is not None
        processes.stop(self.process)
        self.listen()

    def last_words(self) -> str:
        lines = self.files[2].read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "(silent)"


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    if old is None:
        return new
    return {
        "rows": old["rows"] + new["rows"],
        "failures": old["failures"] + new["failures"],
        "refused": old["refused"] | new["refused"],
        "passed": old["passed"] + new["passed"],
    }


def run(
    items: Sequence[Item], job: Job, many: int, until: float, tell: Callable[[int], None] = lambda done: None
) -> Results:
    """All items, the first first, on `many` processes; what has not ended at `until` (time.monotonic) is
    dropped or, if begun, stopped.
    """
    results = Results()
    if not items:
        return results
    with tempfile.TemporaryDirectory(prefix="mole-gpu-") as folder:
        shares = [list(items[i::many]) for i in range(min(many, len(items)))]
        workers = [Worker(share, job, Path(folder), str(i), results) for i, share in enumerate(shares)]
        try:
            busy = list(workers)
            while busy and time.monotonic() < until:
                busy = [w for w in busy if w.poll()]
                tell(len(results.outcomes))
                time.sleep(POLL)
            for worker in busy:
                worker.stop()
                results.drop(worker.left, "no time left")
        finally:
            for worker in workers:
                if worker.process is not None and worker.process.poll() is None:
                    processes.stop(worker.process)
    return results
