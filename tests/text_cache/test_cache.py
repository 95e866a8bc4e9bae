"""Keys and values kept over the denoising steps: reused bit for bit, and every trick that could make them
stale tried by name.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.gates.block import BlockGate, BlockRouter
from mole_kernels.gates.gate import ConstantGate, MaskGate, MoLEGate, SampleGate
from mole_kernels.gates.schedule import Clock, switch
from mole_kernels.gates.softmax import GivenGate, SoftmaxGate
from mole_kernels.text_cache.cache import TextCache
from tests.tiny_models import make_expert, run_unet, tiny_flux, tiny_unet

C, N, E = 12, 8, 2


class Cross(nn.Module):
    """What every cross-attention has: an input from the picture, keys and values from the text."""

    is_cross_attention = True

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(N, N), nn.Linear(C, N, bias=False), nn.Linear(C, N)

    def forward(self, text: Tensor) -> Tensor:
        return torch.stack([self.to_k(text), self.to_v(text)])


class Scene:
    """A patched cross-attention with its cache, and the same one computed afresh."""

    def __init__(self, gates: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(Cross()).eval()
        self.cross: Any = self.model[0]
        experts = {"a": make_expert(self.model, rank=3), "b": make_expert(self.model, seed=1)}
        self.handle = mk.patch(self.model, experts, gates)
        self.cache = self.handle.cache_text(**options)
        self.text = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(2))

    def __call__(self, text: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self.model(self.text if text is None else text)

    def fresh(self) -> Tensor:
        """What the layers compute without their cache."""
        with torch.no_grad():
            return torch.stack(
                [type(layer).forward(layer, self.text) for layer in (self.cross.to_k, self.cross.to_v)]
            )

    def warm(self) -> Tensor:
        """Run until the outputs are kept, and show that they are."""
        before, first = self.cache.reused, self()
        assert torch.equal(first, self()) and self.cache.reused == before + 2
        return first


def put(name: str, make: Callable[[Any], Any]) -> Callable[[Scene], None]:
    return lambda s: setattr(s, name, make(getattr(s, name)))


def prompt_at_the_same_address(s: Scene) -> None:
    """The old text is freed, the new one comes to lie where it lay."""
    values, place = torch.randn_like(s.text), s.text.data_ptr()
    s.text = None  # type: ignore[assignment]
    gc.collect()
    held = []
    for _ in range(50):
        s.text = values.clone()
        if s.text.data_ptr() == place:
            return
        # an allocator that gives other places is what holding the old text makes it do
        held.append(s.text)


def prompt_through_numpy(s: Scene) -> None:
    s.text.numpy()[0, 0, 0] += 1


def prompt_rebound(s: Scene) -> None:
    s.text.data = torch.randn_like(s.text)


def weight_replaced(s: Scene) -> None:
    s.cross.to_k.weight = nn.Parameter(torch.randn_like(s.cross.to_k.weight))


def half_and_back(s: Scene) -> None:
    # other values behind the same parameters, with the same versions
    s.model.half().float()


def merged_through_data(s: Scene) -> None:
    # as PEFT's merge does
    s.cross.to_k.weight.data += 0.1 * torch.randn_like(s.cross.to_k.weight)


def hot_swapped_through_data(s: Scene) -> None:
    s.cross.to_v.experts.down.data.copy_(torch.randn_like(s.cross.to_v.experts.down))


def swapped_to_larger(s: Scene) -> None:
    s.handle.swap("a", make_expert(s.model, rank=6, seed=7))


def tensors_rewritten(s: Scene) -> None:
    s.model.load_state_dict({name: value + 0.25 for name, value in s.model.state_dict().items()})


def assigned(s: Scene) -> None:
    s.model.load_state_dict({name: value + 0.25 for name, value in s.model.state_dict().items()}, assign=True)


def other_layer(s: Scene) -> None:
    s.cross.to_k = nn.Linear(C, N)


def output_written(s: Scene) -> None:
    s()[0].zero_()
    with torch.no_grad():
        s.cross.to_k(s.text).mul_(3)
        s.cross.to_v(s.text)[0].zero_()


def folded(s: Scene) -> None:
    s.handle.fold()


TRICKS: dict[str, Callable[[Scene], Any]] = {
    "another prompt": put("text", torch.randn_like),
    "prompt written in place": lambda s: s.text.mul_(2),
    "prompt written through a view": lambda s: s.text[0, 1].zero_(),
    "prompt written through .data": lambda s: s.text.data.mul_(2),
    "prompt written through numpy": prompt_through_numpy,
    "prompt's .data rebound": prompt_rebound,
    "another prompt at the same address": prompt_at_the_same_address,
    "prompt of zeros": put("text", torch.zeros_like),
    "batch doubled by guidance": put("text", lambda t: torch.cat([t * 0.5, t])),
    "guidance switched off": put("text", lambda t: t[:1]),
    "samples in another order": put("text", lambda t: t.flip(0)),
    "scale": lambda s: s.handle.set_scales({"a": 0.25}),
    "scale of one layer": lambda s: s.cross.to_k.experts.scale.mul_(2),
    "expert swapped, same rank": lambda s: s.handle.swap("a", make_expert(s.model, rank=3, seed=7)),
    "expert swapped, smaller rank": lambda s: s.handle.swap("a", make_expert(s.model, rank=1, seed=7)),
    "expert swapped, larger rank": swapped_to_larger,
    "experts disabled": lambda s: s.handle.disable(),
    "experts folded": folded,
    "patch removed": lambda s: s.handle.remove(),
    "weights loaded": tensors_rewritten,
    "weights assigned": assigned,
    "a weight replaced": weight_replaced,
    "to half and back": half_and_back,
    "merged through .data": merged_through_data,
    "hot-swapped through .data": hot_swapped_through_data,
    "another layer in its place": other_layer,
    "a consumer wrote into the output": output_written,
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("check", ["sample", "content"])
def test_is_never_stale(trick: str, check: str):
    s = Scene(check=check)
    before = s.warm().clone()
    TRICKS[trick](s)
    for _ in range(2):
        after = s()
        assert torch.equal(after, s.fresh())
    if trick not in ("a consumer wrote into the output", "experts folded"):
        assert not torch.equal(after, before)


@pytest.mark.parametrize("trick", [t for t in TRICKS if ".data" not in t and "numpy" not in t])
def test_versions_alone_see_all_that_counts_versions(trick: str):
    s = Scene(check="versions")
    s.warm()
    TRICKS[trick](s)
    assert torch.equal(s(), s.fresh())


def test_versions_alone_do_not_see_data_writes_and_clear_helps():
    s = Scene(check="versions")
    before = s.warm()
    merged_through_data(s)
    assert torch.equal(s(), before)
    s.cache.clear()
    assert torch.equal(s(), s.fresh()) and not torch.equal(s(), before)


def given(path: str, module: nn.Module, experts: Any) -> GivenGate:
    return GivenGate(E)


GATE_TRICKS: dict[str, tuple[Callable[[str, nn.Module, Any], Any], Callable[[Any], Any]]] = {
    "constant": (lambda p, m, e: ConstantGate(E, [0.5, 0.3]), lambda gate: gate.value.mul_(0.5)),
    "mask": (lambda p, m, e: MaskGate(torch.rand(5, E)), lambda gate: gate.set(torch.rand(5, E))),
    "sample": (lambda p, m, e: SampleGate(torch.rand(2, E)), lambda gate: gate.set(torch.rand(2, E))),
    "given, another": (given, lambda gate: gate.set(torch.rand(2, 5, E))),
    "given, in place": (given, lambda gate: gate.given.mul_(0.5)),
    "given, through .data": (given, lambda gate: gate.given.data.mul_(0.5)),
    "softmax, its weights": (lambda p, m, e: SoftmaxGate(C, E), lambda gate: gate.phi.detach().mul_(3)),
    "softmax, its temperature": (
        lambda p, m, e: SoftmaxGate(C, E),
        lambda gate: setattr(gate, "temperature", 0.25),
    ),
    "softmax, its top-k": (lambda p, m, e: SoftmaxGate(C, E), lambda gate: setattr(gate, "top_k", 1)),
    "mole, its head": (lambda p, m, e: MoLEGate(C, N, E), lambda gate: gate.head.detach().add_(1)),
    "mole, its bias": (lambda p, m, e: MoLEGate(C, N, E), lambda gate: gate.phi_bias.detach().add_(1)),
}


@pytest.mark.parametrize("name", GATE_TRICKS)
def test_gates_that_change_are_followed(name: str):
    make, change = GATE_TRICKS[name]
    s = Scene(make)
    before = s.warm()
    change(s.cross.to_k.gate)
    after = s()
    assert torch.equal(after, s.fresh())
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_another_gate_is_followed():
    s = Scene(given)
    before = s.warm()
    s.cross.to_k.gate = ConstantGate(E, 0.5)
    assert torch.equal(s(), s.fresh()) and not torch.equal(s(), before)


def test_a_schedule_is_made_anew_as_its_steps_go_by():
    clock = Clock(4)
    s = Scene(switch(clock, every=2))
    s.warm()
    for step in range(4):
        clock.set(step)
        assert torch.equal(s(), s.fresh()) and torch.equal(s(), s.fresh())
    assert s.cache.computed > 2


def test_a_block_gate_stands_aside():
    router = BlockRouter(C, E)
    s = Scene(lambda path, module, experts: BlockGate(router))
    for seed in range(3):
        for layer in (s.cross.to_k, s.cross.to_v):
            layer.gate.current = torch.softmax(
                torch.randn(2, E, generator=torch.Generator().manual_seed(seed)), -1
            )
        assert torch.equal(s(), s.fresh())
    (reason,) = s.cache.report()["aside"]
    assert "BlockGate" in reason and s.cache.reused == 0


def test_assignments_are_followed():
    s = Scene()
    for layer in (s.cross.to_k, s.cross.to_v):
        old = layer.experts
        old.down, old.up = (
            nn.Parameter(torch.cat([t.detach(), -2 * t.detach()]), requires_grad=False)
            for t in (old.down, old.up)
        )
        old.route = SimpleNamespace(current=torch.tensor([0, 1]))
    before = s.warm()
    for layer in (s.cross.to_k, s.cross.to_v):
        layer.experts.route.current.copy_(torch.tensor([-1, 0]))
    assert torch.equal(s(), s.fresh()) and not torch.equal(s(), before)


def test_autocast_and_product_precision_are_followed():
    s = Scene()
    before = s.warm()
    with torch.autocast("cpu", torch.bfloat16):
        inside = s()
        assert inside.dtype == torch.bfloat16 and torch.equal(inside, s.fresh())
    assert torch.equal(s(), before)
    count = s.cache.computed
    torch.set_float32_matmul_precision("medium")
    try:
        s()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert s.cache.computed > count


def test_dtype_is_followed():
    s = Scene()
    s.warm()
    s.model.to(torch.bfloat16)
    # not left to chance: the allocator may put other values at the same address
    outputs = [item for text in s.cache.texts.known for item in text.outputs.items()]
    assert len(outputs) == 2 and all(output.epoch is not forward.epoch for forward, output in outputs)
    s.text = s.text.to(torch.bfloat16)
    assert s().dtype == torch.bfloat16 and torch.equal(s(), s.fresh())


def test_gradients_stand_aside_and_flow():
    s = Scene()
    s.warm()
    s.handle.experts_require_grad()
    out = s.model.train()(s.text)
    out.sum().backward()
    assert s.cross.to_k.experts.up.grad is not None and "gradients are on" in s.cache.report()["aside"]
    with torch.no_grad():
        s.cross.to_k.experts.up -= s.cross.to_k.experts.up.grad
    assert torch.equal(s(), s.fresh())


def test_inference_mode_reuses_and_leaves_usable_tensors():
    s = Scene()
    with torch.inference_mode():
        s.text = torch.randn(2, 5, C)
        first = s().clone()
        count = s.cache.reused
        assert torch.equal(s(), first) and s.cache.reused == count + 2
        # such a text counts no versions
        s.text.mul_(2)
        assert not torch.equal(s(), first) and torch.equal(s(), s.fresh())
        s.cross.to_k(s.text).zero_()
        assert torch.equal(s(), s.fresh())


def test_weights_made_in_inference_mode_stand_aside():
    s = Scene()
    with torch.inference_mode():
        down = s.cross.to_k.experts.down
        s.cross.to_k.experts.down = nn.Parameter(torch.randn(*down.shape), requires_grad=False)
        s(), s()
        s.cross.to_k.experts.down.mul_(2)
        assert torch.equal(s(), s.fresh())
    assert any("inference_mode" in reason for reason in s.cache.report()["aside"])


def test_a_parameter_that_others_put_there_for_a_forward_stands_aside():
    """As FSDP does, which fills its own Parameter anew before each forward and hides the write from the
    version counter.
    """
    s = Scene(check="versions")
    s.warm()
    s.cross.to_k._parameters["weight"] = nn.Parameter(torch.randn(N, C), requires_grad=False)
    for _ in range(2):
        assert torch.equal(s(), s.fresh())
        s.cross.to_k.weight.data.mul_(2)
    assert any("another Parameter" in reason for reason in s.cache.report()["aside"])


def test_threads_do_not_mix_up_their_texts():
    s = Scene()
    texts = [torch.randn(2, 5, C, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    with torch.no_grad():
        want = [
            torch.stack([type(layer).forward(layer, text) for layer in (s.cross.to_k, s.cross.to_v)])
            for text in texts
        ]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(30):
            if not torch.equal(s(texts[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and s.cache.reused > 0


def test_hooks_around_a_layer_run_at_each_call():
    s = Scene()
    first = s.warm().clone()
    calls = []
    s.cross.to_k.register_forward_hook(lambda module, args, y: calls.append(1) or y * 2)
    s.cross.to_v.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    for _ in range(2):
        got = s()
        assert torch.equal(got[0], first[0] * 2)
        with torch.no_grad():
            assert torch.equal(got[1], type(s.cross.to_v).forward(s.cross.to_v, s.text * 3))
    assert len(calls) == 2


def test_guidance_by_two_calls_keeps_both_texts_and_no_more_than_asked():
    s = Scene(texts=2)
    one, two, three = (torch.randn(1, 5, C, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for _ in range(3):
        s(one), s(two)
    assert (s.cache.computed, s.cache.reused) == (4, 8)
    s(three)
    assert len(s.cache.texts.known) == 2 and all(len(t.outputs) == 2 for t in s.cache.texts.known)


def test_the_same_content_in_a_new_tensor_is_reused():
    s = Scene()
    before = s.warm()
    count = s.cache.computed
    assert torch.equal(s(s.text.clone()), before) and s.cache.computed == count


def test_offload_hooks_stand_aside_before_and_after():
    accelerate = pytest.importorskip("accelerate")
    model, text = nn.Sequential(Cross()).eval(), torch.randn(2, 5, C)
    with torch.no_grad(), mk.cache_text(model) as cache:
        want, again = model(text), model(text)
        assert torch.equal(again, want) and cache.reused == 2
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        for _ in range(2):
            assert torch.equal(model(text), want)
        assert any("offload" in reason for reason in cache.report()["aside"]) and cache.reused == 2
        cache.close()
        assert torch.equal(model(text), want)
        with pytest.raises(mk.MoleError, match="offload"):
            mk.cache_text(model)


def test_group_offload_stands_aside():
    hooks = pytest.importorskip("diffusers.hooks")
    s = Scene()
    want = s.warm()
    hooks.apply_group_offloading(
        s.model, onload_device=torch.device("cpu"), offload_type="leaf_level", num_blocks_per_group=None
    )
    for _ in range(2):
        assert torch.equal(s(), want)
    assert any("offload" in reason for reason in s.cache.report()["aside"])


def test_peft_stands_aside_and_fused_weights_are_seen():
    peft = pytest.importorskip("peft")
    model: Any = nn.Sequential(Cross()).eval()
    text = torch.randn(2, 5, C)
    with torch.no_grad(), mk.cache_text(model) as cache:
        before, again = model(text), model(text)
        config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, "a")
        wrapped = model(text)
        for layer in (model[0].to_k, model[0].to_v):
            layer.merge()
        merged = model(text)
        # the usual way to keep a fused LoRA: no forward between, and the plain layer back in its place
        for name in ("to_k", "to_v"):
            setattr(model[0], name, getattr(model[0], name).get_base_layer())
        after = model(text)
        assert torch.equal(before, again) and cache.reused == 2
        torch.testing.assert_close(wrapped, merged)
        assert torch.equal(merged, after) and not torch.equal(after, before)
        assert any("PEFT" in reason for reason in cache.report()["aside"])
        # fused and taken off with no forward at all in between
        cache.clear()
        kept = model(text)
        peft.inject_adapter_in_model(config, model, "b")
        for name in ("to_k", "to_v"):
            getattr(model[0], name).merge()
            setattr(model[0], name, getattr(model[0], name).get_base_layer())
        assert not torch.equal(model(text), kept)
        assert torch.equal(model(text)[0], type(model[0].to_k).forward(model[0].to_k, text))


def test_compiled_graphs_compute_as_ever():
    s = Scene()
    before = s.warm()
    torch.compiler.reset()
    compiled = torch.compile(s.model, fullgraph=True, backend="eager")
    count = s.cache.reused
    with torch.no_grad():
        torch.testing.assert_close(compiled(s.text), before)
        s.handle.set_scales({"a": 0.0})
        torch.testing.assert_close(compiled(s.text), s.fresh())
    assert s.cache.reused == count
    torch.compiler.reset()


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_by_itself(how: Callable[[nn.Module], Any]):
    s = Scene()
    before = s.warm()
    other = how(s.model)
    with torch.no_grad():
        assert torch.equal(other(s.text), before)
        other[0].to_k.weight.data.mul_(2)
        assert not torch.equal(other(s.text)[0], before[0])
        assert torch.equal(s(), before)


@pytest.mark.parametrize("patched", [False, True])
def test_unet_over_steps(patched: bool):
    unet = tiny_unet()
    handle = mk.patch(unet, {"a": make_expert(unet)}, cache_text=True) if patched else None
    cache = mk.cache_text(unet) if handle is None else handle._cache
    assert isinstance(cache, TextCache)
    outputs = [run_unet(unet, batch=2) for _ in range(3)]
    layers = len(cache.layers)
    assert layers and all(path.endswith(("attn2.to_k", "attn2.to_v")) for path in cache.layers)
    assert (cache.computed, cache.reused) == (layers, 2 * layers)
    cache.close()
    assert torch.equal(run_unet(unet, batch=2), outputs[0]) and all(
        torch.equal(y, outputs[0]) for y in outputs
    )
    assert not any("forward" in m.__dict__ or "_apply" in m.__dict__ for m in unet.modules())


def test_wan_whose_text_is_projected_anew_at_every_step():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    x, text = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 5, 16)
    with torch.no_grad():
        want = [model(x, torch.tensor([t]), text).sample for t in (9, 5, 1)]
        with mk.cache_text(model) as cache:
            for t, y in zip((9, 5, 1), want):
                assert torch.equal(model(x, torch.tensor([t]), text).sample, y)
    assert sorted(cache.layers) == sorted(f"blocks.{i}.attn2.to_{kv}" for i in (0, 1) for kv in "kv")
    assert (cache.computed, cache.reused) == (4, 8)


def test_what_cannot_be_kept_is_refused_and_changes_nothing():
    with pytest.raises(mk.MoleError, match="no cross-attention"):
        mk.cache_text(tiny_flux())
    with pytest.raises(mk.MoleError, match="sample"):
        mk.cache_text(nn.Sequential(Cross()), check="often")  # type: ignore[arg-type]
    with pytest.raises(mk.MoleError, match="texts >= 1"):
        mk.cache_text(nn.Sequential(Cross()), texts=0)
    mlp = nn.Sequential(nn.Linear(C, N))
    with pytest.raises(mk.MoleError, match="no cross-attention"):
        mk.patch(mlp, {"a": make_expert(mlp)}, cache_text=True)
    assert type(mlp[0]) is nn.Linear
    s = Scene()
    with pytest.raises(mk.MoleError, match="another cache"):
        mk.cache_text(s.model)
    s.cache.close()
    s.cache.close()
    mk.cache_text(s.model).close()
