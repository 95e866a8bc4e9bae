"""Groups in the models of diffusers and transformers, with what these do to attentions; with the text cache;
the choice by cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.dispatch.device import KNOWN
from mole_kernels.gates.softmax import SoftmaxGate
from mole_kernels.grouping.groups import Groups
from mole_kernels.grouping.reasons import reason_against_one_product
from mole_kernels.modules.scan import scan
from mole_kernels.ops.group import beside, group_op
from mole_kernels.problem import Problem
from tests.denoisers import DENOISERS, ENCODERS, Model
from tests.grouping.test_group import CHANGES, GATES, B, K, N, T, Twins, draw
from tests.peft_models import FAMILIES
from tests.tiny_models import TEXT_WIDTH, State, make_expert, run_unet, tiny_unet

QKV, ADDED = "(to_q, to_k, to_v)", "(add_q_proj, add_k_proj, add_v_proj)"
JOINT = {f"attn.{QKV}", f"attn.{ADDED}"}
CROSS = {f"attn1.{QKV}", "attn2.(to_k, to_v)"}
# the kinds of groups that each model has
KINDS = {
    "sd15": CROSS,
    "sdxl": CROSS,
    "sd3": JOINT,
    "sd35-medium": JOINT | {f"attn2.{QKV}"},
    "flux1": JOINT | {"(proj_mlp, to_q, to_k, to_v)"},
    "flux2": JOINT,
    "qwen-image": JOINT,
    "z-image": {f"attention.{QKV}"},
    "wan": CROSS,
}


def group(handle: Any) -> Groups:
    """Grouped whatever it costs."""
    handle.groups = Groups(handle.model, handle.layers.values(), always=True)
    return handle.groups


def every_linear(model: nn.Module, seed: int = 0) -> Any:
    return make_expert(
        model, [path for path, m in scan(model).layers.items() if isinstance(m, nn.Linear)], seed=seed
    )


def kind_of(path: str) -> str:
    """The attention's own name and its layers; of a group with an MLP the layers."""
    owner, _, layers = path.partition("(")
    return f"({layers}" if "proj_mlp" in layers else f"{owner.split('.')[-2]}.({layers}"


@pytest.mark.parametrize("case", [*DENOISERS, *ENCODERS], ids=str)
def test_every_model(case: Model):
    model = case.make()
    before = State(model, lambda: case.run(model))
    handle = mk.patch(model, {"a": every_linear(model), "b": every_linear(model, 1)}, "mole")
    want = case.run(model)
    groups = group(handle)
    kinds = {kind_of(path) for path in groups.groups}
    if case.id in KINDS:
        assert kinds == KINDS[case.id] and not groups.skipped
    assert kinds
    torch.testing.assert_close(case.run(model), want, rtol=1e-9, atol=1e-9)
    report = groups.report()
    # every one of them was one product, each time, and nothing was made in vain
    assert report["computed"] >= len(groups) and (report["wasted"], report["apart"]) == (0, {})
    handle.remove()
    before.assert_unchanged()


def test_switched_on_by_one_argument_it_leaves_to_the_layers_what_a_cpu_does_better():
    unet = tiny_unet()
    with mk.patch(unet, {"a": make_expert(unet)}, group=True) as handle:
        run_unet(unet)
        report = handle.groups.report()
        assert report["computed"] == 0 and report["apart"] == {
            "on a CPU the zeros beside each layer's B cost more than its calls": 8
        }
        handle.groups.remove()
        assert not any("group" in m.__dict__ or (m._forward_hooks and m is not unet) for m in unet.modules())


def run_masked(unet: Any) -> Tensor:
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        return unet(
            draw(1, 4, 8, 6), torch.tensor([3]), draw(1, 5, TEXT_WIDTH), encoder_attention_mask=mask
        ).sample


def test_attention_masks_and_another_processor():
    from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

    unet = tiny_unet()
    handle = mk.patch(unet, {"a": make_expert(unet)})
    for processor in (None, AttnProcessor(), SlicedAttnProcessor(1)):
        handle.groups.remove()
        if processor is not None:
            unet.set_attn_processor(processor)
        want = run_masked(unet)
        groups = group(handle)
        torch.testing.assert_close(run_masked(unet), want, rtol=1e-4, atol=1e-5)
        assert groups.report()["computed"] == len(groups) and groups.report()["wasted"] == 0


def test_ip_adapters_keep_their_own_projections():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    unet: Any = tiny_unet()
    processors = {}
    for name, old in unet.attn_processors.items():
        width = unet.get_submodule(name.rpartition(".")[0]).to_q.in_features
        cross = "attn2" in name
        processors[name] = IPAdapterAttnProcessor2_0(width, TEXT_WIDTH, num_tokens=(2,)) if cross else old
    unet.set_attn_processor(processors)
    handle = mk.patch(unet, {"a": make_expert(unet)})

    def run() -> Tensor:
        with torch.no_grad():
            return unet(
                draw(1, 4, 8, 6), torch.tensor([3]), (draw(1, 5, TEXT_WIDTH), [draw(1, 1, 2, TEXT_WIDTH)])
            ).sample

    want = run()
    groups = group(handle)
    torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-5)
    assert groups.report()["computed"] == len(groups) and groups.report()["wasted"] == 0


def test_peft_layers_around_ours_stand_aside():
    peft = pytest.importorskip("peft")
    unet = tiny_unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    with mk.patch(unet, {"a": make_expert(unet)}) as handle:
        want = run_unet(unet)
        groups = group(handle)
        assert (
            len(groups) == 0
            and set(groups.skipped.values()) == {"PEFT's layers are called in their place"}
            and len(groups.skipped) == 8
        )
        assert torch.equal(run_unet(unet), want)


def test_fused_projections_and_groups_exclude_each_other():
    make, run = FAMILIES["sd3"]
    model = make()
    everything = every_linear(model)
    handle = mk.patch(model, {"a": everything}, group=True)
    want = run(model)
    with pytest.raises(mk.MoleError, match="experts"):
        model.fuse_qkv_projections()
    handle.remove()
    made = make_expert(model, ["transformer_blocks.0.attn.to_q"])
    model.fuse_qkv_projections()
    with pytest.raises(mk.MoleError, match="fused projections"):
        mk.patch(model, {"a": made}, group=True)
    model.unfuse_qkv_projections()
    with mk.patch(model, {"a": everything}, group=True):
        torch.testing.assert_close(run(model), want)


@pytest.mark.parametrize("gates", ["none", "mole", "learned"])
def test_gradients_are_those_of_the_layers(gates: str):
    t = Twins(GATES.get(gates, "constant"), same=True)
    grads = []
    for model, handle in zip(t.models, t.handles):
        model.double()
        handle.experts_require_grad()
        if gates != "none":
            handle.gates_require_grad()
        x = t.x.double().requires_grad_()
        (model(x) * draw(B, T, 3 * N + 4, seed=5)).sum().backward()
        grads.append({"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}})
    assert t.groups.report()["computed"] == 1 and t.groups.report()["shared"] == 0
    assert list(grads[0]) == list(grads[1])
    for name, want in grads[0].items():
        if want is None:
            assert grads[1][name] is None, name
        else:
            torch.testing.assert_close(grads[1][name], want, msg=name)


def test_gradient_checkpointing():
    grads = []
    for grouped in (False, True):
        unet = tiny_unet().train()
        unet.enable_gradient_checkpointing()
        handle = mk.patch(unet, {"a": make_expert(unet)}, "mole")
        handle.experts_require_grad()
        torch.manual_seed(3)
        for gate in handle.gate_parameters():
            gate.data = torch.randn_like(gate)
        if grouped:
            group(handle)
        unet(draw(1, 4, 8, 6), torch.tensor([3]), draw(1, 5, TEXT_WIDTH)).sample.square().sum().backward()
        grads.append([p.grad for p in handle.expert_parameters() + handle.gate_parameters()])
    assert handle.groups.report()["wasted"] == 0 and handle.groups.report()["computed"] >= 8
    for got, want in zip(grads[1], grads[0]):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_offload_hooks_stand_aside():
    accelerate = pytest.importorskip("accelerate")
    t = Twins()
    t.check(1)
    accelerate.cpu_offload(t.models[1], execution_device=torch.device("cpu"))
    t.check(0)
    assert "offload hooks move its tensors" in t.groups.report()["apart"]
    accelerate.hooks.remove_hook_from_submodules(t.models[1])
    t.check(1)


@pytest.mark.parametrize("mode", ["inference", "autocast", "vmap"])
def test_modes(mode: str):
    t = Twins("mole")
    if mode == "inference":
        with torch.inference_mode():
            t.x = draw(2, 5, K)
            t.check(0)
        assert "inference_mode" in next(iter(t.groups.report()["apart"]))
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            t.check(1)
    else:
        with torch.no_grad():
            want, got = (torch.vmap(model)(t.x[:, None]) for model in t.models)
        torch.testing.assert_close(got, want)
        assert "tracer" in next(iter(t.groups.report()["apart"]))


ASIDE: dict[str, tuple[Any, Callable[[Any, Any], Any], str]] = {
    "top-k": (lambda p, m, e: SoftmaxGate(K, 2), lambda a, h: None, "softmax"),
    "kinds of gates": (
        lambda p, m, e: None,
        lambda a, h: setattr(a.to_q, "gate", group_gate(a)),
        "kinds of gates",
    ),
    "backends": (None, lambda a, h: setattr(a.to_q, "backend", "stacked"), "backends"),
    "off": (None, lambda a, h: h.disable(), "off"),
}


def group_gate(attention: Any) -> Any:
    from mole_kernels.gates.gate import MoLEGate

    torch.manual_seed(5)
    return MoLEGate(K, attention.to_q.out_features, 2)


@pytest.mark.parametrize("name", ASIDE)
def test_stands_aside_with_a_reason(name: str):
    gates, change, reason = ASIDE[name]
    t = Twins(gates)
    t.both(change)
    t.check(0)
    (said,) = t.groups.report()["apart"]
    assert reason in said


# -- with the text cache


def test_grouped_and_cached_over_steps():
    unet = tiny_unet()
    handle = mk.patch(unet, {"a": make_expert(unet)}, "mole")
    want = run_unet(unet, batch=2)
    groups, cache = group(handle), handle.cache_text()
    outputs = [run_unet(unet, batch=2) for _ in range(3)]
    torch.testing.assert_close(outputs[0], want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    cross = sum("attn2" in path for path in groups.groups)
    assert (cache.computed, cache.reused) == (2 * cross, 4 * cross)
    # once for the text, at each step for the picture
    assert groups.report()["computed"] == cross + 3 * (len(groups) - cross) and groups.report()["wasted"] == 0
    handle.remove()
    assert not any("forward" in m.__dict__ or "group" in m.__dict__ for m in unet.modules())


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in CHANGES
        if name not in ("a weight written through .data", "an expert's tensors replaced")
    ],
)
def test_grouped_and_cached_is_never_stale(name: str):
    models = [tiny_unet(), tiny_unet()]
    handles = [mk.patch(m, {"a": make_expert(m, rank=3), "b": make_expert(m, seed=1)}) for m in models]
    group(handles[1])
    handles[1].cache_text()

    def both() -> list[Tensor]:
        dtype = next(models[1].parameters()).dtype
        with torch.no_grad():
            return [
                m(draw(2, 4, 8, 6).to(dtype), torch.tensor([3, 3]), draw(2, 5, TEXT_WIDTH).to(dtype)).sample
                for m in models
            ]

    def check() -> Tensor:
        want, got = both()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        return got

    before = check()
    assert torch.equal(check(), before)
    for model, handle in zip(models, handles):
        attention: Any = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
        if name.startswith("swap"):
            handle.swap("a", make_expert(model, rank=4 if "larger" in name else 2, seed=7))
        elif name in ("a weight replaced", "weights assigned"):
            attention.to_k.weight = nn.Parameter(attention.to_k.weight.detach() * 2, requires_grad=False)
        elif name == "a bias written":
            attention.to_out[0].bias.detach().add_(1)
        elif name in ("double", "half and back"):
            CHANGES[name](model, handle)
        else:
            CHANGES[name](attention, handle)
    check(), check()


# -- the operator, and the choice


def test_operator_over_separate_weights():
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(20, K, generator=g)
    side, apart = list(whole.split([8, 12])), [part.clone() for part in whole.split([8, 12])]
    assert beside(apart) is None and torch.equal(beside(side), whole)  # type: ignore[arg-type]
    assert (
        beside(side[::-1]) is None
        and beside([whole[:8], whole[9:]]) is None
        and beside([whole[:8, :4], whole[8:, :4]]) is None
    )
    x, down, up, scale = draw(2, 5, K), draw(1, 5, K), draw(1, 20, 5), torch.ones(2)
    rest = (None, down, up, scale, (3, 2), None, draw(2, K), None, None, None, "auto")
    for one, other in zip(group_op(x, side, *rest), group_op(x, apart, *rest)):
        assert torch.equal(one, other)
    for weights in (side, apart):
        torch.library.opcheck(
            group_op,
            (x, weights, *rest),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_the_choice_by_cost(monkeypatch: pytest.MonkeyPatch):
    cpu = Problem(2, 1024, 640, 1920, (16,), 1, torch.float32, "cpu")
    split = ((640, (16,)),) * 3
    assert reason_against_one_product(cpu, split, None, False) is None
    assert "too few rows" in str(reason_against_one_product(replace(cpu, B=1, T=8), split, None, False))
    assert "zeros" in str(reason_against_one_product(replace(cpu, ranks=(16, 16, 16)), split, None, False))
    monkeypatch.setattr("mole_kernels.grouping.reasons.present", lambda index: KNOWN["h200"])
    gpu = replace(cpu, device="cuda", dtype=torch.bfloat16, ranks=(16, 16, 16))
    assert (
        reason_against_one_product(gpu, split, 0, False) is None
        and reason_against_one_product(replace(gpu, ranks=(16,)), split, 0, True) is None
    )
    large, shape = (
        ((12288, (512,)),) * 3,
        replace(gpu, T=8192, K=3072, N=36864, ranks=(512,) * 3, token_gate=True),
    )
    assert "predicted slower" in str(reason_against_one_product(shape, large, 0, False))
