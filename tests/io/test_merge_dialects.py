"""A layer is the same whatever the tool that spelled it: any two dialects of one model merge to the weighted
sum, or are refused before anything is written.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_kernels.errors import MoleError, MoleFileError, MoleKeyError, MoleValueError
from mole_kernels.experts.lowrank import Expert, LowRank, flatten
from mole_kernels.experts.merge import merge
from mole_kernels.files.writer import atomic_save
from mole_kernels.io import load_expert, save_expert
from mole_kernels.io.merge import compress_file, merge_files
from mole_kernels.patching.plan import plan
from tests.denoisers import DENOISERS, pipeline_of
from tests.io.dialect_files import FLUX1, FLUX2, SAME, WAN, ZIMAGE_FUSED, Names, dotted, known_lora, kohya

diffusers = pytest.importorskip("diffusers")

MODELS = {str(model): model for model in DENOISERS}
Writer = Callable[[dict[str, Any]], dict[str, Tensor]]
# names of a tool's modules, and how it writes them into a file
COMFY: Writer = lambda modules: dotted(modules, "diffusion_model.")  # noqa: E731
DIFFUSERS: Writer = lambda modules: dotted(modules, "transformer.")  # noqa: E731
PEFT: Writer = lambda modules: dotted(modules, "base_model.model.")  # noqa: E731
ONETRAINER: Writer = lambda modules: kohya(modules, "lora_transformer_")  # noqa: E731
# cut by FLUX.1's own widths, so not in miniature
NARROW1: Names = [row for row in FLUX1 if "blocks" in row[1] and not row[1].endswith("linear1")]
BLOCKS2: Names = [row for row in FLUX2 if "_blocks" in row[1]]
BLOCKS_WAN: Names = [row for row in WAN if "blocks" in row[1]]
SPELLINGS: dict[str, dict[str, tuple[Names, Writer]]] = {
    "flux1": {
        "kohya": (NARROW1, kohya),
        "comfy": (NARROW1, COMFY),
        "bfl": (NARROW1, dotted),
        "diffusers": (SAME, DIFFUSERS),
        "onetrainer": (SAME, ONETRAINER),
        "peft": (SAME, PEFT),
    },
    "flux2": {"kohya": (BLOCKS2, kohya), "comfy": (BLOCKS2, COMFY), "diffusers": (SAME, DIFFUSERS)},
    "wan": {"musubi": (BLOCKS_WAN, kohya), "comfy": (BLOCKS_WAN, COMFY), "diffusers": (SAME, DIFFUSERS)},
    "qwen-image": {"musubi": (SAME, kohya), "comfy": (SAME, COMFY), "diffusers": (SAME, DIFFUSERS)},
    "z-image": {"fused": (ZIMAGE_FUSED, kohya), "comfy": (SAME, COMFY), "diffusers": (SAME, DIFFUSERS)},
}
PAIRS = [(model, *pair) for model, names in SPELLINGS.items() for pair in itertools.product(names, repeat=2)]


@functools.cache
def pipeline(model: str) -> Any:
    return pipeline_of(MODELS[model])


@functools.cache
def file_and_layers(model: str, spelling: str, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(a file's tensors, ΔW by diffusers' flat name of the layer)."""
    names, write = SPELLINGS[model][spelling]
    modules, layers = known_lora(MODELS[model].make(), names, rank, alpha=lambda name: 1.5)
    return write(modules), {flatten(path): layer.delta(torch.float64) for path, layer in layers.items()}


def deltas(expert: Expert) -> dict[str, Tensor]:
    return {
        flatten(path.removeprefix("transformer.")): layer.delta(torch.float64)
        for path, layer in expert.layers.items()
    }


@pytest.mark.parametrize("known", [True, False], ids=["pipeline", "auto"])
@pytest.mark.parametrize(("model", "one", "other"), PAIRS)
def test_the_weighted_sum_or_a_refusal(model: str, one: str, other: str, known: bool, tmp_path: Path):
    (first, a), (second, b) = file_and_layers(model, one, 3), file_and_layers(model, other, 2)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, tensors in zip(files, (first, second)):
        atomic_save(tensors, file)
    out = tmp_path / "out.safetensors"
    try:
        merge_files(files, out, [0.75, -0.5], pipeline=type(pipeline(model)) if known else "auto")
    except MoleError as error:
        assert not known and not out.exists()
        assert "--pipeline" in str(error)
        return
    merged = deltas(load_expert(out, pipeline=pipeline(model)))
    assert set(merged) == set(a) | set(b)
    for name, delta in merged.items():
        zero = torch.zeros_like(delta)
        expected = 0.75 * a.get(name, zero) - 0.5 * b.get(name, zero)
        assert (delta - expected).norm() <= 1e-5 * expected.norm(), name
    # the model at hand reads every layer of it
    assert not plan(pipeline(model), {"merged": out}).unmatched.get("merged")


def test_tools_names_that_nothing_resolves_are_not_mixed_in_memory():
    comfy = load_expert(dict(file_and_layers("flux1", "comfy", 3)[0]))
    bfl = load_expert(dict(file_and_layers("flux1", "kohya", 3)[0]))
    own = load_expert(dict(file_and_layers("flux1", "diffusers", 3)[0]))
    for pair in ((comfy, own), (bfl, own), (comfy, bfl)):
        with pytest.raises(MoleKeyError, match=r"names of several tools.*\n.*pipeline="):
            merge(dict(zip("ab", pair)))
    assert len(merge({"a": comfy, "b": comfy}).layers) == len(comfy.layers)


def tiny(path: str, n: int = 4, k: int = 4) -> Expert:
    return Expert({path: LowRank(torch.ones(1, k), torch.ones(n, 1))})


DIFFERENT = {
    "unet and transformer": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "transformer.transformer_blocks.0.norm1_context.linear",
    ),
    "FLUX.1 and Qwen-Image": (
        "transformer.single_transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.img_mlp.net.2",
    ),
    "Z-Image and Wan": ("transformer.layers.0.attention.to_q", "transformer.blocks.0.attn1.to_q"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_family_is_refused_before_anything_is_written(case: str, tmp_path: Path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, path in zip(files, DIFFERENT[case]):
        save_expert(tiny(path), file)
    with pytest.raises(MoleValueError, match="a and b are for different models"):
        merge_files(files, tmp_path / "out.safetensors")
    # text encoders belong to any
    save_expert(tiny("text_encoder.text_model.encoder.layers.0.mlp.fc1"), files[1])
    merge_files(files, tmp_path / "out.safetensors")


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_expert(tiny("unet.mid_block.attentions.0.proj_in", 100, 100), file)
    usage = type("Usage", (), {"free": 2 * 2 * 200 * 4 - 1})
    monkeypatch.setattr("mole_kernels.io.merge.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr(
        "mole_kernels.files.reader.SafetensorsFile._read", lambda *_: pytest.fail("data were read")
    )
    with pytest.raises(MoleFileError, match=r"too full; expected 3,200 free bytes .*got 3,199"):
        merge_files([file, file], out)
    assert not out.exists()


def test_compress_keeps_kohyas_names_and_resolves_the_others(tmp_path: Path):
    for spelling, prefix in (("kohya", "lora_unet_double_blocks"), ("comfy", "transformer.")):
        tensors, expected = file_and_layers("flux1", spelling, 3)
        atomic_save(tensors, tmp_path / "a.safetensors")
        out = tmp_path / "out.safetensors"
        compress_file(tmp_path / "a.safetensors", out, rank=3, pipeline="auto")
        assert any(path.startswith(prefix) for path in _keys(out))
        found = deltas(load_expert(out, pipeline=pipeline("flux1")))
        assert set(found) == set(expected)
        for name, delta in found.items():
            assert (delta - expected[name]).norm() <= 1e-5 * expected[name].norm()


def _keys(path: Path) -> list[str]:
    from mole_kernels.files.reader import read_header

    return list(read_header(path).entries)
