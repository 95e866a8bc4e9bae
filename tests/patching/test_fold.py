"""Folding: merged is unmerged, unfolding restores, and a gate that varies is refused; SELMA's criteria 1 and
5.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.lowrank import Expert
from mole_kernels.experts.merge import merge
from mole_kernels.gates.gate import ConstantGate, MaskGate
from mole_kernels.patching import fold as fold_module
from mole_kernels.patching.apply import patch
from mole_kernels.patching.fold import reason_against_folding
from tests.patching.test_plan import PATHS, gate_file
from tests.tiny_models import Mlp, State, make_expert, run_unet, tiny_unet


@pytest.fixture
def experts(mlp) -> dict[str, Expert]:
    return {"a": make_expert(mlp, PATHS, rank=3), "b": make_expert(mlp, ["first", "mix"], rank=2, seed=1)}


def output(model, x):
    with torch.no_grad():
        return model(x)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    }


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
def test_folded_merged_and_unmerged_agree(keep: bool, mlp, experts, x):
    base, values = output(mlp, x), {"a": 0.8, "b": -0.3}
    handle = patch(mlp, experts, scales=values)
    unmerged = output(mlp, x)
    handle.fold(keep=keep)
    folded = output(mlp, x)
    assert (folded - unmerged).norm() <= 1e-5 * unmerged.norm() < (unmerged - base).norm()
    handle.unfold()
    assert torch.equal(output(mlp, x), unmerged) or not keep
    handle.remove()
    patch(mlp, {"both": merge(experts, values)})
    assert (output(mlp, x) - unmerged).norm() <= 1e-5 * unmerged.norm()


def test_a_whole_unet():
    unet = tiny_unet()
    handle = patch(unet, {"a": make_expert(unet), "b": make_expert(unet, seed=1)})
    before, unmerged = weights(unet), run_unet(unet)
    handle.fold()
    assert (run_unet(unet) - unmerged).norm() <= 1e-5 * unmerged.norm()
    handle.unfold()
    assert all(torch.equal(value, before[name]) for name, value in weights(unet).items())
    assert torch.equal(run_unet(unet), unmerged)


def test_a_kept_copy_restores_bit_for_bit_and_the_handle_too(mlp, experts, x):
    state = State(mlp, lambda: output(mlp, x))
    with patch(mlp, experts) as handle:
        handle.fold()
        assert any(not torch.equal(tensor, value) for tensor, value in state.tensors.values())
    state.assert_unchanged()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_recomputing_restores_within_two_roundings(dtype: torch.dtype, mlp, experts):
    model = mlp.to(dtype)
    before = weights(model)
    handle = patch(model, experts)
    handle.fold(keep=False)
    folded = weights(model)
    handle.unfold()
    half = torch.finfo(dtype).eps / 2
    for path in PATHS:
        name = f"{path}.weight"
        then, inside, now = (found[name].double() for found in (before, folded, weights(model)))
        # 16 bits round twice on the way, through float32; float16 has subnormals
        allowed = (
            half * (inside.abs() + now.abs()) * (1 + 1e-3) + 2 * torch.finfo(dtype).smallest_normal * half
        )
        assert ((now - then).abs() <= allowed).all()
        assert not torch.equal(inside, then)


def test_constant_gates_fold(mlp, experts, x):
    made = {
        "first": ConstantGate(2, [0.25, 0.5]),
        "second": ConstantGate(1, 2.0),
        "mix": ConstantGate(2, learned=True),
    }
    handle = patch(mlp, experts, lambda path, module, layer: made[path])
    unmerged = output(mlp, x)
    handle.fold()
    assert (output(mlp, x) - unmerged).norm() <= 1e-5 * unmerged.norm()


def test_gates_that_vary_are_refused_and_nothing_changes(mlp, experts, x):
    def mask(path, module, layer):
        return MaskGate(torch.ones(6, len(layer.names))) if path == "mix" else None

    for gates, words in ((gate_file(mlp), "MoLEGate varies"), (mask, "layer mix: its MaskGate varies")):
        handle = patch(mlp, experts, gates)
        before, said = weights(mlp), output(mlp, x)
        with pytest.raises(MoleStateError, match=words):
            handle.fold()
        assert all(torch.equal(value, before[name]) for name, value in weights(mlp).items())
        assert torch.equal(output(mlp, x), said)
        handle.remove()


def test_other_reasons(mlp, experts):
    handle = patch(mlp, experts)
    one = handle._patched["first"]
    assert reason_against_folding(one, {}) is None
    assert "shared with another module" in str(reason_against_folding(one, {id(one.module.weight): 2}))
    with torch.inference_mode():
        other = copy.copy(one)
        other.module = nn.Linear(2, 2)
    assert "inference_mode" in str(reason_against_folding(other, {}))
    other.module = nn.Linear(2, 2, device="meta")
    assert "offload" in str(reason_against_folding(other, {}))


def test_a_tied_weight_is_refused(experts, x):
    model = Mlp()
    model.twin = nn.Linear(6, 10)
    model.twin.weight = model.first.weight
    handle = patch(model, {"a": experts["b"]})
    with pytest.raises(MoleStateError, match="layer first: its weight is shared"):
        handle.fold()
    assert torch.equal(model.twin.weight, model.first.weight)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
def test_a_failure_half_way_takes_everything_back(
    keep: bool, error: BaseException, mlp, experts, x, monkeypatch
):
    handle = patch(mlp, experts)
    before, said, made = weights(mlp), output(mlp, x), []

    def third(module, sign, real=fold_module._shifted):
        made.append(module)
        if len(made) == 3:
            raise error
        return real(module, sign)

    monkeypatch.setattr(fold_module, "_shifted", third)
    with pytest.raises(type(error)):
        handle.fold(keep=keep)
    monkeypatch.undo()
    for name, value in weights(mlp).items():
        assert torch.allclose(value, before[name], rtol=0, atol=0 if keep else 1e-6), name
    assert torch.allclose(output(mlp, x), said, atol=0 if keep else 1e-5)
    handle.fold()


def test_overflow_is_refused(mlp, experts, x):
    model = mlp.half()
    handle = patch(model, experts, scales={"a": 1e6})
    before = weights(model)
    with pytest.raises(MoleValueError, match=r"layer first: the folded weight overflows in torch\.float16"):
        handle.fold()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_while_folded_the_handle_only_reads(mlp, experts):
    handle = patch(mlp, experts)
    with pytest.raises(MoleStateError, match="nothing is folded"):
        handle.unfold()
    handle.fold()
    for refused in (
        lambda: handle.set_scales({"a": 0.5}),
        lambda: handle.swap("a", experts["b"]),
        handle.enable,
        handle.disable,
        handle.remove,
        handle.fold,
    ):
        with pytest.raises(MoleStateError, match=r"folded into the weights.\nHint: handle.unfold\(\) first"):
            refused()
    assert handle.bank().names == ("a", "b")
    handle.unfold()
    handle.remove()


@pytest.mark.parametrize(("keep", "touch"), [(True, "weight"), (False, "weight"), (False, "expert")])
def test_what_was_written_to_meanwhile_is_not_unfolded(keep: bool, touch: str, mlp, experts):
    handle = patch(mlp, experts)
    handle.fold(keep=keep)
    with torch.no_grad():
        (mlp.first.weight if touch == "weight" else mlp.first.experts.up).mul_(2)
    now = weights(mlp)
    with pytest.raises(MoleStateError, match=r"first: its weight .*written to while folded"):
        handle.unfold()
    assert all(torch.equal(value, now[name]) for name, value in weights(mlp).items())


def test_layers_that_are_off_stay_out(mlp, experts, x):
    handle = patch(mlp, experts)
    handle.disable()
    base = output(mlp, x)
    handle.fold()
    assert torch.equal(output(mlp, x), base)
