"""Questions about pictures answered by a transformers model of the visual-question-answering kind (ViLT,
BLIP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mole_kernels.errors import MoleFileError, MoleTypeError, printable
from mole_kernels.methods.selma.evaluate import normal

if TYPE_CHECKING:
    from PIL.Image import Image


class TransformersVQA:
    """An `Answerer`: a model that classifies (ViLT) chooses the likeliest of the choices it knows, one that
    writes (BLIP) writes.

    Args:
        model, processor: Such as ViltForQuestionAnswering and ViltProcessor, BlipForQuestionAnswering
            and BlipProcessor; `TransformersVQA.load` takes a folder or a hub name.
    """

    def __init__(self, model: Any, processor: Any, *, name: str = "") -> None:
        self.model, self.processor = model.eval(), processor
        self.name = name or type(model).__name__
        self._writes = hasattr(model, "generate")
        # ViLT takes 40 tokens, whatever its tokenizer says
        self._length = getattr(
            getattr(model.config, "text_config", model.config), "max_position_embeddings", None
        )
        self._labels = (
            {} if self._writes else {normal(label): int(k) for k, label in model.config.id2label.items()}
        )
        if not self._writes and not self._labels:
            raise MoleTypeError(
                "TransformersVQA: model",
                expected="one with answers as its labels, or one that writes",
                got=type(model).__name__,
            )

    @classmethod
    def load(cls, source: str, *, device: str | None = None) -> TransformersVQA:
        """From safetensors only."""
        from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(source)
            model: Any = AutoModelForVisualQuestionAnswering.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise MoleFileError(
                printable(source, 300), f"is no question answering model ({printable(error, 400)})"
            ) from error
        return cls(
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            processor,
            name=f"{type(model).__name__} {source}",
        )

    @torch.no_grad()
    def answer(self, image: Image, question: str, choices: Sequence[str]) -> str:
        inputs = self.processor(
            images=image, text=question, return_tensors="pt", truncation=True, max_length=self._length
        )
        inputs = inputs.to(self.model.device)
        if self._writes:
            return self.processor.decode(
                self.model.generate(**inputs, max_new_tokens=16)[0], skip_special_tokens=True
            )
        logits = self.model(**inputs).logits[0].float()
        known = [choice for choice in choices if normal(choice) in self._labels]
        # an open question, or choices none of which the model knows: its own best answer
        names = (
            {k: label for label, k in self._labels.items()}
            if not known
            else {self._labels[normal(c)]: c for c in known}
        )
        return names[max(names, key=lambda k: float(logits[k]))]
