"""The result file: its schema, goals, table for the dispatcher, pages made from it."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, goals, report, results, sanitize
from benchmarks.gpu.table import table
from mole_kernels.dispatch.tables import dumps, parse
from tests.benchmarks.support import imaginary

COMMITTED = sorted((Path(command.__file__).parents[1] / "results").glob("*/*.json"))
# the layers' suites are named by their day, maybe with a number; each other suite by a word, and its cases
# are of its own kind
LAYERS = [path for path in COMMITTED if re.fullmatch(r"\d{4}-\d\d-\d\d(-\d+)?", path.stem)]


@pytest.fixture(scope="module")
def result():
    return imaginary()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_committed_file_says_what_was_measured_where(path):
    result = json.loads(path.read_text())
    for name in ("schema", "commit", "dirty", "utc", "host", "software"):
        assert name in result, name
    assert result["cases"]


@pytest.mark.parametrize("path", LAYERS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_committed_file_of_layers_keeps_the_schema(path):
    result = results.load(path)
    assert "IMAGINARY" not in path.read_text() and result["cases"]


def test_a_file_is_written_and_read_back(result, tmp_path):
    path = results.save(result, tmp_path / "gpu" / "x.json")
    assert results.load(path) == json.loads(json.dumps(result))
    assert results.free(path.parent, "x") == "x-2" and results.free(path.parent, "y") == "y"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda r: r.pop("ceilings"), "ceilings is missing"),
        (lambda r: r.update(gpu="H200"), "gpu is a str"),
        (lambda r: r.update(schema=99), "schema 1 expected"),
        (lambda r: r["cases"][0].pop("us"), "case 0: us is missing"),
        (lambda r: r["cases"][0].update(us=None), "no time, and no word"),
        (lambda r: r["cases"][0]["us"].update(p50=float("nan")), "case 0: us is"),
        (lambda r: r["cases"][0]["us"].update(p20=1e9), "case 0: us is"),
        (lambda r: r["cases"][0].update(ratio={}), "no ratio to the plain layer"),
        (lambda r: r["failures"].append({"id": "a"}), "a failure: method is missing"),
    ],
)
def test_a_broken_file_is_refused(result, tmp_path, spoil, words):
    broken = json.loads(json.dumps(result))
    spoil(broken)
    assert any(words in p for p in results.problems(broken)), results.problems(broken)[:3]
    with pytest.raises(ValueError, match=r"x\.json"):
        results.save(broken, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_goals_are_weighted_by_operations(result):
    rows = [
        r
        for r in results.rows(result)
        if "SDXL-UNet" in r["counts"] and sum(r["ranks"]) == 16 and r["E"] == 2 and r["gate"] != "none"
    ]
    weights = [r["M"] * r["K"] * r["N"] * r["counts"]["SDXL-UNet"] for r in rows]
    by_hand = sum(w * r["ratio"]["plain"] for w, r in zip(weights, rows)) / sum(weights)
    value, part = goals.weighted(result, "SDXL-UNet", 16)
    assert value == pytest.approx(by_hand) and part == pytest.approx(1.0)
    found = {g["goal"]: g for g in goals.goals(result)}
    said = found["adapted ÷ plain, SDXL-UNet, R=16, flop-weighted"]
    assert said["value"] == pytest.approx(by_hand, abs=1e-4) and said["met"] is (by_hand <= 1.07)
    assert found["forward + backward ÷ base, 2048×1280×1280, R=64"]["met"] is None


def test_a_part_of_a_model_meets_no_goal(result):
    part = result | {"cases": [r for r in result["cases"] if r["M"] != 2048]}
    said = goals.goals(part)[0]
    assert said["value"] is not None and said["met"] is None and "too little" in said["note"]


def test_a_shape_slower_than_stacked_is_named(result):
    slow = json.loads(json.dumps(result))
    row = results.rows(slow)[3]
    row["ratio"]["stacked"] = 1.5
    said = next(g for g in goals.goals(slow) if "stacked" in g["goal"])
    assert said["met"] is False and said["value"] == 1.5 and row["id"] in said["note"]


def test_a_claim_is_beyond_the_noise(result):
    assert goals.claim(result) == 0.02 and goals.claim(result | {"aa_spread": 0.03}) == pytest.approx(0.06)


def test_a_table_for_the_dispatcher(result, capsys, tmp_path):
    made = parse(dumps(table(result)), "made")
    assert made.key == "h200" and len(made.rows) > 40
    row = next(
        r
        for r in made.rows
        if (r.M, r.K, r.N, sum(r.ranks), r.gate) == (2048, 1280, 1280, 64, "token+sample")
    )
    measured = {
        r["method"].removeprefix("triton:"): r["us"]["p50"]
        for r in result["cases"]
        if r["id"] == "forward-2048x1280x1280-bf16-r32"
    }
    assert row.us == {name: measured[name] for name in row.us} and {
        "plain",
        "stacked",
        "persistent",
        "two_pass",
    } <= set(row.us)
    assert "ours" not in row.us and "recompute" not in row.us
    assert command.main(["--table", str(results.save(result, tmp_path / "x.json"))]) == 0
    assert parse(capsys.readouterr().out, "printed") == made
    with pytest.raises(ValueError, match="of a CPU"):
        table(result | {"gpu": None})


def test_pages_and_plots(result, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    made = report.write(result, tmp_path, "x")
    assert [p.name for p in made] == ["x.md", "x-ratio.png", "x-roofline.png"]
    text = made[0].read_text()
    assert (
        "IMAGINARY" in text
        and "SDXL-UNet | 64" in text
        and "**missed**" in text
        and "2048x1280x1280-bf16-r32" in text
    )
    assert all(p.stat().st_size > 20_000 for p in made[1:])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [p.name for p in report.write(result, tmp_path, "y")] == [
        "y.md"
    ] and "no plots" in capsys.readouterr().err


def test_failures_and_drops_are_in_the_page(result):
    failed = result | {
        "failures": [{"id": "c", "method": "m", "stage": "verify", "error": "planted"}],
        "dropped": [{"id": f"d{i}", "why": "no time left"} for i in range(70)],
    }
    text = report.markdown(failed)
    assert "- c, m, verify: planted" in text and "- d59: no time left" in text and "and 10 more" in text


def test_an_empty_run_still_has_a_page(result, tmp_path):
    empty = result | {"cases": [], "ceilings": {}}
    empty["goals"] = goals.goals(empty)
    assert all(g["met"] is None for g in empty["goals"]) and "not measured" in report.markdown(empty)
    assert report.plots(empty, tmp_path, "x") == []
    assert results.problems(empty) == []


@pytest.mark.parametrize(
    "code, text, ended, state",
    [
        (0, "========= ERROR SUMMARY: 0 errors", 4, "passed"),
        (
            86,
            "========= Invalid __global__ read of size 2 bytes\n=========     at kernel\n========= ERROR SUMMARY: 3 errors",
            4,
            "failed",
        ),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 4, "failed"),
        (1, "========= Error: Device not supported", 0, "not run"),
        (1, "", 2, "not run"),
    ],
)
def test_what_a_sanitizer_says(code, text, ended, state):
    assert sanitize.verdict(code, text, ended)[0] == state


def test_the_sanitizers_shapes_are_few_and_ours():
    from benchmarks import ours
    from benchmarks.gpu import verify

    ours.register()
    chosen = sanitize.shapes(verify.unique(verify.items("cuda")))
    assert 6 <= len(chosen) <= 24 and {i["kind"] for i in chosen} == {"rules"}
    assert "triton:persistent" in {i["backend"] for i in chosen} and "stacked" not in {
        i["backend"] for i in chosen
    }
    # Hopper's dX too, which a call with a sample gate does not reach
    assert {"cuda:cluster", "cuda:persistent", "cuda:recompute"} <= {
        i["backend"] for i in chosen if "both" not in i["case"]
    }


def test_the_build_without_ninja_runs_ninjas_own_commands(tmp_path):
    """Ours against `ninja -t commands` on the build.ninja that setup.py writes."""
    import os
    import platform
    import subprocess

    setup = build.load_setup()
    ninja = setup.find_ninja(os.environ)
    if ninja is None:
        pytest.skip("ninja is not installed")
    tools = setup.Toolchain("/usr/bin/c++", ninja, "/usr/local/cuda/bin/nvcc", "")
    text = setup.ninja_file(
        setup.find_torch(), tools, tmp_path / "lib.so", dict(os.environ), platform.machine()
    )
    (tmp_path / "build.ninja").write_text(text)
    said = subprocess.run(
        [ninja, "-t", "commands"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    mine = build.commands(text)
    assert sorted(mine) == sorted(said.splitlines()) and mine[-1] == said.splitlines()[-1]


def test_a_build_that_fails_is_recorded_and_tried_without_cuda(monkeypatch):
    tried = []

    def attempt(limit, env):
        tried.append(env.get("MOLE_SKIP_CUDA_BUILD"))
        return "setup.py", "" if len(tried) == 2 else "nvcc: an error"

    monkeypatch.delenv("MOLE_SKIP_CUDA_BUILD", raising=False)
    monkeypatch.setattr(build, "attempt", attempt)
    said = build.build(10.0, gpu=False)
    assert (
        tried == [None, "1"]
        and said["built"]
        and said["error"] == "nvcc: an error"
        and "without CUDA" in said["how"]
    )


def test_what_setup_raises_is_no_crash(monkeypatch):
    monkeypatch.setattr(build, "load_setup", lambda: (_ for _ in ()).throw(SystemExit("no torch")))
    assert build.attempt(1.0, {}) == ("setup.py", "SystemExit: no torch")
    assert (
        build.tail("a\nb.cu(3): error: no\n") == "b.cu(3): error: no"
        and build.tail("") == "failed and said nothing"
    )


def test_a_result_of_a_changed_tree_is_kept_apart(capsys):
    from benchmarks.machine import results_folder

    assert results_folder("AMD EPYC", False).parts[-3:] == ("benchmarks", "results", "amd-epyc")
    assert results_folder("AMD EPYC", True).parts[-3:] == ("build", "results", "amd-epyc")
    assert "uncommitted changes" in capsys.readouterr().err
