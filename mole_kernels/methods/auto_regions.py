"""Experts by region without boxes: gates found while drawing, from where the experts' words are read.

The first steps of a drawing run with all experts and record the attention to each expert's trigger words;
from these maps come soft masks, which are the gates of the other steps. No training, no second pass.

    m_e [h,w]  mean over layers of (attention to the words of e, mean over heads) ÷ its largest value
    m_e        smoothed by a Gaussian of σ places
    g_e        exp(m_e/τ) / (exp(b/τ) + Σ exp(m_f/τ)),  b the level below which a place is background

Source: attention as a map of words, Hertz et al., ICLR 2023 (Prompt-to-Prompt), Tang et al., ACL 2023
(DAAM); its use as gates of experts is this package's.
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

from mole_kernels.attention.grids import token_grid
from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError, MoleValueError, printable
from mole_kernels.gates.softmax import GivenGate
from mole_kernels.layers.linear import Gated
from mole_kernels.patching.handle import Handle


@dataclass(frozen=True)
class MaskSettings:
    """How maps become gates.

    Args:
        steps: Steps of a drawing that record.
        smooth: σ of the Gaussian in places of the finest grid; 0 for none.
        temperature: τ; small ones make the masks hard.
        background: b, in 0..1 of the largest attention: where no map is above it, no expert acts.
        outside: Gate of every expert on the background, beside its mask; 0 for none.
    """

    steps: int = 2
    smooth: float = 0.8
    temperature: float = 0.05
    background: float = 0.65
    outside: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.smooth < 0 or not self.temperature > 0:
            raise MoleValueError(
                "MaskSettings",
                expected="steps >= 1, smooth >= 0, temperature > 0",
                got=f"{self.steps}, {self.smooth}, {self.temperature}",
            )
        if not (math.isfinite(self.background) and math.isfinite(self.outside)):
            raise MoleValueError(
                "MaskSettings", expected="finite levels", got=f"{self.background}, {self.outside}"
            )


def found_gates(path: str, module: nn.Module, experts: Any) -> GivenGate:
    """For `mk.patch(pipe, experts, gates=found_gates)`: gates that `automatic_regions` fills.

    Args:
        path: The layer's path.
        module: The layer.
        experts: Its experts.

    Returns:
        A given gate that is closed until the regions are found.
    """
    return GivenGate(len(experts.names), device=experts.scale.device)


def soft_masks(maps: Tensor, settings: MaskSettings, present: Tensor | None = None) -> Tensor:
    """Gates [B,E,h,w] from attention maps [B,E,h,w].

    Args:
        maps: Attention to each expert's words; each is divided by its largest value.
        settings: See `MaskSettings`.
        present: [B,E] bool: whose words the prompt holds; the others get 0. None: all.
    """
    m = maps.float() / maps.float().amax((2, 3), keepdim=True).clamp_min(1e-12)
    if settings.smooth:
        m = _smoothed(m, settings.smooth)
        m = m / m.amax((2, 3), keepdim=True).clamp_min(1e-12)
    if present is not None:
        m = m.masked_fill(~present[:, :, None, None], -math.inf)
    level = torch.full_like(m[:, :1], settings.background)
    gates = torch.softmax(torch.cat([level, m], 1) / settings.temperature, 1)
    inside = gates[:, 1:] + settings.outside * gates[:, :1]
    return inside if present is None else inside * present[:, :, None, None]


class automatic_regions:
    """While it is open, every expert acts where its words are read.

        with mk.patch(pipe, {"cat": a, "dog": b}, gates=found_gates) as handle:
            words = {"cat": ["cat"], "dog": ["dog"]}
            with automatic_regions(pipe, handle, ["a cat and a dog"], words) as found:
                images = pipe(["a cat and a dog"]).images
            found.masks   # [pictures, experts, h, w]

    Keys and values of the text: a word of expert e takes e alone, every other token the mean of the experts.
    Layers that see neither places nor text (time embeddings) keep all experts. Gates are 1 again when it
    closes.

    Args:
        pipe: A Stable Diffusion 1, 2 or XL, Stable Diffusion 3 or FLUX pipeline: cross-attention of a UNet
            (attn2), or joint attention with text projections of its own (add_k_proj).
        handle: A patch made with gates=found_gates.
        prompts: The prompts of the call, in order.
        words: Expert -> the words that call it, as they stand in the prompts.
        settings: See `MaskSettings`.
        tokens: Concept tokens of the pipeline, which prompts and words may hold.

    Raises:
        MoleTypeError: A pipeline without such attention.
        MoleKeyError: An expert that the patch lacks.
        MoleValueError: A prompt that holds none of the words, or a word that the tokenizer cuts off.
        MoleStateError: A patch without such gates; a call with other prompts than were said.
    """

    def __init__(
        self,
        pipe: Any,
        handle: Handle,
        prompts: Sequence[str],
        words: Mapping[str, Sequence[str]],
        settings: MaskSettings | None = None,
        tokens: Any = None,
    ) -> None:
        self.pipe, self.handle, self.settings = pipe, handle, settings or MaskSettings()
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if not isinstance(denoiser, nn.Module):
            raise MoleTypeError(
                "automatic_regions",
                expected="a pipeline with a UNet or a transformer",
                got=type(pipe).__name__,
            )
        self.denoiser: nn.Module = denoiser
        self._attentions = {path: m for path, m in denoiser.named_modules() if _reads_text(path, m)}
        if not self._attentions:
            raise MoleTypeError(
                "automatic_regions",
                expected="attention to the text (attn2, or joint with add_k_proj)",
                got=type(denoiser).__name__,
            )
        self._gated = {
            path: m
            for path, m in handle.layers.items()
            if isinstance(m, Gated) and isinstance(m.gate, GivenGate)
        }
        if not self._gated:
            raise MoleStateError(
                "automatic_regions",
                "the patch has no gates to fill",
                hint="mk.patch(pipe, experts, gates=found_gates)",
            )
        for name in words:
            if name not in handle.names:
                raise MoleKeyError(
                    "automatic_regions", expected=f"experts among {', '.join(handle.names)}", got=repr(name)
                )
        self.names = handle.names
        # [prompts,E,L] of each tokenizer: which text tokens are words of which expert
        self._by_tokenizer = _spots(pipe, prompts, words, self.names, tokens)
        self._spots = torch.cat(self._by_tokenizer, 2)
        self.masks: Tensor | None = None
        self._maps: list[tuple[Tensor, tuple[int, int]]] = []
        self._hooks: list[Any] = []
        self._filled: dict[Any, tuple[Any, bool]] = {}
        self._calls, self._last, self._size, self._grid = 0, math.inf, (0, 0), (0, 0)

    def __enter__(self) -> automatic_regions:
        try:
            self._hooks.append(self.denoiser.register_forward_pre_hook(self._begin, with_kwargs=True))
            for module in self._attentions.values():
                self._hooks.append(module.register_forward_pre_hook(self._look, with_kwargs=True))
            for module in self._gated.values():
                self._hooks.append(module.register_forward_pre_hook(partial(self._fill, module)))
        # whatever stops it, the pipeline must draw as before
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._maps.clear()
        self._filled.clear()
        for module in self._gated.values():
            gate: Any = module.gate
            gate.set(torch.ones(1, 1, gate.num_experts, device=gate.given.device))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a step: which one it is, and after the last that records, the masks."""
        hidden = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        now = float(torch.as_tensor(time).flatten()[0])
        # a later noise level than before: another drawing
        if now > self._last:
            self._calls, self.masks = 0, None
            self._maps.clear()
            self._filled.clear()
        self._last = now
        if self._calls == self.settings.steps:
            self.masks = self._solve()
            self._filled.clear()
            self._maps.clear()
        self._calls += 1
        if hidden.dim() == 4:
            self._size = (int(hidden.shape[-2]), int(hidden.shape[-1]))
        elif (ids := kwargs.get("img_ids")) is not None:
            places = ids.reshape(-1, ids.shape[-1])[:, -2:].amax(0)
            self._size = (int(places[0]) + 1, int(places[1]) + 1)
        else:
            raise MoleTypeError(
                "automatic_regions", expected="latents [B,C,h,w] or img_ids", got=tuple(hidden.shape)
            )

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Attention of the places to the text in one layer, while it is recorded."""
        if self.masks is not None or self._calls > self.settings.steps:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if not isinstance(text, Tensor):
            return
        self._fit(text.shape[1])
        with torch.no_grad():
            own, spots = self._own(hidden.shape[0])
            q, k = _queries_keys(module, hidden[own], text[own])
            # the softmax over the text alone: words compete with one another for every place
            read = (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1).mean(1)
            by_expert = torch.einsum("bpl,bel->bep", read, spots.to(read))
        self._maps.append((by_expert, token_grid(by_expert.shape[2], *self._size)))

    def _fit(self, length: int) -> None:
        """Cut or fill up the last tokenizer's part, which pipelines pad to a length of the call."""
        if self._spots.shape[2] != length:
            *first, last = self._by_tokenizer
            rest = length - sum(part.shape[2] for part in first)
            last = F.pad(last[..., : max(rest, 0)], (0, max(0, rest - last.shape[2])))
            self._spots = torch.cat([*first, last], 2)[..., :length]

    def _solve(self) -> Tensor:
        """[pictures,E,h,w] gates on the finest grid that was recorded."""
        if not self._maps:
            raise MoleStateError("automatic_regions", "no attention to the text has run in the first steps")
        self._grid = max((grid for _, grid in self._maps), key=lambda grid: grid[0] * grid[1])
        layers = []
        for by_expert, grid in self._maps:
            layer = by_expert.unflatten(2, grid)
            layer = layer / layer.amax((2, 3), keepdim=True).clamp_min(1e-12)
            layers.append(F.interpolate(layer, self._grid, mode="bilinear"))
        maps = torch.stack(layers).mean(0)
        present = self._spots.any(2).repeat_interleave(len(maps) // len(self._spots), 0).to(maps.device)
        return soft_masks(maps, self.settings, present)

    def _fill(self, module: Any, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a layer runs: its gate [B,T,E], by what its tokens are; once for each drawing and shape."""
        x, masks = args[0], self.masks
        # a filled layer meets the same shape at every step
        if self._filled.get(module) == (x.shape, masks is None):
            return
        self._filled[module] = (x.shape, masks is None)
        experts = [self.names.index(name) for name in module.experts.names]
        if masks is None:
            module.gate.set(torch.ones(1, 1, len(experts), device=x.device))
            return
        B = x.shape[0]
        T = _places_out(layer, x) if isinstance(layer, nn.Conv2d) else x.shape[1] if x.dim() == 3 else 0
        places = math.prod(self._grid)
        L = self._spots.shape[2]
        if T == L and places != T:
            gate = self._of_text(B)
        elif L + places == T:
            gate = torch.cat([self._of_text(B).to(masks), self._of_places(B, places)], 1)
        elif T:
            gate = self._of_places(B, T)
        else:
            gate = torch.ones(1, 1, len(self.names))
        module.gate.set(gate[..., experts].to(x.device))

    def _of_places(self, B: int, T: int) -> Tensor:
        """[B,T,E] for a layer of T places."""
        assert self.masks is not None
        resized = F.interpolate(self.masks, token_grid(T, *self._size), mode="area")
        rows = resized.flatten(2).transpose(1, 2)
        return rows.repeat(B // len(rows), 1, 1)

    def _of_text(self, B: int) -> Tensor:
        """[B,L,E] for a layer of text tokens."""
        spots = self._spots.float()
        present = spots.amax(2, keepdim=True)
        shared = present / present.sum(1, keepdim=True).clamp_min(1)
        gates = torch.where(spots.sum(1, keepdim=True) > 0, spots, shared).transpose(1, 2)
        pictures = len(gates) if self.masks is None else len(self.masks)
        rows = gates.repeat_interleave(pictures // len(gates), 0)
        return rows.repeat(B // pictures, 1, 1)

    def _own(self, B: int) -> tuple[slice, Tensor]:
        """(samples with the prompts' own text, their words [n,E,L]): the second half under guidance."""
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False))
        n = B // 2 if guided else B
        if n % len(self._spots):
            raise MoleStateError(
                "automatic_regions", expected=f"pictures of {len(self._spots)} prompts", got=f"a batch of {n}"
            )
        return slice(B - n, B), self._spots.repeat_interleave(n // len(self._spots), 0)


def _reads_text(path: str, module: nn.Module) -> bool:
    joint = getattr(module, "add_k_proj", None) is not None and hasattr(module, "to_q")
    return joint or (path.endswith("attn2") and hasattr(module, "to_q") and hasattr(module, "to_k"))


def _queries_keys(module: Any, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of the places [B,H,P,D] and keys of the text [B,H,L,D], without rotary embeddings."""
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    joint = getattr(module, "add_k_proj", None) is not None
    q, k = module.to_q(hidden), (module.add_k_proj if joint else module.to_k)(text)
    q, k = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k))
    of_q, of_k = getattr(module, "norm_q", None), getattr(module, "norm_added_k" if joint else "norm_k", None)
    return (q if of_q is None else of_q(q)), (k if of_k is None else of_k(k))


def _places_out(layer: nn.Conv2d, x: Tensor) -> int:
    """Places that a convolution gives, which are fewer than it sees where it strides."""
    count = 1
    for axis, side in enumerate(x.shape[-2:]):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        # "same" or "valid" as a word
        around = int(layer.padding[axis]) if isinstance(layer.padding, tuple) else 0
        grown = reach if layer.padding == "same" else 2 * around
        count *= (side + grown - reach - 1) // layer.stride[axis] + 1
    return count


def _smoothed(maps: Tensor, sigma: float) -> Tensor:
    """A Gaussian over the last two dimensions, edges repeated."""
    reach = max(1, math.ceil(2 * sigma))
    line = torch.exp(-((torch.arange(-reach, reach + 1, device=maps.device) / sigma) ** 2) / 2)
    line = line / line.sum()
    flat = maps.flatten(0, 1)[:, None]
    flat = F.pad(flat, (reach, reach, reach, reach), mode="replicate")
    flat = F.conv2d(F.conv2d(flat, line[None, None, None]), line[None, None, :, None])
    return flat[:, 0].unflatten(0, maps.shape[:2])


def _spots(
    pipe: Any, prompts: Sequence[str], words: Mapping[str, Sequence[str]], names: Sequence[str], tokens: Any
) -> list[Tensor]:
    """[prompts,E,L] bool of each tokenizer whose text the denoiser reads: where each expert's words stand."""
    expanded = [text if tokens is None else tokens.expand(text)[0] for text in prompts]
    own = {
        name: [word if tokens is None else tokens.expand(word)[0] for word in texts]
        for name, texts in words.items()
    }
    parts = [_spots_of(tokenizer, expanded, own, names) for tokenizer in _tokenizers(pipe)]
    for b, text in enumerate(prompts):
        if not any(bool(part[b].any()) for part in parts):
            asked = [word for texts in words.values() for word in texts]
            raise MoleValueError(
                f"automatic_regions, prompt '{printable(text)}'",
                expected=f"one of the words {', '.join(map(printable, asked)) or 'none'}",
                got="none of them",
                hint=f"words must stand in the first {parts[-1].shape[2] - 2} tokens, as written there",
            )
    return parts


def _tokenizers(pipe: Any) -> list[Any]:
    """Those whose tokens are the text, in its order: CLIP of a UNet, T5 of FLUX, CLIP then T5 of SD3."""
    if getattr(pipe, "tokenizer_3", None) is not None:
        return [pipe.tokenizer, pipe.tokenizer_3]
    if hasattr(pipe, "transformer") and getattr(pipe, "tokenizer_2", None) is not None:
        return [pipe.tokenizer_2]
    return [pipe.tokenizer]


def _spots_of(
    tokenizer: Any, prompts: Sequence[str], words: Mapping[str, Sequence[str]], names: Sequence[str]
) -> Tensor:
    length = min(tokenizer.model_max_length, 512)
    ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)["input_ids"]
    spots = torch.zeros(len(prompts), len(names), len(ids[0]), dtype=torch.bool)
    for name, texts in words.items():
        for word in texts:
            piece = list(tokenizer(word, add_special_tokens=False)["input_ids"])
            for b, row in enumerate(ids):
                for at in range(len(row) - len(piece) + 1):
                    if piece and list(row[at : at + len(piece)]) == piece:
                        spots[b, names.index(name), at : at + len(piece)] = True
    return spots
