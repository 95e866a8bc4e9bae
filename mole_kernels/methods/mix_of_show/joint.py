"""Regions for transformers of joint attention (FLUX): every region's text stands in the sequence, and a mask
says who sees whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.methods.mix_of_show.regions import Region, shares


def joint_mask(table: Tensor, lengths: Sequence[int]) -> Tensor:
    """Who attends to whom, [T,T] bool over [text 0 | text 1 | … | places].

    A place sees every place and the texts that it takes of. A text sees itself and the places that take of
    it, no other text.

    Args:
        table: [1+S, places]: what each place takes of the global text (row 0) and of the regions' (see
            `regions.shares`).
        lengths: Tokens of each text.
    """
    if table.dim() != 2 or len(lengths) != table.shape[0]:
        raise MoleShapeError("joint_mask", expected=f"table [{len(lengths)}, places]", got=tuple(table.shape))
    texts, places = sum(lengths), table.shape[1]
    mask = torch.zeros(texts + places, texts + places, dtype=torch.bool, device=table.device)
    mask[texts:, texts:] = True
    start = 0
    for length, row in zip(lengths, table):
        span, takes = slice(start, start + length), row > 0
        mask[span, span] = True
        mask[span, texts:] = takes
        mask[texts:, span] = takes[:, None]
        start += length
    return mask


@torch.no_grad()
def regional_flux(
    pipe: Any,
    prompt: str,
    regions: Sequence[Region],
    *,
    height: int,
    width: int,
    overlap: str = "mean",
    embeds: Sequence[Tensor] | None = None,
    pooled: Tensor | None = None,
    max_sequence_length: int = 512,
) -> dict[str, Any]:
    """The arguments with which a FLUX pipeline draws every region from its own text.

    A joint softmax has no share of one half: where regions overlap a place sees the texts of all that cover
    it
    ("mean"), or of the last ("overwrite"). Negative prompts of regions are not used, as FLUX has no guidance
    of that
    kind in one call. Ours: the paper has cross-attention only.

    Args:
        pipe: The pipeline.
        prompt: The text of the whole picture.
        regions: The regions.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        overlap: "mean" or "overwrite".
        embeds: The texts' embeddings [L,C], the global one first, instead of encoding them.
        pooled: [1,D], with `embeds`.
        max_sequence_length: Tokens of each text.

    Returns:
        `prompt_embeds` [1,ΣL,C] with all texts one after the other, and `joint_attention_kwargs` with the
        mask
        [1,1,T,T], for all layers and steps.

    Raises:
        MoleError: A region, text or size that does not fit.

    Example:
        >>> image = pipe(height=512, width=512, **regional_flux(pipe, "a street", regions, height=512,
        width=512))
    """
    if not regions or not all(isinstance(region, Region) for region in regions):
        raise MoleTypeError("regional_flux", expected="a list of regions, at least one", got="something else")
    if not hasattr(pipe, "transformer"):
        raise MoleTypeError(
            "regional_flux",
            expected="a pipeline with a transformer of joint attention",
            got=type(pipe).__name__,
        )
    step = 2 * int(getattr(pipe, "vae_scale_factor", 8))
    if height % step or width % step:
        raise MoleValueError(
            "regional_flux", expected=f"height and width in multiples of {step}", got=f"{height} x {width}"
        )
    if embeds is None:
        embeds = []
        for text in (prompt, *(region.prompt for region in regions)):
            states, own_pooled, _ = pipe.encode_prompt(
                prompt=text, prompt_2=None, max_sequence_length=max_sequence_length
            )
            embeds.append(states[0])
            pooled = own_pooled if pooled is None else pooled
    if len(embeds) != len(regions) + 1 or pooled is None:
        raise MoleShapeError(
            "regional_flux: embeds",
            expected=f"{len(regions) + 1} texts, the global one first, and pooled",
            got=len(embeds),
        )
    table = shares(list(regions), height // step, width // step, overlap=overlap)
    mask = joint_mask(table, [e.shape[0] for e in embeds]).to(embeds[0].device)
    return {
        "prompt_embeds": torch.cat(list(embeds))[None],
        "pooled_prompt_embeds": pooled,
        "joint_attention_kwargs": {"attention_mask": mask[None, None]},
    }
