"""LoRA over quantised bases: the base is called as it is, the adapters come on top in one go, and the answer
is PEFT's own.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mole_kernels as mk
from mole_kernels.errors import MoleBackendError
from tests.peft.quantised_layers import CASES, FEW, K, Quantised, twins
from tests.peft_models import calls, draw

peft = pytest.importorskip("peft")
# PEFT says so for every layer that was not loaded through transformers; it concerns merging
pytestmark = pytest.mark.filterwarnings(
    "ignore:TorchaoLoraLinear was instantiated", "ignore:MatMul8bitLt", "ignore:Already found"
)


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


def pair(case: Quantised, **config: Any) -> tuple[Any, Any, Any]:
    plain, fast = twins(case, **config)
    handle = mk.accelerate(fast)
    assert list(handle.report()) == ["0"]
    return plain, fast, handle


def assert_same(plain: Any, fast: Any, x: torch.Tensor) -> torch.Tensor:
    """Within four roundings of the input's dtype, over the whole output; PEFT rounds once for each adapter
    and product.
    """
    ours, theirs = fast(x), plain(x)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert (ours - theirs).float().norm() <= 4 * torch.finfo(x.dtype).eps * theirs.float().norm()
    return ours


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_answer(case: Quantised, grad: bool):
    plain, fast, _ = pair(case)
    assert type(plain[0]).__name__ == case.layer
    x = draw(2, 5, K, dtype=case.dtype)
    with torch.set_grad_enabled(grad):
        ours = assert_same(plain, fast, x)
        assert_same(plain, fast, x)
        base = plain[0].base_layer(x)
    assert (ours - base).float().norm() > 0.05 * base.float().norm()
    assert calls() == (2, {})
    said = case.base if case.package != "torchao" else f"weight is a {case.base}"
    assert [reason.endswith(said) for reason in mk.status()["base_called"]] == [True]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_same_gradients(case: Quantised):
    plain, fast, _ = pair(case)
    x = draw(5, K, dtype=case.dtype)
    grads = []
    for model in (plain, fast):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        inputs = x.clone().requires_grad_()
        model(inputs).float().square().sum().backward()
        grads.append([inputs.grad, *(p.grad for name, p in model.named_parameters() if "lora_" in name)])
    assert len(grads[0]) == 5
    eps = torch.finfo(case.dtype).eps
    for theirs, ours in zip(*grads, strict=True):
        assert theirs is not None and (ours - theirs).float().norm() <= 8 * eps * theirs.float().norm()
    assert calls() == (1, {})


@pytest.mark.parametrize("case", FEW, ids=str)
def test_weights_and_states(case: Quantised):
    """Scales, zero, one adapter, disabled, tensors written through .data: what PEFT does, each time."""
    plain, fast, _ = pair(case)
    x = draw(5, K, dtype=case.dtype)
    with torch.no_grad():
        for model in (plain, fast):
            model[0].set_scale("a1", 0.0)
        assert_same(plain, fast, x)
        for model in (plain, fast):
            model[0].set_adapter(["a1"])
        assert torch.equal(fast(x), fast[0].base_layer(x))
        for model in (plain, fast):
            model[0].set_adapter(["a0", "a1"])
            model[0].set_scale("a1", -2.0)
            model[0].lora_A["a0"].weight.data.mul_(3)
        assert_same(plain, fast, x)
        assert calls() == (3, {})
        for model in (plain, fast):
            model[0].enable_adapters(False)
        assert torch.equal(fast(x), plain(x))
    assert calls()[1] == {"adapters are disabled": 1}


@pytest.mark.parametrize("case", [case for case in FEW if case.package == "bitsandbytes"], ids=str)
def test_merge_and_back(case: Quantised):
    plain, fast, _ = pair(case)
    x = draw(5, K, dtype=case.dtype)
    with torch.no_grad(), pytest.warns(UserWarning, match="rounding errors"):
        for step in ("merge", "unmerge"):
            for model in (plain, fast):
                getattr(model[0], step)()
            assert_same(plain, fast, x)
    assert calls() == (1, {"adapters are merged into the weight": 1})


@pytest.mark.parametrize("case", FEW, ids=str)
def test_copies_pickles_and_the_way_back(case: Quantised):
    plain, fast, handle = pair(case)
    x = draw(5, K, dtype=case.dtype)
    with torch.no_grad():
        want = fast(x)
        # GGUF's and quanto's tensors cannot be copied, with us or without
        if case.package in ("bitsandbytes", "torchao"):
            assert torch.equal(copy.deepcopy(fast)(x), want)
        assert repr(fast[0]) == repr(plain[0]) and isinstance(fast[0], type(plain[0]))
        restored = pickle.loads(pickle.dumps(type(fast[0])))
        assert restored is type(fast[0])
        handle.remove()
        assert type(fast[0]) is type(plain[0]) and torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_output_may_be_added_to_in_place(case: Quantised):
    """What a base gave earlier must not change with what we add to a later output of its."""
    _, fast, _ = pair(case)
    x = draw(5, K, dtype=case.dtype)
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        before = fast[0].base_layer(x)
        copied = before.clone()
        fast(x)
        assert torch.equal(before, copied) and torch.equal(fast[0].base_layer(x), copied)
        fast[0].base_layer.register_forward_hook(lambda module, inputs, y: kept.append(y))
        fast(x)
    assert torch.equal(kept[0], copied)


def test_dora_over_a_quantised_base_steps_aside():
    case = FEW[1]
    plain, fast, _ = pair(case, use_dora=True)
    x = draw(5, K, dtype=case.dtype)
    assert torch.equal(fast(x), plain(x))
    assert calls() == (0, {"a LoRA variant (DoRA and its like)": 1})


def test_a_format_without_a_kernel_is_named():
    """diffusers cannot take this GGUF format apart: the base fails with and without adapters, and ours says
    which.
    """
    gguf = pytest.importorskip("gguf")
    case = next(case for case in CASES if case.package == "gguf")
    _, fast, _ = pair(case)
    base = fast[0].base_layer
    base.weight.quant_type = gguf.GGMLQuantizationType.TQ1_0
    with pytest.raises(KeyError):
        base(draw(2, K))
    with pytest.raises(
        MoleBackendError,
        match=r"^diffusers.GGUFLinear with a diffusers.GGUFParameter: this base layer has no kernel",
    ):
        fast(draw(2, K))


def test_quantised_layers_we_have_no_class_for_are_skipped_by_name():
    from peft.tuners.lora.gptq import GPTQLoraLinear

    model: Any = torch.nn.Sequential(GPTQLoraLinear(torch.nn.Linear(K, K), "a", peft.LoraConfig(r=2), r=2))
    assert mk.accelerate(model).skipped == {"0": "GPTQLoraLinear has a forward of its own"}
