"""Scales by component and by block, for UNets, transformers and text encoders, in diffusers' shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_kernels.errors import MoleError, MoleValueError
from mole_kernels.patching.apply import patch
from mole_kernels.patching.block_scales import check_scales, layer_scales, scale_at
from tests.tiny_models import make_expert, run_flux, tiny_flux, tiny_pipeline

pytest.importorskip("diffusers")


def pipe_and_paths():
    pipe = tiny_pipeline()
    paths = [f"unet.{n}" for n, _ in pipe.unet.named_modules() if n.endswith(("to_q", "to_v"))]
    return pipe, paths + [
        f"text_encoder.{n}" for n, _ in pipe.text_encoder.named_modules() if n.endswith("q_proj")
    ]


def scales_of(handle):
    return {
        path: module.experts.scale.item() / module.experts.base_scale.item()
        for path, module in handle.layers.items()
    }


def test_by_component_and_by_block():
    pipe, paths = pipe_and_paths()
    handle = patch(pipe, {"a": make_expert(pipe, paths)})
    handle.set_scales({"a": {"unet": 0.5, "text_encoder": 0.25}})
    assert scales_of(handle) == {p: 0.5 if p.startswith("unet") else 0.25 for p in paths}
    handle.set_scales({"a": {"text_encoder": 2.0}})
    assert scales_of(handle) == {p: 1.0 if p.startswith("unet") else 2.0 for p in paths}
    by_block = {"unet": {"down": 0.5, "up": 0.75}, "text_encoder": {"layers.0": 0.25}}
    handle.set_scales({"a": by_block})
    want = {
        p: 0.25 if ".layers.0." in p else 0.5 if ".down_blocks." in p else 0.75 if ".up_blocks." in p else 1.0
        for p in paths
    }
    assert scales_of(handle) == want and set(want.values()) == {0.25, 0.5, 0.75, 1.0}
    assert handle.scales == {"a": by_block}
    # blocks alone are those of the denoiser
    handle.set_scales({"a": {"down": 0.5}})
    assert scales_of(handle) == {p: 0.5 if ".down_blocks." in p else 1.0 for p in paths}
    handle.set_scales({"a": 1.0})
    assert set(scales_of(handle).values()) == {1.0}


def test_diffusers_gives_the_same_layers_the_same_scales():
    pipe, paths = pipe_and_paths()
    paths = [p for p in paths if p.startswith("unet.")]
    expert = make_expert(pipe, paths, scale=1.0)
    keys = {}
    for path, layer in expert.layers.items():
        keys[f"{path}.lora_A.weight"], keys[f"{path}.lora_B.weight"] = layer.down, layer.up
    for scale in ({"down": 0.5, "mid": 0.25, "up": {"block_1": [0.1, 0.2]}}, {"up": {"block_1": 0.3}}):
        handle = patch(pipe, {"a": expert}, scales={"a": {"unet": scale}})
        ours = scales_of(handle)
        handle.remove()
        pipe.load_lora_weights(dict(keys), adapter_name="a")
        pipe.set_adapters(["a"], [{"unet": scale}])
        modules = dict(pipe.unet.named_modules())
        assert ours == pytest.approx({p: modules[p.removeprefix("unet.")].scaling["a"] for p in paths})
        pipe.unload_lora_weights()


def test_blocks_of_a_transformer_are_whole_parts_of_a_path():
    flux = tiny_flux()
    paths = [n for n, _ in flux.named_modules() if n.endswith("to_q")]
    assert {p.partition(".")[0] for p in paths} == {"transformer_blocks", "single_transformer_blocks"}
    handle = patch(flux, {"a": make_expert(flux, paths)})
    before = run_flux(flux)
    handle.set_scales({"a": {"transformer_blocks": 0.5}})
    assert scales_of(handle) == {p: 0.5 if p.startswith("transformer_blocks") else 1.0 for p in paths}
    assert not torch.equal(run_flux(flux), before)
    handle.set_scales({"a": {"single_transformer_blocks.0": 0.0, "transformer_blocks.0.attn": 2.0}})
    assert scales_of(handle) == {p: 2.0 if p.startswith("transformer_blocks") else 0.0 for p in paths}


BAD = {
    "an unknown component": {"te": 0.5},
    "a component of another pipeline": {"transformer": {"transformer_blocks": 0.5}},
    "components beside blocks": {"unet": 0.5, "down": 0.5},
    "an unknown block": {"unet": {"sideways": 0.5}},
    "a block that is not there": {"text_encoder": {"layers.99": 0.5}},
    "a component without layers of this adapter": {"vae": 0.5},
    "a list": [1.0] * 17,
    "a list for a component": {"unet": [1.0, 2.0]},
    "a list of the wrong length": {"up": {"block_1": [1.0] * 17}},
    "a block of blocks": {"text_encoder": {"layers.0": {"q": 1.0}}},
    "text": {"unet": "half"},
    "NaN": {"unet": {"down": float("nan")}},
    "nothing": {"unet": None},
    "a number too large": {"text_encoder": 1e300},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_refused_in_words(name):
    pipe, paths = pipe_and_paths()
    handle = patch(pipe, {"a": make_expert(pipe, paths)}, scales={"a": 0.5})
    before = scales_of(handle)
    with pytest.raises(MoleError, match=r"scale of 'a'") as caught:
        handle.set_scales({"a": BAD[name]})
    assert "unpack" not in str(caught.value)
    assert scales_of(handle) == before and handle.scales == {"a": 0.5}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "unet",
                    "text_encoder",
                    "vae",
                    "down",
                    "mid",
                    "up",
                    "block_0",
                    "block_1",
                    "layers.0",
                    "te",
                    "",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
PIPE, PATHS = pipe_and_paths()


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_shape_is_taken_whole_or_refused_in_words(scale):
    try:
        checked = check_scales({"a": scale}, ["a"])
        scales = layer_scales("a", checked["a"], PIPE, PATHS)
    except MoleError:
        return
    assert all(isinstance(scale_at(scales, path), float) for path in PATHS)


def test_check_scales_names_the_adapters():
    with pytest.raises(MoleValueError, match="the adapters a, b, got one for 'c'"):
        check_scales({"c": 1.0}, ["a", "b"])
