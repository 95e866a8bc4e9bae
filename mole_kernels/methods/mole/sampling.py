"""Pictures as MoLE's generators make them: DDIM, 50 steps, guidance 7.5, and on request their prompt
suffixes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

# both official generators append these to every prompt without a word (JiePKU/MoLE), blanks included
SUFFIX = " best quality, 8K"
NEGATIVE_SUFFIX = " poor quality, unclear hand, bad face "


def prompt_arguments(
    texts: Sequence[str], negative: str = "", *, suffixes: bool = False
) -> dict[str, list[str]]:
    """{"prompt", "negative_prompt"} for a diffusers pipeline; with the official generators' suffixes only
    where asked for.
    """
    positive, against = (SUFFIX, NEGATIVE_SUFFIX) if suffixes else ("", "")
    return {
        "prompt": [text + positive for text in texts],
        "negative_prompt": [negative + against] * len(texts),
    }


def sample_pictures(
    pipe: Any,
    texts: Sequence[str],
    *,
    negative: str = "",
    suffixes: bool = False,
    steps: int = 50,
    guidance: float = 7.5,
    seed: int = 0,
    **more: Any,
) -> Any:
    """Pictures with the paper's settings; picture i is drawn from seed + i alone.

    The pipeline keeps its own scheduler, also while it draws, so that several threads may sample from it.

    Args:
        pipe: The pipeline.
        texts: One prompt for each picture.
        negative: The negative prompt.
        suffixes: Whether the paper's suffixes are put behind each prompt.
        steps: Steps of the sampler.
        guidance: Classifier-free guidance.
        seed: Of the first picture.
        **more: Goes to the pipeline: height, width, output_type, …

    Returns:
        `pipe(...).images`.
    """
    from diffusers import DDIMScheduler

    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    own = copy.copy(pipe)
    own.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    texts_of_both = prompt_arguments(texts, negative, suffixes=suffixes)
    return own(
        **texts_of_both, num_inference_steps=steps, guidance_scale=guidance, generator=generators, **more
    ).images
