"""`explain` and `tune` as a user sees them, on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from mole_kernels.cli import app, tune
from mole_kernels.cli.explain import GATES, question
from mole_kernels.cli.machine import ExplainArgs
from mole_kernels.dispatch import tables
from mole_kernels.dispatch.choose import CANDIDATES
from mole_kernels.dispatch.device import known
from mole_kernels.dispatch.suite import suite
from mole_kernels.dispatch.tables import dumps, key_of, load
from mole_kernels.errors import MoleFileError

CALL = ("explain", "--shape", "4608,3072,3072", "--ranks", "64,64", "--gate", "mole", "--device", "h200")


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the entry point; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mole-kernels", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


def test_explain_shows_every_candidate_and_its_reason(cli):
    code, out, err = cli(*CALL)
    assert code == 0 and not err
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(CANDIDATES) <= set(lines)
    assert lines["persistent"].endswith(
        "taken".ljust(len(lines["persistent"]) - lines["persistent"].rindex("taken"))
    )
    assert "the gates depend on x" in lines["merge"] and "every token of a sample" in lines["recompute"]
    assert (
        "% slower" in lines["stacked"]
        and "NVIDIA H200" in lines["gpu"]
        and "predictions of the cost model" in lines["by"]
    )
    assert lines["taken"].split()[1] == "persistent"


def test_explain_as_json_agrees(cli):
    found = json.loads(cli(*CALL, "--json")[1])
    assert found["taken"] == "persistent" and found["source"] == "model" and found["gpu"] == "h200"
    considered = {c["name"]: c for c in found["considered"]}
    assert set(CANDIDATES) <= set(considered)
    taken = considered["persistent"]
    assert taken["added_percent"] == pytest.approx((taken["predicted"] / found["plain_us"] - 1) * 100)
    assert all((c["lost"] is None) == (name == "persistent") for name, c in considered.items())
    assert found["call"]["ranks"] == [64, 64] and found["call"]["token_gate"] and found["call"]["sample_gate"]
    back = json.loads(cli(*CALL, "--json", "--backward")[1])
    assert back["plain_us"] > 0 and {c["name"] for c in back["considered"] if c["possible"]} == {
        "persistent",
        "two_pass",
        "stacked",
    }


def test_what_no_tile_can_hold_has_no_time(cli):
    """A rank whose recomputation no tile has registers for: a dash on the screen, null in the JSON, never
    Infinity.
    """
    large = (*CALL[:3], "--ranks", "256,256", "--gate", "mask", "--device", "a100")
    found = json.loads(cli(*large, "--json")[1], parse_constant=pytest.fail)
    assert next(c["predicted"] for c in found["considered"] if c["name"] == "recompute") is None
    line = next(line for line in cli(*large)[1].splitlines() if line.startswith("recompute"))
    assert line.split()[1:5] == ["1", "–", "–", "–"] and "R = 512 > 32" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_an_assumption_is_said(cli):
    out = cli("explain", "--shape", "2048x1280x1280", "--ranks", "4")[1]
    assert "NVIDIA H200  (none is here; --device names another)" in out


def test_explain_uses_a_table(cli, tmp_path):
    problem, use = question(ExplainArgs(shape="4608,3072,3072", ranks="64,64", gate="mole"))
    us = {"plain": 10.0, "stacked": 40.0, "two_pass": 13.0}
    path = tmp_path / "mine.json"
    path.write_text(
        dumps(
            tables.Table(
                "NVIDIA H200", "h200", (9, 0), 132, {}, "now", (replace(key_of(problem, use), us=us),)
            )
        )
    )
    code, out, _ = cli(*CALL, "--table", path)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert code == 0 and lines["taken"].split()[1] == "two_pass" and "measurements of 4608×3072×3072" in out
    assert (
        "13.0" in lines["two_pass"]
        and "+30" in lines["two_pass"]
        and "not measured near" in lines["persistent"]
    )
    code, _, err = cli(*CALL[:-1], "a100", "--table", path)
    assert code == 2 and "expected a100, got h200" in err


@pytest.mark.parametrize(
    "change, words",
    [
        (("--shape", "2048,1280"), "--shape: expected M,K,N, got '2048,1280'"),
        (("--shape", "0,1,1"), "--shape: expected M,K,N"),
        (("--shape", "²,1,1"), "--shape: expected M,K,N"),
        (("--shape", "99999999999,1,1"), "--shape: expected M,K,N"),
        (("--ranks", ""), "--ranks: expected the rank of each expert"),
        (("--ranks", "-4"), "--ranks: expected"),
        (("--ranks", ",".join("1" * 65)), "--ranks: expected at most 64 experts, got 65"),
        (("--gate", "magic"), "--gate: expected none, constant"),
        (("--dtype", "fp8"), "'fp8' is not one of 'float32'"),
        (("--device", "voodoo"), "gpu: expected one of h200"),
        (("--batch-size", "5"), "--batch-size: expected a number that divides M = 4608, got 5"),
        (("--batch-size", "0"), "greater than or equal to 1"),
        (("--backward", "--training"), "--training: is about the forward"),
        (("--table", "/nowhere/t.json"), "there is no such file"),
    ],
)
def test_bad_questions(cli, change, words):
    code, out, err = cli(*CALL, *change)
    assert code == 2 and words in err and not out and "Traceback" not in err


def test_every_gate_and_dtype_can_be_asked(cli):
    for gate in (*GATES, "mask+mole"):
        assert cli(*CALL[:-1], "rtx4090", "--gate", gate, "--batch-size", 2, "--per-sample")[0] == 0
    for dtype in ("float32", "float16", "bfloat16"):
        assert cli(*CALL, "--dtype", dtype)[0] == 0
    assert cli(*CALL, "--dtype", "float32", "--tf32")[0] == 0
    assert "--dtype float32 with it" in cli(*CALL, "--tf32")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_tune_without_a_gpu_says_so_and_writes_nothing(cli, tmp_path):
    code, out, err = cli("tune", "--quick", "--out", tmp_path / "t.json")
    assert code == 2 and not out and not list(tmp_path.iterdir())
    assert (
        err.startswith("tune: torch sees no NVIDIA GPU on this machine")
        and "Hint: mole-kernels explain predicts without one" in err
    )


def test_a_table_that_could_not_be_written_is_refused_first(tmp_path, monkeypatch):
    h200 = known("h200")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "t.json"):
        with pytest.raises(MoleFileError, match="MOLE_TABLES"):
            tune.destination(h200, path)
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "new" / "folder")
    assert (
        tune.destination(h200, None) == tmp_path / "new" / "folder" / "h200.json"
        and (tmp_path / "new" / "folder").is_dir()
    )


def test_what_is_measured_becomes_a_table(tmp_path):
    """The loop of `tune` with a made-up clock: rows, refused candidates never asked for, failures told and
    survived.
    """
    asked = []

    def clock(call, names):
        asked.append((call, names))
        if call.problem.R == 32 and call.problem.N == 640:
            return {}, {"stacked": "OutOfMemoryError: too large"}
        times = {"plain": 10.0} | {name: 11.0 + len(name) for name in names}
        return times, ({"two_pass": "wrong by 30.0%"} if call.use.backward else {})

    calls = list(suite(quick=True))
    made, failed = tune.collect(calls, known("h200"), clock)
    lost = [c for c in calls if c.problem.R == 32 and c.problem.N == 640]
    assert lost and len(made.rows) == len(calls) - len(lost)
    assert len(failed) == len(lost) + sum(c.use.backward and c not in lost for c in calls)
    assert "too large" in " ".join(failed) and "two_pass: wrong by 30.0%" in " ".join(failed)
    for call, names in asked:
        assert "stacked" in names
        assert ("dense" in names) == (not call.problem.sample_gate and call.use.direction == "forward")
        assert ("merge" in names) == (not call.problem.token_gate and call.use.direction == "forward")
    path = tmp_path / "h200.json"
    path.write_text(dumps(made))
    assert load(path) == made
    found = tune.regret(calls, made, known("h200"))
    assert len(found) == len(made.rows) and all(loss >= 1 for _, _, loss in found)
    # the clock made the shortest name the fastest, the first of them where names are as long
    assert {best for _, best, _ in found} == {"merge", "added", "stacked"}


def test_the_error_of_a_result():
    from mole_kernels.cli.measure import error

    one = torch.ones(4)
    assert error([one, torch.empty(0)], [one, torch.empty(0)]) == 0
    assert error([one, one * 1.1], [one, one]) == pytest.approx(0.1, abs=1e-6)
    assert error([one * float("nan")], [one]) == float("inf")


def test_softmax_gates_and_sets_are_asked_about(cli):
    sizes = (
        "explain",
        "--shape",
        "2048,1280,1280",
        "--ranks",
        "16,16,16",
        "--device",
        "h200",
        "--batch-size",
        4,
    )
    out = cli(*sizes, "--gate", "top-2+global", "--sets", 3)[1]
    assert "S=3 by assignment, gates top-2+sample" in out
    asked = json.loads(cli(*sizes, "--gate", "softmax", "--sets", 3, "--json")[1])["call"]
    assert (asked["top_k"], asked["assigned"], asked["S"]) == (3, True, 3)
    for wrong, words in (
        ("top-4", "top-1 … top-3"),
        ("softmax+local", "one kind of token gate"),
        ("top-1+top-2", "one kind of token gate"),
    ):
        code, _, err = cli(*sizes, "--gate", wrong)
        assert code and words in err
    assert "--sets" in cli(*sizes, "--sets", 2, "--per-sample")[2]
