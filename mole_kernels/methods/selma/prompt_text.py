"""The text of a request for more prompts, and the prompts found in an answer."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice

from mole_kernels.methods.selma.skills import Skill

MAX_CHARACTERS, MAX_ITEMS = 1000, 1000
_NUMBER = re.compile(r"^\s*(?:[*_#>-]\s*)*(?:prompt\s*)?(\d{1,4})\s*[.):]\s*(.*)$", re.IGNORECASE)
_BULLET = re.compile(r"^\s*[-*•–]\s+(.*)$")
_LABEL = re.compile(r"^(?:prompt|caption)\s*:\s*", re.IGNORECASE)
_FENCE = re.compile(r"^\s*```\w*\s*$")
# invisible, but parts of words in Persian and Indic scripts and of emoji
_JOINERS = "\u200c\u200d"
_PAIRS = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}


def request_text(skill: Skill, shown: Sequence[str], more: int) -> str:
    """Asks for `more` prompts like those shown, by the skill's rules, as a numbered list that goes on from
    them.
    """
    about = f" ({skill.about})" if skill.about else ""
    first, last = len(shown) + 1, len(shown) + more
    examples = "\n".join(f"{i}. {text}" for i, text in enumerate(shown, 1))
    rules = "".join(f"\n- {rule}" for rule in skill.rules)
    return (
        f"These are prompts for a text-to-image model, all of one kind{about}. Write {more} new "
        "prompts of the same kind, each about "
        f"something else, as a numbered list from {first} to {last}, one prompt to a line and nothing "
        f"besides.{rules}\n\n{examples}\n"
    )


def parse_prompts(answer: str, start: int = 1) -> list[str]:
    """The prompts of an answer: its numbered items, else its bullets, else the strings of a JSON list, else
    none.

    Introductions, closing remarks, quotes, markdown and "Prompt:" before an item are taken off; a line that
    follows an item
    directly belongs to it; what is empty, has no letter or is longer than 1000 characters is left out. A
    thousand items are enough.

    Args:
        start: The number that a text which simply continues the list begins with: a first line without
            a number is that item.
    """
    items = list(islice(_json_items(answer), MAX_ITEMS)) or list(
        islice(_items(answer.replace("\r", "\n").split("\n"), start), MAX_ITEMS)
    )
    return [text for item in items if (text := clean_prompt(item)) is not None]


def clean_prompt(text: str) -> str | None:
    """One line of plain text without decoration, or None where there is no prompt in it."""
    plain = "".join(
        " " if c.isspace() else c
        for c in text
        if c.isspace() or c in _JOINERS or unicodedata.category(c)[0] != "C"
    )
    plain = re.sub(r"\*\*|__", "", " ".join(plain.split()))
    plain = _LABEL.sub("", plain).strip()
    # before quotes are taken off one by one: a hostile answer may be megabytes of them
    if len(plain) > 2 * MAX_CHARACTERS:
        return None
    while len(plain) > 1 and _PAIRS.get(plain[0]) == plain[-1]:
        plain = plain[1:-1].strip()
    fits = 0 < len(plain) <= MAX_CHARACTERS and any(c.isalpha() for c in plain)
    return plain if fits else None


def _items(lines: list[str], start: int) -> Iterator[str]:
    lines = [line for line in lines if not _FENCE.match(line)]
    pattern = _NUMBER if any(_NUMBER.match(line) for line in lines) else _BULLET
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    goes_on = first is not None and start > 1 and _continues(lines[first:], start)
    if goes_on and first is not None:
        lines[first] = f"{start}. {lines[first].strip()}"
        pattern = _NUMBER
    item: list[str] = []
    for line in lines:
        if match := pattern.match(line):
            if item:
                yield " ".join(item)
            item = [match.group(match.re.groups)]
        elif not line.strip():
            if item:
                yield " ".join(item)
            item = []
        elif item:
            item.append(line)
    if item:
        yield " ".join(item)


def _continues(lines: list[str], start: int) -> bool:
    """Whether the first line is item `start` without its number: the first number there is, if any, is the
    next one.
    """
    if _NUMBER.match(lines[0]) or _BULLET.match(lines[0]) or lines[0].rstrip().endswith(":"):
        return False
    following = next((match for line in lines[1:] if (match := _NUMBER.match(line))), None)
    return following is not None and int(following.group(1)) == start + 1


def _json_items(answer: str) -> Iterator[str]:
    """The strings of the first JSON list in the answer."""
    begin, end = answer.find("["), answer.rfind("]")
    if not 0 <= begin < end:
        return
    try:
        items = json.loads(answer[begin : end + 1])
    except (ValueError, RecursionError):
        return
    if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
        yield from items
