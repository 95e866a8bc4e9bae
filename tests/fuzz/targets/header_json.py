"""The header's JSON alone, before a file of whatever length of data."""

from __future__ import annotations

from mole_kernels.errors import MoleError
from mole_kernels.files.header import parse_header
from mole_kernels.files.limits import MAX_DIMS, MAX_TENSORS, check_json_size, parse_json

JSON = True
SIZES = (0, 4, 24, 2**40)


def check(data: bytes) -> None:
    check_json_size(data, "header")
    refused = None
    for size in SIZES:
        try:
            header = parse_header(parse_json(data, "header"), size, "header")
        except MoleError as error:
            refused = error
            continue
        assert len(header.entries) <= MAX_TENSORS
        assert sum(e.end - e.begin for e in header.entries.values()) == size
        assert all(
            len(e.shape) <= MAX_DIMS and 0 <= e.begin <= e.end <= size for e in header.entries.values()
        )
        return
    assert refused is not None
    raise refused
