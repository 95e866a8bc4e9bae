"""Regions for transformers: FLUX, Stable Diffusion 3, Qwen-Image, Z-Image and Wan.

All texts, the whole picture's first, stand one after the other, and a mask says who sees whom: a place sees
every place and the texts it takes of, a text itself and the places that take of it. The mask is put before
torch's attention while the transformer runs, whatever processor calls it.

A joint softmax has no share of one half: where regions overlap a place sees all that cover it ("mean") or the
last ("overwrite"). Ours: the paper has the cross-attention of UNets alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.methods.mix_of_show.regions import Region, shares
from mole_kernels.methods.mix_of_show.transformer_weights import TransformerWeights
from mole_kernels.patching.handle import Handle

# class of the transformer -> (how its texts lie, whether guidance is one call of both halves)
_KINDS = {
    "FluxTransformer2DModel": ("text first", False),
    "QwenImageTransformer2DModel": ("text first", False),
    "SD3Transformer2DModel": ("places first", True),
    "ZImageTransformer2DModel": ("places first", True),
    "WanTransformer3DModel": ("cross", False),
}


@dataclass(frozen=True)
class EncodedText:
    """One text as the pipeline's encoders give it.

    Args:
        states: [L,C].
        pooled: [D], for FLUX and Stable Diffusion 3.
    """

    states: Tensor
    pooled: Tensor | None = None


class regional_transformer:
    """While it is open, the pipeline draws every region from its own text.

        regions = [Region("a cat", box=(0, 0, 1, 0.5)), Region("a dog", negative="grey", box=(0, 0.5, 1, 1))]
        with regional_transformer(pipe, ["two pets"], regions, height=1024, width=1024) as state:
            images = pipe(height=1024, width=1024, **state.arguments).images

    Negative texts are used where the pipeline has guidance by two texts (`true_cfg_scale` of FLUX and
    Qwen-Image, `guidance_scale` of the others). Several prompts and pictures per prompt are followed.
    Positions of texts in Qwen-Image and Z-Image count on from text to text, so that a region's text is
    turned a little further than by itself.

    Args:
        pipe: A pipeline with one of these transformers.
        prompts: Of the whole picture.
        regions: For all prompts, or one list for each.
        height: Of the picture in pixels.
        width: Likewise.
        frames: Of a Wan video.
        negative: What no picture shall show.
        overlap: "mean" or "overwrite".
        handle: A patch made with gates=region_gates: then Region.experts says how much of each expert
            its places and its text get; `elsewhere` where no region is (1 by default).
        elsewhere: Expert -> weight outside all regions.
        texts: (prompt, region or None for the whole, "prompt" or "negative") -> text, instead of encoding.

    Raises:
        MoleTypeError: Another transformer, or no regions.
        MoleValueError: Sizes that are no multiples of a place, unequal numbers of regions.
        MoleKeyError: An expert that the patch lacks.
        MoleStateError: A patch without region gates.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        regions: Sequence[Region] | Sequence[Sequence[Region]],
        *,
        height: int,
        width: int,
        frames: int = 1,
        negative: str = "",
        overlap: str = "mean",
        handle: Handle | None = None,
        elsewhere: Mapping[str, float] | None = None,
        texts: Mapping[tuple[int, int | None, str], EncodedText] | None = None,
    ) -> None:
        transformer = getattr(pipe, "transformer", None)
        kind = _KINDS.get(type(transformer).__name__)
        if kind is None or not isinstance(transformer, nn.Module):
            raise MoleTypeError(
                "regional_transformer", expected=f"one of {', '.join(_KINDS)}", got=type(transformer).__name__
            )
        self.pipe, self.transformer, (self.order, self.doubled) = pipe, transformer, kind
        self.prompts, self.negative = list(prompts), negative
        self.by_prompt = _by_prompt(regions, len(self.prompts))
        grid = _grid(pipe, height, width)
        places = (frames - 1) // int(getattr(pipe, "vae_scale_factor_temporal", 4)) + 1
        # [prompts,1+S,places]; every frame has the same regions
        tables = [shares(own, *grid, overlap=overlap).repeat(1, places) for own in self.by_prompt]
        self.table = torch.stack(tables)
        self._encoded = self._encode() if texts is None else dict(texts)
        self.arguments, self.lengths, self._valid = self._assemble()
        self._experts = None if handle is None else TransformerWeights(self, handle, elsewhere)
        self._masks: dict[tuple[int, int, str], Tensor] = {}
        self._mode: _RegionMode | None = None
        # what the layers that run see: "text", "places", or both
        self.part = ""
        self._hooks: list[Any] = []

    def __enter__(self) -> regional_transformer:
        self._hooks.append(self.transformer.register_forward_pre_hook(self._begin))
        self._hooks.append(self.transformer.register_forward_hook(self._end, always_call=True))
        # Z-Image's refiners see one of the two alone, and both may have the same length
        for name, part in (("context_refiner", "text"), ("noise_refiner", "places")):
            for block in getattr(self.transformer, name, ()):
                self._hooks.append(block.register_forward_pre_hook(partial(self._enter_part, part)))
                self._hooks.append(block.register_forward_hook(self._leave_part, always_call=True))
        if self._experts is not None:
            self._hooks += self._experts.hooks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._experts is not None:
            self._experts.clear()

    def prompt_of(self, B: int) -> list[int]:
        """Whose prompt each of B samples is of; under guidance in one call both halves have the same
        order.
        """
        guided = self.doubled and bool(getattr(self.pipe, "do_classifier_free_guidance", False))
        n = B // 2 if guided else B
        P = len(self.prompts)
        if n % P or (guided and B % 2):
            raise MoleStateError(
                "regional_transformer", expected=f"a batch of pictures of {P} prompts", got=f"{B}"
            )
        return [b % n // (n // P) for b in range(B)]

    def seen(self, q: int, k: int) -> Tensor | None:
        """[prompts,q,k] bool of an attention of so many queries and keys; None for one that is another's."""
        places, length = self.table.shape[2], sum(self.lengths)
        if self.order == "cross":
            return self._cross() if (q, k) == (places, length) else None
        if q != k or self.part == "places":
            return None
        extra_places, extra_text = self.filling()
        if self.part == "text":
            takes = self._takes_of_text(extra_text)
            return self._with_valid(torch.einsum("pis,pjs->pij", takes, takes) > 0, 0, q)
        whole = q == places + extra_places + length + extra_text
        return self._joint(extra_places, extra_text) if whole else None

    def filling(self) -> tuple[int, int]:
        """(places, text tokens) that Z-Image adds to come to multiples of 32."""
        if "ZImage" not in type(self.transformer).__name__:
            return 0, 0
        return -self.table.shape[2] % 32, -sum(self.lengths) % 32

    def mask(self, q: int, k: int, B: int, device: torch.device) -> Tensor | None:
        """[B,1,q,k] bool on the device."""
        key = (q, k, f"{self.part} {device}")
        if key not in self._masks:
            allowed = self.seen(q, k)
            if allowed is None:
                return None
            self._masks[key] = allowed.to(device)
        return self._masks[key][self.prompt_of(B)][:, None]

    def _takes_of_text(self, extra: int) -> Tensor:
        """[prompts,L,1+S] 0/1: which text each text token is of; those that fill up are of the whole's."""
        owners = torch.cat([torch.full((n,), s) for s, n in enumerate(self.lengths)])
        owners = F.pad(owners, (0, extra))
        one_hot = F.one_hot(owners, len(self.lengths)).float()
        return one_hot.expand(len(self.prompts), -1, -1)

    def _joint(self, extra_places: int, extra_text: int) -> Tensor:
        places = (self.table > 0).float().transpose(1, 2)
        # what fills places up sees and is seen by all
        places = F.pad(places, (0, 0, 0, extra_places), value=1.0)
        text = self._takes_of_text(extra_text)
        parts = [text, places] if self.order == "text first" else [places, text]
        takes = torch.cat(parts, 1)
        is_place = torch.zeros(takes.shape[1], dtype=torch.bool)
        start = text.shape[1] if self.order == "text first" else 0
        is_place[start : start + places.shape[1]] = True
        allowed = torch.einsum("pis,pjs->pij", takes, takes) > 0
        allowed |= is_place[:, None] & is_place[None]
        return self._with_valid(allowed, 0 if self.order == "text first" else places.shape[1], takes.shape[1])

    def _cross(self) -> Tensor:
        takes = (self.table > 0).float().transpose(1, 2)
        allowed = torch.einsum("pis,pjs->pij", takes, self._takes_of_text(0)) > 0
        return allowed & self._valid[:, None]

    def _with_valid(self, allowed: Tensor, start: int, total: int) -> Tensor:
        """Nobody sees what fills a short text up, but it sees itself."""
        seen = torch.ones(len(allowed), total, dtype=torch.bool)
        seen[:, start : start + self._valid.shape[1]] = self._valid
        return (allowed & seen[:, None]) | torch.eye(total, dtype=torch.bool)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._mode = _RegionMode(self)
        self._mode.__enter__()

    def _enter_part(self, part: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.part = part

    def _leave_part(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.part = ""

    def _end(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    @torch.no_grad()
    def _encode(self) -> dict[tuple[int, int | None, str], EncodedText]:
        encoded: dict[str, EncodedText] = {}
        texts: dict[tuple[int, int | None, str], str] = {}
        for p, (prompt, own) in enumerate(zip(self.prompts, self.by_prompt)):
            texts[p, None, "prompt"], texts[p, None, "negative"] = prompt, self.negative
            for s, region in enumerate(own):
                texts[p, s, "prompt"], texts[p, s, "negative"] = region.prompt, region.negative
        for text in texts.values():
            if text not in encoded:
                encoded[text] = _encoded(self.pipe, text)
        return {key: encoded[text] for key, text in texts.items()}

    def _assemble(self) -> tuple[dict[str, Any], list[int], Tensor]:
        """(the pipeline's arguments, tokens of each text, [prompts,L] bool of those that are not filling)."""
        S = len(self.by_prompt[0])
        order: list[int | None] = [None, *range(S)]
        halves, P = ("prompt", "negative"), len(self.prompts)
        lengths = [
            max(len(self._encoded[p, s, half].states) for p in range(P) for half in halves) for s in order
        ]
        arguments: dict[str, Any] = {}
        valid = torch.ones(P, sum(lengths), dtype=torch.bool)
        family = type(self.transformer).__name__
        for half, prefix in zip(halves, ("", "negative_")):
            rows, pooled = [], []
            for p in range(P):
                parts, at = [], 0
                for s, length in zip(order, lengths):
                    text = self._encoded[p, s, half]
                    parts.append(F.pad(text.states, (0, 0, 0, length - len(text.states))))
                    valid[p, at + len(text.states) : at + length] = False
                    at += length
                rows.append(torch.cat(parts))
                own = self._encoded[p, None, half].pooled
                if own is not None:
                    pooled.append(own)
            arguments[f"{prefix}prompt_embeds"] = rows if "ZImage" in family else torch.stack(rows)
            if pooled:
                arguments[f"{prefix}pooled_prompt_embeds"] = torch.stack(pooled)
            if "Qwen" in family:
                full = torch.ones(P, sum(lengths), dtype=torch.long, device=rows[0].device)
                arguments[f"{prefix}prompt_embeds_mask"] = full
        return arguments, lengths, valid


class _RegionMode(TorchFunctionMode):
    """Puts the regions' mask before scaled_dot_product_attention."""

    def __init__(self, state: regional_transformer) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            call = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
            q, k = call["query"], call["key"]
            allowed = self.state.mask(q.shape[-2], k.shape[-2], q.shape[0], q.device)
            if allowed is not None:
                call["attn_mask"] = _both(call.get("attn_mask"), allowed)
                rest = {key: value for key, value in call.items() if key not in ("query", "key", "value")}
                return func(q, k, call["value"], **rest)
        return func(*args, **kwargs)


def _both(mask: Tensor | None, allowed: Tensor) -> Tensor:
    """The caller's mask and ours."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, -math.inf)


def _by_prompt(regions: Sequence[Any], prompts: int) -> list[list[Region]]:
    if not regions:
        raise MoleTypeError("regional_transformer", expected="at least one region", got="none")
    single = isinstance(regions[0], Region)
    nested = [list(regions)] * prompts if single else [list(own) for own in regions]
    if not all(own and all(isinstance(region, Region) for region in own) for own in nested):
        raise MoleTypeError(
            "regional_transformer",
            expected="regions, or one list of them for each prompt",
            got="something else",
        )
    counts = {len(own) for own in nested}
    if len(nested) != prompts or len(counts) > 1:
        raise MoleValueError(
            "regional_transformer",
            expected=f"as many regions for each of {prompts} prompts",
            got=f"{[len(own) for own in nested]}",
        )
    return nested


def _grid(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Places of a picture: latents by twos, in all of these transformers."""
    step = 2 * int(getattr(pipe, "vae_scale_factor", getattr(pipe, "vae_scale_factor_spatial", 8)))
    if height % step or width % step:
        raise MoleValueError(
            "regional_transformer",
            expected=f"height and width in multiples of {step}",
            got=f"{height} x {width}",
        )
    return height // step, width // step


def _encoded(pipe: Any, text: str) -> EncodedText:
    """A text by the pipeline's own encoders."""
    family = type(pipe.transformer).__name__
    if "Flux" in family:
        states, pooled, _ = pipe.encode_prompt(prompt=text, prompt_2=None)
        return EncodedText(states[0], pooled[0])
    if "SD3" in family:
        states, _, pooled, _ = pipe.encode_prompt(
            prompt=text, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
        )
        return EncodedText(states[0], pooled[0])
    if "Qwen" in family:
        states, mask = pipe.encode_prompt(prompt=text)
        return EncodedText(states[0] if mask is None else states[0][mask[0].bool()])
    states, _ = pipe.encode_prompt(prompt=text, do_classifier_free_guidance=False)
    if not isinstance(states, Tensor | list):
        raise MoleShapeError("regional_transformer", expected="states of a text", got=type(states).__name__)
    return EncodedText(states[0])
