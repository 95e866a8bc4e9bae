"""Prompts in what a language model answered."""

from __future__ import annotations

from mole_kernels.methods.selma.asking import MAX_CHARACTERS, MAX_ITEMS, parse_prompts, tidy
from tests.fuzz.meeting import text

JSON = False


def check(data: bytes) -> None:
    for start in (1, 4):
        found = parse_prompts(text(data), start)
        assert len(found) <= MAX_ITEMS
        for prompt in found:
            assert 0 < len(prompt) <= MAX_CHARACTERS and "\n" not in prompt and prompt == prompt.strip()
            # what was taken out once needs no second time
            assert tidy(prompt) is not None
