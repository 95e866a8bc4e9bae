"""Measured times of one GPU: a JSON file, checked when read, and the row nearest to a call.

{"format": "mole-kernels-dispatch-1", "gpu": name, "key": "h200", "capability": [9, 0], "multiprocessors":
132,
 "software": {"torch": "…", "triton": "…"}, "utc": "…",
 "rows": [{"M": 2048, "K": 1280, "N": 1280, "ranks": [64, 64], "sets": 1, "dtype": "bfloat16", "gate":
 "token+sample",
           "direction": "forward", "us": {"plain": 12.2, "stacked": 25.0, "persistent": 14.0}}]}
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mole_kernels.dispatch.device import Device
from mole_kernels.dispatch.work import Use
from mole_kernels.errors import MoleFileError, MoleWarning, printable
from mole_kernels.files.opening import open_regular
from mole_kernels.problem import Problem
from mole_kernels.settings import tables_folder

FORMAT = "mole-kernels-dispatch-1"
SHIPPED = Path(__file__).with_name("tables")
CANDIDATES = (
    "persistent",
    "recompute",
    "two_pass",
    "merge",
    "added",
    "stacked",
    "dense",
    "cuda_cluster",
    "cuda_persistent",
    "cuda_recompute",
)
DTYPES = ("bfloat16", "float16", "float32", "tf32")
GATES = ("none", "fixed", "mask", "token", "sample")
DIRECTIONS = ("forward", "training", "backward")
MOST_BYTES = 16 << 20
MOST = 1 << 31
# a row speaks for shapes within a factor of √2 in M, K, N and R; beyond, waves and tiles differ too much
FARTHEST = 0.5


@dataclass(frozen=True)
class TableRow:
    """One measured call: microseconds of "plain", "stacked" and the other candidates that could run it.

    gate       kinds joined by "+": none, fixed (given, one value per sample), mask (given, per token), token,
               sample
    direction  forward, training (h kept) or backward
    """

    M: int
    K: int
    N: int
    ranks: tuple[int, ...]
    sets: int
    dtype: str
    gate: str
    direction: str
    us: dict[str, float] = field(compare=False)

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be the same for a row to speak for a call."""
        return self.sets > 1, self.dtype, self.gate, self.direction

    def __str__(self) -> str:
        return f"{self.M}×{self.K}×{self.N}, ranks {','.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Table:
    gpu: str
    key: str
    capability: tuple[int, int]
    multiprocessors: int
    software: dict[str, str]
    utc: str
    rows: tuple[TableRow, ...]

    def nearest(self, problem: Problem, use: Use) -> TableRow | None:
        """The row of the same kind whose sizes are nearest; None where none is near enough."""
        asked = key_of(problem, use)
        near = [(distance(row, asked), i) for i, row in enumerate(self.rows) if row.kind == asked.kind]
        best = min(near, default=None)
        return self.rows[best[1]] if best is not None and best[0] <= FARTHEST else None


def key_of(problem: Problem, use: Use) -> TableRow:
    """The row that a measurement of this call would have, without its times."""
    dtype = "tf32" if use.tf32 and str(problem.dtype) == "torch.float32" else str(problem.dtype)[6:]
    return TableRow(
        problem.M,
        problem.K,
        problem.N,
        problem.ranks,
        problem.S,
        dtype,
        gate_kind(problem, use),
        use.direction,
        {},
    )


def gate_kind(problem: Problem, use: Use) -> str:
    gate_word = ("mask" if use.by_token else "fixed") if problem.given_gate else ""
    kinds = [gate_word, "token" if problem.token_gate else "", "sample" if problem.sample_gate else ""]
    return "+".join(filter(None, kinds)) or "none"


def distance(a: TableRow, b: TableRow) -> float:
    """Largest |log2| of the ratios of M, K, N, R; a little more where the number of experts differs."""
    sizes = ((a.M, b.M), (a.K, b.K), (a.N, b.N), (sum(a.ranks), sum(b.ranks)))
    return max(abs(math.log2(max(p, 1) / max(q, 1))) for p, q in sizes) + 0.01 * abs(
        len(a.ranks) - len(b.ranks)
    )


def dumps(table: Table) -> str:
    """The file's text: one row a line."""
    head = {"format": FORMAT} | {name: value for name, value in asdict(table).items() if name != "rows"}
    rows = ",\n".join("  " + json.dumps(asdict(row)) for row in table.rows)
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'


def load(path: Path) -> Table:
    """A checked table. Raises MoleFileError that names the file and the row."""
    where = printable(path, 300)
    with open_regular(path) as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise MoleFileError(where, expected=f"at most {MOST_BYTES:,} bytes", got="more")
    return parse(text, where)


def parse(text: bytes | str, where: str) -> Table:
    def constant(name: str) -> Any:
        raise MoleFileError(where, f"{name} is not a time")

    try:
        fields = json.loads(text, parse_constant=constant)
    except MoleFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise MoleFileError(
            where, f"is not JSON ({printable(error)})", hint="mole-kernels tune writes it anew"
        ) from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        got = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
        raise MoleFileError(
            where,
            expected=f'a table with format "{FORMAT}"',
            got=printable(repr(got)),
            hint="mole-kernels tune writes one",
        )
    texts = [_text(fields, name, where) for name in ("gpu", "key", "utc")]
    software = fields.get("software")
    if not isinstance(software, dict) or not all(isinstance(v, str) for v in software.values()):
        raise MoleFileError(where, "software", expected="an object of strings", got=printable(repr(software)))
    capability = _sizes(fields.get("capability"), "capability", where)
    if len(capability) != 2:
        raise MoleFileError(where, "capability", expected="two numbers", got=len(capability))
    processors = _size(fields.get("multiprocessors"), "multiprocessors", where)
    rows = fields.get("rows")
    if not isinstance(rows, list):
        raise MoleFileError(where, "rows", expected="a list", got=type(rows).__name__)
    table = Table(
        texts[0],
        texts[1],
        (capability[0], capability[1]),
        processors,
        software,
        texts[2],
        tuple(_row(row, f"{where}, row {i}") for i, row in enumerate(rows)),
    )
    seen: dict[TableRow, int] = {}
    for i, row in enumerate(table.rows):
        # times are no part of a row's identity
        first = seen.setdefault(row, i)
        if first != i:
            raise MoleFileError(where, f"rows {first} and {i} are the same call ({row})")
    return table


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise MoleFileError(where, name, expected="a printable text", got=printable(repr(value)))
    return value


def _size(value: Any, name: str, where: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MOST:
        raise MoleFileError(
            where, name, expected=f"a whole number from {least} on", got=printable(repr(value))
        )
    return value


def _sizes(value: Any, name: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 64:
        raise MoleFileError(where, name, expected="a list of whole numbers", got=printable(repr(value)))
    return tuple(_size(v, name, where, least=0 if name == "capability" else 1) for v in value)


def _row(fields: Any, where: str) -> TableRow:
    if not isinstance(fields, dict):
        raise MoleFileError(where, expected="an object", got=type(fields).__name__)
    M, K, N, sets = (_size(fields.get(name), name, where) for name in ("M", "K", "N", "sets"))
    ranks = _sizes(fields.get("ranks"), "ranks", where)
    dtype, gate, direction = (_text(fields, name, where) for name in ("dtype", "gate", "direction"))
    kinds = gate.split("+")
    good_gate = (
        all(k in GATES for k in kinds)
        and len(set(kinds)) == len(kinds)
        and ("none" not in kinds or len(kinds) == 1)
    )
    for name, value, right, expected in (
        ("dtype", dtype, dtype in DTYPES, ", ".join(DTYPES)),
        ("gate", gate, good_gate, f"{', '.join(GATES)} joined by '+'"),
        ("direction", direction, direction in DIRECTIONS, ", ".join(DIRECTIONS)),
    ):
        if not right:
            raise MoleFileError(where, name, expected=expected, got=printable(repr(value)))
    return TableRow(M, K, N, ranks, sets, dtype, gate, direction, _times(fields.get("us"), where))


def _times(us: Any, where: str) -> dict[str, float]:
    if not isinstance(us, dict) or not {"plain", "stacked"} <= set(us):
        raise MoleFileError(
            where, "us", expected='times, among them "plain" and "stacked"', got=printable(repr(us))
        )
    for name, value in us.items():
        if name not in (*CANDIDATES, "plain"):
            raise MoleFileError(
                where, "us", expected=f"plain, {', '.join(CANDIDATES)}", got=printable(repr(name))
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise MoleFileError(
                where, f"us.{name}", expected="microseconds above 0", got=printable(repr(value))
            )
    return {name: float(value) for name, value in us.items()}


def path_of(device: Device) -> Path | None:
    """The table's file: in the folder the environment names, else beside this module; None where there is
    none.
    """
    folders = [Path(folder) for folder in (tables_folder(),) if folder] + [SHIPPED]
    return next((p for folder in folders if (p := folder / f"{device.key}.json").exists()), None)


def of_device(table: Table, device: Device) -> Table:
    """`table`, if it was measured on such a GPU. Raises MoleFileError."""
    for what, mine, its in (
        ("gpu", device.key, table.key),
        ("multiprocessors", device.processors, table.multiprocessors),
    ):
        if mine != its:
            raise MoleFileError(
                f"table of {printable(table.gpu)}",
                what,
                expected=mine,
                got=printable(its),
                hint="run mole-kernels tune",
            )
    return table


@lru_cache(maxsize=16)
def for_device(device: Device) -> Table | None:
    """The device's table; None without one, and with a warning where it is broken: a call must not fail for
    that.
    """
    path = path_of(device)
    if path is None:
        return None
    try:
        return of_device(load(path), device)
    except MoleFileError as error:
        warnings.warn(
            f"mole_kernels: the table of measurements is passed over: {error}", MoleWarning, stacklevel=2
        )
        return None
