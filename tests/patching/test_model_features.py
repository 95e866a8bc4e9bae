"""What else every model has: PEFT layers accelerated, offload, training, every sample its own expert, save
and load, compiled, fold.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mole_kernels as mk
from mole_kernels.modules.scan import scan
from mole_kernels.patching.apply import patch
from mole_kernels.serving.serve import serve
from tests.denoisers import DENOISERS, ENCODERS, Model
from tests.patching.test_compile import Counted
from tests.tiny_models import State, make_expert

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ALL = [*DENOISERS, *ENCODERS]
# what LoRAs of any of them are trained on
ENDINGS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "SelfAttention.q",
    "SelfAttention.v",
    "to_qkv_mlp_proj",
)


def attention(model: nn.Module) -> list[str]:
    found = [p for p, m in scan(model).layers.items() if isinstance(m, nn.Linear) and p.endswith(ENDINGS)]
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("case", ALL, ids=str)
def test_accelerated_peft_layers(case: Model):
    """Two adapters of PEFT's own, one negative weight among theirs: the accelerated model says what PEFT
    says.
    """
    peft = pytest.importorskip("peft")
    model = case.make()
    for name, rank in (("a", 4), ("b", 2)):
        config = peft.LoraConfig(
            r=rank, lora_alpha=3, target_modules=attention(case.make()), init_lora_weights=False
        )
        model = peft.inject_adapter_in_model(config, model, name)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter(["a", "b"])
            module.set_scale("b", -0.4)
    model.double()
    want = case.run(model)
    mk.status(reset=True)
    handle = mk.accelerate(model)
    got = case.run(model)
    assert len(handle.layers) == len(attention(case.make())) and not handle.skipped
    assert mk.status()["accelerated"] >= len(handle.layers) and not mk.status()["fallbacks"]
    assert (got - want).norm() <= 1e-10 * want.norm()
    handle.remove()
    assert torch.equal(case.run(model), want)


@pytest.mark.parametrize("case", DENOISERS, ids=str)
def test_sequential_offload(case: Model):
    """accelerate keeps every tensor on meta between calls; the answer stays, and so does the model
    afterwards.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = case.make()
    expert = make_expert(model, list(scan(model).layers))
    base = case.run(model)
    handle = patch(model, {"e": expert})
    want = case.run(model)
    cpu_offload(model, torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert torch.equal(case.run(model), want)
    remove_hook_from_submodules(model)
    assert torch.equal(case.run(model), want)
    handle.remove()
    assert torch.equal(case.run(model), base)


@pytest.mark.parametrize("case", DENOISERS, ids=str)
def test_experts_and_gates_learn(case: Model):
    """One backward through the whole model: finite gradients for what trains, none for the base."""
    model = case.make()
    experts = {"a": make_expert(model, attention(model)), "b": make_expert(model, attention(model), seed=1)}
    handle = patch(model, experts, "mole")
    # a layer whose output is thrown away (SD3's last text stream) has no gradient at all
    handle.experts_require_grad()
    with torch.enable_grad():
        case.answer(model).square().mean().backward()
    grads = {path: layer.experts.down.grad for path, layer in handle.layers.items()}
    heard = {path: grad for path, grad in grads.items() if grad is not None}
    assert len(heard) >= 0.75 * len(grads)
    assert all(torch.isfinite(grad).all() for grad in heard.values())
    # the last block's text query, whose output no one reads
    assert {path for path, grad in heard.items() if not grad.any()} <= {
        path for path in heard if path.endswith("1.attn.add_q_proj")
    }
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    gates = [p.grad for p in handle.gate_parameters()]
    assert any(grad is not None and grad.any() for grad in gates)


@pytest.mark.parametrize("case", DENOISERS, ids=str)
def test_every_sample_its_own_expert(case: Model):
    """A batch of two: the first sample gets expert a, the second none; each as if it had been alone."""
    model = case.make()
    base = case.run(model)
    experts = {name: make_expert(model, attention(model), seed=seed) for seed, name in enumerate("ab")}
    with patch(model, {"a": experts["a"]}):
        alone = case.run(model)
    state = State(model, lambda: case.run(model))
    with serve(model, experts) as served:
        served.assign(["a", None])
        got = case.run(model)
    assert (got[0] - alone[0]).norm() <= 1e-6 * alone[0].norm()
    assert (got[1] - base[1]).norm() <= 1e-6 * base[1].norm()
    assert not torch.allclose(alone[0], base[0], rtol=1e-2)
    state.assert_unchanged()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_saved_and_patched_again(case: Model, tmp_path: Path):
    """Experts and gates of every layer, convolutions too, through the single file."""
    model = case.make()
    every = list(scan(model).layers)
    with patch(
        model, {"a": make_expert(model, every), "b": make_expert(model, every[::3], seed=1)}, "mole"
    ) as handle:
        want = case.run(model)
        handle.save(tmp_path / "mixture.safetensors")
    with patch(model, tmp_path / "mixture.safetensors"):
        assert torch.equal(case.run(model), want)


BLOCKS = {str(case): case for case in DENOISERS if case.cls != "SD3Transformer2DModel"}


# SD3 names no blocks that repeat; sd15 and flux1 are in test_compile.py
@pytest.mark.parametrize(
    "name",
    ["wan", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdxl", "flux2", "qwen-image", "z-image"))],
)
def test_repeated_blocks_compile_once(name: str):
    """`compile_repeated_blocks(fullgraph=True)`: other scales make no other graph."""
    case = BLOCKS[name]
    model = case.make()
    handle = patch(model, {"e": make_expert(model, attention(model))})
    want, counted = case.run(model), Counted()
    model.compile_repeated_blocks(fullgraph=True, backend=counted)  # type: ignore[operator]
    got, first = case.run(model), counted.graphs
    assert first and (got - want).norm() <= 1e-6 * want.norm()
    for scale in (0.5, 0.0):
        handle.set_scales({"e": scale})
        assert not torch.equal(case.run(model), got)
    assert counted.graphs == first


@pytest.mark.parametrize("case", DENOISERS, ids=str)
def test_folded_and_back(case: Model):
    """W' = W + ΔW gives the same answer, and unfolding the same bits."""
    model = case.make()
    base = case.run(model)
    handle = patch(model, {"e": make_expert(model, attention(model))})
    want = case.run(model)
    handle.fold()
    assert (case.run(model) - want).norm() <= 1e-9 * want.norm()
    handle.unfold()
    assert torch.equal(case.run(model), want)
    handle.remove()
    assert torch.equal(case.run(model), base)
