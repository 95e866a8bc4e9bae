"""What the handle changes is what a fresh patch would have made; what it refuses changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mole_kernels.errors import (
    MoleKeyError,
    MoleShapeError,
    MoleStateError,
    MoleTypeError,
    MoleValueError,
    MoleWarning,
)
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.gates.gate import MaskGate
from mole_kernels.io.gates import load_gates
from mole_kernels.patching import swap as swap_module
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from tests.patching.test_plan import PATHS, gate_file
from tests.tiny_models import Mlp, State, make_expert, run_unet


@pytest.fixture
def experts(mlp) -> dict[str, Expert]:
    return {"a": make_expert(mlp, PATHS, rank=3), "b": make_expert(mlp, ["first", "mix"], rank=2, seed=1)}


@pytest.fixture
def handle(mlp, experts) -> Handle:
    return patch(mlp, experts, gate_file(mlp))


def output(model, x):
    with torch.no_grad():
        return model(x)


def fresh_output(experts, x, **kw):
    """What a newly patched copy of the model says."""
    torch.manual_seed(0)
    model = Mlp()
    patch(model, experts, gate_file(model), **kw)
    return output(model, x)


# -- scales
# --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_set_scales_is_a_fresh_patch_with_those_scales(mlp, handle, experts, x, mode):
    output(mlp, x)  # fills whatever is cached
    with mode():
        handle.set_scales({"b": 0.3})
    assert torch.equal(output(mlp, x), fresh_output(experts, x, scales={"b": 0.3}))
    handle.set_scales({"a": -2.0})
    assert handle.scales == {"a": -2.0, "b": 0.3}
    assert torch.equal(output(mlp, x), fresh_output(experts, x, scales={"a": -2.0, "b": 0.3}))
    torch.testing.assert_close(mlp.first.experts.scale, torch.tensor([-1.0, 0.15]))
    assert mlp.first.experts.base_scale.tolist() == [0.5, 0.5]


def test_zero_scales_give_the_base(unet):
    linear = [
        path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear) and "attentions" in path
    ]
    base = run_unet(unet)
    handle = patch(unet, {"a": make_expert(unet, linear), "b": make_expert(unet, linear, seed=1)}, "mole")
    assert not torch.equal(run_unet(unet), base)
    handle.set_scales({"a": 0, "b": 0})
    assert torch.equal(run_unet(unet), base)


def test_set_scales_follows_the_model_to_another_dtype_and_back(mlp, handle, x):
    handle.set_scales({"a": 0.5})
    mlp.double()
    handle.set_scales({"a": 0.25})
    assert mlp.first.experts.scale.tolist() == [0.125, 0.5]


class _Allocations(TorchDispatchMode):
    """Names of ops whose result lives in memory that none of their arguments had."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.names += [str(func) for t in made if t.untyped_storage().data_ptr() not in known]
        return result


def test_set_scales_allocates_nothing(handle):
    handle.set_scales({"a": 0.9})
    with _Allocations() as seen:
        torch.ones(3)
    assert seen.names == ["aten.ones.default"]  # the instrument sees one where there is one
    with _Allocations() as seen:
        handle.set_scales({"a": 0.5, "b": 2.0})
    assert not [name for name in seen.names if "lift_fresh" not in name]


@pytest.mark.parametrize(
    ("scales", "error", "words"),
    [
        ({"a": 2.0, "c": 1.0}, MoleValueError, "the adapters a, b, got one for 'c'"),
        ({"a": 2.0, "b": float("nan")}, MoleValueError, "scale of 'b': expected a finite number, got nan"),
        ({"a": 2.0, "b": float("inf")}, MoleValueError, "finite"),
        ({"a": 2.0, "b": "much"}, MoleTypeError, "scale of 'b': expected a number, got str"),
        ([1.0, 2.0], MoleTypeError, "scales"),
    ],
    ids=["unknown", "nan", "inf", "text", "list"],
)
def test_bad_scales_change_nothing(mlp, handle, x, scales, error, words):
    before = output(mlp, x)
    with pytest.raises(error, match=words):
        handle.set_scales(scales)
    assert handle.scales == {"a": 1.0, "b": 1.0}
    assert torch.equal(output(mlp, x), before)


# -- swap
# ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_a_swap_is_a_fresh_patch(mlp, handle, experts, x, rank):
    handle.set_scales({"a": 0.7, "b": 0.4})
    output(mlp, x)
    new = make_expert(mlp, PATHS, rank=rank, seed=7, scale=0.9)
    parameters = {path: layer.experts.down for path, layer in handle.layers.items()}
    handle.swap("a", new)
    want = fresh_output({**experts, "a": new}, x, scales={"a": 0.7, "b": 0.4})
    torch.testing.assert_close(output(mlp, x), want, rtol=1e-5, atol=1e-6)
    # up to the packed rank nothing is reallocated, so nothing recompiles
    assert all(
        (layer.experts.down is parameters[path]) == (rank <= 3) for path, layer in handle.layers.items()
    )
    handle.set_scales({"a": 0.2})
    want = fresh_output({**experts, "a": new}, x, scales={"a": 0.2, "b": 0.4})
    torch.testing.assert_close(output(mlp, x), want, rtol=1e-5, atol=1e-6)
    # the zeros that fill up a smaller rank are not kept in files
    assert {factor.rank for factor in handle.bank().experts["a"].layers.values()} == {rank}
    handle.swap("a", experts["a"])
    handle.set_scales({"a": 1.0, "b": 1.0})
    torch.testing.assert_close(output(mlp, x), fresh_output(experts, x), rtol=1e-5, atol=1e-6)


def test_a_swap_to_an_expert_of_fewer_layers(mlp, handle, experts, x):
    new = make_expert(mlp, ["first"], rank=3, seed=7)
    handle.swap("a", new)
    # its gates stay, but it adds nothing where it has no factors
    silent = {
        path: LowRank(f.down, torch.zeros_like(f.up), f.scale, f.conv)
        for path, f in experts["a"].layers.items()
    }
    want = fresh_output({**experts, "a": Expert({**silent, **new.layers})}, x)
    torch.testing.assert_close(output(mlp, x), want, rtol=1e-5, atol=1e-6)
    assert list(handle.bank().experts["a"].layers) == ["first"]


def test_bad_swaps_change_nothing(mlp, handle, experts, x):
    before = State(mlp, lambda: output(mlp, x))
    good = make_expert(mlp, PATHS, rank=3, seed=7)
    misfit = Expert({**good.layers, "mix": LowRank(torch.zeros(2, 9), torch.zeros(9, 2))})
    with pytest.raises(MoleShapeError, match="mix: expected down"):
        handle.swap("a", misfit)
    with pytest.raises(MoleValueError, match="one of the experts a, b, got 'c'"):
        handle.swap("c", good)
    with pytest.raises(
        MoleKeyError, match="1 of its 3 layers do not hold the expert it is to replace: second"
    ):
        handle.swap("b", good)
    with pytest.raises(MoleKeyError, match="none of its 1 layers holds"):
        handle.swap("b", make_expert(mlp, ["second"]), strict=False)
    with pytest.raises(MoleTypeError, match="expert 'a'"):
        handle.swap("a", 3)  # type: ignore[arg-type]
    before.assert_unchanged()
    with pytest.warns(MoleWarning, match="second"):
        handle.swap("b", good, strict=False)
    assert not torch.equal(output(mlp, x), before.output)


@pytest.mark.parametrize("rank", [2, 5], ids=["in-place", "repacked"])
@pytest.mark.parametrize(
    "fault", [RuntimeError("no"), KeyboardInterrupt()], ids=lambda fault: type(fault).__name__
)
def test_a_swap_that_fails_half_way_changes_nothing(mlp, handle, x, monkeypatch, fault, rank):
    before = State(mlp, lambda: output(mlp, x))
    calls = []

    class Failing(torch.Tensor):
        """Copies twice, then no more."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                calls.append(1)
                if len(calls) == 3:
                    raise fault
            return super().__torch_function__(func, types, args, kwargs or {})

    if rank == 2:
        stage = swap_module._stage
        monkeypatch.setattr(
            swap_module, "_stage", lambda *args: tuple(t.as_subclass(Failing) for t in stage(*args))
        )
    else:
        set_module = type(mlp.second).__setattr__

        def failing(module, name, value):
            set_module(module, name, value)
            if name == "experts":
                calls.append(1)
                if len(calls) == 2:
                    raise fault

        monkeypatch.setattr(nn.Module, "__setattr__", failing)
    with pytest.raises(type(fault)):
        handle.swap("a", make_expert(mlp, PATHS, rank=rank, seed=7))
    monkeypatch.undo()
    assert len(calls) >= 2
    before.assert_unchanged()
    handle.remove()


# -- gate maps
# -----------------------------------------------------------------------------------------------------------------------


def test_gate_maps_are_what_the_gates_said(mlp, handle, x):
    with pytest.raises(MoleStateError, match="no patched layer has run yet"):
        handle.gate_maps()
    output(mlp, x)
    maps = handle.gate_maps()
    assert list(maps) == PATHS
    tensors = gate_file(mlp_like(mlp)).layers["first"]
    want = torch.sigmoid(x @ tensors.phi.T + tensors.phi_bias)
    torch.testing.assert_close(maps["first"].token, want)
    assert (
        maps["first"].sample.shape == (2, 2)
        and maps["first"].names == ("a", "b")
        and maps["first"].given is None
    )
    assert maps["second"].names == ("a",) and maps["second"].token.shape == (2, 6, 1)


def mlp_like(_: nn.Module) -> Mlp:
    return Mlp()


def test_gate_maps_of_gates_given_and_absent(mlp, experts, x):
    mask = torch.rand(6, 2)
    handle = patch(
        mlp,
        experts,
        lambda path, module, layer: MaskGate(mask[:, : len(layer.names)]) if path == "first" else None,
    )
    output(mlp, x)
    maps = handle.gate_maps()
    assert (
        torch.equal(maps["first"].given, mask[None])
        and maps["first"].token is None
        and maps["first"].sample is None
    )
    assert maps["mix"][:2] == (None, None) and maps["mix"].given is None


# -- on, off, parameters, files
# --------------------------------------------------------------------------------------------------------


def test_disabled_is_the_base_bit_for_bit(unet):
    base = run_unet(unet)
    handle = patch(unet, {"a": make_expert(unet)}, "mole")
    patched = run_unet(unet)
    with handle.disable():
        assert torch.equal(run_unet(unet), base)
        with handle.enable():
            assert torch.equal(run_unet(unet), patched)
        assert torch.equal(run_unet(unet), base)
    assert torch.equal(run_unet(unet), patched)
    handle.disable()
    assert torch.equal(run_unet(unet), base)
    handle.enable()
    assert torch.equal(run_unet(unet), patched)
    with pytest.raises(KeyError), handle.disable():
        raise KeyError
    assert torch.equal(run_unet(unet), patched)
    with handle.disable():
        handle.remove()
    assert torch.equal(run_unet(unet), base)


def test_parameters_and_their_switches(mlp, handle, experts, x):
    assert len(handle.expert_parameters()) == 6 and len(handle.gate_parameters()) == 12
    assert not any(p.requires_grad for p in handle.expert_parameters() + handle.gate_parameters())
    trained = handle.experts_require_grad()
    assert trained == handle.expert_parameters()
    mlp(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in handle.gate_parameters())
    handle.experts_require_grad(False)
    gates = handle.gates_require_grad()
    mlp(x).square().sum().backward()
    assert all(p.grad is not None for p in gates)
    with pytest.raises(MoleStateError, match="a shares its packed parameters"):
        handle.expert_parameters("a")
    with pytest.raises(MoleValueError, match="'c'"):
        handle.expert_parameters("c")
    handle.remove()
    alone = patch(mlp, {"a": experts["a"]})
    assert alone.expert_parameters("a") == alone.expert_parameters()


def test_one_file_holds_experts_and_gates(mlp, handle, experts, x, tmp_path):
    handle.set_scales({"a": 0.5})
    handle.save(tmp_path / "mixture.safetensors")
    handle.set_scales({"a": 1.0})
    want = output(mlp, x)
    handle.remove()
    again = patch(mlp, tmp_path / "mixture.safetensors")
    assert again.names == ("a", "b") and mlp.second.experts.names == ("a",)
    # adapter weights are the caller's, not the file's
    assert again.scales == {"a": 1.0, "b": 1.0}
    assert torch.equal(output(mlp, x), want)
    assert mlp.mix.experts.factor("a").scale == experts["a"].layers["mix"].scale


def test_gates_are_saved_and_read_back(mlp, handle, x, tmp_path):
    file = handle.gates()
    assert file.expert_names == ("a", "b") and set(file.layers) == set(PATHS)
    original = gate_file(Mlp())
    assert torch.equal(file.layers["first"].phi, original.layers["first"].phi)
    handle.save_gates(tmp_path / "gates.safetensors")
    read = load_gates(tmp_path / "gates.safetensors")
    want = output(mlp, x)
    experts = handle.bank()
    handle.remove()
    with patch(mlp, experts, tmp_path / "gates.safetensors"):
        assert torch.equal(output(mlp, x), want)
    with patch(mlp, experts, read):
        assert torch.equal(output(mlp, x), want)


def test_official_gate_files_go_out_and_in(unet, tmp_path):
    experts = {"hand": make_expert(unet), "face": make_expert(unet, seed=1)}
    handle = patch(unet, experts, "mole")
    want = run_unet(unet)
    handle.save_gates(tmp_path / "moe.safetensors", dialect="official")
    handle.remove()
    with patch(unet, experts, tmp_path / "moe.safetensors") as again:
        assert again.names == ("hand", "face")
        torch.testing.assert_close(run_unet(unet), want)
    wrong = {"left": experts["hand"], "right": experts["face"]}
    with pytest.raises(
        MoleKeyError, match="expected gates for the experts left, right, got gates for face, hand"
    ):
        patch(unet, wrong, tmp_path / "moe.safetensors")


def test_what_has_no_gates_to_save(mlp, experts, tmp_path):
    with patch(mlp, experts) as handle:
        assert handle.gates() is None
        with pytest.raises(MoleStateError, match="no gates"):
            handle.save_gates(tmp_path / "gates.safetensors")
        handle.save(tmp_path / "bank.safetensors")
    with patch(mlp, experts, "constant") as handle, pytest.raises(MoleStateError, match="ConstantGate"):
        handle.save_gates(tmp_path / "gates.safetensors")
    assert ExpertBank.load(tmp_path / "bank.safetensors").names == ("a", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_the_bank_is_what_was_patched(mlp, handle, experts):
    bank = handle.bank()
    for name, expert in experts.items():
        assert set(bank.experts[name].layers) == set(expert.layers)
        for path, factor in expert.layers.items():
            got = bank.experts[name].layers[path]
            assert torch.equal(got.down, factor.down) and torch.equal(got.up, factor.up)
            assert (got.scale, got.conv) == (factor.scale, factor.conv)
    # copies: training on does not change what was collected
    mlp.first.experts.down.data.zero_()
    assert bank.experts["a"].layers["first"].down.abs().sum() > 0


def test_metadata_survives(mlp, experts):
    named = replace(experts["a"], metadata={"title": "a face"}, source="face.safetensors")
    assert patch(mlp, {"a": named}).bank().experts["a"].metadata == {"title": "a face"}


@pytest.mark.parametrize(
    "old, new", [("train_gates", "gates_require_grad"), ("train_experts", "experts_require_grad")]
)
def test_a_name_of_before_says_the_new_one(mlp, old, new):
    with patch(mlp, {"a": make_expert(mlp, PATHS)}) as handle, pytest.raises(AttributeError, match=new):
        getattr(handle, old)
