"""77: fusing q, k and v after patching is an error, never experts that are silently gone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mole_kernels.errors import MoleStateError
from mole_kernels.patching.apply import patch
from tests.tiny_models import State, make_expert, run_flux, run_unet

MODELS = {"unet": run_unet, "flux": run_flux}


@pytest.fixture(params=MODELS)
def model_and_run(request):
    return request.getfixturevalue(request.param), MODELS[request.param]


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "fuse_projections")]


def test_fusing_a_patched_model_is_refused_and_changes_nothing(model_and_run):
    model, run = model_and_run
    base = State(model, lambda: run(model))
    handle = patch(model, {"a": make_expert(model)})
    names, output = list(model.state_dict()), run(model)
    with pytest.raises(MoleStateError, match="projections hold experts"):
        model.fuse_qkv_projections()
    for attention in attentions(model):
        with pytest.raises(MoleStateError, match=r"fuse_projections: .* projections hold experts"):
            attention.fuse_projections()
    assert list(model.state_dict()) == names and torch.equal(run(model), output)
    handle.remove()
    base.assert_unchanged()
    model.fuse_qkv_projections()
    assert any(name.endswith("to_qkv.weight") for name in model.state_dict())
    torch.testing.assert_close(run(model), base.output, rtol=1e-4, atol=1e-5)


def test_only_where_projections_are_patched(unet):
    patched = "mid_block.attentions.0.transformer_blocks.0.attn1"
    with patch(unet, {"a": make_expert(unet, [f"{patched}.to_q"])}):
        others = [attention for attention in attentions(unet) if attention is not unet.get_submodule(patched)]
        assert others and not any("fuse_projections" in attention.__dict__ for attention in others)
        others[0].fuse_projections()
    out = [path for path in dict(unet.named_modules()) if path.endswith("ff.net.2")]
    with patch(unet, {"a": make_expert(unet, out)}):
        unet.fuse_qkv_projections()


def test_two_handles_share_a_guard(unet):
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    first = patch(unet, {"a": make_expert(unet, [f"{attention}.to_q"])})
    second = patch(unet, {"b": make_expert(unet, [f"{attention}.to_k"])})
    first.remove()
    with pytest.raises(MoleStateError, match=r"\(.*to_k, …\)"):
        unet.fuse_qkv_projections()
    second.remove()
    unet.fuse_qkv_projections()


def test_a_pipeline_is_guarded(pipeline):
    handle = patch(pipeline, {"a": make_expert(pipeline)})
    want = run_unet(pipeline.unet)
    with pytest.raises(MoleStateError):
        pipeline.fuse_qkv_projections()
    assert torch.equal(run_unet(pipeline.unet), want)
    handle.remove()
    pipeline.fuse_qkv_projections()


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_guarded_too(unet, make_copy):
    patch(unet, {"a": make_expert(unet)})
    with pytest.raises(MoleStateError):
        make_copy(unet).fuse_qkv_projections()
