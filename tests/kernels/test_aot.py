"""Ratchets on the compiled kernels, with no GPU: a few builds of the table that `python/tools/aot.py`
prints.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "python/tools/aot.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "rows.json"
    # a process of its own: here Triton is its interpreter
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(out.parent)}
    environment.pop("TRITON_INTERPRET", None)
    wanted = "^((persistent-fwd-both|persistent-bwd-both|expand-fwd-none) sm_[89]0|expand-bwd-both sm_89|dense-fwd-mask-160 sm_90)$"
    program = [sys.executable, str(TOOL), "--only", wanted, "--json", str(out)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return {(r["id"], r["arch"]): r for r in json.loads(out.read_text())["rows"]}


def test_everything_compiles_and_nothing_spills(rows):
    assert len(rows) == 8
    for name, r in rows.items():
        assert not r["error"], name
        assert r["spills"] == 0, name


def test_shared_memory_is_within_the_limit(rows):
    for (name, arch), r in rows.items():
        assert 0 < r["shared"] <= {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}[arch], name


def test_hopper_uses_its_warp_group_product_and_tma(rows):
    for name in ("persistent-fwd-both", "persistent-bwd-both", "expand-fwd-none", "dense-fwd-mask-160"):
        r = rows[name, 90]
        assert set(r["mma"]) <= {"HGMMA", "HMMA"} and r["mma"]["HGMMA"] >= 8, name
        assert r["tma"] >= 6, name
    assert rows["persistent-fwd-both", 80]["mma"].keys() == {"HMMA"}


def test_the_main_loop_stays_short(rows):
    """Instructions of the loop for each tensor-core instruction in it; a ratchet: lower it when it falls."""
    for (name, arch), most in {
        ("expand-fwd-none", 90): 90,
        ("persistent-fwd-both", 90): 125,
        ("persistent-bwd-both", 90): 105,
        ("expand-fwd-none", 80): 170,
        ("persistent-fwd-both", 80): 180,
    }.items():
        assert 0 < rows[name, arch]["loop"] <= most, name


def test_a_release_comes_after_a_barrier(rows):
    """The interpreter checks that too, on the source; here on the machine's own order: no release without a
    barrier before it.
    """
    assert (
        rows["persistent-fwd-both", 90]["releases"] == rows["persistent-fwd-both", 90]["ordered_releases"] > 0
    )
