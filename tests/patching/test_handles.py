"""A handle that nobody kept is found again from the model, and by nobody else."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import mole_kernels as mk
from mole_kernels.errors import MoleTypeError
from tests.tiny_models import Mlp, make_expert, tiny_pipeline


def test_found_again_from_the_module_the_pipeline_and_what_holds_them():
    model = Mlp()
    base = model(X)
    assert mk.handles(model) == ()
    mk.patch(model, {"a": make_expert(model)})
    (handle,) = mk.handles(torch.nn.Sequential(model))
    assert handle.names == ("a",) and mk.handles(model) == (handle,)
    handle.remove()
    assert mk.handles(model) == () and torch.equal(model(X), base)
    assert "_mole_handles" not in vars(model)


X = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3))


def test_of_a_pipeline_with_several_components():
    pytest.importorskip("diffusers")
    pipe = tiny_pipeline()
    text = [f"text_encoder.{n}" for n, _ in pipe.text_encoder.named_modules() if n.endswith("q_proj")]
    first = mk.patch(pipe, {"a": make_expert(pipe.unet)})
    second = mk.patch(pipe, {"b": make_expert(pipe, text)})
    assert mk.handles(pipe) == tuple(sorted((first, second), key=mk.handles(pipe).index))
    assert mk.handles(pipe.unet) == (first,) and mk.handles(pipe.text_encoder) == (second,)
    first.remove()
    assert mk.handles(pipe) == (second,)
    with pytest.raises(MoleTypeError):
        mk.handles("pipe")


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"]
)
def test_a_copy_has_no_handle(how):
    model = Mlp()
    mk.patch(model, {"a": make_expert(model)})
    other = how(model)
    assert mk.handles(other) == () and torch.equal(other(X), model(X))


def test_a_patched_model_is_freed_with_its_handle():
    model = Mlp()
    gone = weakref.ref(mk.patch(model, {"a": make_expert(model)}))
    del model
    gc.collect()
    assert gone() is None


def test_a_served_model_shows_no_handle_of_its_own():
    model = Mlp()
    served = mk.serve(model, {"a": make_expert(model)})
    assert mk.handles(model) == ()
    served.remove()


def test_a_patch_that_fails_leaves_no_handle(monkeypatch):
    from mole_kernels.patching import apply as apply_module

    model = Mlp()
    monkeypatch.setattr(apply_module, "regroup", lambda roots: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mk.patch(model, {"a": make_expert(model)})
    assert "_mole_handles" not in vars(model)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["experts", "gates"])
def test_a_cast_in_the_middle_of_training_rounds_nothing_that_trains(what, cast):
    model = Mlp()
    handle = mk.patch(model, {"a": make_expert(model)}, "mole")
    trained = handle.expert_parameters() if what == "experts" else handle.gate_parameters()
    still = handle.gate_parameters() if what == "experts" else handle.expert_parameters()
    for parameter in trained:
        parameter.requires_grad_()
    model(X).square().sum().backward()
    before = [p.detach().clone() for p in trained]
    model.to(cast)
    assert all(p.dtype == torch.float32 and torch.equal(p, was) for p, was in zip(trained, before))
    assert all(p.grad.dtype == torch.float32 for p in trained if p.grad is not None)
    assert model.first.weight.dtype == cast and (what == "experts" or all(p.dtype == cast for p in still))
    model.zero_grad()
    model(X.to(cast)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained if p.grad is not None)
    torch.optim.SGD(trained, 1e-4).step()
    # once nothing trains, a cast is a cast
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    model.to(torch.float32).to(cast)
    assert all(p.dtype == cast for p in trained)
