"""A tiny StableDiffusionPipeline of real diffusers and transformers classes, and its weights in safetensors
files.

Pictures are 24x72, latents 6x18 with 4 channels, captions five tokens long. The weights are kept in half
precision and computed in
single precision.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mole_kernels.demo.data import BLANK, HEIGHT, SLOTS, WIDTH, WORDS
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

# a diffusers StableDiffusionPipeline; its components are no attributes that a type checker knows
Pipeline = Any
ASSETS = Path(__file__).parent / "assets"
# two experts and their gates in one file of ours
MIXTURE = ASSETS / "mixture.safetensors"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CAPTION_TOKENS = SLOTS + 2
TEXT_WIDTH = 64
LATENT_CHANNELS, FACTOR = 4, 4
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PARTS = ("unet", "text_encoder", "vae")


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer that knows the digits' names and "blank", each one token, spelled together from its
    letters left to right.
    """
    from transformers import CLIPTokenizer

    vocab: dict[str, int] = {BOS: 0, EOS: 1}
    merges = ["#version: 0.2"]
    for word in (*WORDS, BLANK):
        symbols = [*word[:-1], word[-1] + "</w>"]
        head = symbols[0]
        vocab.setdefault(head, len(vocab))
        for symbol in symbols[1:]:
            merges.append(f"{head} {symbol}")
            head += symbol
            vocab.setdefault(symbol, len(vocab))
            vocab.setdefault(head, len(vocab))
    # through files, since the constructor's arguments changed between transformers 4 and 5
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("\n".join(merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=CAPTION_TOKENS)


def build_text_encoder() -> CLIPTextModel:
    """Two layers of width 64 over the own vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Two levels of 32 and 64 channels with cross-attention everywhere: seven transformers, 84 adaptable
    layers.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=(HEIGHT // FACTOR, WIDTH // FACTOR),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        # diffusers' name; it is the number of heads
        attention_head_dim=2,
    )


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """A small convolutional autoencoder, four pixels to a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=scaling_factor,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM on Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def load_pipeline(assets: Path | str = ASSETS) -> Pipeline:
    """The shipped base as a frozen StableDiffusionPipeline in eval mode, float32, on the CPU."""
    from diffusers import StableDiffusionPipeline

    vae = build_vae(read_facts(assets)["scaling_factor"])
    parts: dict[str, Any] = {"unet": build_unet(), "text_encoder": build_text_encoder(), "vae": vae}
    for name, module in parts.items():
        load_weights(module, Path(assets) / f"{name}.safetensors")
        module.requires_grad_(False).eval()
    pipe: Pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=build_tokenizer(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_weights(module: nn.Module, path: Path | str) -> None:
    """Write a module's state in half precision; complete or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_save({name: tensor.detach().half() for name, tensor in module.state_dict().items()}, path)


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Read what save_weights wrote, into the module's own dtype; every key must match."""
    module.load_state_dict(read_tensors(path)[0])


def read_facts(assets: Path | str = ASSETS) -> dict:
    """facts.json beside the weights: the scaling factor and how the weights were made."""
    return json.loads((Path(assets) / "facts.json").read_text())


def write_facts(facts: dict, assets: Path | str) -> None:
    """Write facts.json."""
    Path(assets).mkdir(parents=True, exist_ok=True)
    (Path(assets) / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
