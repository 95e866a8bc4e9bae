"""The public CI runs targets that exist, asks for nothing it may not write, and lets no stranger onto a GPU
machine.
"""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
FLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(flow):
    return [(name, step) for name, job in flow["jobs"].items() for step in job["steps"]]


@pytest.mark.parametrize("path", FLOWS, ids=lambda path: path.stem)
def test_every_make_target_exists_and_nothing_is_written(path):
    flow = yaml.safe_load(path.read_text())
    assert flow["permissions"] == {"contents": "read"}
    matrix = [t for job in flow["jobs"].values() for t in job.get("strategy", {}).get("matrix", {}).get("target", [])]
    named = [m for _, step in steps(flow) for m in re.findall(r"(?:^|&& )make ([a-z][\w-]*)", step.get("run", ""), re.MULTILINE)]
    assert (matrix or named) and set(matrix) | set(named) <= TARGETS
    assert all(job["timeout-minutes"] for job in flow["jobs"].values())
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|[0-9a-f]{40})", step["uses"]) for _, step in steps(flow) if "uses" in step)


def test_all_that_a_change_must_pass_is_run():
    run = {m for path in FLOWS for m in re.findall(r"make ([\w-]+)", path.read_text())}
    assert {"lint", "test", "docs", "matrix", "wheel", "gpu"} <= run and "sanitize" in (ROOT / ".github/workflows/deep.yml").read_text()
    assert {"make lint", "make test"} <= set((ROOT / ".ci/run").read_text().splitlines())


def test_strangers_do_not_reach_the_gpu_machine():
    flow = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())
    # yaml reads a bare "on" as true
    assert "pull_request" not in flow.get("on", flow.get(True)) and "self-hosted" in flow["jobs"]["gpu"]["runs-on"]
