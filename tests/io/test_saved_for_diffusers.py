"""A saved file means in diffusers' own loader what it means here: the strength of every layer, whatever the
ranks and scales, for every family of models and for all that writes files.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import load_expert, save_expert
from mole_kernels.io.convert import convert
from mole_kernels.io.merge import compress_file, merge_files
from tests.denoisers import DENOISERS, pipeline_of

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

FAMILIES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "FluxPipeline",
    "StableDiffusion3Pipeline",
    "QwenImagePipeline",
    "WanPipeline",
    "ZImagePipeline",
]
KOHYA = FAMILIES[:2]
# what trainers adapt, and diffusers' loader of kohya's files therefore knows
ENDS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "q_proj", "v_proj", "out_proj", "fc1")


# kohya's names of SDXL's blocks count three levels of two layers
SDXL = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
}


@functools.cache
def pipeline(name: str) -> Any:
    case = next(case for case in DENOISERS if case.pipeline == name)
    if name == "StableDiffusionXLPipeline":
        case = replace(case, config=case.config | SDXL)
    return pipeline_of(case)


def layers_of(name: str) -> dict[str, tuple[int, int]]:
    """path -> (N, K) of the layers that trainers adapt, in the denoiser and in CLIP's text encoders."""
    sizes = {}
    for component, module in pipeline(name).components.items():
        clip = component.startswith("text_encoder") and type(module).__name__.startswith("CLIP")
        if isinstance(module, nn.Module) and (component in ("unet", "transformer") or clip):
            for path, layer in module.named_modules():
                if isinstance(layer, nn.Linear) and path.endswith(ENDS):
                    sizes[f"{component}.{path}"] = (layer.out_features, layer.in_features)
    return sizes


def expert(
    name: str,
    ranks: list[int],
    scales: list[float],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Expert:
    """Layer i has the i-th rank and scale, again from the first where they end."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for i, (path, (n, k)) in enumerate(layers_of(name).items()):
        rank = ranks[i % len(ranks)]
        down, up = torch.randn(rank, k, generator=draw), torch.randn(n, rank, generator=draw)
        layers[path] = LowRank(down.to(dtype), up.to(dtype), scales[i % len(scales)])
    return Expert(layers)


def deltas(expert: Expert) -> dict[str, Tensor]:
    return {path: layer.delta(torch.float64) for path, layer in expert.layers.items()}


def deltas_in_diffusers(name: str, file: Path) -> dict[str, Tensor]:
    """path -> s·B·A of every layer, after diffusers' own loader."""
    pipe = pipeline(name)
    pipe.load_lora_weights(str(file))
    try:
        found = {}
        for component, module in pipe.components.items():
            if not isinstance(module, nn.Module):
                continue
            for path, layer in module.named_modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    (adapter,) = layer.lora_A
                    down = layer.lora_A[adapter].weight.double().flatten(1)
                    up = layer.lora_B[adapter].weight.double().flatten(1)
                    found[f"{component}.{path}"] = layer.scaling[adapter] * up @ down
        return found
    finally:
        pipe.unload_lora_weights()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for path, delta in expected.items():
        error = (found[path] - delta).norm() / delta.norm().clamp(min=1e-9)
        assert error < tolerance, f"{path} is off by {error:.3g}"


UNEQUAL = ([3, 1, 4, 2], [0.5, 2.0, -1.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "dialect"), [(name, "diffusers") for name in FAMILIES] + [(name, "kohya") for name in KOHYA]
)
def test_unequal_ranks_and_scales(name: str, dialect: Any, dtype: torch.dtype, tmp_path: Path):
    source, file = expert(name, *UNEQUAL, dtype), tmp_path / "x.safetensors"
    save_expert(source, file, dialect)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_same(deltas_in_diffusers(name, file), deltas(source), tolerance)
    assert_same(deltas(load_expert(file, pipeline=pipeline(name))), deltas(source), tolerance)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(KOHYA),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    scales=st.lists(st.sampled_from([0.0, 1.0, 0.3, -2.0, 0.0625]), min_size=1, max_size=4),
)
def test_any_ranks_and_scales_in_a_kohya_file(name: str, ranks: list[int], scales: list[float]):
    source = expert(name, ranks, scales)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        save_expert(source, file, "kohya")
        assert_same(deltas_in_diffusers(name, file), deltas(source))
        # and kohya's tools: alpha over rank, layer by layer
        assert_same(deltas(load_expert(file)), deltas(source))


def test_one_scale_and_one_rank_keep_every_bit(tmp_path: Path):
    source = expert(KOHYA[0], [4], [0.5], torch.float16)
    save_expert(source, tmp_path / "x.safetensors", "kohya")
    for path, layer in load_expert(tmp_path / "x.safetensors").layers.items():
        twin = source.layers[path]
        assert torch.equal(layer.down, twin.down) and torch.equal(layer.up, twin.up)
        assert layer.scale == twin.scale


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", KOHYA)
def test_what_merges_compresses_and_converts(name: str, to: Any, tmp_path: Path):
    a, b = expert(name, *UNEQUAL), expert(name, [2, 3], [1.0, 0.25, 3.0], seed=1)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_expert(a, files[0], "diffusers")
    save_expert(b, files[1], "kohya")
    out = tmp_path / "out.safetensors"
    merge_files(files, out, [0.75, -0.5], to=to)
    total = {path: 0.75 * deltas(a)[path] - 0.5 * deltas(b)[path] for path in deltas(a)}
    assert_same(deltas_in_diffusers(name, out), total)
    for file, source in zip(files, (a, b)):
        convert(file, out, to)
        assert_same(deltas_in_diffusers(name, out), deltas(source))
    compress_file(files[0], out, energy=0.9, to=to)
    assert_same(deltas_in_diffusers(name, out), deltas(load_expert(out)))
    assert len(load_expert(out).ranks()) > 1


def test_eight_bit_factors_are_not_rounded_to_eight_bits_again(tmp_path: Path):
    source = expert(KOHYA[0], *UNEQUAL, torch.float8_e4m3fn)
    save_expert(source, tmp_path / "x.safetensors", "kohya")
    assert_same(
        deltas(load_expert(tmp_path / "x.safetensors")), deltas(source), torch.finfo(torch.float16).eps
    )
