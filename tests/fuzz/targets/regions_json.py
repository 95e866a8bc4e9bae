"""Mix-of-Show's regions as JSON."""

from __future__ import annotations

import json
import math

from mole_kernels.methods.mix_of_show.regions import read_regions, shares
from tests.fuzz.meeting import assert_plain, text

JSON = True


def check(data: bytes) -> None:
    regions = read_regions(text(data))
    for region in regions:
        assert_plain(region.box, int, float)
        assert region.prompt.strip() and all(
            math.isfinite(weight) for weight in (region.experts or {}).values()
        )
    shares(regions, 8, 8)
    fields = [
        {"prompt": r.prompt, "negative": r.negative, "box": r.box, "experts": r.experts or {}}
        for r in regions
    ]
    again = read_regions(json.dumps(fields))
    assert [(r.prompt, r.negative, tuple(r.box), r.experts or {}) for r in again] == [
        (r.prompt, r.negative, tuple(r.box), r.experts or {}) for r in regions
    ]
