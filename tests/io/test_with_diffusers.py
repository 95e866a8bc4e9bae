"""Files that diffusers and PEFT write are read with PEFT's own scales, and files of ours load into a
diffusers pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleKeyError, MoleTypeError
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import load_expert, save_expert

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 50,
    }
    return CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=1))


def pipeline() -> Any:
    parts = {
        "vae": None,
        "tokenizer": None,
        "scheduler": diffusers.DDIMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return diffusers.StableDiffusionPipeline(
        unet=unet(), text_encoder=text_encoder(), requires_safety_checker=False, **parts
    )


def peft_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


CONFIGS = {
    "plain": {"r": 2, "lora_alpha": 2},
    "alpha": {"r": 4, "lora_alpha": 2},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"attn1.to_q": 3},
        "alpha_pattern": {"to_k": 5, "attn2.to_v": 7},
    },
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("level", ["model", "pipeline"])
def test_scales_of_files_written_by_diffusers(config: str, level: str, tmp_path: Path):
    model = unet()
    made = peft.LoraConfig(
        **CONFIGS[config],
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in"],
        init_lora_weights=False,
    )
    model.add_adapter(made)
    if level == "model":
        model.save_lora_adapter(tmp_path)
    else:
        from diffusers.training_utils import _collate_lora_metadata

        weights = peft.get_peft_model_state_dict(model)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=weights, **_collate_lora_metadata({"unet": model})
        )
    expert = load_expert(tmp_path / "pytorch_lora_weights.safetensors")
    prefix = "" if level == "model" else "unet."
    layers = peft_layers(model)
    assert {f"{prefix}{path}" for path in layers} == set(expert.layers)
    for path, layer in layers.items():
        ours = expert.layers[f"{prefix}{path}"]
        assert ours.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert torch.equal(ours.down, layer.lora_A["default"].weight.flatten(1))
        assert torch.equal(ours.up, layer.lora_B["default"].weight.flatten(1))
        assert ours.conv == isinstance(layer, peft.tuners.lora.Conv2d)


def random_expert(pipe: Any, text: bool, mixed: bool) -> Expert:
    """An expert on the attention layers; `mixed` ranks and scales."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for component in ("unet", "text_encoder") if text else ("unet",):
        for path, module in getattr(pipe, component).named_modules():
            if isinstance(module, nn.Linear) and (".attentions." in path or component == "text_encoder"):
                n, k = module.weight.shape
                rank = 3 if mixed and "to_k" in path else 2
                down, up = (
                    torch.randn(rank, k, generator=generator),
                    torch.randn(n, rank, generator=generator),
                )
                scale = 4.0 if mixed and path.endswith(("attn1.to_q", "ff.net.2")) else 0.5
                made[f"{component}.{path}"] = LowRank(down, up, scale)
    return Expert(made)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet-and-text"])
def test_diffusers_loads_our_files(dialect: str, text: bool, tmp_path: Path):
    pipe = pipeline()
    # of a kohya file with unequal alphas, diffusers 0.42 gives every attention layer the most frequent one
    # (and PEFT warns)
    expert = random_expert(pipe, text, mixed=dialect == "diffusers")
    assert len(expert.scales()) == (2 if dialect == "diffusers" else 1)
    save_expert(expert, tmp_path / "x.safetensors", dialect)  # type: ignore[arg-type]
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    found = {
        f"{component}.{path}": layer
        for component in ("unet", "text_encoder")
        for path, layer in peft_layers(getattr(pipe, component)).items()
    }
    assert set(found) == set(expert.layers)
    for path, layer in found.items():
        (name,) = layer.lora_A
        ours = expert.layers[path]
        assert layer.scaling[name] == pytest.approx(ours.scale, rel=1e-6)
        assert torch.equal(layer.lora_A[name].weight, ours.down) and torch.equal(
            layer.lora_B[name].weight, ours.up
        )


FLUX = "lora_unet_double_blocks_0_img_attn_qkv"


def flux(alpha: float = 2.0) -> dict[str, torch.Tensor]:
    return {
        f"{FLUX}.lora_down.weight": torch.randn(4, 3072),
        f"{FLUX}.lora_up.weight": torch.randn(9216, 4),
        f"{FLUX}.alpha": torch.tensor(alpha),
    }


@pytest.mark.parametrize("given", ["class", "instance"])
def test_other_models_go_through_the_pipelines_converter(given: str):
    cls = diffusers.FluxPipeline
    tensors = flux()
    before = dict(tensors)
    expert = load_expert(tensors, pipeline=cls if given == "class" else object.__new__(cls))
    paths = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert sorted(expert.layers) == sorted(paths)
    fused = 0.5 * before[f"{FLUX}.lora_up.weight"] @ before[f"{FLUX}.lora_down.weight"]
    torch.testing.assert_close(torch.cat([expert.layers[path].delta() for path in paths]), fused)
    assert tensors == before


def test_converter_that_refuses_is_reported_with_the_file():
    with pytest.raises(MoleKeyError, match=r"FluxPipeline\.lora_state_dict (cannot read it|leaves out)"):
        load_expert(
            {
                "lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(1, 2),
                "lora_unet_double_blocks_0_x.lora_up.weight": torch.ones(2, 1),
            },
            pipeline=diffusers.FluxPipeline,
        )


def test_unsupported_keys_do_not_slip_through_the_converter():
    with pytest.raises(MoleKeyError, match=r"splits or does not know.*dora_scale"):
        load_expert(flux() | {f"{FLUX}.dora_scale": torch.ones(1)}, pipeline=diffusers.FluxPipeline)


def test_stable_diffusion_pipelines_keep_our_tables():
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 4), f"{name}.lora_up.weight": torch.ones(4, 1)}
    expert = load_expert(tensors, pipeline=diffusers.StableDiffusionXLPipeline)
    assert list(expert.layers) == ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]


@pytest.mark.parametrize("wrong", [3, dict, nn.Linear(1, 1)], ids=["int", "dict", "module"])
def test_pipeline_of_wrong_type(wrong: object):
    with pytest.raises(MoleTypeError, match="a diffusers pipeline"):
        load_expert(flux(), pipeline=wrong)
