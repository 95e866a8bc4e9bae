"""Files in the dialects of other models' tools: the right ΔW on the right layers, nothing lost, and what
diffusers makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleStateError
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.experts.shared import shared_down
from mole_kernels.files.writer import atomic_save
from mole_kernels.io import load_expert
from mole_kernels.io.convert import convert
from mole_kernels.io.dialects.families import families
from mole_kernels.patching.apply import patch
from mole_kernels.patching.plan import plan
from tests.denoisers import DENOISERS, pipeline_of
from tests.io.dialect_files import (
    FLUX1,
    FLUX2,
    SAME,
    WAN,
    ZIMAGE_FUSED,
    Module,
    Names,
    dotted,
    known_lora,
    kohya,
    xlabs,
)

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

MODELS = {str(model): model for model in DENOISERS}
# single_blocks.*.linear1 is cut by FLUX.1's own widths, so not in miniature
NARROW1: Names = [row for row in FLUX1 if not row[1].endswith("linear1")]
XLABS: Names = [row for row in NARROW1 if row[1].endswith((".qkv", "_attn.proj", "linear2"))]
ZIMAGE: Names = [*ZIMAGE_FUSED, *SAME]


def half(name: str) -> float:
    return 1.5


def mixed(name: str) -> float | None:
    """No alpha, the rank itself, and two others."""
    return (None, 3.0, 0.75, 6.0)[len(name) % 4]


@dataclass(frozen=True)
class Dialect:
    """A model, the names of the tool's modules, what writes the file, and the layers that diffusers' own
    loader gets wrong (why: docs).
    """

    id: str
    model: str
    names: Names = field(hash=False)
    write: Callable[[dict[str, Module]], dict[str, Tensor]] = field(hash=False)
    alpha: Callable[[str], float | None] = lambda name: None
    theirs_wrong: str | tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.id


BLOCKS_WAN: Names = [row for row in WAN if "blocks" in row[1]]
BLOCKS2: Names = [row for row in FLUX2 if "modulation" not in row[1] and "guidance" not in row[1]]
DIALECTS = [
    Dialect("kohya-flux1", "flux1", NARROW1, kohya, half, "all"),
    Dialect("kohya-flux1-blocks", "flux1", [row for row in NARROW1 if "blocks" in row[1]], kohya, half),
    Dialect(
        "kohya-flux1-mixed-alphas", "flux1", [row for row in NARROW1 if "blocks" in row[1]], kohya, mixed
    ),
    Dialect("bfl-flux1", "flux1", NARROW1, dotted, theirs_wrong="all"),
    Dialect(
        "comfy-flux1",
        "flux1",
        NARROW1,
        lambda m: dotted(m, "diffusion_model.", ("lora_down", "lora_up")),
        half,
        "all",
    ),
    Dialect("fal-flux1", "flux1", NARROW1, lambda m: dotted(m, "base_model.model."), theirs_wrong="all"),
    Dialect("xlabs-flux1", "flux1", XLABS, xlabs),
    Dialect("kohya-flux2", "flux2", FLUX2, kohya, half, "all"),
    Dialect(
        "kohya-flux2-blocks", "flux2", [row for row in BLOCKS2 if "final_layer" not in row[1]], kohya, mixed
    ),
    Dialect("bfl-flux2", "flux2", FLUX2, dotted, theirs_wrong="all"),
    Dialect(
        "comfy-flux2",
        "flux2",
        FLUX2,
        lambda m: dotted(m, "diffusion_model."),
        theirs_wrong=("norm_out.linear",),
    ),
    Dialect("musubi-wan", "wan", BLOCKS_WAN, kohya, half),
    Dialect("musubi-wan-everything", "wan", WAN, kohya, mixed, "all"),
    Dialect("comfy-wan", "wan", WAN, lambda m: dotted(m, "diffusion_model.")),
    Dialect(
        "comfy-wan-alpha",
        "wan",
        BLOCKS_WAN,
        lambda m: dotted(m, "diffusion_model.", ("lora_down", "lora_up")),
        half,
    ),
    Dialect("musubi-qwen", "qwen-image", SAME, kohya, half),
    Dialect("comfy-qwen", "qwen-image", SAME, lambda m: dotted(m, "diffusion_model.")),
    Dialect(
        "musubi-z-image",
        "z-image",
        SAME,
        lambda m: kohya({k: v for k, v in m.items() if "-" not in k}),
        mixed,
    ),
    Dialect("fused-z-image", "z-image", ZIMAGE_FUSED, kohya, half),
    Dialect("comfy-z-image", "z-image", SAME, lambda m: dotted(m, "diffusion_model."), half),
    *[
        Dialect(f"diffusers-{name}", name, SAME, lambda m: dotted(m, "transformer."))
        for name in MODELS
        if name not in ("sd15", "sdxl")
    ],
]


def made(case: Dialect) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    modules, layers = known_lora(MODELS[case.model].make(), case.names, alpha=case.alpha)
    file = case.write(modules)
    if case.id == "musubi-z-image":
        layers = {path: layer for path, layer in layers.items() if "-" not in path}
    assert len(layers) > 8 and file
    return file, layers


def close(found: Tensor, expected: LowRank, path: str, rtol: float = 1e-6) -> None:
    want = expected.delta(torch.float64)
    assert found.shape == want.shape, path
    assert (found.double() - want).norm() <= rtol * want.norm(), path


@pytest.mark.parametrize("case", DIALECTS, ids=str)
def test_the_file_gives_the_right_delta_on_the_right_layers(case: Dialect):
    file, layers = made(case)
    before = dict(file)
    cls = getattr(diffusers, MODELS[case.model].pipeline)
    expert = load_expert(file, pipeline=cls)
    assert (
        set(expert.layers) == {f"transformer.{path}" for path in layers}
        or set(expert.layers) == set(layers)
        or {path.removeprefix("transformer.") for path in expert.layers} == set(layers)
    )
    by_path = {path.removeprefix("transformer."): layer for path, layer in expert.layers.items()}
    for path, layer in layers.items():
        close(by_path[path].delta(torch.float64), layer, path)
        # one alpha over the file is the scale itself: no rounding goes into B
        if case.alpha is half:
            assert by_path[path].scale == layer.scale == 0.5
    assert file.keys() == before.keys() and all(file[key] is before[key] for key in file)


@pytest.mark.parametrize("case", [case for case in DIALECTS if case.theirs_wrong != "all"], ids=str)
def test_diffusers_own_loader_agrees(case: Dialect):
    file, layers = made(case)
    pipe = pipeline_of(MODELS[case.model])
    # its Wan converter multiplies alphas into the caller's own tensors
    pipe.load_lora_weights({key: tensor.clone() for key, tensor in file.items()}, adapter_name="a")
    import peft

    found = {
        path: m for path, m in pipe.transformer.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert set(found) == set(layers)
    for path, m in found.items():
        delta = (
            m.scaling["a"] * m.lora_B["a"].weight.detach().double() @ m.lora_A["a"].weight.detach().double()
        )
        if path in case.theirs_wrong:
            assert (delta - layers[path].delta(torch.float64)).norm() > 0.5 * delta.norm(), (
                "diffusers reads it right now: tell docs"
            )
        else:
            close(delta, layers[path], path, 1e-5)


@pytest.mark.parametrize("case", DIALECTS, ids=str)
def test_a_bare_transformer_is_patched_from_the_file(case: Dialect):
    """No pipeline at hand: the class of the module says which files fit it."""
    file, layers = made(case)
    made_plan = plan(MODELS[case.model].make(), {"e": file})
    assert set(made_plan.layers) == set(layers) and not made_plan.unmatched["e"]


FUSED = [
    case
    for case in DIALECTS
    if case.id in ("kohya-flux1", "bfl-flux1", "xlabs-flux1", "kohya-flux2", "comfy-flux2", "fused-z-image")
]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_projections_share_one_a(case: Dialect):
    file, _ = made(case)
    expert = load_expert(file, pipeline=getattr(diffusers, MODELS[case.model].pipeline))
    groups = shared_down(expert)
    assert groups and all(len(group) == 3 for group in groups)
    for group in groups:
        first = expert.layers[group[0]]
        # stored once, too
        assert all(expert.layers[path].down is first.down for path in group)


@pytest.fixture(scope="module")
def wide() -> Any:
    """FLUX.1 with its real widths, one block of each kind, without weights."""
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


@pytest.mark.parametrize("writer", ["kohya", "bfl", "fal"])
def test_flux_at_its_real_width(wide: Any, writer: str):
    """Single blocks' linear1 is q, k, v and the MLP in one: A shared by four layers of unequal height."""
    modules, layers = known_lora(wide, FLUX1, rank=2, alpha=lambda name: 4.0 if writer == "kohya" else None)
    file = {"kohya": kohya, "bfl": dotted, "fal": lambda m: dotted(m, "base_model.model.")}[writer](modules)
    expert = load_expert(file, pipeline=diffusers.FluxPipeline)
    by_path = {path.removeprefix("transformer."): layer for path, layer in expert.layers.items()}
    assert set(by_path) == set(layers)
    for path, layer in layers.items():
        assert by_path[path].scale == layer.scale and torch.equal(by_path[path].up, layer.up), path
        assert torch.equal(by_path[path].down, layer.down), path
    assert sorted(len(group) for group in shared_down(expert)) == [3, 3, 3]
    assert len(plan(wide, {"e": expert}).layers) == len(layers)


@pytest.mark.slow
def test_a_whole_fal_file_is_read_as_diffusers_reads_it():
    """All 57 blocks at full width: what our spelling of fal's keys gives is what diffusers' own converter for
    fal gives.
    """
    with torch.device("meta"):
        whole = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    modules, layers = known_lora(
        whole, [row for row in FLUX1 if "blocks" in row[1] or row[1] == "final_layer.linear"], rank=1
    )
    file = dotted(modules, "base_model.model.")
    theirs = diffusers.FluxPipeline.lora_state_dict(dict(file))
    expert = load_expert(file, pipeline=diffusers.FluxPipeline)
    assert len(expert.layers) == len(layers) == 495 == len(theirs) // 2
    theirs = {key.removeprefix("transformer."): tensor for key, tensor in theirs.items()}
    for path, layer in expert.layers.items():
        name = path.removeprefix("transformer.")
        assert torch.equal(theirs[f"{name}.lora_A.weight"], layer.down) and torch.equal(
            theirs[f"{name}.lora_B.weight"], layer.up
        ), path


def test_a_compiled_transformer_is_known_by_what_it_wraps():
    case = next(case for case in DIALECTS if case.id == "musubi-wan")
    file, layers = made(case)
    assert len(plan(torch.compile(MODELS["wan"].make()), {"e": file}).layers) == len(layers)


@pytest.mark.parametrize("name", ["flux1", "qwen-image", "z-image", "wan"])
@pytest.mark.parametrize("config", ["rslora", "patterns"])
def test_scales_of_files_that_diffusers_writes(name: str, config: str, tmp_path: Path):
    """rsLoRA, rank and alpha patterns are in the metadata, which the converter does not see."""
    import peft

    model = MODELS[name].make().float()
    fields = {
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 5}},
    }[config]
    targets = ["to_q", "to_k", "to_v"]
    model.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False, **fields)
    )  # type: ignore[operator]
    model.save_lora_adapter(tmp_path)  # type: ignore[operator]
    found = {path: m for path, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    expert = load_expert(
        tmp_path / "pytorch_lora_weights.safetensors", pipeline=getattr(diffusers, MODELS[name].pipeline)
    )
    by_path = {path.removeprefix("transformer."): layer for path, layer in expert.layers.items()}
    assert set(by_path) == set(found) and len(expert.scales()) == (1 if config == "rslora" else 3)
    for path, m in found.items():
        assert by_path[path].scale == pytest.approx(m.scaling["default"], rel=1e-12)
        assert torch.equal(by_path[path].down, m.lora_A["default"].weight), path


def test_patched_pipeline_computes_the_file():
    """From a file of fused projections to a pipeline's output: the merged weights' output."""
    import copy

    case = next(case for case in DIALECTS if case.id == "kohya-flux2")
    file, layers = made(case)
    pipe = pipeline_of(MODELS["flux2"])
    reference = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for path, layer in layers.items():
            reference.get_submodule(path).weight += layer.delta(torch.float64)
    want, base = MODELS["flux2"].run(reference), MODELS["flux2"].run(pipe.transformer)
    handle = patch(pipe, {"e": file})
    got = MODELS["flux2"].run(pipe.transformer)
    assert (got - want).norm() <= 1e-6 * want.norm() and (want - base).norm() > 0.05 * want.norm()
    handle.remove()
    assert torch.equal(MODELS["flux2"].run(pipe.transformer), base)


TEXT_KEYS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (16, 12),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (12, 12),
}


def test_text_encoders_of_a_flux_file_go_to_both_encoders():
    """diffusers' converter leaves T5's out with a line in the log; here they are patched."""
    modules, _ = known_lora(MODELS["flux1"].make(), NARROW1)
    file = kohya(modules)
    for name, (n, k) in TEXT_KEYS.items():
        file |= {
            f"{name}.lora_down.weight": torch.ones(2, k),
            f"{name}.lora_up.weight": torch.ones(n, 2),
            f"{name}.alpha": torch.tensor(1.0),
        }
    pipe = pipeline_of(MODELS["flux1"])
    handle = patch(pipe, {"e": file})
    text = [path for path in handle.layers if path.startswith("text_encoder")]
    assert sorted(text) == [
        "text_encoder.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    ]
    assert [handle.layers[path].experts.base_scale.item() for path in text] == [0.5, 0.5]


def test_what_the_converter_would_drop_is_refused():
    modules, _ = known_lora(MODELS["flux2"].make(), FLUX2)
    file = dotted(modules, "diffusion_model.") | {"lora_unet_extra.lora_down.weight": torch.ones(2, 4)}
    with pytest.raises(MoleKeyError, match=r"no B|leaves out|cannot read"):
        load_expert(
            file | {"lora_unet_extra.lora_up.weight": torch.ones(4, 2)}, pipeline=diffusers.Flux2Pipeline
        )
    kohya_file = kohya(modules) | {
        "lora_unet_new_head.lora_down.weight": torch.ones(2, 4),
        "lora_unet_new_head.lora_up.weight": torch.ones(4, 2),
    }
    with pytest.raises(MoleKeyError, match="Flux2Pipeline"):
        load_expert(kohya_file, pipeline=diffusers.Flux2Pipeline)


def one(name: str, n: int, k: int) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, k), f"{name}.lora_up.weight": torch.ones(n, 2)}


def test_a_dialect_that_cannot_be_told_names_its_candidates():
    """A file of attention's projections alone is FLUX.1's, FLUX.2 klein's or HunyuanVideo's; at another width
    it is FLUX.2's.
    """
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    with pytest.raises(
        MoleKeyError, match=r"dialect cannot be told: .*FLUX\.1 or FLUX\.2 or HunyuanVideo transformer"
    ) as caught:
        load_expert(one(key, 9216, 3072), pipeline="auto")
    assert "pipeline=" in caught.value.hint
    wide = load_expert(one(key, 3 * 6144, 6144), pipeline="auto")
    assert sorted(wide.layers) == [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "kqv"]
    told = load_expert(
        one(key, 9216, 3072) | one("lora_unet_double_blocks_0_img_mod_lin", 18432, 3072), pipeline="auto"
    )
    assert "transformer.transformer_blocks.0.norm1.linear" in told.layers
    with pytest.raises(MoleKeyError, match="dialect is not known"):
        load_expert(one("lora_unet_some_new_thing", 4, 4), pipeline="auto")
    assert list(
        load_expert(one("lora_unet_mid_block_attentions_0_proj_in", 4, 4), pipeline="auto").layers
    ) == ["unet.mid_block.attentions.0.proj_in"]


@pytest.mark.parametrize(
    "name", ["kohya-flux1", "bfl-flux1", "xlabs-flux1", "kohya-flux2", "musubi-wan", "musubi-qwen"]
)
def test_converted_file_to_file(name: str, tmp_path: Path):
    """`mole-kernels convert --to diffusers` finds the converter from the keys; what it wrote is diffusers'
    dialect.
    """
    file, layers = made(next(case for case in DIALECTS if case.id == name))
    atomic_save(file, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers")
    again = load_expert(tmp_path / "out.safetensors")
    assert again.dialect == "diffusers" and {
        path.removeprefix("transformer.") for path in again.layers
    } == set(layers)
    for path, layer in again.layers.items():
        close(layer.delta(torch.float64), layers[path.removeprefix("transformer.")], path)


def test_a_file_that_cannot_be_told_is_not_converted(tmp_path: Path):
    """Z-Image's own names are Lumina 2's too; their widths differ."""
    key = "lora_unet_layers_0_attention_qkv"
    atomic_save(one(key, 96, 32), tmp_path / "in.safetensors")
    with pytest.raises(MoleKeyError, match="Z-Image or Lumina 2 transformer"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers")
    assert not (tmp_path / "out.safetensors").exists()
    atomic_save(one(key, 3 * 3840, 3840), tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers")
    assert sorted(load_expert(tmp_path / "out.safetensors").layers) == [
        f"transformer.layers.0.attention.to_{x}" for x in "kqv"
    ]


def test_what_only_a_converter_reads_says_so(monkeypatch: pytest.MonkeyPatch):
    modules, _ = known_lora(MODELS["flux1"].make(), XLABS)
    with pytest.raises(MoleKeyError, match="another tool's names") as caught:
        load_expert(xlabs(modules))
    assert 'pipeline="auto"' in caught.value.hint
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MoleStateError, match=r"FLUX\.1 transformer, which diffusers converts"):
        load_expert(xlabs(modules), pipeline="auto")


WRONG = {
    "sdxl-into-flux": (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        "FluxPipeline",
        "SDXL UNet",
    ),
    "flux-into-wan": ("lora_unet_double_blocks_0_img_mod_lin", "WanPipeline", "FLUX.1 transformer"),
    "wan-into-flux": ("lora_unet_blocks_0_self_attn_q", "FluxPipeline", "Wan transformer"),
    "wan-into-flux2": ("diffusion_model.blocks.0.self_attn.q", "Flux2Pipeline", "Wan transformer"),
    "flux-into-flux2": ("diffusion_model.double_blocks.0.img_mod.lin", "Flux2Pipeline", "FLUX.1 transformer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_another_family_is_named_by_the_pipeline(case: str):
    key, pipeline, words = WRONG[case]
    with pytest.raises(MoleKeyError, match=rf"(?s)these look like keys of a {words}; this is a {pipeline}"):
        load_expert(one(key, 4, 4), pipeline=getattr(diffusers, pipeline))


def test_sd3_in_kohyas_names_is_refused_by_name():
    """Neither diffusers nor this package has a table of them."""
    file = one("lora_unet_joint_blocks_0_x_block_attn_qkv", 48, 16)
    with pytest.raises(MoleKeyError, match=r"(?s)none of its 1 layers.*SD3"):
        patch(MODELS["sd3"].make(), {"e": file})
    with pytest.raises(MoleKeyError, match=r"leaves out|cannot|joint"):
        patch(pipeline_of(MODELS["sd3"]), {"e": file})


def test_families_of_every_tiny_model():
    known = {
        "flux1": "flux1",
        "flux2": "flux2",
        "qwen-image": "qwen",
        "z-image": "zimage",
        "wan": "wan",
        "sd15": "sd",
        "sdxl": "sdxl",
    }
    for name, family in known.items():
        _, layers = known_lora(MODELS[name].make(), SAME)
        assert families(dict.fromkeys(layers)) == (family,), name


def test_a_locon_core_is_multiplied_into_a():
    torch.manual_seed(0)
    name = "lora_unet_mid_block_resnets_0_conv1"
    down, mid, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(4, 3, 1, 1)
    file = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(6.0),
    }
    (layer,) = load_expert(file).layers.values()
    assert layer.conv == (3, 3) and layer.scale == 2.0
    x = torch.randn(1, 5, 6, 6)
    conv = torch.nn.functional.conv2d
    want = 2 * conv(conv(conv(x, down), mid), up)
    torch.testing.assert_close(conv(x, layer.delta().view(4, 5, 3, 3)), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(MoleShapeError, match="a core"):
        load_expert(file | {f"{name}.lora_mid.weight": torch.ones(2, 3, 3, 3)})
