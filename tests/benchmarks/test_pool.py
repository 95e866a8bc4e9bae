"""Processes under a time limit: what hangs or dies costs itself, the rest is measured; and the whole command
on a CPU.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.cases import Case
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import pool, results
from benchmarks.gpu.context import Context, Outcome
from benchmarks.gpu.processes import limited
from benchmarks.gpu.worker import DeviceLost, work

PEERS = str(Path(__file__).with_name("peers_file.py"))
CASE = Case("tiny", 32, 24, 40, True, "fp32", 4, counts=(("tiny", 3),))
ROOT = Path(__file__).resolve().parents[2]


def item(methods, name=""):
    return {"id": f"{CASE}{name}", "kind": "layer", "case": asdict(CASE), "methods": methods, "stream": False}


@pytest.fixture(autouse=True)
def _as_on_a_plain_machine(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_what_hangs_or_dies_costs_itself():
    """One process: a method that hangs, one that ends the process, one that raises; the case is measured
    without them.
    """
    items = [item(["ours", "hangs", "dies"]), item(["stacked", "raises"], " again")]
    job = pool.Job("cpu", limit=8.0, peers=PEERS, seconds=0.001)
    found = pool.run(items, job, 1, time.monotonic() + 120)
    failed = {(f["method"], f["error"].partition(":")[0]) for f in found.failures}
    assert failed == {
        ("hangs", "no answer within 8 s"),
        ("dies", "the process ended with code 13"),
        ("raises", "RuntimeError"),
    }
    timed = {r["method"] for r in found.rows if r["us"]}
    assert timed == {"plain", "ours", "stacked"} and not found.dropped


class Ended:
    """A process that is no process: it has said what it says and ended."""

    # no process has this number
    pid = 1 << 30

    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode

    def kill(self):
        pass

    wait = kill


def fake(monkeypatch, scripts):
    """Each start writes the next script's lines."""
    starts = iter(scripts)

    def popen(arguments, **named):
        lines, code = next(starts)
        Path(arguments[-1]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Ended(code)

    monkeypatch.setattr(pool.processes, "start", popen)


GOOD = {"rows": [{"op": "x"}], "failures": [], "refused": {}, "passed": 1}
ITEMS = [{"id": name, "kind": "layer"} for name in "ab"]


def test_a_lost_device_ends_the_process_and_the_rest_goes_on(monkeypatch):
    lost = GOOD | {"failures": [{"id": "a", "method": "m", "stage": "device", "error": "lost"}]}
    fake(
        monkeypatch,
        [
            ([{"ready": True}, {"begin": "a"}, {"end": "a", "outcome": lost}], 75),
            ([{"ready": True}, {"begin": "b"}, {"end": "b", "outcome": GOOD}], 0),
        ],
    )
    found = pool.run(ITEMS, pool.Job("cpu", 5.0), 1, time.monotonic() + 5)
    assert set(found.outcomes) == {"a", "b"} and len(found.failures) == 1 and not found.dropped


def test_a_method_is_skipped_after_it_killed_its_process(monkeypatch):
    seen = []
    fake(
        monkeypatch,
        [
            ([{"ready": True}, {"begin": "a"}, {"at": "bad"}], -11),
            (
                [
                    {"ready": True},
                    {"begin": "a"},
                    {"end": "a", "outcome": GOOD},
                    {"begin": "b"},
                    {"end": "b", "outcome": GOOD},
                ],
                0,
            ),
        ],
    )
    start = pool.Worker.start
    monkeypatch.setattr(
        pool.Worker, "start", lambda self: (seen.append([i.get("skip") for i in self.left]), start(self))[1]
    )
    found = pool.run(ITEMS, pool.Job("cpu", 5.0), 1, time.monotonic() + 5)
    assert seen == [[None, None], [["bad"], None]]
    assert [f["method"] for f in found.failures] == ["bad"] and "code -11" in found.failures[0]["error"]
    assert len(found.outcomes["a"]["rows"]) == 1


def test_a_plain_layer_that_dies_is_not_tried_again(monkeypatch):
    fake(
        monkeypatch,
        [
            ([{"ready": True}, {"begin": "a"}, {"at": "plain"}], 1),
            ([{"begin": "b"}, {"end": "b", "outcome": GOOD}], 0),
        ],
    )
    found = pool.run(ITEMS, pool.Job("cpu", 5.0), 1, time.monotonic() + 5)
    assert set(found.outcomes) == {"a", "b"} and len(found.failures) == 1


def test_processes_that_do_not_start_are_given_up(monkeypatch):
    fake(monkeypatch, [([], 1)])
    found = pool.run(ITEMS, pool.Job("cpu", 5.0), 1, time.monotonic() + 5)
    assert [d["id"] for d in found.dropped] == ["a", "b"] and "does not start" in found.failures[0]["error"]


def test_what_there_was_no_time_for_is_recorded(monkeypatch):
    monkeypatch.setattr(pool.processes, "start", lambda *a, **k: Ended(None))
    found = pool.run(ITEMS, pool.Job("cpu", 5.0), 2, time.monotonic() + 0.2)
    assert sorted(d["id"] for d in found.dropped) == ["a", "b"] and {d["why"] for d in found.dropped} == {
        "no time left"
    }


def test_a_worker_stops_where_the_device_answers_nothing(monkeypatch):
    said, context = [], Context.make("cpu")
    monkeypatch.setattr(
        type(context.device), "sync", lambda self: (_ for _ in ()).throw(RuntimeError("an illegal address"))
    )
    monkeypatch.setattr("benchmarks.gpu.worker.handler", lambda kind: lambda item, context: Outcome(passed=1))
    with pytest.raises(DeviceLost, match="illegal address"):
        work(ITEMS, context, said.append)
    assert [s for s in said if "begin" in s] == [{"begin": "a"}]
    assert said[-1]["outcome"]["failures"][0]["stage"] == "device"


def test_a_process_ends_with_what_it_started():
    """A shell that is stopped for lack of time takes its child along."""
    begin = time.monotonic()
    code, _ = limited(["/bin/sh", "-c", "sleep 60 & sleep 60; echo never"], 1.0)
    assert code is None and time.monotonic() - begin < 30
    assert limited(["/bin/sh", "-c", "echo said; exit 3"], 20.0) == (3, "said\n")


BLOCKER = """
import sys
HIDDEN = ("peft", "diffusers", "matplotlib", "rich", "typer", "pytest", "transformers", "accelerate", "sklearn", "hypothesis")
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def test_the_whole_command_with_nothing_but_torch(tmp_path):
    """A dry run in which PEFT, diffusers, matplotlib, rich, typer and pytest cannot be imported; a faulty
    method and backend besides.
    """
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(BLOCKER)
    env = dict(os.environ, PYTHONPATH=str(hidden), TRITON_INTERPRET="0")
    words = "--device cpu --quick --processes 1 --seconds 300 --only=-r8".split() + ["--out", str(tmp_path)]
    quiet = "import tests.benchmarks.peers_file as p; [p.METHODS.pop(n) for n in ('hangs', 'dies')]"
    peers = tmp_path / "peers.py"
    peers.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{quiet}\nMETHODS, BACKENDS = p.METHODS, p.BACKENDS\n"
    )
    words += ["--peers", str(peers)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1, done.stderr
    [path] = tmp_path.glob("*.json")
    result = results.load(path)
    assert not result["verified"] and result["gpu"] is None and result["suite"] == "gpu"
    assert "peft" not in result["software"] or result["checks"]["refused"]["peft"] == "PEFT is not installed"
    methods = {f["method"] for f in result["failures"]}
    assert methods >= {"five-percent", "wrong", "NaN", "raises"}
    assert any(f["id"].startswith("rules five-percent") and "G2" in f["error"] for f in result["failures"])
    assert {r["method"] for r in result["cases"] if r.get("wrong")} == {"wrong", "NaN", "five-percent"}
    assert {r["method"] for r in result["cases"] if r["us"]} >= {"plain", "ours", "stacked", "eager"}
    assert all(g["met"] is None for g in result["goals"])
    text = path.with_suffix(".md").read_text()
    assert "NOT verified" in text and "**wrong**" in text and "five-percent" in text and "dry run" in text
    assert not list(tmp_path.glob("*.png")) and "no plots" in done.stderr
    # the plots are made where matplotlib is
    assert command.main(["--report", str(path)]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {f"{path.stem}-ratio.png", f"{path.stem}-roofline.png"}


def test_without_a_gpu_nothing_is_run(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert command.main([]) == 2 and "no NVIDIA GPU" in capsys.readouterr().err
