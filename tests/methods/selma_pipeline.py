"""A tiny StableDiffusionPipeline of random weights, and what the launched test runs in each of its
processes.
"""

import json
import sys
from pathlib import Path

import torch


def tiny_pipeline():
    """The demo's classes at their smallest: pictures of 16x16 in two steps."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    from mole_kernels.demo.model import TEXT_WIDTH, build_scheduler, build_text_encoder, build_tokenizer

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        **blocks,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )
    pipe = StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=build_text_encoder().eval(),
        tokenizer=build_tokenizer(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    from mole_kernels.methods.selma.pictures import PictureSettings, make_pictures
    from mole_kernels.methods.selma.project import Project

    torch.set_num_threads(1)
    root, made = Path(sys.argv[1]), []
    settings = PictureSettings(seed=7, batch=2, options={"num_inference_steps": 2})
    count = make_pictures(Project(root), "digits", tiny_pipeline(), settings, on_picture=made.append)
    assert count == len(made)
    rank = torch.distributed.get_rank()
    (root / f"rank{rank}.json").write_text(
        json.dumps({"made": made, "world": torch.distributed.get_world_size()})
    )
    torch.distributed.destroy_process_group()
