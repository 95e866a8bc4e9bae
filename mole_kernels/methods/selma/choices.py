"""Which of several choices a free answer means, by a sentence encoder: TIFA's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleValueError, printable


class SentenceChoice:
    """(answer, choices) -> the choice whose embedding has the largest cosine with the answer's, the first of
    equals.

    An embedding is the mean of the encoder's last states over the tokens of a sentence, of length 1.

    Args:
        model: A transformers encoder, such as MPNetModel or BertModel.
        tokenizer: Its tokenizer.

    Source: TIFA (Hu et al., ICCV 2023), which takes sentence-transformers/all-mpnet-base-v2.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, source: str, *, device: str | None = None) -> SentenceChoice:
        """From a folder or a hub name, safetensors only.

        Raises:
            MoleFileError: No sentence encoder there.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModel.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise MoleFileError(
                printable(source, 300),
                f"is no sentence encoder ({printable(error, 400)})",
                hint="a folder with config.json, model.safetensors and a tokenizer, as all-mpnet-base-v2",
            ) from error
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> Tensor:
        """[n,K] float32 of length 1 each."""
        inputs = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        states = self.model(**inputs)[0].float()
        mask = inputs["attention_mask"][..., None].float()
        mean = (states * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
        return torch.nn.functional.normalize(mean, dim=1).cpu()

    def __call__(self, answer: str, choices: Sequence[str]) -> str:
        if not choices:
            raise MoleValueError("SentenceChoice", expected="at least one choice", got="none")
        vectors = self.embed([answer, *choices])
        return choices[int((vectors[1:] @ vectors[0]).argmax())]
