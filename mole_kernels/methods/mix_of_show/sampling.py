"""Regionally controllable sampling of Stable Diffusion pipelines: each region of the picture with its own
prompt, and its own experts.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.attention.regional import regional_attention
from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.gates.block import BlockGate
from mole_kernels.gates.softmax import GivenGate
from mole_kernels.methods.mix_of_show.adapters import Weights, weighted
from mole_kernels.methods.mix_of_show.prompts import encode_prompts
from mole_kernels.methods.mix_of_show.region_weights import RegionWeights
from mole_kernels.methods.mix_of_show.regions import Region, shares, token_grid
from mole_kernels.methods.mix_of_show.tokens import Tokens
from mole_kernels.patching.handle import Handle

# two threads that open `regional` on one UNet at the same time
_OPENING = threading.Lock()


def region_gates(path: str, module: nn.Module, experts: Any) -> GivenGate:
    """For `mk.patch(pipe, experts, gates=region_gates)`: gates that `regional` fills with each region's
    weights.

    Args:
        path: The layer's path.
        module: The layer.
        experts: Its experts.

    Returns:
        A given gate that is open until `regional` fills it.
    """
    return GivenGate(len(experts.names), device=experts.scale.device)


class regional:
    """While it is open, `pipe` draws every region from its own prompt.

        regions = [Region("a red cat", box=(0, 0, 1, 0.5)), Region("a dog", box=(0, 0.5, 1, 1))]
        with regional(pipe, regions):
            image = pipe("two pets in a garden", height=512, width=512).images[0]

    h = Σ_s shares_s ⊙ attention(q, K_s, V_s) in every cross-attention layer: the global prompt where no
    region is, the mean of those that
    cover a place (overlap="mean", the paper's code) or the last of them (overlap="overwrite", its text).

    elsewhere expert name -> weight where no region is (1 for all by default)
    K and V of every region are computed once and kept while the texts, the weights and the gates stay
    (torch's version counters say
    so); the queries are not copied. Guidance, several prompts and several pictures per prompt are followed.
    Raises MoleTypeError, MoleValueError, MoleKeyError (an unknown expert), MoleStateError; then nothing was
    changed.
    Source: Mix-of-Show (Gu et al., NeurIPS 2023).

    Args:
        pipe: A StableDiffusion or StableDiffusionXL pipeline (anything whose `unet` has cross-attention
            processors).
        regions: The regions of the picture, or one list of regions for each prompt of the call.
        height: Height of the picture in pixels; None takes it from the latents.
        width: Width of the picture in pixels; None takes it from the latents.
        handle: A patch made with gates=region_gates: then Region.experts says how much of each expert a
            region gets.
        tokens: What `concept_tokens` gave: concept tokens in the regions' prompts are expanded, with a text
            for every cross-attention layer. The prompts of the call are `sample_concepts`' to expand.
        embeds: (positive, negative) texts of the regions instead of encoding them: [prompts, regions,
            L, C] each, or with one text for every cross-attention layer, [prompts, regions, layers, L,
            C], as extended textual inversion has them.
        backend: Of `regional_attention`.
        adapter: Weights by box for the features of the pipeline's T2I-Adapter, see `adapters.weigh` and
            `adapters.parse_adapter_weights`; for a MultiAdapter, as of sketch and pose, a list of such
            weights, one for each adapter.
        adapter_elsewhere: Weight of places outside all boxes; likewise one for each adapter.
        record: Keep where each region's words were read, for `attention`; costs a second product of
            queries and keys.
    """

    def __init__(
        self,
        pipe: Any,
        regions: Sequence[Region] | Sequence[Sequence[Region]],
        *,
        overlap: str = "mean",
        height: int | None = None,
        width: int | None = None,
        handle: Handle | None = None,
        elsewhere: Mapping[str, float] | None = None,
        tokens: Tokens | None = None,
        embeds: tuple[Tensor, Tensor] | None = None,
        backend: str = "auto",
        record: bool = False,
        adapter: Weights | Sequence[Weights] | None = None,
        adapter_elsewhere: float | Sequence[float] = 1.0,
    ) -> None:
        if not hasattr(getattr(pipe, "unet", None), "attn_processors"):
            raise MoleTypeError(
                "regional", expected="a pipeline with a UNet of cross-attention", got=type(pipe).__name__
            )
        if not regions:
            raise MoleValueError("regional", expected="at least one region", got="none")
        self.pipe, self.overlap, self.backend, self.handle = pipe, overlap, backend, handle
        self.by_prompt = _by_prompt(regions)
        shares(self.by_prompt[0], 1, 1, overlap=overlap)
        self.size = (height, width) if height and width else None
        self.experts = None if handle is None else RegionWeights(handle, self.by_prompt, elsewhere)
        self._adapters = [] if adapter is None else weighted(pipe, adapter, adapter_elsewhere)
        if tokens is not None and embeds is not None:
            raise MoleValueError("regional", expected="tokens or embeds", got="both")
        self.embeds, self.tokens = embeds, tokens
        self._read: dict[tuple[int, int], tuple[Tensor, int]] | None = {} if record else None
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self._before: dict[str, Any] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> regional:
        if self.embeds is None:
            self.embeds = self._encode()
        self._check_embeds()
        unet = self.pipe.unet
        with _OPENING:
            self._open(unet)
        return self

    def _open(self, unet: Any) -> None:
        """Install the processors and hooks; all or none."""
        self._before = dict(unet.attn_processors)
        if any(isinstance(processor, RegionalProcessor) for processor in self._before.values()):
            raise MoleStateError(
                "regional",
                "this UNet already draws by regions: another `with regional(…)` is open on it",
                hint="end it first; a second thread needs a pipeline of its own",
            )
        processors = dict(self._before)
        # down, mid, up, as embeddings are counted; diffusers names up_blocks before mid_block
        parts = ("down_blocks", "mid_block", "up_blocks")
        names = sorted(
            (name for name in processors if ".attn2." in f".{name}"),
            key=lambda name: parts.index(head) if (head := name.partition(".")[0]) in parts else len(parts),
        )
        processors |= {name: RegionalProcessor(self, place) for place, name in enumerate(names)}
        if not names:
            raise MoleStateError("regional", "the UNet has no cross-attention layers (attn2)")
        try:
            self._hooks.append(unet.register_forward_pre_hook(self._see, with_kwargs=True))
            for module, hook in self._adapters:
                self._hooks.append(module.register_forward_hook(hook))
            if self.experts is not None:
                self._hooks += self.experts.hook(self)
            unet.set_attn_processor(processors)
        # whatever stops it, the pipeline must draw as before
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.pipe.unet.set_attn_processor(dict(self._before))
        if self.experts is not None:
            self.experts.clear()

    def attention(self) -> Tensor:
        """[samples, regions, h, w]: how much of each region's words every place read, mean over calls, layers
        and heads.

        The share of the region there times the attention to its words, the first token (which takes what
        nothing else wants) left out.
        The finest grid's size; raises MoleStateError where nothing was recorded.
        """
        if not self._read:
            raise MoleStateError(
                "regional.attention",
                "nothing was recorded",
                hint="regional(…, record=True), and draw something",
            )
        size = max(self._read, key=lambda grid: grid[0] * grid[1])
        maps = [
            nn.functional.interpolate(total / count, size, mode="nearest")
            for total, count in self._read.values()
        ]
        return torch.stack(maps).mean(0)

    def note(self, q: Tensor, k: Tensor, table: Tensor, scale: float) -> None:
        """Add one layer's reading, where it is recorded.  q [B,H,T,D], k [B,1+S,H,L,D], table [B,1+S,T]"""
        if self._read is None or self.size is None:
            return
        words = (
            torch.softmax(torch.einsum("bhtd,bshld->bshtl", q.float(), k[:, 1:].float()) * scale, -1)[..., 1:]
            .sum(-1)
            .mean(2)
        )
        grid = token_grid(q.shape[2], *self.size)
        seen = (words * table[:, 1:]).unflatten(2, grid).detach().cpu()
        total, count = self._read.get(grid, (torch.zeros_like(seen), 0))
        self._read[grid] = (total + seen, count + 1)

    def table(self, B: int, T: int, device: torch.device) -> Tensor:
        """Shares [B,1+S,T] of a layer with T tokens, for the B samples the UNet sees."""
        key = (B, T, device)
        if key not in self._tables:
            if self.size is None:
                raise MoleStateError(
                    "regional", "the size of the picture is not known yet", hint="run the whole UNet"
                )
            grid = token_grid(T, *self.size)
            rows = [shares(regions, *grid, overlap=self.overlap) for regions in self.by_prompt]
            self._tables[key] = torch.stack([rows[p] for p, _ in self.samples(B)]).to(device)
        return self._tables[key]

    def samples(self, B: int) -> list[tuple[int, bool]]:
        """(prompt, unconditional) of each of the B samples: pictures of one prompt lie together, the
        unconditional half comes first.
        """
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False))
        P, parts = len(self.by_prompt), 2 if guided else 1
        # one list of regions serves every prompt of the call
        if B % (P * parts):
            raise MoleShapeError(
                "regional", expected=f"a batch that is a multiple of {P} prompts (times {parts})", got=B
            )
        each = B // (P * parts)
        return [(p, guided and part == 0) for part in range(parts) for p in range(P) for _ in range(each)]

    def texts(self, B: int, place: int) -> Tensor:
        """The regions' texts [B,S,L,C] for cross-attention layer `place`."""
        assert self.embeds is not None
        chosen = [self.embeds[1 if negative else 0][p] for p, negative in self.samples(B)]
        whole = torch.stack(chosen)
        return whole[:, :, place] if whole.dim() == 5 else whole

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        latents = args[0] if args else kwargs["sample"]
        size = (int(latents.shape[-2]), int(latents.shape[-1]))
        # shares are fractions of the picture, so the latents' size serves as well as that in pixels
        if self.size is None or (self.size != size and self.size[0] * size[1] != self.size[1] * size[0]):
            self.size = size
            self._tables.clear()

    @torch.no_grad()
    def _encode(self) -> tuple[Tensor, Tensor]:
        """(positive, negative), each [prompts, regions, (layers,) L, C], by the pipeline's own encoders."""
        halves = []
        for which in ("prompt", "negative"):
            texts = [getattr(region, which) for regions in self.by_prompt for region in regions]
            if self.tokens is not None:
                layered_states = encode_prompts(self.pipe, texts, self.tokens).states
                halves.append(layered_states.unflatten(0, (len(self.by_prompt), -1)))
                continue
            states = self.pipe.encode_prompt(
                prompt=texts,
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )[0]
            halves.append(states.unflatten(0, (len(self.by_prompt), -1)))
        return halves[0], halves[1]

    def _check_embeds(self) -> None:
        assert self.embeds is not None
        want = (len(self.by_prompt), len(self.by_prompt[0]))
        for name, tensor in zip(("positive", "negative"), self.embeds):
            if tensor.dim() not in (4, 5) or tuple(tensor.shape[:2]) != want:
                raise MoleShapeError(
                    "regional: embeds",
                    expected=f"{name} [{want[0]},{want[1]},(layers,)L,C]",
                    got=tuple(tensor.shape),
                )


def _by_prompt(regions: Sequence[Any]) -> list[list[Region]]:
    """One list of regions for each prompt, all of the same length."""
    nested = (
        [list(regions)]
        if isinstance(regions[0], Region)
        else [list(r) if isinstance(r, Sequence) else [] for r in regions]
    )
    counts = {len(own_regions) for own_regions in nested}
    if 0 in counts or any(not isinstance(r, Region) for own_regions in nested for r in own_regions):
        raise MoleTypeError(
            "regional", expected="a list of regions, or one such list for each prompt", got="something else"
        )
    if len(counts) > 1:
        raise MoleValueError(
            "regional",
            expected="as many regions for each prompt",
            got=f"{sorted(counts)}",
            hint="one call per prompt",
        )
    return nested


class RegionalProcessor:
    """A cross-attention processor of a diffusers UNet: its own text where no region is, the regions' texts
    elsewhere.
    """

    def __init__(self, state: regional, place: int) -> None:
        self.state, self.place = state, place
        # (key, (k, v), the text they were made of, so that no other tensor can come to have its address)
        self._kept: tuple[tuple[object, ...], tuple[Tensor, Tensor], Tensor] | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        if attention_mask is not None:
            raise MoleStateError(
                "regional",
                "a mask over the text tokens is not supported",
                hint="pass no encoder_attention_mask",
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        B, T = hidden_states.shape[:2]
        q = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        k, v = self._keys_values(attn, encoder_hidden_states, B)
        table = self.state.table(B, T, q.device)
        self.state.note(q, k, table, attn.scale)
        attended = regional_attention(q, k, v, table, scale=attn.scale, backend=self.state.backend)
        out = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2).to(residual.dtype)))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _keys_values(self, attn: Any, text: Tensor, B: int) -> tuple[Tensor, Tensor]:
        """k, v [B,1+S,H,L,D]: the call's own text first, then the regions'."""
        key = (
            *_versions(attn.to_k),
            *_versions(attn.to_v),
            id(text),
            text._version if not text.is_inference() else -1,
            B,
            text.dtype,
        )
        fixed = (
            _depends_on_text_alone(attn.to_k)
            and _depends_on_text_alone(attn.to_v)
            and not torch.is_grad_enabled()
        )
        # read once: another thread may replace it
        cached = self._kept
        if fixed and cached is not None and cached[0] == key:
            return cached[1]
        own = text[:, self.place] if text.dim() == 4 else text
        regions = self.state.texts(B, self.place).to(own)
        if regions.shape[2:] != own.shape[1:]:
            raise MoleShapeError(
                "regional",
                expected=f"region texts of the prompt's [L,C] = {list(own.shape[1:])}",
                got=list(regions.shape[2:]),
            )
        if attn.norm_cross:
            own = attn.norm_encoder_hidden_states(own)
            regions = attn.norm_encoder_hidden_states(regions.flatten(0, 1)).unflatten(0, regions.shape[:2])
        every = torch.cat([own[:, None], regions], 1)
        if self.state.experts is not None:
            self.state.experts.for_texts([attn.to_k, attn.to_v], self.state.samples(B), every.shape[1])
        flat = every.flatten(0, 1)
        k, v = (
            _heads(attn, proj(flat), norm).unflatten(0, (B, -1))
            for proj, norm in ((attn.to_k, attn.norm_k), (attn.to_v, None))
        )
        self._kept = (key, (k, v), text) if fixed else None
        return k, v


def _heads(attn: Any, x: Tensor, norm: Any) -> Tensor:
    """[B,T,H·D] -> [B,H,T,D]"""
    heads = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return heads if norm is None else norm(heads)


def _versions(module: nn.Module) -> tuple[object, ...]:
    tensors = [*module.parameters(), *module.buffers()]
    return tuple((id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


def _depends_on_text_alone(module: nn.Module) -> bool:
    """Whether the layer's output is settled by its tensors and its input; a gate that something outside sets
    is not.
    """
    return not any(isinstance(part, GivenGate | BlockGate) for part in module.modules())
