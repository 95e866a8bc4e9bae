"""Every family in miniature: a pipeline without text encoders and VAE, and a batch for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.denoisers import DENOISERS

B = 2
FLOW = {"shift": 3.0}
SHIFTED = {"use_dynamic_shifting": True}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int64)


@dataclass(frozen=True)
class Tiny:
    """A pipeline class, its denoiser's class and configuration, and one sample's entries of a batch."""

    id: str
    pipeline: str
    cls: str
    config: dict[str, Any] = field(hash=False)
    latents: tuple[int, ...]
    texts: dict[str, Tensor] = field(hash=False)
    scheduler: Callable[[], Any] = lambda: diffusers.FlowMatchEulerDiscreteScheduler(**FLOW)
    # numbers that a pipeline reads from the VAE that is not there
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.id

    def make(self, seed: int = 0) -> Any:
        cls = getattr(diffusers, self.pipeline)
        parts = dict.fromkeys(
            name
            for name, p in inspect.signature(cls.__init__).parameters.items()
            if p.default is p.empty and name != "self"
        )
        torch.manual_seed(seed)
        denoiser = getattr(diffusers, self.cls)(**self.config).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                # some begin at zero, where nothing that a LoRA does could be seen
                if parameter.dim() > 1 and not parameter.any():
                    parameter.normal_(std=0.2)
        pipe = cls(**(parts | {"transformer": denoiser, "scheduler": self.scheduler()}))
        for name, value in self.settings.items():
            setattr(pipe, name, value)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def batch(self, samples: int = B, seed: int = 0) -> dict[str, Tensor]:
        batch = {"latents": randn(samples, *self.latents, seed=seed)}
        for i, (name, text) in enumerate(self.texts.items()):
            floating = text.is_floating_point()
            shape = (samples, *text.shape)
            batch[name] = randn(*shape, seed=seed + i + 1) if floating else text.expand(shape).clone()
        return batch


def _of(id_: str) -> dict[str, Any]:
    return next(model.config for model in DENOISERS if model.id == id_)


def flow(**options: Any) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**options)


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


def embeds(tokens: int, width: int) -> dict[str, Tensor]:
    return {"prompt_embeds": randn(tokens, width)}


FAMILIES = [
    Tiny(
        "sd3",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        _of("sd3"),
        (4, 8, 8),
        embeds(5, 12) | {"pooled_prompt_embeds": randn(10)},
    ),
    Tiny(
        "flux1-dev",
        "FluxPipeline",
        "FluxTransformer2DModel",
        _of("flux1"),
        (1, 4, 8),
        embeds(3, 12) | {"pooled_prompt_embeds": randn(10)},
        flow(**SHIFTED),
    ),
    Tiny(
        "flux1-schnell",
        "FluxPipeline",
        "FluxTransformer2DModel",
        _of("flux1") | {"guidance_embeds": False},
        (1, 4, 8),
        embeds(3, 12) | {"pooled_prompt_embeds": randn(10)},
        flow(shift=1.0),
    ),
    Tiny(
        "flux2",
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        _of("flux2"),
        (4, 4, 4),
        embeds(3, 12),
        flow(**SHIFTED),
    ),
    Tiny(
        "qwen-image",
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        _of("qwen-image"),
        (4, 4, 8),
        embeds(5, 12) | {"prompt_embeds_mask": ones(5)},
        flow(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, **SHIFTED),
    ),
    Tiny(
        "z-image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        _of("z-image"),
        (4, 8, 8),
        embeds(7, 12) | {"prompt_embeds_mask": torch.tensor([1, 1, 1, 1, 1, 0, 0])},
    ),
    Tiny("wan", "WanPipeline", "WanTransformer3DModel", _of("wan"), (4, 2, 4, 6), embeds(5, 12), unipc),
    Tiny(
        "skyreels-v2",
        "SkyReelsV2Pipeline",
        "SkyReelsV2Transformer3DModel",
        _of("wan"),
        (4, 2, 4, 6),
        embeds(5, 12),
        unipc,
    ),
    Tiny(
        "lumina2",
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 4,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 16, 16),
            "cap_feat_dim": 12,
        },
        (4, 4, 6),
        embeds(5, 12) | {"prompt_attention_mask": ones(5)},
        flow(shift=6.0),
    ),
    Tiny(
        "chroma",
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
            "approximator_num_channels": 16,
        },
        (1, 4, 8),
        embeds(5, 12) | {"prompt_attention_mask": ones(5).bool()},
        flow(shift=1.0),
    ),
    Tiny(
        "sana",
        "SanaPipeline",
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 12,
            "sample_size": 4,
        },
        (4, 4, 4),
        embeds(5, 12) | {"prompt_attention_mask": ones(5)},
    ),
    Tiny(
        "auraflow",
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pos_embed_max_size": 64,
        },
        (4, 4, 6),
        embeds(5, 12) | {"prompt_attention_mask": ones(5)},
        flow(shift=1.73),
    ),
    Tiny(
        "cogview4",
        "CogView4Pipeline",
        "CogView4Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        (4, 4, 6),
        embeds(5, 12),
        flow(base_shift=0.25, max_shift=0.75, time_shift_type="linear", **SHIFTED),
    ),
    Tiny(
        "ltx-video",
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
        },
        (8, 2, 3, 4),
        embeds(5, 12) | {"prompt_attention_mask": ones(5)},
        flow(**SHIFTED),
    ),
    Tiny(
        "hunyuan-video",
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "guidance_embeds": True,
            "text_embed_dim": 12,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        (4, 2, 4, 4),
        embeds(5, 12) | {"pooled_prompt_embeds": randn(8), "prompt_attention_mask": ones(5)},
        flow(shift=7.0),
    ),
    Tiny(
        "mochi",
        "MochiPipeline",
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 12,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 16,
        },
        (12, 2, 4, 4),
        embeds(5, 16) | {"prompt_attention_mask": ones(5).bool()},
        flow(shift=1.0),
    ),
    Tiny(
        "cogvideox",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 4,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 9,
            "max_text_seq_length": 5,
            "use_rotary_positional_embeddings": True,
        },
        (2, 4, 4, 4),
        embeds(5, 12),
        lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    ),
    Tiny(
        "ernie-image",
        "ErnieImagePipeline",
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 12,
            "rope_axes_dim": (4, 4, 4),
        },
        (8, 4, 6),
        embeds(5, 12) | {"prompt_embeds_mask": torch.tensor([1, 1, 1, 1, 0])},
        flow(shift=4.0),
    ),
    Tiny(
        "krea2",
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 12,
            "num_text_layers": 2,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 4, 4),
        },
        (4, 4, 8),
        {"prompt_embeds": randn(5, 2, 12), "prompt_embeds_mask": ones(5).bool()},
        flow(**SHIFTED),
    ),
]
