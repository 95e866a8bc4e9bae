"""A PEFT layer that computes through our operator gives PEFT's answer and gradients, or steps aside and says
why.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mole_kernels as mk
from mole_kernels import functional
from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from tests.peft_models import K, N, assert_as_right, calls, draw, make, twins

peft = pytest.importorskip("peft")
lora = pytest.importorskip("peft.tuners.lora")


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


@pytest.mark.parametrize("base", [True, False], ids=["with-base", "low-rank-alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [(4,), (1,), (4, 4), (3, 8, 5)], ids=str)
def test_same_answer(ranks: tuple[int, ...], dtype: torch.dtype, base: bool):
    plain, fast = twins(ranks, dtype)
    if not base:
        for model in (plain, fast):
            model[0].base_layer.weight.data.zero_()
            model[0].base_layer.bias.data.zero_()
    x = draw(2, 7, K, dtype=dtype)
    truth = copy.deepcopy(plain).double()(x.double())
    assert_as_right(fast(x), plain(x), truth)
    assert calls() == (1, {})


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (2, 3, 4, K), (0, K), (2, 0, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_any_leading_shape(shape: tuple[int, ...], bias: bool):
    plain, fast = twins((4, 2), bias=bias)
    x = draw(*shape)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls() == (1, {})


def test_strided_input():
    plain, fast = twins()
    x = draw(3, 2 * K, 5).mT[..., 1::2]
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [(4,), (4, 2)], ids=str)
def test_same_gradients(ranks: tuple[int, ...]):
    plain, fast = twins(ranks, torch.float64)
    x = draw(2, 7, K, dtype=torch.float64)
    grads = []
    for model in (plain, fast):
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        grads.append([inputs.grad, *(p.grad for p in model.parameters())])
    assert calls() == (1, {})
    assert len(grads[0]) == 3 + 2 * len(ranks)
    for theirs, ours in zip(*grads, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


def test_weight_zero_costs_nothing_and_still_trains():
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        model[0].set_scale("a0", 0.0)
    x = draw(3, K)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
        fast[0].set_scale("a1", 0.0)
        assert torch.equal(fast(x), fast[0].base_layer(x))
    fast(x).sum().backward()
    grad = fast[0].lora_A["a0"].weight.grad
    assert grad is not None and not grad.any()
    assert calls() == (3, {})


def test_tensors_are_read_at_each_call():
    plain, fast = twins((4, 2))
    x = draw(3, K)
    before = fast(x)
    for model in (plain, fast):
        layer = model[0]
        layer.lora_A["a0"].weight.data.copy_(draw(4, K, seed=5))
        layer.lora_B["a1"].weight.data = draw(N, 2, seed=6)
        layer.set_scale("a1", 3.0)
        layer.base_layer.weight.data.mul_(0.5)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fast(x), before)


def test_scaling_as_tensor():
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        model[0].scaling["a1"] = torch.tensor(0.3)
    x = draw(3, K)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls() == (1, {})


def test_scale_made_in_inference_mode_serves_training():
    _, fast = twins((7,))
    fast[0].set_scale("a0", 0.123456)
    with torch.inference_mode():
        fast(draw(3, K))
    fast(draw(3, K)).sum().backward()
    assert fast[0].lora_A["a0"].weight.grad is not None


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(adapter: torch.dtype):
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        model[0].lora_A.to(adapter)
    x = draw(2, 7, K)
    truth = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(x), plain(x)
    assert ours.dtype == torch.bfloat16
    assert_as_right(ours, theirs, truth)
    assert calls() == (1, {})


def test_remove_gives_everything_back():
    plain, fast = twins((4, 2))
    x = draw(3, K)
    handle = mk.accelerate(fast)
    before = {name: id(module) for name, module in fast.named_modules()}
    state = {name: (id(t), t.clone()) for name, t in fast.state_dict(keep_vars=True).items()}
    assert isinstance(fast[0], lora.Linear) and repr(fast) == repr(plain)
    fast(x)
    handle.remove()
    assert type(fast[0]) is lora.Linear and vars(fast[0]).keys() == vars(plain[0]).keys()
    assert {name: id(module) for name, module in fast.named_modules()} == before
    assert {name: id(t) for name, t in fast.state_dict(keep_vars=True).items()} == {
        name: i for name, (i, _) in state.items()
    }
    assert all(torch.equal(t, state[name][1]) for name, t in fast.state_dict().items())
    assert torch.equal(fast(x), plain(x)) and calls() == (1, {})
    handle.remove()


def test_copies_and_pickles_stay_accelerated():
    _, fast = twins((4, 2))
    x = draw(3, K)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(copied(x), fast(x))
    assert calls() == (6, {})


def test_which_layers_keep_their_own_forward():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.conv, self.emb = nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Embedding(5, 4)

    config = peft.LoraConfig(r=2, target_modules=["lin", "conv", "emb"])
    handle = mk.accelerate(peft.inject_adapter_in_model(config, Model(), "a"))
    assert list(handle.layers) == ["lin"]
    assert handle.skipped == {
        "conv": "Conv2d has a forward of its own",
        "emb": "Embedding has a forward of its own",
    }
    assert repr(handle) == "AccelerateHandle(1 layers accelerated, 2 skipped)"


def test_again_finds_the_new_layers():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model, "a")
    assert list(mk.accelerate(model).layers) == ["0"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "1"]), model, "b")
    assert list(mk.accelerate(model).layers) == ["0", "1"]


def test_bad_targets():
    with pytest.raises(MoleValueError, match="no PEFT LoRA layer"):
        mk.accelerate(nn.Linear(4, 4))
    with pytest.raises(MoleTypeError):
        mk.accelerate("unet")


def test_without_peft(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "mole_kernels.peft.forward", None)
    with pytest.raises(MoleStateError, match="PEFT cannot be imported"):
        mk.accelerate(make())


def test_status_and_reset():
    _, fast = twins()
    fast(draw(3, K))
    fast[0].enable_adapters(False)
    fast(draw(3, K))
    report: Any = mk.status(reset=True)
    assert report["accelerated"] == 1 and report["fallbacks"] == {"adapters are disabled": 1}
    assert report["backends"]["stacked"] is None and set(report["backends"]) >= {
        "cpu",
        "stacked",
        "reference",
    }
    assert calls() == (0, {})


def test_backend_refusals_step_aside_and_are_counted(monkeypatch: pytest.MonkeyPatch):
    from mole_kernels.backends import select

    plain, fast = twins()
    monkeypatch.setattr(functional, "_KNOWN", {})
    for backend in select.BACKENDS.values():
        monkeypatch.setattr(backend, "reason_against", lambda problem: "not today")
    x = draw(3, K)
    with pytest.warns(match="not today"):
        assert torch.equal(fast(x), plain(x))
    report: Any = mk.status()
    assert report["fallbacks"] == {"no backend takes the problem": 1}
    assert report["refusals"]["stacked: not today"] == 1
