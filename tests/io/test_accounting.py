"""Every key of a file is read, named and refused, or known to do nothing: none vanishes, whatever reads the
file.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mole_kernels.errors import MoleError, MoleFileError, MoleKeyError, MoleShapeError, MoleWarning
from mole_kernels.io import load_expert
from mole_kernels.io.convert import convert
from mole_kernels.io.dialects.keys import parse_key, unsupported
from mole_kernels.io.dialects.parts import parse_part
from mole_kernels.io.mix_of_show import load_mix_of_show
from mole_kernels.io.stream import open_experts
from tests.denoisers import DENOISERS, pipeline_of

diffusers = pytest.importorskip("diffusers")

# endings in the wild that are no plain LoRA's, and a word of the refusal
ENDINGS = {
    "diff_m": "modulation",
    "set_weight": "replaces",
    "reshape_weight": "new shape",
    "hada_w1_a": "LoHa",
    "hada_t1": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w2_b": "LoKr",
    "boft_R": "BOFT",
    "on_input": "IA3",
    "a1.weight": "GLoRA",
    "bm2.weight": "GLoRA",
    "vera_lambda_b": "VeRA",
    "lora_E": "AdaLoRA",
    "lora_embedding_A": "embedding",
    "scalar": "scalar",
    "bias_values": "sparse bias",
    "modules_to_save.default.weight": "modules_to_save",
    "lora_A.weight.absmax": "quantised",
}
# endings of families that are computed: read as what they are, or refused by their keys
READ = (
    "diff",
    "diff_b",
    "dora_scale",
    "lora_magnitude_vector",
    "lora_magnitude_vector.default.weight",
    "w_norm",
    "b_norm",
    "lora_B.bias",
    "lora_bias",
    "lora_up.bias",
    "oft_blocks",
    "oft_diag",
    "oft_R.default.weight",
    "ia3_l",
)
ADDED = ("diff", "diff_b", "diff_m", "w_norm", "b_norm", "lora_B.bias", "lora_bias", "lora_up.bias")
# module names that go to our tables, to the model's own, and to each kind of converter
PLACES = {
    "sd": ("lora_unet_mid_block_attentions_0_proj_in", None),
    "qwen": ("transformer.transformer_blocks.0.attn.to_q", "QwenImagePipeline"),
    "wan": ("diffusion_model.blocks.0.self_attn.q", "WanPipeline"),
    "wan-kohya": ("lora_unet_blocks_0_cross_attn_k", "WanPipeline"),
    "flux": ("double_blocks.0.img_attn.proj", "FluxPipeline"),
    "flux2": ("diffusion_model.double_blocks.0.img_attn.proj", "Flux2Pipeline"),
}


def lora(module: str) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_not_computed_is_named(place: str, ending: str):
    """Beside a whole layer, and on a layer of its own; with a converter and without."""
    module, name = PLACES[place]
    pipeline = getattr(diffusers, name) if name else None
    other = module.replace("0", "1")
    for extra in (f"{module}.{ending}", f"{other}.{ending}"):
        for given_pipeline in {None: (None,)}.get(pipeline, (None, pipeline)):
            with pytest.raises(MoleKeyError, match=ENDINGS[ending]) as caught:
                load_expert(lora(module) | {extra: torch.ones(8)}, pipeline=given_pipeline)
            assert extra in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ending", READ)
def test_what_is_computed_is_kept_or_named(place: str, ending: str):
    """Beside a whole layer, and on a layer of its own: a family of the expert, or an error with the key."""
    module, name = PLACES[place]
    pipeline = getattr(diffusers, name) if name else None
    value = torch.ones(8, 1) if ending in ("dora_scale", "ia3_l") else torch.ones(8)
    for extra in (f"{module}.{ending}", f"{module.replace('0', '1')}.{ending}"):
        for asked in {None: (None,)}.get(pipeline, (None, pipeline)):
            try:
                expert = load_expert(lora(module) | {extra: value}, pipeline=asked)
            except MoleError as error:
                assert extra in str(error), error
            else:
                assert len(expert.families) == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ending", ADDED)
def test_differences_of_zeros_are_left_out_and_told(place: str, ending: str, tmp_path: Path):
    module, name = PLACES[place]
    tensors = lora(module) | {f"{module}.{ending}": torch.zeros(8)}
    pipeline = getattr(diffusers, name) if name else None
    with pytest.warns(MoleWarning, match="all zero"):
        expert = load_expert(tensors, pipeline=pipeline)
    assert len(expert.layers) == 1
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.warns(MoleWarning, match="all zero"), open_experts(tmp_path / "x.safetensors") as found:
        assert len(found["x"].layers) == 1


@settings(max_examples=60, deadline=None)
@given(
    place=st.sampled_from(sorted(PLACES)),
    ending=st.text("abcdefgh_ABw12.", min_size=1, max_size=14),
    converted=st.booleans(),
)
def test_no_unknown_ending_vanishes(place: str, ending: str, converted: bool):
    """Whatever stands behind a module's name: the layers of the file without it, and an error with it."""
    module, name = PLACES[place]
    key = f"{module}.{ending}"
    if parse_key(key) is not None:
        return
    pipeline = getattr(diffusers, name) if name and converted else None
    with pytest.raises(MoleKeyError) as caught:
        load_expert(lora(module) | {key: torch.ones(8)}, pipeline=pipeline)
    assert key in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from("uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64".split()),
    shape=st.sampled_from([(), (1,), (1, 1), (2,), (0,)]),
    value=st.integers(1, 100),
    form=st.sampled_from(["whole", "lazy", "tensors"]),
)
def test_alpha_of_every_dtype_and_form(tmp_path_factory, dtype, shape, value, form):
    alpha = torch.full(shape, value, dtype=getattr(torch, dtype))
    tensors = lora("unet.mid_block.attentions.0.proj_in") | {
        "unet.mid_block.attentions.0.proj_in.alpha": alpha
    }
    path = tmp_path_factory.mktemp("alpha") / "x.safetensors"
    save_file(tensors, path)

    def scale() -> float:
        if form == "lazy":
            with open_experts(path) as found:
                (layer,) = [found["x"].layers[p] for p in found["x"].layers]
                return layer.scale
        (layer,) = load_expert(path if form == "whole" else tensors).layers.values()
        return layer.scale

    if alpha.numel() != 1:
        with pytest.raises(MoleShapeError, match="scalar alpha"):
            scale()
    else:
        assert scale() == float(alpha.reshape(())) / 2


WORDS = {
    "list-form": ({"unet:0:up": (8, 2), "unet:0:down": (2, 8)}, "list form"),
    "embedding": ({"emb_params": (3, 768)}, "textual inversion"),
    "embedding-xl": ({"clip_l": (3, 768), "clip_g": (3, 1280)}, "textual inversion"),
    "embedding-token": ({"<cat>": (768,)}, "textual inversion"),
    "checkpoint": ({"model.diffusion_model.out.2.weight": (8, 8), "cond.x.bias": (8,)}, "weights of a model"),
    "other": ({"noise": (3, 3)}, "no LoRA"),
}


@pytest.mark.parametrize("case", WORDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_of_other_kinds_are_named(case: str, suffix: str, tmp_path: Path):
    """In words that lead on: no hint sends to a command that gives the same refusal."""
    shapes, words = WORDS[case]
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
        read = lambda: load_expert(path)  # noqa: E731
    else:
        torch.save(tensors, path)
        read = lambda: convert(path, tmp_path / "y.safetensors", "diffusers")  # noqa: E731
    with pytest.raises(
        MoleError, match=words if suffix != ".pt" or case not in ("checkpoint", "other") else "dictionary"
    ) as caught:
        read()
    assert "inspect" not in caught.value.hint and "convert" not in caught.value.hint


PICKLES = {
    "list": ([torch.ones(8, 2), torch.ones(2, 8)], "list form"),
    "dict-of-lists": ({"unet": [torch.ones(8, 2), torch.ones(2, 8)]}, "list form"),
    "embedding": ({"string_to_param": {"*": torch.ones(3, 768)}, "name": "x"}, "textual inversion"),
    "embedding-token": ({"<cat>": torch.ones(768)}, "textual inversion"),
    "checkpoint": ({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, "training checkpoint"),
    "tensor": (torch.ones(3), "a Tensor"),
    "numbers": ({"a": 1.0}, "dictionary of a"),
}


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("name", ["x.pt", "pytorch_lora_weights.bin"])
def test_pickles_of_other_kinds_are_named(case: str, name: str, tmp_path: Path):
    """patch sends to convert, and convert says what the file is."""
    content, words = PICKLES[case]
    torch.save(content, tmp_path / name)
    with pytest.raises(MoleFileError, match="mole-kernels convert"):
        load_expert(tmp_path / name)
    with pytest.raises(MoleFileError, match=words) as caught:
        convert(tmp_path / name, tmp_path / "y.safetensors", "diffusers")
    assert "convert" not in caught.value.hint
    with pytest.raises(MoleFileError, match=words):
        load_mix_of_show(tmp_path / name)


def test_a_flat_pickle_is_converted(tmp_path: Path):
    module = "unet.mid_block.attentions.0.proj_in"
    tensors = lora(module) | {f"{module}.alpha": torch.tensor(1)}
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    convert(tmp_path / "pytorch_lora_weights.bin", tmp_path / "y.safetensors", "diffusers")
    (layer,) = load_expert(tmp_path / "y.safetensors").layers.values()
    assert layer.scale == 0.5 and torch.equal(layer.up, tensors[f"{module}.lora_B.weight"])


def test_a_huge_rank_is_refused_before_its_data_are_read(tmp_path: Path):
    """A sparse file of 16 GiB takes no room on the disk, and no time."""
    down, up = (2**30, 4), (4, 2**30)
    sizes = [4 * 2**30 * 2, 4 * 2**30 * 2]
    module = "unet.mid_block.attentions.0.proj_in"
    header = json.dumps(
        {
            f"{module}.lora_A.weight": {"dtype": "F16", "shape": down, "data_offsets": [0, sizes[0]]},
            f"{module}.lora_B.weight": {"dtype": "F16", "shape": up, "data_offsets": [sizes[0], sum(sizes)]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + sum(sizes))
        except OSError:
            pytest.skip("no file system for a file of 16 GiB")
    for read in (lambda: load_expert(path), lambda: open_experts(path).__enter__()):
        with pytest.raises(MoleShapeError, match="a rank of at most 4,096"):
            read()
    assert os.stat(path).st_blocks * 512 < 2**20


def test_a_wan_file_for_two_transformers_says_where_it_went():
    wan = next(model for model in DENOISERS if str(model) == "wan")
    pipe = pipeline_of(wan)
    pipe.register_modules(transformer_2=wan.make())
    names = {"": True, "diffusion_model.": True, "transformer.": False, "transformer_2.": False}
    for prefix, told in names.items():
        name = f"{prefix}blocks.0.attn1.to_q"
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expert = load_expert(tensors, pipeline=pipe)
        assert any("go to transformer" in str(w.message) for w in caught) == told, prefix
        component = "transformer_2" if prefix == "transformer_2." else "transformer"
        assert list(expert.layers) == [f"{component}.blocks.0.attn1.to_q"]


def test_every_ending_is_a_part_or_refused():
    for ending in ENDINGS:
        assert (parse_part(f"x.{ending}") is None) == (unsupported(f"x.{ending}") is not None), ending
