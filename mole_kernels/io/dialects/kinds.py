"""What a file is whose keys are none of a LoRA's, in words, with the step that leads on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mole_kernels.errors import printable

# cloneofsimo/lora numbers its layers instead of naming them
_LIST_FORM = re.compile(r"\A(?:unet|text_encoder|vae):\d+:(?:up|down|rank)\Z")
# keys that tools give textual inversions; a file of diffusers holds each token under its own name
_EMBEDDING_KEYS = frozenset({"emb_params", "clip_l", "clip_g", "t5", "string_to_param", "string_to_param.*"})
# widths of the text encoders' embeddings
_EMBEDDING_WIDTHS = frozenset({768, 1024, 1280, 2048, 2560, 3584, 4096, 5120})
_MODEL_WEIGHT = re.compile(r"\.(?:weight|bias|gamma|beta|running_mean|running_var|num_batches_tracked)\Z")

LIST_FORM = (
    "a LoRA in list form (cloneofsimo/lora), whose layers are numbers without names",
    "only the tool that wrote it knows the order of its layers: let that tool write a file with names",
)
EMBEDDING = (
    "a textual inversion embedding, no LoRA",
    "pipe.load_textual_inversion(path) reads it",
)


def what_keys_are(unknown: Sequence[str], tensors: Mapping[str, Any]) -> tuple[str, str]:
    """(what a file with these keys is, what to do with it); "" where that cannot be told.

    Args:
        unknown: The keys that are none of a LoRA's.
        tensors: All tensors, or a header's entries: anything with a `shape`.
    """
    if any(".softmoe." in key for key in unknown):
        return "", "this is a gate file: give it as gates, or read it with mole_kernels.io.load_gates"
    if all(_LIST_FORM.match(key) for key in unknown):
        return f"this is {LIST_FORM[0]}", LIST_FORM[1]
    if len(unknown) == len(tensors):
        if is_embedding({key: getattr(tensors[key], "shape", ()) for key in unknown}):
            return f"this is {EMBEDDING[0]}", EMBEDDING[1]
        if all(_MODEL_WEIGHT.search(key) for key in unknown):
            return (
                "these are weights of a model, no LoRA",
                "load it as a model: from_pretrained, or from_single_file for one file; a full fine-tune "
                "is not an expert",
            )
        return "this file holds no LoRA", "the keys above are all that it has"
    return "", "everything in a file must be known, for leaving it out would change the result"


def is_embedding(shapes: Mapping[str, Iterable[int]]) -> bool:
    """Whether these are the vectors of a few tokens."""
    sizes = {key: tuple(shape) for key, shape in shapes.items()}
    if _EMBEDDING_KEYS & set(sizes):
        return True
    return len(sizes) <= 8 and all(
        1 <= len(size) <= 2 and size[-1] in _EMBEDDING_WIDTHS and not _MODEL_WEIGHT.search(key)
        for key, size in sizes.items()
    )


def list_form(value: object) -> bool:
    """Whether a pickle's content is cloneofsimo's list of up and down matrices, or a dict of such lists."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(part, list | tuple) for part in value.values())
    return isinstance(value, list | tuple)


def kind_of_pickle(value: object) -> tuple[str, str]:
    """(what the content of a pickle without LoRA keys is, what to do with it)."""
    numbered = isinstance(value, Mapping) and bool(value) and all(_LIST_FORM.match(str(key)) for key in value)
    if numbered or list_form(value):
        return LIST_FORM
    if isinstance(value, Mapping):
        if "string_to_param" in value or "string_to_token" in value:
            return EMBEDDING
        shapes = {str(key): tuple(getattr(part, "shape", ())) for key, part in value.items()}
        if shapes and is_embedding(shapes):
            return EMBEDDING
        if "state_dict" in value:
            return "a training checkpoint", "let the trainer export its LoRA as safetensors"
        return f"a dictionary of {', '.join(printable(key, 40) for key in list(value)[:5])}", ""
    return f"a {type(value).__name__}", ""
