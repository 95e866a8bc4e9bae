"""One process that works through a list of items and says after each what came out. Started by `pool.py`,
never by hand.

    python -m benchmarks.gpu.worker JOB.json OUT.jsonl

JOB: {"device", "peers", "seconds", "ceilings", "items": [...]}. OUT, one JSON object a line:
{"begin": id}, {"at": method} before each method, {"end": id, "outcome": {...}}. An error that leaves the
device unusable ends the
process with LOST, after its line was written; what was not begun is given to a new process.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from benchmarks.gpu.context import Context, Item, Outcome, short
from mole_kernels.errors import MoleBackendError

LOST = 75


class DeviceLost(RuntimeError):
    """The device answers nothing any more: every later call in this process would fail too."""


def handler(kind: str) -> Callable[[Item, Context], Outcome]:
    from benchmarks.gpu import ceilings, layers, models, verify

    found = verify.HANDLERS | layers.HANDLERS | models.HANDLERS | ceilings.HANDLERS
    return found[kind]


def work(items: list[Item], context: Context, say: Callable[[dict[str, Any]], None]) -> None:
    """Every item; what one of them raises is a failure in its outcome. Raises DeviceLost."""
    context.at = lambda name: say({"at": name})
    for item in items:
        say({"begin": item["id"]})
        context.skip = frozenset(item.get("skip", ()))
        try:
            outcome = handler(item["kind"])(item, context)
        except MoleBackendError as refusal:
            # a way that finds out only at the call that it cannot
            outcome = Outcome(refused={str(item.get("backend", item["kind"])): short(refusal)})
        # whatever one item raises, the others still say what they have to say
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            outcome = Outcome()
            outcome.fail(item, str(item.get("backend", item["kind"])), "run", error)
        lost = usable(context)
        if lost is not None:
            outcome.fail(item, str(item.get("backend", item["kind"])), "device", lost)
        say({"end": item["id"], "outcome": outcome.plain()})
        if lost is not None:
            raise DeviceLost(str(lost))


def usable(context: Context) -> Exception | None:
    """None, or what the device says when it is asked to finish."""
    try:
        context.device.sync()
    except Exception as error:
        return error
    return None


def line(file: TextIO, said: dict[str, Any]) -> None:
    file.write(json.dumps(said) + "\n")
    file.flush()


def main() -> int:
    job_file, out_file = sys.argv[1:3]
    with open(job_file) as file:
        job = json.load(file)
    with open(out_file, "a") as out:
        context = Context.make(
            job["device"], job.get("peers"), seconds=job["seconds"], ceilings=job.get("ceilings", {})
        )
        line(out, {"ready": True})
        try:
            work(job["items"], context, lambda said: line(out, said))
        except DeviceLost:
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
