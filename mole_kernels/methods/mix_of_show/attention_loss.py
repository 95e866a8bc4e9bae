"""Attention regularisation: a concept's tokens shall look where the concept's mask is; the paper's and
ours.
"""

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

    The mask is brought to each layer's grid by area. This form is this package's; `PaperAttentionLoss`
    is that of the paper's code.
    """

    def __init__(self, unet: nn.Module, tokens: Tokens) -> None:
        self.layers = list(cross_attentions(unet).values())
        self.ids = {
            encoder: sorted(i for own in tokens.ids.values() for i in own[encoder])
            for encoder in next(iter(tokens.ids.values()))
        }
        self._maps: list[Tensor] = []
        # of the layer that each map is the mean over
        self._heads: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks that keep each cross-attention's probabilities of the current forward; to be entered after
        `layered`.
        """
        with ExitStack() as stack:
            for module in self.layers:
                stack.callback(module.register_forward_pre_hook(self._look, with_kwargs=True).remove)
            stack.callback(self.forget)
            yield

    def forget(self) -> None:
        """Drop the maps of earlier forwards, which no loss used."""
        self._maps.clear()
        self._heads.clear()

    def take(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss of the last forward, for ids [B,L,T] of the first text encoder and masks [B,1,h,w] in 0…1;
        forgets the maps.
        """
        maps = [layer_map for layer_map, _ in self._collected()]
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

    def _collected(self) -> list[tuple[Tensor, int]]:
        """(map [B,P,T], heads) of each layer that ran; forgets them."""
        maps, heads = self._maps, self._heads
        self._maps, self._heads = [], []
        if not maps:
            raise MoleStateError(
                "AttentionLoss",
                "no cross-attention has run since the last time",
                hint="enter listening() first",
            )
        return list(zip(maps, heads))

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if torch.is_grad_enabled() and isinstance(states, Tensor):
            q, k = module.to_q(args[0]), module.to_k(states)
            q, k = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k))
            self._maps.append((q @ k.mT * module.scale).softmax(-1).float().mean(1))
            self._heads.append(module.heads)


class PaperAttentionLoss(AttentionLoss):
    """Σ over resolutions of (subject term + adjective term), as in the paper's code.

    Layers of one resolution are one map a [B,h,w] for each token: the mean over all their heads together. The
    concept's first token is its adjective (a random start), its second its subject (a class word); each
    map is divided by its largest value in the batch, through which gradients flow. With the mask brought
    to the resolution by nearest neighbours:

        adjective  mean of a outside the mask
        subject    mean of (a − mask)² with `full_identity`, else the mean of a outside the mask

    `full_identity` is for concepts whose clothes belong to them. A batch that lies wholly inside its
    masks has no outside, and the loss is 0. A concept of one token has its subject alone; tokens after
    the second are free.

    Args:
        unet: Its cross-attentions are listened to.
        tokens: The concept's tokens.
        full_identity: See above.

    Source: Mix-of-Show (Gu et al., NeurIPS 2023), trainer_edlora.py of its code.
    """

    def __init__(self, unet: nn.Module, tokens: Tokens, full_identity: bool = True) -> None:
        super().__init__(unet, tokens)
        self.full_identity = full_identity

    def take(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss of the last forward, for ids [B,L,T] and masks [B,1,h,w]; forgets the maps.

        Raises:
            MoleStateError: No forward since the last time, or a text that holds no token of the concept.
        """
        by_grid: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
        for layer_map, heads in self._collected():
            grid = attention_grid(layer_map.shape[1], mask.shape[-2], mask.shape[-1])
            by_grid.setdefault(grid, []).append((layer_map, heads))
        places = self._places(ids)
        terms: list[Tensor] = []
        for grid, layers in by_grid.items():
            mean = sum(layer_map * heads for layer_map, heads in layers) / sum(heads for _, heads in layers)
            assert isinstance(mean, Tensor)
            index = places.to(mean.device)[:, None].expand(-1, mean.shape[1], -1)
            maps = mean.gather(2, index).unflatten(1, grid)
            wanted = F.interpolate(mask.float(), grid, mode="nearest")[:, 0].to(maps)
            terms += self._terms(maps, wanted)
        return torch.stack(terms).sum() if terms else mask.new_zeros(())

    def _terms(self, maps: Tensor, wanted: Tensor) -> list[Tensor]:
        """Of one resolution.  maps [B,h,w,1 or 2], wanted [B,h,w]"""
        outside = wanted == 0
        if not bool(outside.any()):
            return []
        subject = maps[..., -1] / maps[..., -1].max()
        terms = [(subject - wanted).square().mean() if self.full_identity else subject[outside].mean()]
        if maps.shape[-1] > 1:
            adjective = maps[..., 0] / maps[..., 0].max()
            terms.append(adjective[outside].mean())
        return terms

    def _places(self, ids: Tensor) -> Tensor:
        """[B,1 or 2] int64: where the first tokens of the concept stand in each text."""
        own = torch.tensor(self.ids["text_encoder"], device=ids.device)
        rows = [torch.isin(text, own).nonzero()[:, 0] for text in ids[:, 0]]
        count = min(2, min(map(len, rows)))
        if count == 0:
            raise MoleStateError("PaperAttentionLoss", "a text of the batch holds no token of the concept")
        return torch.stack([row[:count] for row in rows])


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
