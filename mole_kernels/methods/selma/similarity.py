"""Keeps prompts apart: a new one is turned away where its ROUGE-L F1 with one that is there is above 0.8."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

from mole_kernels.errors import MoleStateError, MoleValueError

LIMIT = 0.8
# rouge-score's own words on ASCII text; other alphabets are words too, where it would see nothing at all
_WORD = re.compile(r"[^\W_]+")


class Clash(NamedTuple):
    """A prompt that is there, and its ROUGE-L F1 with the new one."""

    other: str
    f1: float


class Words:
    """Lower case, runs of letters and digits; the tokenizer given to rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


class SimilarityFilter:
    """The prompts that are there, and what is too like them.

    ROUGE-L F1 = 2·LCS/(m+n) of two prompts of m and n words, LCS the length of their longest common
    subsequence by rouge-score.
    Above `limit` a prompt is turned away; at the limit it is kept. rouge-score's own 2PR/(P+R) rounds 0.8 up
    to
    0.8000000000000002 for four words of five, so the quotient is taken from the counts, where 4/5 is 4/5.
    """

    def __init__(self, known: Iterable[str] = (), limit: float = LIMIT) -> None:
        if not 0 < limit <= 1:
            raise MoleValueError("Likeness: limit", expected="a number in (0, 1]", got=limit)
        self.limit, self._words = limit, Words()
        self._known: list[tuple[str, int, Counter[str]]] = []
        for text in known:
            self.add(text)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, text: str) -> None:
        words = self._words.tokenize(text)
        self._known.append((text, len(words), Counter(words)))

    def clash(self, text: str) -> Clash | None:
        """The first that this prompt is too like, or None; the prompt is not added."""
        words = self._words.tokenize(text)
        n, bag = len(words), Counter(words)
        for other, m, others in self._known:
            # LCS is at most the number of words in common, so most pairs need no table of subsequences
            if m + n == 0 or 2 * sum((bag & others).values()) <= self.limit * (m + n):
                continue
            if (f1 := self._f1(other, text, m, n)) > self.limit:
                return Clash(other, f1)
        return None

    def _f1(self, other: str, text: str, m: int, n: int) -> float:
        recall = self._scorer.score(other, text)["rougeL"].recall
        return 2 * round(recall * m) / (m + n)

    @cached_property
    def _scorer(self) -> Any:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise MoleStateError(
                "selma", f"needs rouge-score ({error})", hint='pip install "mole-kernels[selma]"'
            ) from error
        return RougeScorer(["rougeL"], tokenizer=self._words)
