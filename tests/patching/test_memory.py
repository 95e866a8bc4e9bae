"""Patched models under what people use to save memory: offloading, casting, checkpointing; and their copies
(docs/memory.md).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import mole_kernels as mk
from mole_kernels.errors import MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.block import BlockRouting
from mole_kernels.modules.scan import sizes
from tests.tiny_models import Mlp, State, make_expert, run_flux, run_unet, tiny_flux, tiny_unet

CPU = torch.device("cpu")
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "unet": (tiny_unet, run_unet),
    "flux": (tiny_flux, run_flux),
}
PATHS = ("first", "second", "mix")


@pytest.fixture(params=MODELS, ids=str)
def kind(request) -> Any:
    return request.param


def patched(model: nn.Module) -> Any:
    """Two experts and every kind of gate on all linear layers; the same numbers at each call."""
    experts = {"a": make_expert(model), "b": make_expert(model, seed=1)}
    torch.manual_seed(2)
    return mk.patch(model, experts, "mole")


def sequential(model: nn.Module) -> Callable[[], None]:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    cpu_offload(model, CPU)
    assert any(p.is_meta for p in model.parameters())
    return lambda: remove_hook_from_submodules(model)


def sequential_with_buffers(model: nn.Module) -> Callable[[], None]:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    cpu_offload(model, CPU, offload_buffers=True)
    return lambda: remove_hook_from_submodules(model)


def whole_model(model: nn.Module) -> Callable[[], None]:
    from accelerate import cpu_offload_with_hook

    _, hook = cpu_offload_with_hook(model, CPU)
    return hook.remove


def groups_of(level: str) -> Callable[[nn.Module], Callable[[], None]]:
    def switch_on(model: nn.Module) -> Callable[[], None]:
        from diffusers.hooks import HookRegistry, apply_group_offloading

        apply_group_offloading(model, CPU, CPU, level, num_blocks_per_group=1)
        registry = HookRegistry.check_if_exists_or_initialize(model)
        return lambda: registry.remove_hook("group_offloading", recurse=True)

    return switch_on


OFFLOADS = {
    "sequential": sequential,
    "sequential-buffers": sequential_with_buffers,
    "model": whole_model,
    "group-block": groups_of("block_level"),
    "group-leaf": groups_of("leaf_level"),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("order", ["hooks-first", "patch-first"])
def test_offloaded_the_patched_model_says_the_same(kind, offload, order):
    make, run = MODELS[kind]
    model = make()
    base = run(model)
    with patched(model):
        want = run(model)
    if order == "hooks-first":
        take_off = OFFLOADS[offload](model)
        handle = patched(model)
    else:
        handle = patched(model)
        take_off = OFFLOADS[offload](model)
    for _ in range(2):
        assert torch.equal(run(model), want)
    with handle.disable():
        assert torch.equal(run(model), base)
    handle.remove()
    assert torch.equal(run(model), base)
    take_off()
    assert torch.equal(run(model), base)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_hooks_taken_off_first_leave_the_patch_whole(offload):
    model = tiny_unet()
    state = State(model, lambda: run_unet(model))
    handle = patched(model)
    want = run_unet(model)
    take_off = OFFLOADS[offload](model)
    run_unet(model)
    take_off()
    assert torch.equal(run_unet(model), want)
    handle.remove()
    assert torch.equal(run_unet(model), state.output)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("rank", [1, 4], ids=["in-place", "repacked"])
def test_offloaded_experts_are_changed_and_read(offload, rank):
    mlp, plain = Mlp(), Mlp()
    plain.load_state_dict(mlp.state_dict())
    x = torch.randn(2, 6, 6)
    new = make_expert(plain, PATHS, rank=rank, seed=9)
    there = patch_mlp(plain)
    there.swap("a", new)
    there.set_scales({"b": 0.3})
    handle = patch_mlp(mlp)
    take_off = OFFLOADS[offload](mlp)
    handle.swap("a", new)
    handle.set_scales({"b": 0.3})
    with torch.no_grad():
        want = plain(x)
        for _ in range(2):
            assert torch.equal(mlp(x), want)
        for name in ("a", "b"):
            for path in PATHS:
                assert torch.equal(handle.bank().layer(path)[name].down, there.bank().layer(path)[name].down)
        assert torch.equal(handle.gates().layers["first"].head, there.gates().layers["first"].head)
        take_off()
        assert torch.equal(mlp(x), want)
    handle.remove()


def patch_mlp(mlp: nn.Module, gates: Any = "mole") -> Any:
    torch.manual_seed(4)
    return mk.patch(mlp, {"a": make_expert(mlp, PATHS), "b": make_expert(mlp, PATHS, seed=1)}, gates)


def test_offloaded_experts_are_not_trained_in_silence():
    mlp = Mlp()
    handle = patch_mlp(mlp)
    sequential(mlp)
    with pytest.raises(MoleStateError, match="offload hooks hold the experts"):
        handle.experts_require_grad()
    with pytest.raises(MoleStateError, match="offload hooks hold the experts"):
        handle.gates_require_grad()


def test_experts_kept_on_the_disk_are_read_only(tmp_path):
    from accelerate import disk_offload

    mlp = Mlp().eval()
    x = torch.randn(2, 6, 6)
    handle = patch_mlp(mlp)
    with torch.no_grad():
        want = mlp(x)
        disk_offload(mlp, str(tmp_path), CPU)
        assert torch.equal(mlp(x), want)
        with pytest.raises(MoleStateError, match="is kept on the disk"):
            handle.swap("a", make_expert(mlp, PATHS, rank=1, seed=9))
        assert torch.equal(mlp(x), want)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("order", ["hooks-first", "serve-first"])
def test_an_offloaded_model_is_served(offload, order):
    plain, unet = tiny_unet(), tiny_unet()
    base = run_unet(unet, batch=2)
    people = {name: make_expert(plain, seed=seed) for seed, name in enumerate("abc")}
    there = mk.serve(plain, people, capacity=2)
    if order == "hooks-first":
        take_off = OFFLOADS[offload](unet)
    served = mk.serve(unet, people, capacity=2)
    if order == "serve-first":
        take_off = OFFLOADS[offload](unet)
    for names in (["a", "b"], ["c", None], ["b", "c"]):
        there.assign(names), served.assign(names)
        assert torch.equal(run_unet(unet, batch=2), run_unet(plain, batch=2))
    served.remove()
    assert torch.equal(run_unet(unet, batch=2), base)
    take_off()
    assert torch.equal(run_unet(unet, batch=2), base)


@pytest.mark.parametrize("offload", ["sequential", "group-leaf"])
def test_what_the_hooks_let_go_of_is_free(offload, monkeypatch):
    """Nothing of ours, least of all a pooled gate's p, holds the tensors that were fetched for a forward."""
    mlp, x = Mlp(), torch.randn(2, 6, 6)
    handle = patch_mlp(mlp)
    if offload == "group-leaf":
        Elsewhere(monkeypatch)
    OFFLOADS[offload](mlp)
    fetched: list[StorageWeakRef] = []
    operands = LayerExperts.operands

    def seen(experts: LayerExperts, samples: int | None = None) -> Any:
        # on a CPU accelerate fetches an alias of what it keeps
        if offload == "sequential":
            experts.up.data = experts.up.data.clone()
        fetched.append(StorageWeakRef(experts.up.untyped_storage()))
        return operands(experts, samples)

    monkeypatch.setattr(LayerExperts, "operands", seen)
    with torch.no_grad():
        for _ in range(2):
            mlp(x)
    assert len(fetched) == 2 * len(handle.layers)
    assert all(storage.expired() for storage in fetched)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_routers_of_whole_blocks_are_offloaded_with_them(offload):
    unet = tiny_unet()

    def routed() -> Any:
        torch.manual_seed(5)
        return mk.patch(unet, {"a": make_expert(unet), "b": make_expert(unet, seed=1)}, BlockRouting(unet))

    with routed() as handle:
        want = run_unet(unet)
        gates = [path for path, layer in handle.layers.items() if layer.gate is not None]
    assert gates
    routed()
    OFFLOADS[offload](unet)
    for _ in range(2):
        assert torch.equal(run_unet(unet), want)


class Elsewhere:
    """A second device as far as a CPU can pretend one: what comes to it is a copy, what leaves it is spoiled
    behind.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.hooks.group_offloading import ModuleGroup

        here: dict[int, Tensor] = {}

        def load(group: Any) -> None:
            for tensor in tensors_of(group):
                here[id(tensor)], tensor.data = tensor.data, tensor.data.clone()

        def unload(group: Any) -> None:
            for tensor in tensors_of(group):
                if id(tensor) in here:
                    if tensor.is_floating_point():
                        tensor.data.fill_(torch.nan)
                    tensor.data = here.pop(id(tensor))

        monkeypatch.setattr(ModuleGroup, "onload_", load)
        monkeypatch.setattr(ModuleGroup, "offload_", unload)


def tensors_of(group: Any) -> list[Tensor]:
    found = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
    return list({id(t): t for t in (*found, *group.parameters, *group.buffers)}.values())


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("order", ["hooks-first", "patch-first"])
def test_groups_that_really_move(kind, level, order, monkeypatch):
    make, run = MODELS[kind]
    model = make()
    with patched(model):
        want = run(model)
    Elsewhere(monkeypatch)
    if order == "hooks-first":
        groups_of(level)(model)
    handle = patched(model)
    if order == "patch-first":
        groups_of(level)(model)
    for _ in range(3):
        assert torch.equal(run(model), want)
    handle.set_scales({"a": 0.5})
    changed = run(model)
    assert not torch.equal(changed, want) and changed.isfinite().all()
    handle.set_scales({"a": 1.0})
    assert torch.equal(run(model), want)


def test_a_model_whose_groups_lie_on_the_disk_is_refused(tmp_path):
    from diffusers.hooks import apply_group_offloading

    unet = tiny_unet()
    base = run_unet(unet)
    apply_group_offloading(unet, CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path))
    with pytest.raises(MoleStateError, match="written the model's tensors to the disk"):
        patched(unet)
    assert torch.equal(run_unet(unet), base)


# -- casting
# ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("order", ["hooks-first", "patch-first"])
def test_layerwise_casting_rounds_the_base_and_no_expert_to_8_bits(kind, storage, order):
    make, run = MODELS[kind]
    plain, model, rounded = make(), make(), make()
    rounded.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    plain.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    reference = patched(plain)
    if order == "hooks-first":
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        handle = patched(model)
    else:
        handle = patched(model)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    if storage is torch.bfloat16:
        for path in handle.layers:
            # norms and what diffusers leaves alone are not cast, nor are their experts
            if handle.layers[path].weight.dtype == storage:
                for part in (reference.layers[path].experts, reference.layers[path].gate):
                    # what requires a gradient trains, and keeps its dtype
                    if not any(p.requires_grad for p in part.parameters()):
                        part.to(storage).to(torch.float32)
    path = next(path for path in handle.layers if "attn" in path)
    assert handle.layers[path].weight.dtype == storage
    assert handle.layers[path].experts.scale.dtype == torch.float32
    if storage is torch.float8_e4m3fn:
        assert handle.layers[path].experts.down.dtype == handle.layers[path].gate.phi.dtype == torch.float32
    run(model)
    got = run(model)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, run(plain), rtol=1e-4, atol=1e-5)
    handle.remove()
    reference.remove()
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_patched_model_moves_to_another_dtype(kind, dtype):
    make, _ = MODELS[kind]
    model, other = make(), make().to(dtype)
    torch.manual_seed(0)
    experts = {"a": make_expert(model), "b": make_expert(model, seed=1)}
    run_in = lambda m: run_as(m, dtype)  # noqa: E731
    with mk.patch(other, experts):
        want = run_in(other)
    handle = mk.patch(model, experts)
    model.to(dtype)
    assert torch.equal(run_in(model), want)
    handle.remove()
    assert torch.equal(run_in(model), run_in(other))


def run_as(model: nn.Module, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    with torch.no_grad():
        if type(model).__name__.startswith("UNet"):
            return model(draw(1, 4, 8, 6), torch.tensor([3]), draw(1, 5, 12)).sample
        return model(
            hidden_states=draw(1, 6, 4),
            encoder_hidden_states=draw(1, 3, 24),
            pooled_projections=draw(1, 20),
            timestep=torch.tensor([0.5], dtype=dtype),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


# -- training
# ---------------------------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, handle: Any, kind: str) -> list[Tensor]:
    parameters = handle.experts_require_grad() + handle.gates_require_grad()
    model.zero_grad()
    g = torch.Generator().manual_seed(1)
    with torch.enable_grad():
        if kind == "unet":
            y = model(
                torch.randn(2, 4, 8, 6, generator=g), torch.tensor([3, 3]), torch.randn(2, 5, 12, generator=g)
            ).sample
        else:
            y = model(
                hidden_states=torch.randn(1, 6, 4, generator=g),
                encoder_hidden_states=torch.randn(1, 3, 24, generator=g),
                pooled_projections=torch.randn(1, 20, generator=g),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(6, 3),
                txt_ids=torch.zeros(3, 3),
            ).sample
        y.square().sum().backward()
    assert all(p.grad is not None for p in parameters) and any(p.grad.abs().sum() > 0 for p in parameters)
    return [p.grad.clone() for p in parameters]


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    make, _ = MODELS[kind]
    model = make().train()
    handle = patched(model)
    want = gradients(model, handle, kind)
    calls = []
    if reentrant:
        model.enable_gradient_checkpointing(lambda f, *a, **k: checkpoint(f, *a, use_reentrant=True, **k))
        first = model.conv_in if kind == "unet" else model.x_embedder
        # reentrant checkpointing wants an input that takes a gradient
        first.register_forward_hook(lambda module, args, y: y.requires_grad_())
    else:
        model.enable_gradient_checkpointing()
    inside = next(module for path, module in handle.layers.items() if "transformer_blocks" in path)
    inside.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(model, handle, kind)
    assert len(calls) == 2
    for a, b in zip(got, want):
        # recomputed blocks may add their parts of a sum in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -- copies
# -----------------------------------------------------------------------------------------------------------------------------


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_is_a_model_of_its_own(kind, make_copy):
    make, run = MODELS[kind]
    model = make()
    base = run(model)
    handle = patched(model)
    want = run(model)
    twin, its_handle = make_copy((model, handle))
    assert torch.equal(run(twin), want)
    handle.swap("a", make_expert(model, rank=1, seed=7))
    handle.set_scales({"b": 0.1})
    changed = run(model)
    assert not torch.equal(changed, want) and torch.equal(run(twin), want)
    its_handle.set_scales({"a": 0.0})
    assert torch.equal(run(model), changed) and not torch.equal(run(twin), want)
    its_handle.remove()
    assert torch.equal(run(twin), base) and torch.equal(run(model), changed)
    assert not twin._forward_pre_hooks and not twin._forward_hooks
    handle.remove()
    assert torch.equal(run(model), base)
    assert sizes(twin.get_submodule(next(iter(handle.layers)))) == sizes(next(iter(handle.layers.values())))
