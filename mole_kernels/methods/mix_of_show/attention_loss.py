"""Attention regularisation: a concept's tokens shall look where the concept's mask is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError
from mole_kernels.methods.mix_of_show.tokens import Tokens, cross_attentions


class AttentionLoss:
    """mean over layers and concept tokens of (a/max a − mask)²,  a [P] = mean over heads of softmax(q kᵀ/√d)
    at that token.

    The mask is brought to each layer's grid by area. The paper's code has such a term; this form of it is
    this package's.
    """

    def __init__(self, unet: nn.Module, tokens: Tokens) -> None:
        self.layers = list(cross_attentions(unet).values())
        self.ids = {
            encoder: sorted(i for own in tokens.ids.values() for i in own[encoder])
            for encoder in next(iter(tokens.ids.values()))
        }
        self._maps: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks that keep each cross-attention's probabilities of the current forward; to be entered after
        `layered`.
        """
        with ExitStack() as stack:
            for module in self.layers:
                stack.callback(module.register_forward_pre_hook(self._look, with_kwargs=True).remove)
            stack.callback(self._maps.clear)
            yield

    def forget(self) -> None:
        """Drop the maps of earlier forwards, which no loss used."""
        self._maps.clear()

    def take(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss of the last forward, for ids [B,L,T] of the first text encoder and masks [B,1,h,w] in 0…1;
        forgets the maps.
        """
        maps, self._maps = self._maps, []
        if not maps:
            raise MoleStateError(
                "AttentionLoss",
                "no cross-attention has run since the last time",
                hint="enter listening() first",
            )
        # variants differ in the concept's ids only, so its places are the same in all
        ours = torch.isin(ids[:, 0], torch.tensor(self.ids["text_encoder"], device=ids.device)).to(
            maps[0].device
        )
        losses = []
        for layer_map in maps:
            h, w = attention_grid(layer_map.shape[1], mask.shape[-2], mask.shape[-1])
            wanted = F.interpolate(mask.float(), (h, w), mode="area").flatten(1).to(layer_map)
            rows = layer_map.mT[ours]
            rows = rows / rows.detach().amax(1, keepdim=True).clamp_min(1e-12)
            losses.append((rows - wanted.repeat_interleave(ours.sum(1), 0)).square().mean())
        return torch.stack(losses).mean()

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if torch.is_grad_enabled() and isinstance(states, Tensor):
            q, k = module.to_q(args[0]), module.to_k(states)
            q, k = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k))
            self._maps.append((q @ k.mT * module.scale).softmax(-1).float().mean(1))


def attention_grid(places: int, height: int, width: int) -> tuple[int, int]:
    """The grid of a layer with so many places, of latents height x width: halved, rounded up, as a UNet does
    it.
    """
    h, w = height, width
    while h * w > places and max(h, w) > 1:
        h, w = -(-h // 2), -(-w // 2)
    if h * w != places:
        raise MoleStateError(
            "AttentionLoss", expected=f"a layer on halves of {height} x {width} places", got=places
        )
    return h, w
