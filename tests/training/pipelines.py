"""Tiny pipelines of real diffusers classes with random weights: like Stable Diffusion 1.5, and like SDXL."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mole_kernels.demo.model import SCHEDULE, build_tokenizer

TOKENS = 5


def tiny_vae(scaling=0.5, shift=None):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def text_config(vocabulary, width=12, **options):
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **options,
    )


def tiny_unet(**options):
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(config | options))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def sd_pipeline(seed=0):
    torch.manual_seed(seed)
    words = build_tokenizer()
    return quiet(
        StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text_config(len(words))),
            tokenizer=words,
            unet=tiny_unet(),
            scheduler=DDIMScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl_pipeline(seed=0):
    torch.manual_seed(seed)
    one, two = build_tokenizer(), build_tokenizer()
    unet = tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        cross_attention_dim=20,
        use_linear_projection=True,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text_config(len(one), 12)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(len(two), 8, projection_dim=10)),
            tokenizer=one,
            tokenizer_2=two,
            unet=unet,
            scheduler=DDIMScheduler(**SCHEDULE),
        )
    )


def t5(width=12):
    """A tokenizer of five words and the letters, and an encoder of two layers."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words += [(f"\u2581{word}", -1.0) for word in ("zero", "one", "two", "three", "four")]
    words += [(letter, -3.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=6,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5TokenizerFast(vocab=words, extra_ids=0), T5EncoderModel(config)


def sd3_pipeline(seed=0):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    words = [build_tokenizer(), build_tokenizer()]
    encoders = [
        CLIPTextModelWithProjection(text_config(len(w), width, projection_dim=6))
        for w, width in zip(words, (12, 8))
    ]
    tokenizer, encoder = t5(24)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return quiet(
        StableDiffusion3Pipeline(
            vae=tiny_vae(shift=0.1),
            text_encoder=encoders[0],
            tokenizer=words[0],
            text_encoder_2=encoders[1],
            tokenizer_2=words[1],
            text_encoder_3=encoder,
            tokenizer_3=tokenizer,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


def flux_pipeline(seed=0):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    words = build_tokenizer()
    tokenizer, encoder = t5(12)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return quiet(
        FluxPipeline(
            vae=tiny_vae(shift=0.1),
            text_encoder=CLIPTextModel(text_config(len(words), 12)),
            tokenizer=words,
            text_encoder_2=encoder,
            tokenizer_2=tokenizer,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
    )
