"""Biases, norms and magnitudes under the names of a model's own code: the same layers as under diffusers'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mole_kernels as mk
from mole_kernels.errors import MoleKeyError
from mole_kernels.io import load_expert
from tests.denoisers import DENOISERS

diffusers = pytest.importorskip("diffusers")

# Wan's own name -> diffusers'
LINEAR = {
    "self_attn.q": "attn1.to_q",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.k": "attn2.to_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
NORMS = {"self_attn.norm_q": "attn1.norm_q", "cross_attn.norm_k": "attn2.norm_k", "norm3": "norm2"}


@pytest.fixture(scope="module")
def wan() -> torch.nn.Module:
    model = next(m for m in DENOISERS if m.cls == "WanTransformer3DModel").make()
    return model.requires_grad_(False)


def files(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as step-distillation tools write it, and the same under diffusers' names."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 0.1

    own: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    for name, path in LINEAR.items():
        weight = model.get_submodule(f"blocks.0.{path}").weight
        parts = {
            "lora_down.weight": draw(2, weight.shape[1]),
            "lora_up.weight": draw(weight.shape[0], 2),
            "diff_b": draw(weight.shape[0]),
        }
        own |= {f"diffusion_model.blocks.0.{name}.{part}": t for part, t in parts.items()}
        theirs |= {f"transformer.blocks.0.{path}.{part}": t for part, t in parts.items()}
    for name, path in NORMS.items():
        norm = model.get_submodule(f"blocks.0.{path}")
        parts = {"diff": draw(*norm.weight.shape)}
        if getattr(norm, "bias", None) is not None:
            parts["diff_b"] = draw(*norm.bias.shape)
        own |= {f"diffusion_model.blocks.0.{name}.{part}": t for part, t in parts.items()}
        theirs |= {f"transformer.blocks.0.{path}.{part}": t for part, t in parts.items()}
    return own, theirs


def test_wans_own_names_are_diffusers(wan: torch.nn.Module):
    own, theirs = files(wan)
    first, second = load_expert(own, pipeline=diffusers.WanPipeline), load_expert(theirs)
    assert set(first.families) == set(second.families) and set(first.layers) == set(second.layers)
    model = next(m for m in DENOISERS if m.cls == "WanTransformer3DModel")
    plain = model.run(wan)
    before = {key: t.clone() for key, t in wan.state_dict().items()}
    with mk.patch(wan, {"a": theirs}):
        want = model.run(wan)
    with mk.patch(wan, {"a": own}):
        got = model.run(wan)
    assert torch.equal(got, want) and not torch.allclose(got, plain)
    assert all(torch.equal(t, before[key]) for key, t in wan.state_dict().items())


def test_the_change_is_the_files(wan: torch.nn.Module):
    """Against the weights with every part added."""
    _, theirs = files(wan)
    model = next(m for m in DENOISERS if m.cls == "WanTransformer3DModel")
    with mk.patch(wan, {"a": theirs}):
        got = model.run(wan)
    merged = model.make()
    with torch.no_grad():
        for path in LINEAR.values():
            layer, key = merged.get_submodule(f"blocks.0.{path}"), f"transformer.blocks.0.{path}"
            layer.weight += (theirs[f"{key}.lora_up.weight"] @ theirs[f"{key}.lora_down.weight"]).double()
            layer.bias += theirs[f"{key}.diff_b"]
        for path in NORMS.values():
            norm, key = merged.get_submodule(f"blocks.0.{path}"), f"transformer.blocks.0.{path}"
            norm.weight += theirs[f"{key}.diff"]
            if f"{key}.diff_b" in theirs:
                norm.bias += theirs[f"{key}.diff_b"]
    torch.testing.assert_close(got, model.run(merged), rtol=1e-5, atol=1e-6)


def test_what_a_converter_splits_is_refused_by_key():
    module = "double_blocks.0.img_attn.qkv"
    file = {
        f"{module}.lora_A.weight": torch.ones(2, 3072),
        f"{module}.lora_B.weight": torch.ones(9216, 2),
        f"{module}.diff_b": torch.ones(9216),
    }
    with pytest.raises(MoleKeyError, match=r"splits or does not know.*qkv"):
        load_expert(file, pipeline=diffusers.FluxPipeline)
