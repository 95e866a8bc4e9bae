"""Every dialect leads to the same layers, the same factors and the right scale; diffusers' own converters
agree.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleTypeError, MoleValueError
from mole_kernels.experts.lowrank import Expert, LowRank, flatten
from mole_kernels.files.reader import read_tensors
from mole_kernels.io import load_expert, read_header, save_expert
from mole_kernels.io.dialects import ldm
from mole_kernels.io.dialects.paths import unflatten

Layers = dict[str, tuple[int, int, bool]]
QUERY = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
OUT = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
DOWN, UP = torch.arange(10.0).reshape(2, 5), torch.arange(8.0).reshape(4, 2)


def processor(path: str) -> str:
    """diffusers before PEFT: the factors hung on the attention processor."""
    head, _, last = path.removesuffix(".0").rpartition(".")
    if "text" in path:
        return f"{head}.{last.replace('q_proj', 'to_q')}_lora"
    return f"{head}.processor.{last}_lora"


# spelling of a module -> (its down key, its up key)
SPELLINGS = {
    "peft": lambda p: (f"{p}.lora_A.weight", f"{p}.lora_B.weight"),
    "peft-adapter-name": lambda p: (f"{p}.lora_A.default_0.weight", f"{p}.lora_B.default_0.weight"),
    "peft-wrapped": lambda p: (f"base_model.model.{p}.lora_A.weight", f"base_model.model.{p}.lora_B.weight"),
    "diffusers-lora": lambda p: (f"{p}.lora.down.weight", f"{p}.lora.up.weight"),
    "diffusers-linear-layer": lambda p: (
        f"{p}.lora_linear_layer.down.weight",
        f"{p}.lora_linear_layer.up.weight",
    ),
    "diffusers-processor": lambda p: (f"{processor(p)}.down.weight", f"{processor(p)}.up.weight"),
    "kohya": lambda p: (f"{kohya(p)}.lora_down.weight", f"{kohya(p)}.lora_up.weight"),
    "mix-of-show-main": lambda p: (f"{p}.lora_down.weight", f"{p}.lora_up.weight"),
    "mix-of-show-research": lambda p: (f"{p}_lora.down.weight", f"{p}_lora.up.weight"),
}
DIALECT = {"kohya": "kohya", "mix-of-show-main": "mix_of_show", "mix-of-show-research": "mix_of_show"}


def kohya(path: str) -> str:
    component, _, rest = path.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + flatten(rest)


@pytest.mark.parametrize("path", [QUERY, OUT, TEXT])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_names_the_layer(spelling: str, path: str):
    down, up = SPELLINGS[spelling](path)
    expert = load_expert({up: UP, down: DOWN})
    assert list(expert.layers) == [path]
    assert torch.equal(expert.layers[path].down, DOWN)
    assert torch.equal(expert.layers[path].up, UP)
    assert expert.layers[path].scale == 1.0
    assert expert.dialect == DIALECT.get(spelling, "diffusers")


@pytest.mark.parametrize("prefix", ["", "unet.", "transformer.", "text_encoder.", "text_encoder_2."])
def test_component_prefixes_stay(prefix: str):
    assert list(
        load_expert({f"{prefix}a.b.lora_A.weight": DOWN, f"{prefix}a.b.lora_B.weight": UP}).layers
    ) == [f"{prefix}a.b"]


def test_kohya_text_encoders():
    names = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    for prefix, component in names.items():
        key = f"{prefix}text_model_encoder_layers_11_mlp_fc1"
        expert = load_expert({f"{key}.lora_down.weight": DOWN, f"{key}.lora_up.weight": UP})
        assert list(expert.layers) == [f"{component}.text_model.encoder.layers.11.mlp.fc1"]


def test_lycoris_prefix_is_the_modules_flat_name():
    name = "lycoris_down_blocks_0_attentions_1_proj_in"
    (path,) = load_expert(
        {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": UP, f"{name}.alpha": torch.tensor(1.0)}
    ).layers
    assert path == "down_blocks.0.attentions.1.proj_in"


def test_unknown_flat_name_stays_flat():
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    expert = load_expert({f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": UP})
    assert list(expert.layers) == ["unet.double_blocks_0_img_attn_qkv"]


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.tensor(0.5).half(),
        torch.tensor(0.5).to(torch.float8_e5m2),
        0.5,
    ],
)
def test_alpha_key_is_alpha_over_rank(alpha: Tensor | float):
    for name in (kohya(QUERY), QUERY):
        expert = load_expert(
            {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": UP, f"{name}.alpha": alpha}
        )
        assert expert.layers[QUERY].scale == 0.25


def test_mix_of_show_alpha_is_the_scale_itself():
    keys = {f"{QUERY}.lora_down.weight": DOWN, f"{QUERY}.lora_up.weight": UP}
    assert load_expert(keys).layers[QUERY].scale == 1.0
    assert load_expert(keys, alpha=0.7).layers[QUERY].scale == 0.7


METADATA = {
    "plain": ({"r": 2, "lora_alpha": 8}, 4.0),
    "no-alpha": ({"r": 2}, 1.0),
    "rslora": ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(2)),
    "alpha-pattern-full": ({"lora_alpha": 8, "alpha_pattern": {f"^{QUERY.removeprefix('unet.')}": 3}}, 1.5),
    "alpha-pattern-ending": ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}, 1.5),
    "alpha-pattern-first-wins": ({"lora_alpha": 8, "alpha_pattern": {"to_q": 5, "attn1.to_q": 3}}, 2.5),
    "alpha-pattern-other": ({"lora_alpha": 8, "alpha_pattern": {"^to_q": 3, "o_q": 3, "to_k": 3}}, 4.0),
    "alpha-pattern-escaped": ({"lora_alpha": 8, "alpha_pattern": {"attn1\\.to_q$": 3}}, 1.5),
    "rank-pattern": ({"r": 64, "lora_alpha": 8, "rank_pattern": {"to_q": 2}}, 4.0),
}


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("case", METADATA)
def test_peft_metadata_give_the_scale(case: str, prefix: str, tmp_path: Path):
    fields, scale = METADATA[case]
    path = QUERY if prefix else QUERY.removeprefix("unet.")
    text = json.dumps({f"{prefix}{key}": value for key, value in fields.items()})
    save_file(
        {f"{path}.lora_A.weight": DOWN, f"{path}.lora_B.weight": UP},
        tmp_path / "x.safetensors",
        {"lora_adapter_metadata": text},
    )
    assert load_expert(tmp_path / "x.safetensors").layers[path].scale == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize("four", ["both", "down"])
def test_1x1_convolutions_are_matrices_that_remember(four: str, tmp_path: Path):
    down, up = DOWN[:, :, None, None], UP[:, :, None, None] if four == "both" else UP
    expert = load_expert({f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up})
    layer = expert.layers[QUERY]
    assert layer.conv and torch.equal(layer.down, DOWN) and torch.equal(layer.up, UP)
    save_expert(expert, tmp_path / "x.safetensors")
    assert {len(entry.shape) for entry in read_header(tmp_path / "x.safetensors").entries.values()} == {4}


def whole(layers: Layers, rank: int = 1) -> Expert:
    """An expert on all these layers, every number its own."""
    made = {}
    for i, (path, (n, k, conv)) in enumerate(layers.items()):
        made[path] = LowRank(
            torch.full((rank, k), float(i)),
            torch.full((n, rank), float(i)),
            scale=0.5 if i % 3 else 2.0,
            conv=conv,
        )
    return Expert(made)


def same(found: Expert, expected: Expert) -> None:
    assert set(found.layers) == set(expected.layers)
    for path, layer in expected.layers.items():
        other = found.layers[path]
        # kohya's files hold one alpha: the rest of a scale lies in B, here a power of two
        assert torch.equal(other.down, layer.down) and other.conv == layer.conv, path
        assert torch.equal(other.scale * other.up, layer.scale * layer.up), path


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_whole_model_round_trip(dialect: str, layers: Layers, tmp_path: Path):
    expert = whole(layers)
    save_expert(expert, tmp_path / "x.safetensors", dialect)  # type: ignore[arg-type]
    found = load_expert(tmp_path / "x.safetensors")
    same(found, expert)
    assert found.dialect == dialect


def test_sdxl_in_kohya_has_ldm_names_and_sd15_has_not(layers: Layers, tmp_path: Path):
    save_expert(whole(layers), tmp_path / "x.safetensors", "kohya")
    keys = [key for key in read_header(tmp_path / "x.safetensors").entries if key.startswith("lora_unet_")]
    sdxl = any(path.startswith("text_encoder_2.") for path in layers)
    assert len(keys) == 3 * (722 if sdxl else 192)
    assert (
        all(
            key.startswith(("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks"))
            for key in keys
        )
        == sdxl
    )
    assert any("input_blocks_4_1_transformer_blocks_0_attn1_to_q" in key for key in keys) == sdxl
    save_expert(whole(layers), tmp_path / "y.safetensors", "kohya", sdxl=False)
    assert not any("_blocks_4_1_" in key for key in read_header(tmp_path / "y.safetensors").entries)
    same(load_expert(tmp_path / "y.safetensors"), whole(layers))


def converted(
    tensors: dict[str, Tensor], sdxl: bool, unet: nn.Module
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What diffusers makes of these keys, in PEFT's names."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    cls = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    state, alphas = cls.lora_state_dict(dict(tensors), unet_config=unet.config)
    text = {key: tensor for key, tensor in state.items() if not key.startswith("unet.")}
    return convert_unet_state_dict_to_peft(
        {k: t for k, t in state.items() if k.startswith("unet.")}
    ) | convert_state_dict_to_peft(text), alphas


def test_diffusers_reads_our_kohya_files_as_we_do(
    layers: Layers, skeletons: dict[str, dict[str, nn.Module]], tmp_path: Path
):
    sdxl = any(path.startswith("text_encoder_2.") for path in layers)
    expert = whole(layers)
    save_expert(expert, tmp_path / "x.safetensors", "kohya")
    tensors, _ = read_tensors(tmp_path / "x.safetensors")
    found, alphas = converted(tensors, sdxl, skeletons["sdxl" if sdxl else "sd15"]["unet"])
    named = {
        key.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B").removesuffix(".weight"): t
        for key, t in found.items()
    }
    assert {key.rpartition(".lora_")[0] for key in named} == set(expert.layers)
    # one alpha for all layers of a component
    by_component: dict[str, set[float]] = {}
    for key, alpha in alphas.items():
        by_component.setdefault(key.partition(".")[0], set()).add(alpha)
    assert len(alphas) == len(expert.layers)
    for path, layer in expert.layers.items():
        (alpha,) = by_component[path.partition(".")[0]]
        down, up = named[f"{path}.lora_A"].flatten(1), named[f"{path}.lora_B"].flatten(1)
        assert torch.equal(down, layer.down)
        assert torch.equal(alpha / layer.rank * up, layer.scale * layer.up)


def test_ldm_table_covers_every_module_of_sdxl(skeletons: dict[str, dict[str, nn.Module]]):
    """There and back for every layer; where diffusers has a converter for the name, it says the same."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    unet = skeletons["sdxl"]["unet"]
    kinds = (nn.Linear, nn.Conv2d)
    flats = [
        flatten(path)
        for path, module in unet.named_modules()
        if isinstance(module, kinds) and "samplers" not in path
    ]
    assert len(flats) > 780
    for flat in flats:
        assert ldm.to_diffusers(ldm.to_ldm(flat)) == flat
    blocks = [flat for flat in flats if "blocks" in flat or "mid_block" in flat]
    assert all(ldm.is_ldm(ldm.to_ldm(flat)) for flat in blocks)
    theirs = _maybe_map_sgm_blocks_to_diffusers(
        {f"lora_unet_{ldm.to_ldm(flat)}.x": flat for flat in blocks}, unet.config
    )
    inner = {back: there for there, back in ldm.RESNET.items()}
    for name, flat in theirs.items():
        name = name.removeprefix("lora_unet_").removesuffix(".x").replace("input_blocks", "down_blocks")
        name = name.replace("output_blocks", "up_blocks").replace("middle_block", "mid_block")
        ours = flat
        for there, back in inner.items():
            ours = ours.replace(there, back) if ours.endswith(there) and "resnets" in ours else ours
        assert name == ours


LDM_NAMES = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    "input_blocks_5_0_out_layers_3": "down_blocks_1_resnets_1_conv2",
    "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
    "output_blocks_3_0_skip_connection": "up_blocks_1_resnets_0_conv_shortcut",
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_2_1_transformer_blocks_9_norm1": "up_blocks_0_attentions_2_transformer_blocks_9_norm1",
    "input_blocks_99_1_x": "input_blocks_99_1_x",
}


@pytest.mark.parametrize("name", LDM_NAMES)
def test_ldm_names(name: str):
    assert ldm.to_diffusers(name) == LDM_NAMES[name]
    if name.endswith(("_op", "_conv", "_x")):
        return
    assert ldm.to_ldm(LDM_NAMES[name]) == name
    from diffusers.loaders.lora_conversion_utils import (
        _convert_unet_lora_key,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    class Config:
        layers_per_block = 2

    (theirs,) = _maybe_map_sgm_blocks_to_diffusers({f"lora_unet_{name}.lora_down.weight": 0}, Config)
    assert flatten(_convert_unet_lora_key(theirs)) == f"{LDM_NAMES[name]}_lora_down_weight"


def test_unflatten_is_the_inverse_of_flatten(layers: Layers):
    for path in layers:
        rest = path.split(".", 1)[1]
        assert unflatten(flatten(rest)) == rest


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip_of_any_ranks_and_scales(data: st.DataObject, tmp_path: Path):
    paths = data.draw(
        st.lists(
            st.sampled_from([QUERY, OUT, TEXT, "unet.mid_block.attentions.0.proj_in"]),
            min_size=1,
            unique=True,
        )
    )
    made = {}
    for path in paths:
        n, k, r = (data.draw(st.integers(1, 6)) for _ in range(3))
        scale = data.draw(st.floats(-10, 10, width=32).filter(lambda s: abs(s) > 1e-1))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        made[path] = LowRank(
            torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype), scale, data.draw(st.booleans())
        )
    expert = Expert(made)
    for dialect in ("diffusers", "kohya"):
        save_expert(expert, tmp_path / "x.safetensors", dialect)  # type: ignore[arg-type]
        found = load_expert(tmp_path / "x.safetensors")
        assert set(found.layers) == set(made)
        for path, layer in made.items():
            other = found.layers[path]
            assert torch.equal(other.down, layer.down) and other.conv == layer.conv
            assert other.down.dtype == other.up.dtype == layer.down.dtype
            # alpha = scale * rank is stored, in float32 by kohya: one rounding on the way in
            if dialect == "diffusers":
                assert torch.equal(other.up, layer.up) and other.scale == pytest.approx(layer.scale, rel=2e-7)
                continue
            # of another alpha than the first layer's, the quotient lies in B: one rounding in its dtype, and
            # one of each of the two alphas in float32
            strong, wanted = other.scale * other.up.double(), layer.scale * layer.up.double()
            kept = torch.finfo(layer.up.dtype)
            rounding = kept.eps / 2 + torch.finfo(torch.float32).eps
            # below the smallest normal number roundings are of one size
            least = abs(other.scale) * kept.smallest_normal * kept.eps / 2
            assert torch.allclose(strong, wanted, rtol=rounding, atol=least)


def test_save_refuses_what_a_dialect_cannot_hold(tmp_path: Path):
    target = tmp_path / "x.safetensors"
    flux = Expert({"transformer.single_transformer_blocks.0.attn.to_q": LowRank(DOWN, UP)})
    with pytest.raises(MoleKeyError, match="do not cover transformer"):
        save_expert(flux, target, "kohya")
    flat = load_expert(
        {
            "lora_unet_double_blocks_0_img.lora_down.weight": DOWN,
            "lora_unet_double_blocks_0_img.lora_up.weight": UP,
        }
    )
    with pytest.raises(MoleKeyError, match="known by a flat name only"):
        save_expert(flat, target, "diffusers")
    with pytest.raises(MoleValueError, match="dialect diffusers or kohya"):
        save_expert(flux, target, "peft")  # type: ignore[arg-type]
    with pytest.raises(MoleTypeError, match="dtype"):
        save_expert(flux, target, dtype=torch.int8)
    assert not target.exists()


def test_metadata_of_the_file_come_along(tmp_path: Path):
    save_expert(
        Expert({QUERY: LowRank(DOWN, UP, 0.5)}, metadata={"ss_network_dim": "2", "note": "\x1b"}),
        tmp_path / "a.safetensors",
    )
    found = load_expert(tmp_path / "a.safetensors")
    assert found.metadata["note"] == "\x1b"
    save_expert(found, tmp_path / "b.safetensors", "kohya")
    assert read_header(tmp_path / "b.safetensors").metadata == {
        "ss_network_dim": "2",
        "note": "\x1b",
        "format": "pt",
    }
    assert load_expert(tmp_path / "b.safetensors").layers[QUERY].scale == 0.5
