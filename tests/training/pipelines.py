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


def tiny_vae(scaling=0.5):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=scaling,
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
