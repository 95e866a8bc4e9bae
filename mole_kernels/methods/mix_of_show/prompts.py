"""Prompts with one text state per cross-attention layer: encoded, carried through any UNet pipeline, read by
their layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleValueError, printable
from mole_kernels.methods.mix_of_show.tokens import Tokens, cross_attentions, text_encoders

# CLIP's is cheap, and all layers of a batch at once need not fit
CHUNK = 64


@dataclass(frozen=True)
class TextStates:
    """Prompts as every cross-attention layer sees them.

    Args:
        states: [B,L,T,K]; layer i reads states[:, i].
        pooled: [B,P] for SDXL, the mean over the layers' variants; else None.
        ids: Text encoder -> [B,L,T] int64.
    """

    states: Tensor
    pooled: Tensor | None
    ids: Mapping[str, Tensor]

    @property
    def tokens(self) -> int:
        return self.states.shape[2]

    @property
    def flat(self) -> Tensor:
        """[B,L·T,K]: what a pipeline takes as prompt_embeds inside `layered`."""
        return self.states.flatten(1, 2)


def token_ids(pipe: Any, prompts: Sequence[str], tokens: Tokens) -> dict[str, Tensor]:
    """{text encoder: ids [B,L,T]} of prompts, each expanded to one variant per layer, padded to the
    tokenizer's length.
    """
    variants = [variant for prompt in prompts for variant in tokens.expand(prompt)]
    ids_by_encoder = {}
    for component, (_, tokenizer) in text_encoders(pipe).items():
        ids = tokenizer(
            variants, padding="max_length", truncation=True, max_length=tokenizer.model_max_length
        )["input_ids"]
        ids_by_encoder[component] = torch.tensor(ids).unflatten(0, (len(prompts), tokens.layers))
    return ids_by_encoder


def encode_ids(pipe: Any, ids: Mapping[str, Tensor]) -> TextStates:
    """Text states of ids {text encoder: [B,L,T]}; carries gradients. Equal variants are encoded once."""
    parts = text_encoders(pipe)
    states, pooled = [], None
    for component, (encoder, tokenizer) in parts.items():
        B, L, _ = ids[component].shape
        device = next(encoder.parameters()).device
        unique, place = ids[component].flatten(0, 1).unique(dim=0, return_inverse=True)
        hidden, pools = [], []
        for some in unique.to(device).split(CHUNK):
            out = encoder(some, output_hidden_states=len(parts) > 1)
            # SDXL's UNet was trained on the last layer but one of both
            hidden.append(out.hidden_states[-2] if len(parts) > 1 else out.last_hidden_state)
            if hasattr(encoder, "text_projection"):
                # by the end token's place: configurations of old take the largest id for it, which an added
                # token would be
                end = (some == tokenizer.eos_token_id).int().argmax(1)
                pools.append(
                    encoder.text_projection(
                        out.last_hidden_state[torch.arange(len(some), device=device), end]
                    )
                )
        place = place.to(device)
        states.append(torch.cat(hidden)[place].unflatten(0, (B, L)))
        if pools:
            pooled = torch.cat(pools)[place].unflatten(0, (B, L)).mean(1)
    return TextStates(torch.cat(states, -1), pooled, ids)


def encode_prompts(pipe: Any, prompts: Sequence[str], tokens: Tokens) -> TextStates:
    """Text states of prompts with concept tokens, without gradients; a prompt without any has the same state
    in every layer.
    """
    with torch.no_grad():
        return encode_ids(pipe, token_ids(pipe, prompts, tokens))


@contextmanager
def layered(unet: nn.Module, tokens: int) -> Iterator[None]:
    """While it lasts, cross-attention layer i of L reads part i of encoder_hidden_states [B,L·tokens,K].

    States of `tokens` tokens alone go to every layer as they are; any other length is a MoleShapeError.
    """
    layers = cross_attentions(unet)
    hooks = [
        module.register_forward_pre_hook(partial(_own_part, i, len(layers), tokens, []), with_kwargs=True)
        for i, module in enumerate(layers.values())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own_part(
    i: int,
    layers: int,
    tokens: int,
    last: list[tuple[Tensor, Tensor]],
    module: nn.Module,
    args: tuple,
    kwargs: dict,
) -> tuple[tuple, dict] | None:
    states = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    if not isinstance(states, Tensor) or states.shape[1] == tokens:
        return None
    if states.shape[1] != layers * tokens:
        raise MoleShapeError(
            f"cross-attention layer {i}",
            expected=f"states of {tokens} or {layers} x {tokens} tokens",
            got=list(states.shape),
        )
    # the very same part at every step, so that keys and values made of it can be kept
    pair = last[0] if last else None
    if pair is None or pair[0] is not states or states.requires_grad:
        pair = (states, states[:, i * tokens : (i + 1) * tokens])
        # one assignment: another thread may draw with another text through the same layers
        last[:] = [pair]
    own = pair[1]
    return (
        (args[:1], kwargs | {"encoder_hidden_states": own})
        if len(args) < 3
        else ((args[0], own, *args[2:]), kwargs)
    )


def pipeline_arguments(
    pipe: Any, prompts: Sequence[str], negative: Sequence[str] | str | None, tokens: Tokens
) -> dict[str, Any]:
    """prompt_embeds and its relatives for `pipe(**…)` inside `layered`; the negative prompt is repeated for
    every layer.
    """
    positive = encode_prompts(pipe, prompts, tokens)
    arguments: dict[str, Any] = {"prompt_embeds": positive.flat}
    if positive.pooled is not None:
        arguments["pooled_prompt_embeds"] = positive.pooled
    if negative is not None:
        against = encode_prompts(
            pipe, [negative] * len(prompts) if isinstance(negative, str) else list(negative), tokens
        )
        arguments["negative_prompt_embeds"] = against.flat
        if against.pooled is not None:
            arguments["negative_pooled_prompt_embeds"] = against.pooled
    return arguments


@torch.no_grad()
def sample_concepts(
    pipe: Any,
    prompts: Sequence[str],
    tokens: Tokens,
    negative: Sequence[str] | str | None = "",
    **options: Any,
) -> Any:
    """What the pipeline draws for prompts with concept tokens.

    Args:
        pipe: The pipeline.
        prompts: The prompts.
        tokens: From `add_concepts` or `read_concepts`.
        negative: One negative prompt, or one for each; None: no classifier-free guidance.
        **options: The pipeline's own (generator, num_inference_steps, …).

    Returns:
        The pipeline's output.

    Raises:
        MoleValueError: A prompt or a number of prompts that does not fit.
    """
    if negative is None:
        options = {"guidance_scale": 1.0} | options
    arguments = pipeline_arguments(pipe, prompts, negative, tokens)
    length = arguments["prompt_embeds"].shape[1] // tokens.layers
    with layered(pipe.unet, length):
        return pipe(**arguments, **options)


def read_positions(
    pipe: Any, ids: Tensor, component: str, wanted: Mapping[str, Sequence[int]], prompt: str
) -> tuple[Tensor, Tensor, int]:
    """(concept tokens' places, all places up to the end token, the end token's place) of one variant's ids
    [T].

    Args:
        wanted: Token -> its id in this variant; MoleValueError where one was cut off.
    """
    tokenizer = text_encoders(pipe)[component][1]
    end = int((ids == tokenizer.eos_token_id).int().argmax())
    lacking = [token for token, own in wanted.items() if not any(int(i) in own for i in ids[:end].tolist())]
    if lacking:
        raise MoleValueError(
            f"prompt '{printable(prompt)}'",
            f"the tokenizer cuts {', '.join(map(printable, lacking))} off",
            hint=f"it takes {tokenizer.model_max_length - 2} tokens; use shorter templates",
        )
    own = {i for ids_of in wanted.values() for i in ids_of}
    places = torch.tensor([at for at, i in enumerate(ids[:end].tolist()) if i in own])
    return places, torch.arange(end + 1), end
