"""Tiny pipelines of the real classes, and what to call each with for some of a batch's prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from tests.denoisers import DENOISERS, ENCODERS

PROMPTS, PICTURES = 2, 2
# layers that LoRA files of these families are trained on
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_qkv", "attn.qkv")
ENCODER = {str(model): model for model in ENCODERS}
BY_ID = {str(model): model for model in DENOISERS}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A pipeline class around a tiny denoiser.

    Args:
        id: Name of the test.
        make: The pipeline.
        latents: Shape of one latent as the pipeline takes it.
        call: Keyword arguments, given the rows of the prompts that take part.
    """

    id: str
    make: Callable[[], Any]
    latents: tuple[int, ...]
    call: Callable[[slice], dict[str, Any]]
    denoiser: str = "transformer"
    # inpainting draws other noise for a prompt alone than in a batch, without any adapter: there the oracle is the
    # whole batch with one adapter, of which each prompt's rows are taken
    by_itself: bool = True

    def __str__(self) -> str:
        return self.id

    def draw(self, pipe: Any, which: slice, pictures: int = PICTURES) -> Tensor:
        """Latents of the prompts `which`, with the noise that they have in the whole batch."""
        noise = randn(PROMPTS, PICTURES, *self.latents, seed=9)[which, :pictures].flatten(0, 1)
        names = inspect.signature(type(pipe).__call__).parameters
        count = next(n for n in names if n.startswith("num_") and n.endswith("_per_prompt"))
        given = {count: pictures, "output_type": "latent", "num_inference_steps": 2}
        if "latents" in names and "strength" not in names:
            given["latents"] = noise
        else:
            # the noise is made from the picture: a generator for each output
            numbers = torch.arange(PROMPTS * PICTURES).reshape(PROMPTS, PICTURES)[which, :pictures].flatten()
            given["generator"] = [torch.Generator().manual_seed(int(n)) for n in numbers]
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            out = pipe(**given | self.call(which))
        for name in ("images", "frames"):
            if (got := getattr(out, name, None)) is not None:
                return torch.stack(list(got)) if isinstance(got, list) else got
        return out[0]


def around(
    cls: str, denoiser: nn.Module, part: str = "transformer", scheduler: Any = None, **more: Any
) -> Any:
    """The pipeline with its denoiser and scheduler; what a call does not need is None."""
    import diffusers

    pipeline = getattr(diffusers, cls)
    parts: dict[str, Any] = dict.fromkeys(
        name
        for name, p in inspect.signature(pipeline.__init__).parameters.items()
        if p.default is p.empty and name != "self"
    )
    parts |= {part: denoiser, "scheduler": scheduler or diffusers.FlowMatchEulerDiscreteScheduler()}
    return pipeline(**parts | more)


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(steps_offset=1, clip_sample=False)


def tiny(model: str) -> nn.Module:
    return BY_ID[model].make().float()


def diffusers_model(cls: str, **config: Any) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, cls)(**config).eval()


def vae() -> nn.Module:
    return diffusers_model(
        "AutoencoderKL",
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


class Words:
    """A tokenizer: a number for each letter, as long as the pipeline asks for."""

    model_max_length = 8
    padding_side, pad_token, bos_token_id, eos_token_id, pad_token_id = "right", "", 0, 1, 1

    def __call__(self, text: str | list[str], **kw: Any) -> BatchEncoding:
        rows = [text] if isinstance(text, str) else text
        length = kw.get("max_length") or self.model_max_length
        if kw.get("padding") == "longest":
            length = min(length, max(map(len, rows), default=1) + 1)
        ids = [([2 + ord(c) % 37 for c in row[: length - 1]] + [1] * length)[:length] for row in rows]
        mask = [[int(i <= len(row)) for i in range(length)] for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    def batch_decode(self, *_: Any) -> list[str]:
        return [""]


# of one length: diffusers repeats the masks of some families in another order than their texts
PROMPT = ("anna at sea", "a dead tree")


def prompts(negative: bool = True, **given: Any) -> Callable[[slice], dict[str, Any]]:
    """The prompts as words, which the pipeline encodes and repeats itself."""

    def call(which: slice) -> dict[str, Any]:
        rows = list(PROMPT[which])
        return {"prompt": rows} | ({"negative_prompt": ["bad"] * len(rows)} if negative else {}) | given

    return call


def t5(width: int = 12) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**ENCODER["t5"].config | {"d_model": width})).eval()


def clip(projected: bool = False) -> nn.Module:
    return ENCODER["clip-projected" if projected else "clip"].make().float()


def texts(
    width: int, length: int = 5, negative: bool = True, **more: int
) -> Callable[[slice], dict[str, Any]]:
    """Embeddings of both prompts and their negatives; `more`: name -> width of pooled ones."""

    def call(which: slice) -> dict[str, Any]:
        given = {"prompt_embeds": randn(PROMPTS, length, width, seed=2)[which]}
        if negative:
            given["negative_prompt_embeds"] = randn(1, length, width, seed=3).expand(PROMPTS, -1, -1)[which]
        for name, size in more.items():
            given[name] = randn(PROMPTS, size, seed=4 + len(name))[which]
        return given

    return call


def joined(*calls: Callable[[slice], dict[str, Any]]) -> Callable[[slice], dict[str, Any]]:
    return lambda which: {name: value for call in calls for name, value in call(which).items()}


def always(**given: Any) -> Callable[[slice], dict[str, Any]]:
    return lambda which: given


def unet_config(**more: Any) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    } | more


SIZE = {"height": 16, "width": 16}


def sd(cls: str = "StableDiffusionPipeline", **more: Any) -> Any:
    parts = {"vae": vae(), "requires_safety_checker": False} | more
    return around(
        cls, diffusers_model("UNet2DConditionModel", **unet_config()), "unet", **{"scheduler": ddim()} | parts
    )


def pag() -> Any:
    return sd("StableDiffusionPAGPipeline", pag_applied_layers=["mid"])


def sdxl(cls: str = "StableDiffusionXLPipeline") -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=10
    )
    return around(
        cls,
        tiny("sdxl"),
        "unet",
        ddim(),
        vae=vae(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
    )


def controlled() -> Any:
    import diffusers

    pipe = sd()
    torch.manual_seed(5)
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(4, 8)
    ).eval()
    for parameter in control.parameters():
        nn.init.normal_(parameter, std=0.1)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=control, requires_safety_checker=False
    )


def pictures(*names: str, size: int = 16, **given: Any) -> Callable[[slice], dict[str, Any]]:
    """One picture (and a mask of its right half) for all prompts."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    made = {"image": randn(1, 3, size, size, seed=4).clamp(-1, 1), "mask_image": mask}
    return always(**{name: made[name] for name in names}, **given)


SDXL_TEXTS = joined(
    texts(12, pooled_prompt_embeds=10, negative_pooled_prompt_embeds=10), always(**SIZE, guidance_scale=4.0)
)
SMALL = {"height": 32, "width": 48}
VIDEO = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8}


def lists(which: slice) -> dict[str, Any]:
    rows = [randn(5 + i, 12, seed=2 + i) for i in range(PROMPTS)]
    return {"prompt_embeds": rows[which], "negative_prompt_embeds": [randn(4, 12, seed=7)] * len(rows[which])}


def qwen_texts(which: slice) -> dict[str, Any]:
    given = texts(12)(which)
    rows = torch.ones(len(given["prompt_embeds"]), 5).long()
    return given | {"prompt_embeds_mask": rows, "negative_prompt_embeds_mask": rows, "true_cfg_scale": 4.0}


def sd3(cls: str = "StableDiffusion3Pipeline") -> Any:
    words = {f"tokenizer{end}": Words() for end in ("", "_2", "_3")}
    encoders = {"text_encoder": clip(True), "text_encoder_2": clip(True), "text_encoder_3": t5(24)}
    denoiser = diffusers_model(
        "SD3Transformer2DModel",
        **BY_ID["sd3"].config | {"joint_attention_dim": 24, "pooled_projection_dim": 20},
    )
    return around(cls, denoiser, **words, **encoders)


def flux(cls: str = "FluxPipeline") -> Any:
    denoiser = diffusers_model(
        "FluxTransformer2DModel", **BY_ID["flux1"].config | {"pooled_projection_dim": 12}
    )
    return around(
        cls, denoiser, tokenizer=Words(), tokenizer_2=Words(), text_encoder=clip(), text_encoder_2=t5()
    )


def with_t5(cls: str, denoiser: nn.Module, **more: Any) -> Any:
    return around(cls, denoiser, tokenizer=Words(), text_encoder=t5(), **more)


def klein() -> nn.Module:
    return diffusers_model(
        "Flux2Transformer2DModel",
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def ltx() -> nn.Module:
    return diffusers_model(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=12,
    )


def aura_flow() -> nn.Module:
    return diffusers_model(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )


def chroma() -> nn.Module:
    return diffusers_model(
        "ChromaTransformer2DModel",
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )


GUIDED = {"guidance_scale": 4.0}
CASES = [
    Case("sd", sd, (4, 8, 8), joined(texts(12), always(**SIZE, **GUIDED)), "unet"),
    Case("sd-plain", sd, (4, 8, 8), joined(texts(12), always(**SIZE, guidance_scale=1.0)), "unet"),
    Case(
        "sd-encoding",
        lambda: sd(tokenizer=Words(), text_encoder=clip()),
        (4, 8, 8),
        prompts(**SIZE, **GUIDED),
        "unet",
    ),
    Case("sd-perturbed", pag, (4, 8, 8), joined(texts(12), always(**SIZE, guidance_scale=1.0)), "unet"),
    Case("sd-guided-perturbed", pag, (4, 8, 8), joined(texts(12), always(**SIZE, **GUIDED)), "unet"),
    Case("sdxl", sdxl, (4, 8, 8), SDXL_TEXTS, "unet"),
    Case(
        "sd-img2img",
        lambda: sd("StableDiffusionImg2ImgPipeline"),
        (4, 8, 8),
        joined(texts(12), pictures("image", strength=1.0, **GUIDED)),
        "unet",
    ),
    Case(
        "sd-inpaint",
        lambda: sd("StableDiffusionInpaintPipeline"),
        (4, 8, 8),
        joined(texts(12), pictures("image", "mask_image", strength=1.0, **SIZE, **GUIDED)),
        "unet",
        by_itself=False,
    ),
    Case(
        "sd-controlnet",
        controlled,
        (4, 8, 8),
        joined(texts(12), pictures("image", **SIZE, **GUIDED)),
        "unet",
    ),
    Case("sd3", sd3, (4, 8, 8), prompts(height=64, width=64, max_sequence_length=8, **GUIDED)),
    Case("flux", flux, (6, 4), prompts(negative=False, max_sequence_length=8, **SMALL)),
    Case("flux-two-calls", flux, (6, 4), prompts(max_sequence_length=8, true_cfg_scale=3.0, **SMALL)),
    Case(
        "qwen-two-calls",
        lambda: around("QwenImagePipeline", tiny("qwen-image")),
        (6, 16),
        joined(qwen_texts, always(**SMALL)),
    ),
    Case(
        "wan-two-calls", lambda: with_t5("WanPipeline", tiny("wan")), (4, 2, 2, 2), prompts(**VIDEO, **GUIDED)
    ),
    Case(
        "wan-plain",
        lambda: with_t5("WanPipeline", tiny("wan")),
        (4, 2, 2, 2),
        prompts(negative=False, guidance_scale=1.0, **VIDEO),
    ),
    Case(
        "z-image",
        lambda: around("ZImagePipeline", tiny("z-image")),
        (4, 8, 8),
        joined(lists, always(height=64, width=64, **GUIDED)),
    ),
    Case(
        "aura-flow",
        lambda: with_t5("AuraFlowPipeline", aura_flow()),
        (4, 8, 8),
        prompts(height=64, width=64, max_sequence_length=8),
    ),
    Case(
        "ltx",
        lambda: with_t5("LTXPipeline", ltx()),
        (4, 4),
        prompts(height=64, width=64, num_frames=1, max_sequence_length=8, guidance_scale=3.0),
    ),
    Case(
        "chroma-two-calls",
        lambda: with_t5("ChromaPipeline", chroma()),
        (6, 4),
        prompts(max_sequence_length=8, **SMALL),
    ),
]
