"""Every test that docs/accelerate.md names as a proof exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMED = sorted(
    set(
        re.findall(
            r"`(test_\w+\.py)(?:::(test_\w+))?`", (HERE.parents[1] / "docs" / "accelerate.md").read_text()
        )
    )
)


def test_the_table_names_tests():
    assert len(NAMED) > 30


@pytest.mark.parametrize("file, test", NAMED, ids="::".join)
def test_is_there(file: str, test: str):
    assert (HERE / file).is_file()
    assert not test or re.search(rf"^def {test}\(", (HERE / file).read_text(), re.MULTILINE)
