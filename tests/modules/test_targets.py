"""Which layers are found, under which paths, and why others are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm

from mole_kernels.errors import MoleTypeError
from mole_kernels.modules.scan import mole_targets, scan, sizes

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(("config", "count"), [(SD15, 192), (SDXL, 722)], ids=["sd15", "sdxl"])
def test_the_papers_layers(config, count):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    targets = mole_targets(unet)
    assert len(targets) == count
    assert not any("resnets" in path or "time_emb" in path for path in targets)
    kinds = {path.rpartition("attentions.")[2].split(".", 1)[1] for path in targets}
    per_block = {"attn1.to_q", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"}
    assert {"proj_in", "proj_out"} | {f"transformer_blocks.0.{name}" for name in per_block} <= kinds


def test_pipeline_components_become_prefixes(pipeline):
    found = scan(pipeline)
    assert set(found.components) == {"unet", "vae", "text_encoder"}
    assert all(path.split(".")[0] in found.components for path in found.layers)
    assert all(path.startswith("unet.") for path in mole_targets(pipeline))
    assert (
        found.layers["unet.mid_block.attentions.0.proj_in"] is pipeline.unet.mid_block.attentions[0].proj_in
    )
    assert (
        "vae.mid_block.attentions.0.to_q" not in found.layers
        and "vae.encoder.mid_block.attentions.0.to_q" in found.layers
    )


class _OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def _with_forward_replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _parametrised() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def _float8() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


class _Packed(torch.Tensor):
    pass


def _quantised() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer._parameters["weight"] = nn.Parameter(layer.weight.detach().as_subclass(_Packed))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _OwnForward(4, 4), "_OwnForward"),
        (_with_forward_replaced, "forward"),
        (_parametrised, "parametrised"),
        (lambda: weight_norm(nn.Linear(4, 4)), "not a plain parameter"),
        (_float8, "float8_e4m3fn"),
        (_quantised, "_Packed"),
        (lambda: nn.Conv2d(4, 4, 1, groups=2), "groups"),
    ],
    ids=[
        "subclass",
        "replaced-forward",
        "parametrised",
        "weight-norm",
        "float8",
        "tensor-subclass",
        "groups",
    ],
)
def test_what_would_not_be_exact_is_skipped_with_a_reason(make, reason):
    found = scan(nn.ModuleDict({"layer": make(), "plain": nn.Linear(4, 4)}))
    assert list(found.layers) == ["plain"]
    assert reason in found.skipped["layer"]


def test_owners_that_read_weights_themselves():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = scan(model)
    assert not found.layers
    assert set(found.skipped) == {"self_attn.out_proj", "linear1", "linear2"}


def test_convolutions_of_any_kernel_are_layers_over_patches():
    found = scan(
        nn.ModuleDict(
            {
                "conv": nn.Conv2d(4, 6, (3, 2), stride=2),
                "up": nn.ConvTranspose2d(4, 4, 3),
                "line": nn.Conv1d(4, 4, 3),
            }
        )
    )
    assert list(found.layers) == ["conv"] and sizes(found.layers["conv"]) == (6, 24)
    assert {"up", "line"} <= set(found.others)


def test_peft_layers_are_known_by_the_layer_they_wrap(unet):
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    found = scan(unet)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert found.layers[path] is unet.get_submodule(path).base_layer
    assert not any("lora_" in path or "base_layer" in path for path in found.layers)


def test_a_shared_module_counts_once():
    shared = nn.Linear(4, 4)
    found = scan(nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}))
    assert list(found.layers) == ["a"] and found.first == {"b.c": "a"}


def test_fused_attention_no_longer_runs_its_projections(unet, flux):
    unet.fuse_qkv_projections()
    attention = "mid_block.attentions.0.transformer_blocks.0."
    found = scan(unet)
    assert (
        "fused" in found.skipped[attention + "attn1.to_q"]
        and "fused" in found.skipped[attention + "attn2.to_k"]
    )
    # cross-attention fuses k and v only
    assert attention + "attn2.to_q" in found.layers
    unet.unfuse_qkv_projections()
    assert attention + "attn1.to_q" in scan(unet).layers

    flux.fuse_qkv_projections()
    skipped = scan(flux).skipped
    block, single = "transformer_blocks.0.attn.", "single_transformer_blocks.0.attn."
    assert {block + "to_q", block + "add_v_proj", single + "to_k"} <= set(skipped)
    flux.unfuse_qkv_projections()
    assert not scan(flux).skipped


def test_a_compiled_model_is_looked_into():
    model = torch.compile(nn.Sequential(nn.Linear(4, 4)))
    assert list(scan(model).layers) == ["0"]


def test_what_is_no_model():
    with pytest.raises(MoleTypeError, match=r"expected an nn\.Module or a diffusers pipeline, got str"):
        scan("unet")
