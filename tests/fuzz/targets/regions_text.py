"""Mix-of-Show's string of regions, and the same as JSON."""

from __future__ import annotations

import json

from mole_kernels.methods.mix_of_show.regions import parse_regions, read_regions, shares
from tests.fuzz.meeting import text

JSON = False


def check(data: bytes) -> None:
    regions = parse_regions(text(data), 64, 96)
    table = shares(regions, 8, 12)
    assert table.shape == (1 + len(regions), 96) and bool((table.sum(0) - 1).abs().max() < 1e-5)
    assert all(0 <= v <= 1 for region in regions for v in region.box)
    again = read_regions(
        json.dumps([{"prompt": r.prompt, "negative": r.negative, "box": r.box} for r in regions])
    )
    assert again == regions
