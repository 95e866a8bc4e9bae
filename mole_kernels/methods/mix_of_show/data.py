"""The few pictures of a concept as batches: latents once, captions as ids with the concept's tokens, masks
where there are any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_kernels.errors import MoleValueError, printable
from mole_kernels.methods.mix_of_show.augmented import PLACE, mask_of
from mole_kernels.methods.mix_of_show.prompts import token_ids
from mole_kernels.methods.mix_of_show.tokens import concept_tokens, new_embeddings, text_encoders
from mole_kernels.training.buckets import cover
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.encode import Encoder
from mole_kernels.training.pictures import PictureFolder, picture_errors


def concept_batches(
    pipe: Any,
    folder: PictureFolder,
    tokens: Mapping[str, str],
    batch_size: int,
    *,
    seed: int = 0,
    masks: Path | None = None,
) -> TensorBatches:
    """Batches for `train_edlora`; the pipeline is as before.

    Raises MoleValueError for captions without the concept or too long, MoleFileError for a mask that is
    missing.

    Args:
        folder: Pictures of one size; each caption names the concept by its tokens, or by <TOK> as in
            the paper's data.
        tokens: As for `train_edlora`.
        masks: Folder of pictures with the same names up to the ending, white where the concept is; any
            size: they are scaled and cut like their picture, then averaged over each latent.

    Returns:
        Batches with latents, caption ids and, where there are masks, masks of the latents' size.
    """
    if len(folder.counts()) != 1:
        raise MoleValueError(
            "concept_batches",
            expected="pictures of one size",
            got=list(folder.counts()),
            hint="PictureFolder(buckets=False)",
        )
    captions = [picture.caption.replace(PLACE, " ".join(tokens)) for picture in folder.pictures]
    for picture, caption in zip(folder.pictures, captions):
        if lacking := [token for token in tokens if token not in caption]:
            where = f"caption of {printable(picture.name)}"
            raise MoleValueError(
                where, expected=f"{PLACE} or {' '.join(tokens)}", got=f"none of {', '.join(lacking)}"
            )
    tensors = _ids(pipe, captions, tokens, folder)
    encoder = Encoder(pipe)
    latents = [
        encoder.latents(torch.stack([folder.pixels(i) for i in some]))
        for some in torch.arange(len(folder)).split(8)
    ]
    tensors["latents"] = torch.cat(latents)
    if len(text_encoders(pipe)) > 1:
        tensors["time_ids"] = torch.stack([folder.time_ids(i) for i in range(len(folder))])
    if masks is not None:
        size = tensors["latents"].shape[-2:]
        tensors["mask"] = torch.stack(
            [_mask(folder, i, masks, (size[0], size[1])) for i in range(len(folder))]
        )
    pictures = hashlib.blake2b(digest_size=12)
    for picture in folder.pictures:
        pictures.update(f"{picture.digest} {picture.bucket};".encode())
    sources = {"latents": f"pictures {pictures.hexdigest()}, vae {encoder.latent_key()}"}
    return TensorBatches(tensors, min(batch_size, len(folder)), seed=seed, sources=sources)


def _ids(
    pipe: Any, captions: list[str], tokens: Mapping[str, str], folder: PictureFolder
) -> dict[str, Tensor]:
    """The ids will mean the same when training adds the tokens in the same order again."""
    start = new_embeddings(pipe, tokens, torch.Generator().manual_seed(0))
    with concept_tokens(pipe, start) as known:
        ids = token_ids(pipe, captions, known)
        for name, own_ids in ids.items():
            for token in tokens:
                there = (own_ids[:, 0] == known.ids[token][name][0]).any(1)
                if not bool(there.all()):
                    picture = folder[int((~there).int().argmax())]
                    raise MoleValueError(
                        f"caption of {printable(picture.name)}",
                        f"the tokenizer cuts {printable(token)} off",
                        hint="shorten the caption",
                    )
    return {f"ids_{name}": own_ids for name, own_ids in ids.items()}


def _mask(folder: PictureFolder, i: int, masks: Path, size: tuple[int, int]) -> Tensor:
    """[1,h,w] in 0…1."""
    from PIL import Image

    picture = folder[i]
    path = mask_of(masks, Path(picture.name))
    with picture_errors(path), Image.open(path) as opened:
        image = opened.convert("L").resize(picture.size[::-1], Image.Resampling.BOX)
    (h, w), (top, left) = cover(picture.size, picture.bucket)
    image = image.resize((w, h), Image.Resampling.BOX).crop(
        (left, top, left + picture.bucket[1], top + picture.bucket[0])
    )
    values = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, *picture.bucket).float() / 255
    )
    return F.interpolate(values[None], size, mode="area")[0]
