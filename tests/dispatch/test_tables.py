"""Tables: there and back, the nearest row, and what is refused."""

import json
import os
import warnings
from dataclasses import replace

import pytest

from mole_kernels.dispatch import tables
from mole_kernels.dispatch.device import known
from mole_kernels.dispatch.tables import (
    Table,
    TableRow,
    distance,
    dumps,
    for_device,
    gate_kind,
    key_of,
    load,
    of_device,
    parse,
)
from mole_kernels.dispatch.work import Use
from mole_kernels.errors import MoleFileError, MoleWarning
from tests.dispatch.support import H200, problem

US = {"plain": 12.5, "stacked": 30.0, "persistent": 14.25}
ROWS = tuple(
    TableRow(M, 1280, 1280, (R // 2, R // 2), 1, "bfloat16", gate, direction, US)
    for M in (512, 2048)
    for R in (32, 128)
    for gate in ("none", "token+sample", "mask+token")
    for direction in ("forward", "backward")
)
TABLE = Table("NVIDIA H200", "h200", (9, 0), 132, {"torch": "2", "triton": "3"}, "2026-01-01T00:00:00Z", ROWS)


def test_there_and_back(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text(dumps(TABLE))
    found = load(path)
    assert found == TABLE and [row.us for row in found.rows] == [row.us for row in ROWS]
    assert len(path.read_text().splitlines()) < 20 + len(ROWS)
    empty = replace(TABLE, rows=())
    assert parse(dumps(empty), "t") == empty


def test_the_nearest_row_speaks():
    def near(M=2048, R=128, gate="none", use=Use(), **more):  # noqa: B008
        return TABLE.nearest(problem(M=M, ranks=(R // 2, R // 2), gate=gate, **more), use)

    row = near(M=2300, R=100, gate="mole", use=Use(backward=True))
    assert row is not None and (row.M, row.ranks, row.gate, row.direction) == (
        2048,
        (64, 64),
        "token+sample",
        "backward",
    )
    exact = near(M=512, R=32)
    assert exact is not None and distance(exact, key_of(problem(512, ranks=(16, 16)), Use())) == 0
    assert near(M=1024) is None and near(K=2048) is None and near(R=512) is None
    assert near(gate="mask") is None and near(use=Use(save=True)) is None and near(B=2, S=2) is None


def test_kinds_of_gate():
    assert gate_kind(problem(), Use()) == "none" and gate_kind(problem(gate="mole"), Use()) == "token+sample"
    both = replace(problem(gate="mole"), given_gate=True)
    assert (
        gate_kind(both, Use()) == "mask+token+sample"
        and gate_kind(both, Use(by_token=False)) == "fixed+token+sample"
    )
    parse(dumps(replace(TABLE, rows=(replace(ROWS[0], gate=gate_kind(both, Use())),))), "t")


def changed(**change):
    found = json.loads(dumps(TABLE))
    row = {k: v for k, v in change.items() if k in found["rows"][0]}
    found["rows"][1] |= row
    return json.dumps(found | {k: v for k, v in change.items() if k not in row})


BAD = {
    "nothing": (b"", "is not JSON"),
    "not text": (b"\xff\xfe\x00", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "format"),
    "another format": (changed(format="2\x1b[31m"), r"got '2\x1b[31m"),
    "no rows": (changed(rows=None), "rows; expected a list"),
    "row is text": (changed(rows=["x"]), "row 0: expected an object"),
    "M is 0": (changed(M=0), "row 1: M; expected a whole number from 1 on, got 0"),
    "M is true": (changed(M=True), "row 1: M;"),
    "K is huge": (changed(K=1 << 40), "row 1: K;"),
    "N is text": (changed(N="1"), "row 1: N;"),
    "no ranks": (changed(ranks=[]), "ranks; expected a list"),
    "a rank of 0": (changed(ranks=[0]), "row 1: ranks; expected a whole number"),
    "float8": (changed(dtype="float8"), "dtype; expected bfloat16"),
    "gate": (changed(gate="token+token"), "gate; expected none"),
    "gate none and more": (changed(gate="none+token"), "gate; expected none"),
    "direction": (changed(direction="sideways"), "direction; expected forward"),
    "no plain": (changed(us={"stacked": 1}), '"plain" and "stacked"'),
    "no stacked": (changed(us={"plain": 1}), '"plain" and "stacked"'),
    "unknown candidate": (changed(us=US | {"magic": 1}), "us; expected plain, persistent"),
    "time of 0": (changed(us=US | {"plain": 0}), "us.plain; expected microseconds above 0"),
    "time below 0": (changed(us=US | {"plain": -1.0}), "us.plain;"),
    "time NaN": (changed(us=US | {"plain": float("nan")}), "NaN is not a time"),
    "time infinite": (changed(us=US | {"plain": float("inf")}), "Infinity is not a time"),
    "time overflowing": (changed().replace("12.5", "1e999", 1), "us.plain;"),
    "time is text": (changed(us=US | {"plain": "1"}), "us.plain;"),
    "the same call twice": (changed(direction="forward"), "rows 0 and 1 are the same call"),
    "capability": (changed(capability=[9]), "capability; expected two numbers"),
    "software": (changed(software=["torch"]), "software; expected an object"),
    "gpu": (changed(gpu="\x1b[2J"), "gpu; expected a printable text"),
}


@pytest.mark.parametrize("text, words", BAD.values(), ids=BAD)
def test_bad_tables_are_refused(text, words, tmp_path):
    path = tmp_path / "h200.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MoleFileError) as caught:
        load(path)
    assert words in str(caught.value) and "h200.json" in str(caught.value) and "\x1b" not in str(caught.value)


def test_what_is_no_table_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_BYTES", 100)
    (tmp_path / "large").write_text(dumps(TABLE))
    os.mkfifo(tmp_path / "fifo")
    for name, words in (
        ("large", "at most 100 bytes"),
        ("fifo", "a regular file"),
        ("missing", "no such file"),
        (".", "a folder"),
    ):
        with pytest.raises(MoleFileError, match=words):
            load(tmp_path / name)


def test_a_table_of_another_gpu_is_refused():
    with pytest.raises(MoleFileError, match="gpu; expected a100, got h200"):
        of_device(TABLE, known("a100"))
    with pytest.raises(MoleFileError, match="multiprocessors; expected 60, got 132"):
        of_device(TABLE, H200.scaled(60))


def test_tables_are_found_and_a_broken_one_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLE_TABLES", str(tmp_path))
    path = tmp_path / "h200.json"
    path.write_text(dumps(TABLE))
    for_device.cache_clear()
    assert for_device(H200) == TABLE
    for_device.cache_clear()
    path.write_text("{")
    with pytest.warns(MoleWarning, match="passed over.*h200.json.*not JSON"):
        assert for_device(H200) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert for_device(H200) is None
    for_device.cache_clear()


def test_shipped_tables_are_whole():
    """Those that are checked in, if any: read as a user's would be."""
    for path in tables.SHIPPED.glob("*.json"):
        assert load(path).key == path.stem
    assert tables.SHIPPED.is_dir()
