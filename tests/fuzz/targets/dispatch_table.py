"""A table of measured times, and its text written again."""

from __future__ import annotations

from mole_kernels.dispatch.tables import dumps, parse

JSON = True


def check(data: bytes) -> None:
    table = parse(data, "table")
    again = parse(dumps(table), "again")
    assert again == table and [row.us for row in again.rows] == [row.us for row in table.rows]
