"""One trained concept, its files, and the fusion configuration of the paper's tools."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.limits import finite
from mole_kernels.files.opening import PathLike
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.text import read_json_file
from mole_kernels.files.writer import atomic_save
from mole_kernels.io import load_expert, save_expert
from mole_kernels.io.mix_of_show import load_mix_of_show_parts, save_mix_of_show
from mole_kernels.methods.mix_of_show.tokens import ENCODERS

Layout = Literal["main", "research"]
FIELDS = ("lora_path", "unet_alpha", "text_encoder_alpha", "concept_name")


@dataclass(frozen=True)
class Concept:
    """An ED-LoRA: V⁺ of its tokens and an expert on text encoder and UNet.

    Args:
        name: How prompts call it: its tokens, as in "<potter1> <potter2>".
        embeddings: Token -> text encoder -> V [L,K], one row for each cross-attention layer.
        unet_alpha: Scale of the expert on the UNet; ΔW is multiplied by it as it is.
        text_encoder_alpha: The same for the text encoders.
    """

    name: str
    expert: Expert
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    unet_alpha: float = 1.0
    text_encoder_alpha: float = 1.0

    def alpha(self, path: str) -> float:
        """The weight on a layer, by its component."""
        return self.text_encoder_alpha if path.startswith("text_encoder") else self.unet_alpha


def save_concept(concept: Concept, path: PathLike, layout: Layout = "main") -> None:
    """Write a concept.

    Args:
        concept: The concept.
        path: A .pth as the paper's tools have it; its alphas are not in it. Or a .safetensors, which holds
            the
            expert as diffusers has it, with NAME.embeddings.safetensors beside it.
        layout: The key dialect of a .pth: the paper's main or its research branch.

    Raises:
        MoleError: A layer that the dialect has no name for, or a file that cannot be written.
    """
    if str(path).lower().endswith((".pth", ".pt")):
        by_encoder = {
            encoder: {
                token: by_component[encoder]
                for token, by_component in concept.embeddings.items()
                if encoder in by_component
            }
            for encoder in ENCODERS
        }
        save_mix_of_show(concept.expert, by_encoder, path, layout)
        return
    save_expert(concept.expert, path)
    save_embeddings(concept.embeddings, Path(os.fsdecode(path)).with_suffix(".embeddings.safetensors"))


def save_embeddings(embeddings: Mapping[str, Mapping[str, Tensor]], path: PathLike) -> None:
    """V⁺ of tokens as safetensors: the token is the key, with `text_encoder_2.` before it for SDXL's second
    encoder.
    """
    tensors = {
        token if encoder == ENCODERS[0] else f"{encoder}.{token}": value
        for token, by_component in embeddings.items()
        for encoder, value in by_component.items()
    }
    atomic_save(tensors, path, {"format": "pt"})


def load_embeddings(path: PathLike) -> dict[str, dict[str, Tensor]]:
    """What `save_embeddings` wrote."""
    embeddings: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(path)[0].items():
        second = key.startswith(f"{ENCODERS[1]}.")
        embeddings.setdefault(key.removeprefix(f"{ENCODERS[1]}.") if second else key, {})[
            ENCODERS[int(second)]
        ] = value
    return embeddings


def load_concept(
    path: PathLike, name: str | None = None, *, unet_alpha: float = 1.0, text_encoder_alpha: float = 1.0
) -> Concept:
    """A concept from a .pth of the paper's tools, or from a .safetensors with its embeddings beside it.

    Args:
        path: The file; a .pth in either key dialect of the paper's branches.
        name: Which of the file's tokens prompts use and in which order; None: all, as they come.
        unet_alpha: The scale of the UNet's layers, which a .pth does not hold.
        text_encoder_alpha: That of the text encoder's.

    Returns:
        The concept: its expert, token embeddings and name.

    Raises:
        MoleError: The file cannot be read, is no concept, or lacks the tokens named.
    """
    where = printable(path, 300)
    if not os.path.exists(path):
        raise MoleFileError(where, "there is no such file")
    if str(path).lower().endswith((".pth", ".pt")):
        expert, by_encoder = load_mix_of_show_parts(path)
        embeddings: dict[str, dict[str, Tensor]] = {}
        for encoder, rows in by_encoder.items():
            for token, value in rows.items():
                embeddings.setdefault(token, {})[encoder] = value
    else:
        expert = load_expert(path)
        expert.check_low_rank("concept")
        beside = Path(os.fsdecode(path)).with_suffix(".embeddings.safetensors")
        embeddings = load_embeddings(beside) if beside.exists() else {}
    name = " ".join(embeddings) if name is None else name
    if not embeddings:
        raise MoleKeyError(
            where,
            "holds no concept embeddings",
            hint="merge fuses plain LoRAs; concepts have tokens of their own",
        )
    lacking = [word for word in name.split() if word not in embeddings]
    unused = [token for token in embeddings if token not in name.split()]
    if lacking or unused:
        got = f"'{printable(name)}'"
        raise MoleValueError(
            f"{where}: concept_name", expected=f"its tokens {', '.join(map(printable, embeddings))}", got=got
        )
    return Concept(name, expert, embeddings, _alpha(unet_alpha, where), _alpha(text_encoder_alpha, where))


def load_fusion_config(path: PathLike) -> list[Concept]:
    """The concepts of a fusion configuration, a JSON list.

    Args:
        path: The file: entries {lora_path, unet_alpha, text_encoder_alpha, concept_name}. A lora_path that
            is not
            absolute is looked for beside the file first.

    Returns:
        The concepts, in the file's order.

    Raises:
        MoleFileError: An entry or field that is wrong, by its name.
    """
    where = printable(path, 300)
    entries = read_json_file(path)
    if not isinstance(entries, list) or not entries:
        raise MoleFileError(
            where, expected=f"a list of entries with {', '.join(FIELDS)}", got=type(entries).__name__
        )
    return [
        _entry(entry, f"{where}, entry {i}", Path(os.fsdecode(path)).parent)
        for i, entry in enumerate(entries)
    ]


def _entry(entry: Any, where: str, folder: Path) -> Concept:
    if not isinstance(entry, dict) or not isinstance(entry.get("lora_path"), str):
        raise MoleFileError(where, expected=f"an object with {', '.join(FIELDS)}", got=printable(entry))
    if unknown := sorted(set(entry) - set(FIELDS)):
        raise MoleFileError(
            where, expected=f"the fields {', '.join(FIELDS)}", got=", ".join(map(printable, unknown))
        )
    name = entry.get("concept_name")
    if name is not None and not isinstance(name, str):
        raise MoleFileError(f"{where}, concept_name", expected="a string", got=printable(name))
    beside = folder / entry["lora_path"]
    source = beside if os.path.exists(beside) else Path(entry["lora_path"])
    alphas = {
        key: _alpha(entry.get(key, 1.0), f"{where}, {key}") for key in ("unet_alpha", "text_encoder_alpha")
    }
    return load_concept(source, name, **alphas)


def _alpha(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MoleTypeError(where, expected="alpha as a number", got=printable(value))
    if not finite(value):
        raise MoleValueError(where, expected="a finite alpha", got=printable(value))
    return float(value)


def at_weights(concept: Concept) -> Expert:
    """The concept's expert with its alphas in the scales, as it stands in a model by itself."""
    layers = {
        path: replace(layer, scale=layer.scale * concept.alpha(path))
        for path, layer in concept.expert.layers.items()
    }
    return replace(concept.expert, layers=layers)
