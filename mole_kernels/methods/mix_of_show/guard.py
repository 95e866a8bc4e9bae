"""Tokenizers that refuse a concept token as text: in pieces it would be drawn as nothing, in silence."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from mole_kernels.errors import MoleValueError, printable

HINT = (
    "sample_concepts(pipe, prompts, tokens) for whole pictures, regional(pipe, regions, tokens=tokens) for "
    "regions, encode_prompts(pipe, prompts, tokens) for prompt_embeds"
)


class _ConceptGuard:
    """Mixed into a tokenizer's class: its public ways in look for concept tokens first."""

    concept_texts: tuple[str, ...]

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._check_text(text)
        self._check_text(kwargs.get("text_pair"))
        return super().__call__(text, *args, **kwargs)  # type: ignore[misc]

    def tokenize(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_text(text)
        return super().tokenize(text, *args, **kwargs)  # type: ignore[misc]

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_text(text)
        return super().encode(text, *args, **kwargs)  # type: ignore[misc]

    def _check_text(self, text: Any) -> None:
        if isinstance(text, str):
            lowered = text.lower()
            for token in self.concept_texts:
                if token.lower() in lowered:
                    raise MoleValueError(
                        f"prompt '{printable(text)}'",
                        f"holds the concept token {printable(token)}, which no one has expanded: it has an "
                        "embedding for every cross-attention layer",
                        hint=HINT,
                    )
        elif isinstance(text, Sequence):
            for part in text:
                self._check_text(part)


def guard_tokenizer(tokenizer: Any, tokens: Iterable[str]) -> Any:
    """A copy of the tokenizer that raises MoleValueError for text with one of the tokens in it.

    Its class has the name and the module of the tokenizer's own, so that what saves it writes these.

    Args:
        tokenizer: Of transformers; one that is guarded already keeps its tokens beside the new ones.
        tokens: Concept tokens, without regard to capitals, which CLIP's tokenizers do not know.
    """
    larger, kind = copy.deepcopy(tokenizer), type(tokenizer)
    if not issubclass(kind, _ConceptGuard):
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        kind = type(kind.__name__, (_ConceptGuard, kind), names)
        larger.__class__ = kind
    larger.concept_texts = (*getattr(tokenizer, "concept_texts", ()), *tokens)
    return larger
