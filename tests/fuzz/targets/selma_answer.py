"""Prompts in what a language model answered."""

from __future__ import annotations

from mole_kernels.methods.selma.prompt_text import MAX_CHARACTERS, MAX_ITEMS, clean_prompt, parse_prompts
from tests.fuzz.meeting import text

JSON = False


def check(data: bytes) -> None:
    for start in (1, 4):
        found = parse_prompts(text(data), start)
        assert len(found) <= MAX_ITEMS
        for prompt in found:
            assert 0 < len(prompt) <= MAX_CHARACTERS and "\n" not in prompt and prompt == prompt.strip()
            # what was taken out once needs no second time
            assert clean_prompt(prompt) is not None
