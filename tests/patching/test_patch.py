"""Patching computes the mixture, touches nothing else, and is undone bit for bit, whatever goes wrong on the
way.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.gates.gate import ConstantGate, MoLEGate
from mole_kernels.io.gates import GateFile, GateTensors
from mole_kernels.layers.attach import detach
from mole_kernels.modules.scan import mole_targets, sizes
from mole_kernels.patching import apply as apply_module
from mole_kernels.patching.apply import apply, patch
from mole_kernels.patching.plan import plan
from tests.patching.test_plan import PATHS, gate_file
from tests.tiny_models import Mlp, State, make_expert, run_unet

ROOT = Path(__file__).parents[2]
GATES = ["none", "local", "global", "both"]


def mixture(
    layer: nn.Module,
    x: Tensor,
    factors: dict[str, LowRank],
    gates: GateTensors | None,
    names: tuple[str, ...],
    weights: dict,
) -> Tensor:
    """The paper's formula in float64, expert by expert, with the expert outputs pooled as its code does. x
    [B,T,K].
    """
    weight = layer.weight.detach().double().flatten(1)
    y = x @ weight.T + (0 if layer.bias is None else layer.bias.detach().double())
    for name, factor in factors.items():
        row = names.index(name)
        out = factor.scale * weights.get(name, 1.0) * (x @ factor.down.double().T) @ factor.up.double().T
        gate = torch.ones(x.shape[0], x.shape[1], 1, dtype=torch.float64)
        if gates is not None and gates.phi is not None:
            gate = gate * torch.sigmoid(x @ gates.phi[row].double() + gates.phi_bias[row].double())[..., None]
        if gates is not None and gates.head is not None:
            gate = (
                gate
                * torch.sigmoid(out.mean(1) @ gates.head[row].double() + gates.head_bias[row].double())[
                    :, None, None
                ]
            )
        y = y + out * gate
    return y


def truth(model: Mlp, x: Tensor, experts: dict[str, Expert], file: GateFile | None, weights: dict) -> Tensor:
    def layer(path: str, x: Tensor) -> Tensor:
        factors = {name: expert.layers[path] for name, expert in experts.items() if path in expert.layers}
        names = file.expert_names if file is not None else tuple(factors)
        return mixture(
            model.get_submodule(path), x, factors, file.layers[path] if file else None, names, weights
        )

    y = layer("second", torch.tanh(layer("first", x.double())))
    return layer("mix", y).mT.unflatten(2, (2, -1))


def half_of(file: GateFile, kind: str) -> GateFile:
    dropped = {"local": ("head", "head_bias"), "global": ("phi", "phi_bias"), "both": ()}[kind]
    layers = {path: replace(tensors, **dict.fromkeys(dropped)) for path, tensors in file.layers.items()}
    return GateFile(layers, file.expert_names)


@pytest.mark.parametrize("kind", GATES)
def test_the_model_computes_the_mixture(mlp, x, kind):
    # b lacks a layer and the file names the experts in another order: rows go by name
    experts = {"a": make_expert(mlp, PATHS, rank=3), "b": make_expert(mlp, ["first", "mix"], seed=1)}
    file = None if kind == "none" else half_of(gate_file(mlp, ("b", "a")), kind)
    want = truth(mlp, x, experts, file, {"b": 0.7})
    base = mlp(x)
    handle = patch(mlp, experts, file, scales={"b": 0.7})
    assert mlp.second.experts.names == ("a",)
    got = mlp(x).double()
    assert (got - want).norm() <= 2e-6 * want.norm()
    assert (base - want).norm() > 0.05 * want.norm()
    assert handle.names == ("a", "b") and list(handle.layers) == PATHS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_experts_take_the_layers_dtype(mlp, x, dtype):
    experts = {"a": make_expert(mlp, PATHS)}
    want = truth(mlp.to(dtype), x.to(dtype), experts, None, {})
    patch(mlp, experts)
    got = mlp(x.to(dtype))
    assert (
        got.dtype == dtype
        and mlp.first.experts.down.dtype == dtype
        and mlp.first.experts.scale.dtype == torch.float32
    )
    allowed = {torch.float64: 1e-7, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (got.double() - want).norm() <= allowed * want.norm()


def test_42_values_that_half_precision_cannot_hold(mlp):
    mlp.half()
    state = State(mlp, lambda: torch.zeros(0))
    factor = LowRank(torch.full((1, 6), 7e4), torch.ones(10, 1))
    with pytest.raises(
        MoleValueError, match="expert 'e', layer first: its values do not fit the layer's float16"
    ):
        patch(mlp, {"e": Expert({"first": factor})})
    state.assert_unchanged()


@pytest.mark.parametrize("gates", [None, "mole", "local", "global", "constant"])
def test_fresh_experts_change_nothing(unet, gates):
    base = run_unet(unet)
    shapes = {path: sizes(layer) for path, layer in mole_targets(unet).items()}
    bank = ExpertBank.new(shapes, ["a", "b"], rank=2)
    with patch(unet, bank, gates, targets=lambda path, module: isinstance(module, nn.Linear)) as handle:
        assert len(handle.layers) == 40
        assert torch.equal(run_unet(unet), base)
    # a 1x1 convolution is computed as a product, which rounds otherwise than torch's convolution does
    with patch(unet, bank, gates) as handle:
        assert len(handle.layers) == 48
        torch.testing.assert_close(run_unet(unet), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", [None, "mole"])
def test_removal_restores_everything(unet, gates):
    unet.mid_block.requires_grad_(False)
    unet.mid_block.attentions[0].proj_in.register_forward_hook(lambda *_: None)
    state = State(unet, lambda: run_unet(unet))
    with patch(unet, {"a": make_expert(unet), "b": make_expert(unet, seed=1)}, gates) as handle:
        assert len(handle.layers) == 48
        assert not torch.equal(run_unet(unet), state.output)
    state.assert_unchanged()


def test_a_batch_of_two_is_two_batches_of_one(unet):
    patch(unet, {"a": make_expert(unet), "b": make_expert(unet, seed=1)}, "mole")
    x, text = torch.randn(2, 4, 8, 6), torch.randn(2, 5, 12)
    with torch.no_grad():
        together = unet(x, 3, text).sample
        alone = torch.cat([unet(x[b : b + 1], 3, text[b : b + 1]).sample for b in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_base_is_frozen_and_only_it(mlp, x):
    mlp.second.weight.requires_grad_(False)
    outside = nn.Sequential(mlp, nn.Flatten(2), nn.Linear(6, 2))
    handle = patch(outside, {"a": make_expert(outside, ["0.first", "0.second"])}, "mole")
    assert not any(
        p.requires_grad
        for layer in handle.layers.values()
        for p in (layer.weight, layer.bias)
        if p is not None
    )
    assert mlp.mix.weight.requires_grad
    assert all(p.requires_grad for p in handle.gate_parameters()) and not any(
        p.requires_grad for p in handle.expert_parameters()
    )
    outside(x).sum().backward()
    assert all(p.grad is not None for p in handle.gate_parameters())
    handle.remove()
    assert (
        mlp.first.weight.requires_grad
        and mlp.first.bias.requires_grad
        and not mlp.second.weight.requires_grad
    )


def test_fresh_gates_by_word_and_by_callable(mlp):
    experts = {"a": make_expert(mlp, PATHS), "b": make_expert(mlp, ["first"])}
    for word, local, pooled in (("mole", True, True), ("local", True, False), ("global", False, True)):
        with patch(mlp, experts, word) as handle:
            for layer in handle.layers.values():
                assert isinstance(layer.gate, MoLEGate) and (
                    layer.gate.phi is not None,
                    layer.gate.head is not None,
                ) == (local, pooled)
            rows = mlp.first.gate.phi if local else mlp.first.gate.head
            assert rows.shape[0] == 2
    with patch(mlp, experts, "constant"):
        assert isinstance(mlp.mix.gate, ConstantGate) and mlp.mix.gate.logit.shape == (1,)
    seen = []

    def maker(path: str, module: nn.Module, layer: LayerExperts):
        seen.append((path, module, layer.names))
        return ConstantGate(len(layer.names), 0.5) if path == "first" else None

    with patch(mlp, experts, maker):
        assert mlp.first.gate.value.tolist() == [0.5, 0.5] and mlp.second.gate is None
    assert seen == [
        ("first", mlp.first, ("a", "b")),
        ("second", mlp.second, ("a",)),
        ("mix", mlp.mix, ("a",)),
    ]


def test_a_pipeline_is_patched_by_component(pipeline):
    # transformers 4 has "text_model." before it
    path, layer = next(
        (n, m) for n, m in pipeline.text_encoder.named_modules() if n.endswith("encoder.layers.0.mlp.fc1")
    )
    expert = make_expert(pipeline, ["unet.mid_block.attentions.0.proj_in", f"text_encoder.{path}"])
    handle = patch(pipeline, {"e": expert})
    assert handle.layers[f"text_encoder.{path}"] is layer and layer.experts.names == ("e",)


def test_peft_layers_keep_their_adapter(unet):
    from peft import LoraConfig

    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with_peft = run_unet(unet)
    expert = make_expert(unet, [path])
    layer, x = unet.get_submodule(path), torch.randn(1, 3, 16)
    before = layer(x)
    handle = patch(unet, {"e": expert})
    torch.testing.assert_close(layer(x), before + x @ expert.layers[path].delta().T)
    handle.remove()
    assert torch.equal(run_unet(unet), with_peft)


def test_a_meta_model_is_patched_with_real_experts():
    with torch.device("meta"):
        model = Mlp()
    source = Mlp()
    experts = {"a": make_expert(source, PATHS)}
    patch(model, experts, "mole")
    assert model.first.experts.down.device.type == "cpu" and model.first.gate.phi.device.type == "cpu"
    model.load_state_dict(source.state_dict(), assign=True, strict=False)
    with patch(source, experts, lambda path, *_: copy.deepcopy(model.get_submodule(path).gate)):
        x = torch.randn(2, 6, 6)
        assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_patched_model_work(unet, make_copy):
    patch(unet, {"a": make_expert(unet)}, "mole")
    want = run_unet(unet)
    assert torch.equal(run_unet(make_copy(unet)), want)


# -- when something goes wrong
# ---------------------------------------------------------------------------------------------------------

FAULTS = [RuntimeError("no"), MemoryError(), KeyboardInterrupt(), torch.OutOfMemoryError("full")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("place", ["pack", "make_gate", "attach", "late attach", "guards", "handle"])
def test_67_68_a_fault_half_way_changes_nothing(mlp, x, monkeypatch, fault, place):
    check_fault(mlp, lambda: mlp(x), monkeypatch, fault, place, at=1 if place in ("guards", "handle") else 2)


@pytest.mark.parametrize("place", ["attach", "guards"])
def test_67_a_fault_half_way_through_a_unet(unet, monkeypatch, place):
    check_fault(
        unet,
        lambda: run_unet(unet),
        monkeypatch,
        KeyboardInterrupt(),
        place,
        at=1 if place == "guards" else 20,
    )


def check_fault(model: nn.Module, run, monkeypatch, fault: BaseException, place: str, at: int) -> None:
    """Patch with `fault` raised by call `at` of one step (after that call's work, for "late"), then patch for
    good.
    """
    state = State(model, run)
    owner, name = {
        "pack": (apply_module, "pack"),
        "make_gate": (apply_module, "make_gate"),
        "attach": (apply_module, "attach"),
        "late attach": (apply_module, "attach"),
        "guards": (apply_module.guards, "install"),
        "handle": (apply_module, "Handle"),
    }[place]
    original, calls = getattr(owner, name), 0

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls != at:
            return original(*args)
        if place == "late attach":
            original(*args)
        raise fault

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(type(fault)):
        patch(model, {"a": make_expert(model)}, "mole")
    assert calls == at
    monkeypatch.undo()
    state.assert_unchanged()
    with patch(model, {"a": make_expert(model)}, "mole"):
        assert not torch.equal(run(), state.output)
    state.assert_unchanged()


def test_an_attach_that_stops_inside_changes_nothing(mlp, x, monkeypatch):
    state = State(mlp, lambda: mlp(x))

    def half(module, experts, gate, backend):
        module.__class__ = type("Half", (nn.Linear,), {})
        module.experts = experts
        module.register_forward_hook(lambda *_: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(apply_module, "attach", half)
    with pytest.raises(KeyboardInterrupt):
        patch(mlp, {"a": make_expert(mlp, PATHS)})
    state.assert_unchanged()


def test_bad_arguments_change_nothing(mlp, x):
    state = State(mlp, lambda: mlp(x))
    experts = {"a": make_expert(mlp, PATHS)}
    with pytest.raises(MoleValueError, match="backend"):
        patch(mlp, experts, backend="fastest")
    with pytest.raises(MoleValueError, match="scales for the adapters a, got one for 'b'"):
        patch(mlp, experts, scales={"b": 1.0})
    with pytest.raises(MoleValueError, match="finite"):
        patch(mlp, experts, scales={"a": float("nan")})
    state.assert_unchanged()


def test_64_patch_twice(mlp, x):
    handle = patch(mlp, {"a": make_expert(mlp, PATHS)})
    patched = State(mlp, lambda: mlp(x))
    with pytest.raises(MoleStateError, match="first already holds the experts a"):
        patch(mlp, {"a": make_expert(mlp, PATHS)})
    patched.assert_unchanged()
    handle.remove()
    assert patch(mlp, {"a": make_expert(mlp, PATHS)}).active


def test_a_stale_plan(mlp):
    made = plan(mlp, {"a": make_expert(mlp, PATHS)})
    patch(mlp, {"b": make_expert(mlp, ["mix"])})
    with pytest.raises(MoleStateError, match="layer mix: it has changed since it was planned"):
        apply(made)
    assert type(mlp.first) is nn.Linear


def test_65_remove_twice(mlp, x):
    state = State(mlp, lambda: mlp(x))
    handle = patch(mlp, {"a": make_expert(mlp, PATHS)})
    handle.remove()
    for call in (
        handle.remove,
        handle.disable,
        handle.gate_maps,
        handle.bank,
        lambda: handle.set_scales({"a": 1.0}),
        handle.__enter__,
    ):
        with pytest.raises(MoleStateError, match="removed already"):
            call()
    state.assert_unchanged()


def test_66_remove_while_another_handle_holds_the_layer(mlp, x):
    first = patch(mlp, {"a": make_expert(mlp, PATHS)})
    detach(mlp.first)
    second = patch(mlp, {"b": make_expert(mlp, ["first"], seed=1)})
    both = State(mlp, lambda: mlp(x))
    with pytest.raises(MoleStateError, match="first no longer holds the experts of this patch"):
        first.remove()
    both.assert_unchanged()
    second.remove()


def test_two_handles_on_different_layers_are_independent(mlp, x):
    state = State(mlp, lambda: mlp(x))
    first, second = (
        patch(mlp, {"a": make_expert(mlp, ["first"])}),
        patch(mlp, {"b": make_expert(mlp, ["second"], seed=1)}),
    )
    first.remove()
    assert mlp.second.experts.names == ("b",)
    second.remove()
    state.assert_unchanged()


@pytest.mark.parametrize(
    "fault", [RuntimeError("no"), KeyboardInterrupt()], ids=lambda fault: type(fault).__name__
)
def test_a_removal_that_fails_leaves_the_patch_whole(mlp, x, monkeypatch, fault):
    from mole_kernels.patching import patched as patched_module

    state = State(mlp, lambda: mlp(x))
    handle = patch(mlp, {"a": make_expert(mlp, PATHS)})
    patched = State(mlp, lambda: mlp(x))

    def failing(module):
        if module is mlp.second:
            raise fault
        detach(module)

    monkeypatch.setattr(patched_module, "detach", failing)
    with pytest.raises(type(fault)):
        handle.remove()
    patched.assert_unchanged()
    monkeypatch.undo()
    handle.remove()
    state.assert_unchanged()


def test_hooks_added_after_the_patch_survive_its_removal(mlp, x):
    handle = patch(mlp, {"a": make_expert(mlp, PATHS)})
    calls = []
    mlp.first.register_forward_hook(lambda *_: calls.append(1))
    handle.remove()
    mlp(x)
    assert calls == [1]


def test_a_hook_that_captured_the_patched_forward_is_named(mlp, x):
    handle = patch(mlp, {"a": make_expert(mlp, PATHS)})
    patched = mlp(x)
    forward = mlp.first.forward
    mlp.first.forward = lambda *args: forward(*args)  # type: ignore[method-assign]
    with pytest.raises(MoleStateError, match="a hook replaced the forward of first"):
        handle.remove()
    assert torch.equal(mlp(x), patched)
    del mlp.first.forward
    handle.remove()


# -- from outside
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    ["mk.plan", "mk.patch", "import mole_kernels.modules.scan", "from mole_kernels.patching import apply"],
)
def test_the_function_is_callable_whatever_was_imported_first(first):
    program = (
        f"import mole_kernels as mk\n{first}\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Linear(4, 4))\n"
        "bank = mk.ExpertBank.new({'0': (4, 4)}, ['a'], 2)\n"
        "mk.plan(model, bank)\n"
        "print(mk.patch(model, bank))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert out.stdout.strip() == "Handle(1 layers, experts a)", out.stderr


def test_69_accelerates_offload_goes_on_under_a_patch(mlp, x):
    from accelerate import cpu_offload

    experts = {"a": make_expert(mlp, PATHS)}
    with patch(mlp, experts, gate_file(mlp, ("a",))):
        want = mlp(x)
    base = mlp(x)
    cpu_offload(mlp, torch.device("cpu"))
    assert mlp.first.weight.is_meta
    with patch(mlp, experts, gate_file(mlp, ("a",))):
        assert torch.equal(mlp(x), want)
        assert mlp.first.weight.is_meta
    assert torch.equal(mlp(x), base)
    handle = patch(mlp, experts)
    handle.remove()
    assert torch.equal(mlp(x), base)
