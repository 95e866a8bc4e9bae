"""Models that turn pictures and texts into vectors: CLIP and its kin, and image encoders, of transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleTypeError, MoleValueError, printable
from mole_kernels.metrics.result import revision_of

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_FILES = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"
IMAGE_FILES = "config.json, model.safetensors and preprocessor_config.json"
# a small model with random weights, to try a command without any download
RANDOM = "random"


class ClipModel:
    """Pictures and texts as vectors of one space.

    Args:
        model: A transformers CLIPModel, SiglipModel or the like: get_image_features, get_text_features.
        processor: Its processor.
        name: What results call it.
        revision: Of its weights.
        batch: Pictures or texts at once.
    """

    def __init__(
        self, model: Any, processor: Any, *, name: str = "", revision: str = "", batch: int = 16
    ) -> None:
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise MoleTypeError(
                "ClipModel",
                expected="a model of pictures and texts, as CLIPModel",
                got=type(model).__name__,
            )
        self.model, self.processor, self.batch = model.eval(), processor, batch
        self.name, self.revision = name or type(model).__name__, revision or "unknown"

    @classmethod
    def load(cls, source: str, *, device: str | None = None) -> ClipModel:
        """From a local folder, or "random" for a small one with random weights.

        Raises:
            MoleFileError: No such model in the folder; the message says what it should hold.
        """
        if source == RANDOM:
            return _random_clip()
        from transformers import AutoModel, AutoProcessor

        with _reading(source, CLIP_FILES):
            processor = AutoProcessor.from_pretrained(source)
            model: Any = AutoModel.from_pretrained(source, use_safetensors=True)
        name = f"{type(model).__name__} {source}"
        return cls(
            model.to(_device(device)), processor, name=name, revision=revision_of(source, model.config)
        )

    @property
    def scale(self) -> float:
        """exp(logit_scale), which PickScore multiplies cosines with; 1 where the model has none."""
        scale = getattr(self.model, "logit_scale", None)
        return 1.0 if scale is None else float(scale.detach().exp())

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> Tensor:
        """[n,K] float32 of length 1."""
        rows = []
        for at in range(0, len(images), self.batch):
            inputs = self.processor(images=list(images[at : at + self.batch]), return_tensors="pt")
            rows.append(
                _vectors(self.model.get_image_features(pixel_values=self._put(inputs["pixel_values"])))
            )
        return torch.nn.functional.normalize(torch.cat(rows).float().cpu(), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[n,K] float32 of length 1; texts are cut at the model's length."""
        rows, unique = [], list(dict.fromkeys(texts))
        for at in range(0, len(unique), self.batch):
            inputs = self.processor(
                text=unique[at : at + self.batch], padding=True, truncation=True, return_tensors="pt"
            )
            known = {
                key: value.to(self.model.device) for key, value in inputs.items() if key != "token_type_ids"
            }
            rows.append(_vectors(self.model.get_text_features(**known)))
        vectors = torch.nn.functional.normalize(torch.cat(rows).float().cpu(), dim=1)
        return vectors[[unique.index(text) for text in texts]]

    def _put(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.model.device, next(self.model.parameters()).dtype)


class ImageModel(torch.nn.Module):
    """Pictures as vectors, by the first token of a vision transformer (DINO) or the picture tower of a CLIP.

    It is a module, so that torchmetrics takes it as a feature extractor: uint8 [B,3,H,W] -> [B,K].

    Args:
        model: A transformers model of pictures.
        processor: Its image processor.
        name: What results call it.
        revision: Of its weights.
        batch: Pictures at once.
    """

    def __init__(
        self, model: Any, processor: Any, *, name: str = "", revision: str = "", batch: int = 16
    ) -> None:
        super().__init__()
        self.model, self.processor, self.batch = model.eval(), processor, batch
        self.name, self.revision = name or type(model).__name__, revision or "unknown"

    @classmethod
    def load(cls, source: str, *, device: str | None = None) -> ImageModel:
        """From a local folder, or "random" for a small one with random weights.

        Raises:
            MoleFileError: No such model in the folder; the message says what it should hold.
        """
        if source == RANDOM:
            return _random_vit()
        from transformers import AutoImageProcessor, AutoModel

        with _reading(source, IMAGE_FILES):
            processor = AutoImageProcessor.from_pretrained(source)
            model: Any = AutoModel.from_pretrained(source, use_safetensors=True)
        name = f"{type(model).__name__} {source}"
        return cls(
            model.to(_device(device)), processor, name=name, revision=revision_of(source, model.config)
        )

    @cached_property
    def num_features(self) -> int:
        """K, which torchmetrics asks for."""
        return int(self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1])

    @torch.no_grad()
    def forward(self, pictures: Tensor | Sequence[Any]) -> Tensor:
        """[n,K] float32, as the model gives them."""
        rows = []
        for at in range(0, len(pictures), self.batch):
            inputs = self.processor(images=list(pictures[at : at + self.batch]), return_tensors="pt")
            dtype = next(self.model.parameters()).dtype
            pixels = inputs["pixel_values"].to(self.model.device, dtype)
            if hasattr(self.model, "get_image_features"):
                rows.append(_vectors(self.model.get_image_features(pixel_values=pixels)))
            else:
                rows.append(self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.cat(rows).float().cpu()

    def images(self, images: Sequence[Image]) -> Tensor:
        """[n,K] float32 of length 1."""
        return torch.nn.functional.normalize(self(images), dim=1)


def same_width(a: Tensor, b: Tensor, metric: str) -> None:
    """Raises MoleValueError for vectors of two models of another size."""
    if a.shape[1] != b.shape[1]:
        raise MoleValueError(metric, expected=f"vectors of {a.shape[1]} numbers", got=f"{b.shape[1]}")


class _reading:
    """Turns what transformers raises for a folder into one error that says what belongs into it."""

    def __init__(self, source: str, files: str) -> None:
        self.source, self.files = source, files

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError | AttributeError | ImportError | TypeError):
            raise MoleFileError(
                printable(self.source, 300),
                f"no model can be read from it ({printable(error, 300)})",
                hint=f"a folder with {self.files}, or 'random' to try",
            ) from error


def _vectors(out: Any) -> Tensor:
    """Features as a tensor; transformers 5 returns an output with pooler_output."""
    vectors: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return vectors


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _image_processor(side: int) -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_resize=True
    )


def _random_clip() -> ClipModel:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

    # letter by letter, so that every text is its own
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    # through files, since the constructor's arguments changed between transformers 4 and 5
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        words = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small
        | {"vocab_size": len(words), "max_position_embeddings": words.model_max_length}
        | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    processor = CLIPProcessor(image_processor=_image_processor(32), tokenizer=words)
    return ClipModel(model, processor, name="CLIPModel of random weights", revision="seed 0")


def _random_vit() -> ImageModel:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTModel(config)
    return ImageModel(model, _image_processor(32), name="ViTModel of random weights", revision="seed 0")
