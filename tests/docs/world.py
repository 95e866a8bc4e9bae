"""What the documentation's code finds around it: tiny pipelines of the real classes, expert files, folders of
pictures.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mole_kernels as mk
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert
from mole_kernels.io.save import save_expert
from mole_kernels.modules.scan import mole_targets, scan, sizes
from mole_kernels.training.config import TrainConfig
from tests.docs.blocks import ROOT

WIDTH, STEPS = 32, 2
WORDS = ("man", "cat", "dog")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# an expert or a gate file that a page reads; what a page writes is made by its own code
FILE = re.compile(r"[\"']([\w/]+\.safetensors)[\"']")


def tokenizer() -> Any:
    """A CLIPTokenizer that spells every word in letters, except some that are one token."""
    from transformers import CLIPTokenizer

    from mole_kernels.demo.model import BOS, EOS

    letters = [chr(code) for code in range(33, 127)]
    vocab = {
        token: i for i, token in enumerate([BOS, EOS, *letters, *(letter + "</w>" for letter in letters)])
    }
    merges = ["#version: 0.2"]
    for word in WORDS:
        head, *tail = [*word[:-1], word[-1] + "</w>"]
        for symbol in tail:
            merges.append(f"{head} {symbol}")
            head += symbol
            vocab.setdefault(head, len(vocab))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("\n".join(merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def pipeline() -> Any:
    """Stable Diffusion in miniature, SD1.5's blocks: at most two steps and pictures of 128², whatever a page
    asks for.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    class Tiny(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["num_inference_steps"] = min(kwargs.get("num_inference_steps", STEPS), STEPS)
            kwargs |= {side: min(kwargs[side], 128) for side in ("height", "width") if side in kwargs}
            return super().__call__(*args, **kwargs)

    torch.manual_seed(0)
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=len(words),
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        mid_block_add_attention=False,
    )
    pipe = Tiny(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> Any:
    """FLUX's transformer in a pipeline that has nothing else."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    parts: dict[str, Any] = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer.eval(), **parts)


def flux_inputs() -> dict[str, torch.Tensor]:
    """Six places and three words, as the tiny transformer takes them."""
    parts = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 3, 24),
        "img_ids": torch.zeros(6, 3),
    }
    return parts | {
        "pooled_projections": torch.randn(1, 20),
        "timestep": torch.tensor([0.5]),
        "txt_ids": torch.zeros(3, 3),
    }


def expert(model: Any, seed: int = 0, rank: int = 4) -> Expert:
    """Random factors for every attention layer of a pipeline's denoiser, named as diffusers names them."""
    component = "unet" if hasattr(model, "unet") else "transformer"
    denoiser = getattr(model, component)
    layers = mole_targets(denoiser) if component == "unet" else scan(denoiser).layers
    shapes = {
        f"{component}.{path}": sizes(module) for path, module in layers.items() if path.endswith(ATTENTION)
    }
    generator = torch.Generator().manual_seed(seed)
    bank = ExpertBank.new(shapes, ["one"], rank, generator=generator)
    made = bank.experts["one"]
    for factors in made.layers.values():
        factors.up.copy_(0.1 * torch.randn(factors.up.shape, generator=generator))
    return made


def pictures(folder: str, count: int = 2, size: int = 512, caption: str = "a {}") -> None:
    """A folder of plain pictures with captions, as PictureFolder reads it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (size, size), (60 * i, 120, 200)).save(Path(folder) / f"{i}.png")
        (Path(folder) / f"{i}.txt").write_text(f"{caption.format(folder)}, {i}")


def write_files(text: str, model: Any) -> None:
    """An expert, or the gates of two experts, in every file that the text names."""
    for i, name in enumerate(dict.fromkeys(FILE.findall(text))):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if "gates" not in path.stem:
            save_expert(expert(model, i), path)
            continue
        with mk.patch(model, {"face": expert(model, 0), "hand": expert(model, 1)}, gates="mole") as handle:
            handle.save_gates(path)


def briefly(monkeypatch: Any) -> None:
    """No training run takes more than two steps."""
    check = TrainConfig.__post_init__

    def capped(self: TrainConfig) -> None:
        object.__setattr__(self, "steps", min(self.steps, STEPS))
        object.__setattr__(self, "warmup", 0)
        check(self)

    monkeypatch.setattr(TrainConfig, "__post_init__", capped)


def predictor(model: Any, folder: str) -> None:
    """DiffLoRA's parts, untrained, as `load_predictor` reads them."""
    from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
    from mole_kernels.methods.difflora.features import SmallImages
    from mole_kernels.methods.difflora.manifest import Manifest
    from mole_kernels.methods.difflora.predictor import Predictor
    from mole_kernels.methods.difflora.store import save_predictor

    manifest = Manifest.of_expert(expert(model, rank=2))
    autoencoder = LoRAAutoencoder(AutoencoderConfig(manifest.length, channels=(4, 4)))
    encoders = {"face": SmallImages(5, 4, 8), "image": SmallImages(6, 4, 16)}
    made = Predictor.new(
        manifest, autoencoder, encoders, dim=8, hidden=8, depth=1, width=12, heads=2, patch=4
    )
    save_predictor(folder, made.eval())


def concept(model: Any) -> Any:
    """A Mix-of-Show concept of two tokens with random weights."""
    from mole_kernels.methods.mix_of_show.concept import Concept
    from mole_kernels.methods.mix_of_show.tokens import cross_attentions

    count = len(cross_attentions(model.unet))
    rows = {f"<potter{i}>": {"text_encoder": torch.randn(count, WIDTH)} for i in (1, 2)}
    return Concept("<potter1> <potter2>", expert(model), rows)


def hub(folder: Path) -> Path:
    """The operator as a repository of the kernels package."""
    sys.path.insert(0, str(ROOT / "python/tools"))
    import hf_kernels

    return hf_kernels.assemble(folder)
