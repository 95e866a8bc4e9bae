"""The models people use: in miniature with an input each, and full size from their configurations for the
meta device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(count: int, axes: int) -> Tensor:
    return torch.arange(count)[:, None].expand(count, axes).contiguous()


@dataclass(frozen=True)
class Model:
    """A diffusers or transformers class, a small configuration, and what to call it with."""

    id: str
    package: str
    cls: str
    config: dict[str, Any] = field(hash=False)
    call: Callable[[nn.Module], Any] = field(hash=False)
    config_cls: str = ""
    pipeline: str = ""

    def __str__(self) -> str:
        return self.id

    def make(self) -> nn.Module:
        """The model in float64, with random weights."""
        package = __import__(self.package)
        torch.manual_seed(0)
        if self.config_cls:
            model = getattr(package, self.cls)(getattr(package, self.config_cls)(**self.config))
        else:
            model = getattr(package, self.cls)(**self.config)
        return model.double().eval()

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        return self.answer(model)

    def answer(self, model: nn.Module) -> Tensor:
        """`run` with gradients."""
        out = self.call(model)
        for name in ("sample", "last_hidden_state", "logits"):
            if getattr(out, name, None) is not None:
                out = getattr(out, name)
                break
        return torch.stack(out) if isinstance(out, list) else out


UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
TEXT = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 40,
}
CLIP = TEXT | {"projection_dim": 10, "bos_token_id": 0, "eos_token_id": 1}
QWEN = TEXT | {"num_key_value_heads": 1, "max_position_embeddings": 64}
T5 = {
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 6,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
WORDS = torch.tensor([[3, 7, 2, 5, 1]])

DENOISERS = [
    Model(
        "sd15",
        "diffusers",
        "UNet2DConditionModel",
        UNET | {"down_block_types": (CROSS_DOWN, "DownBlock2D"), "up_block_types": ("UpBlock2D", CROSS_UP)},
        lambda m: m(randn(2, 4, 8, 6), torch.tensor([3, 3]), randn(2, 5, 12)),
        pipeline="StableDiffusionPipeline",
    ),
    Model(
        "sdxl",
        "diffusers",
        "UNet2DConditionModel",
        UNET
        | {
            "down_block_types": ("DownBlock2D", CROSS_DOWN),
            "up_block_types": (CROSS_UP, "UpBlock2D"),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
        },
        lambda m: m(
            randn(2, 4, 8, 6),
            torch.tensor([3, 3]),
            randn(2, 5, 12),
            added_cond_kwargs={"text_embeds": randn(2, 10), "time_ids": randn(2, 6)},
        ),
        pipeline="StableDiffusionXLPipeline",
    ),
    Model(
        "sd3",
        "diffusers",
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "in_channels": 4,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
        lambda m: m(randn(2, 4, 8, 8), randn(2, 5, 12), randn(2, 10), torch.tensor([3.0, 3.0])),
        pipeline="StableDiffusion3Pipeline",
    ),
    Model(
        "sd35-medium",
        "diffusers",
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "in_channels": 4,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda m: m(randn(2, 4, 8, 8), randn(2, 5, 12), randn(2, 10), torch.tensor([3.0, 3.0])),
        pipeline="StableDiffusion3Pipeline",
    ),
    Model(
        "flux1",
        "diffusers",
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        },
        lambda m: m(
            hidden_states=randn(2, 6, 4),
            encoder_hidden_states=randn(2, 3, 12),
            pooled_projections=randn(2, 10),
            timestep=torch.tensor([0.5, 0.5]).double(),
            img_ids=places(6, 3),
            txt_ids=torch.zeros(3, 3),
            guidance=torch.ones(2).double(),
        ),
        pipeline="FluxPipeline",
    ),
    Model(
        "flux2",
        "diffusers",
        "Flux2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda m: m(
            hidden_states=randn(2, 6, 4),
            encoder_hidden_states=randn(2, 3, 12),
            timestep=torch.tensor([0.5, 0.5]).double(),
            img_ids=places(6, 4),
            txt_ids=places(3, 4),
            guidance=torch.ones(2).double(),
        ),
        pipeline="Flux2Pipeline",
    ),
    Model(
        "qwen-image",
        "diffusers",
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda m: m(
            randn(2, 6, 16),
            randn(2, 5, 12),
            torch.ones(2, 5).bool(),
            torch.tensor([0.5, 0.5]).double(),
            img_shapes=[[(1, 2, 3)]] * 2,
        ),
        pipeline="QwenImagePipeline",
    ),
    Model(
        "z-image",
        "diffusers",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 64, 64],
        },
        lambda m: m(
            [randn(4, 1, 8, 8), randn(4, 1, 8, 8, seed=2)],
            torch.tensor([0.5, 0.5]).double(),
            [randn(5, 12), randn(7, 12)],
        ),
        pipeline="ZImagePipeline",
    ),
    Model(
        "wan",
        "diffusers",
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 8,
            "ffn_dim": 20,
            "num_layers": 2,
        },
        lambda m: m(randn(2, 4, 2, 4, 6), torch.tensor([3, 3]), randn(2, 5, 12)),
        pipeline="WanPipeline",
    ),
]

VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_heads": 2,
    "out_hidden_size": 12,
    "fullatt_block_indexes": [0],
}
ENCODERS = [
    Model("clip", "transformers", "CLIPTextModel", CLIP, lambda m: m(WORDS), "CLIPTextConfig"),
    Model(
        "clip-projected",
        "transformers",
        "CLIPTextModelWithProjection",
        CLIP,
        lambda m: m(WORDS).text_embeds,
        "CLIPTextConfig",
    ),
    Model("t5", "transformers", "T5EncoderModel", T5, lambda m: m(WORDS), "T5Config"),
    Model("umt5", "transformers", "UMT5EncoderModel", T5, lambda m: m(WORDS), "UMT5Config"),
    Model(
        "qwen2.5-vl",
        "transformers",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": QWEN
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}},
            "vision_config": VISION,
        },
        lambda m: m(WORDS),
        "Qwen2_5_VLConfig",
    ),
    Model(
        "qwen3", "transformers", "Qwen3ForCausalLM", QWEN | {"head_dim": 6}, lambda m: m(WORDS), "Qwen3Config"
    ),
]


def pipeline_of(case: Model) -> Any:
    """The pipeline class around the tiny denoiser and text encoders; what a patch does not look at is
    None.
    """
    import diffusers

    cls = getattr(diffusers, case.pipeline)
    encoders = {str(model): model for model in ENCODERS}
    texts = {
        "StableDiffusionXLPipeline": ("clip", "clip-projected"),
        "StableDiffusion3Pipeline": ("clip-projected", "clip-projected", "t5"),
        "FluxPipeline": ("clip", "t5"),
        "Flux2Pipeline": ("qwen3",),
        "QwenImagePipeline": ("qwen2.5-vl",),
        "ZImagePipeline": ("qwen3",),
        "WanPipeline": ("umt5",),
    }.get(case.pipeline, ("clip",))
    parts: dict[str, Any] = dict.fromkeys(
        name
        for name, p in inspect.signature(cls.__init__).parameters.items()
        if p.default is p.empty and name != "self"
    )
    parts |= {
        f"text_encoder_{i + 1}" if i else "text_encoder": encoders[name].make()
        for i, name in enumerate(texts)
    }
    parts["unet" if "unet" in parts else "transformer"] = case.make()
    if case.pipeline.startswith("StableDiffusion"):
        parts["scheduler"] = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return cls(
        **parts, **({"requires_safety_checker": False} if case.pipeline == "StableDiffusionPipeline" else {})
    )


# name in benchmarks/linear_shapes.json -> class and configuration; what is left out is the class's default
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "SD1.5-UNet": (
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": (320, 640, 1280, 1280),
        },
    ),
    "SDXL-UNet": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
            "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "SD3.5-large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 192,
        },
    ),
    "SD3.5-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.2-dev": ("Flux2Transformer2DModel", {}),
    "FLUX.2-klein-4B": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Wan2.1-T2V-1.3B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "Wan2.1-T2V-14B": ("WanTransformer3DModel", {}),
}

TRUNK = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ATTENTION = tuple(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
ADDED = tuple(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
FEED = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
# what a LoRA is usually trained on, and on how many layers that is
TARGETS: dict[str, tuple[tuple[str, ...], int]] = {
    "SD1.5-UNet": (ATTENTION, 128),
    "SDXL-UNet": (ATTENTION, 560),
    "SD3.5-large": ((*TRUNK, *ADDED), 303),
    "FLUX.1-dev": ((*TRUNK, *ADDED, *FEED), 342),
    "FLUX.2-dev": ((*TRUNK, "to_qkv_mlp_proj", "attn.to_out"), 128),
    "Qwen-Image": (TRUNK, 240),
    "Z-Image": (("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"), 136),
    "Wan2.1-T2V-1.3B": ((*ATTENTION, "ffn.net.0.proj", "ffn.net.2"), 300),
}


def full_size(name: str) -> nn.Module:
    """The whole model without its weights."""
    import diffusers

    cls, config = FULL[name]
    with torch.device("meta"):
        return getattr(diffusers, cls)(**config)
