"""Cases 64 to 77: right calls at the wrong moment, and work that is interrupted."""

from __future__ import annotations

import errno
import os
import threading

import torch
from torch import nn

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleStateError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files import writer
from mole_kernels.functional import gated_lora_linear
from mole_kernels.layers.attach import detach
from mole_kernels.patching import apply as apply_module
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handles import forget
from mole_kernels.training.checkpoint import list_checkpoints
from tests.robustness.cases import Case, Ground, patched
from tests.robustness.of_files import factors
from tests.tiny_models import State, run_unet, tiny_unet
from tests.truth import Case as Problem

PATCH, FIT, GUARDS = (
    "tests/patching/test_patch.py::",
    "tests/training/test_fit.py::",
    "tests/patching/test_guards.py::",
)


def remove_twice(g: Ground) -> None:
    handle = patch(g.model, {"a": g.expert()})
    handle.remove()
    handle.remove()


def other_handle_on_the_layer(g: Ground) -> None:
    first = patch(g.model, {"a": g.expert()})
    detach(g.model.first)
    second = patch(g.model, {"b": Expert({"first": g.expert(1).layers["first"]})})
    both = State(g.model, g.forward)
    try:
        first.remove()
    finally:
        both.assert_unchanged()
        second.remove()
        for path in ("second", "mix"):
            detach(g.model.get_submodule(path))
        first._lock.unwatch(first._roots)
        forget(first, first._roots)
        for parameter in g.model.parameters():
            parameter.requires_grad_(True)


def fault_at(step: str, at: int, fault: BaseException):
    """Patch with `fault` raised by call number `at` of one step of it."""

    def act(g: Ground) -> None:
        original, calls = getattr(apply_module, step), []

        def failing(*args):
            calls.append(1)
            if len(calls) == at:
                raise fault
            return original(*args)

        with g.monkeypatch.context() as patches:
            patches.setattr(apply_module, step, failing)
            patch(g.model, {"a": g.expert(), "b": g.expert(1)}, "mole")

    return act


def offloaded(g: Ground) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    with patch(g.model, {"a": g.expert()}):
        want = g.forward()
    kept = {name: p.detach().clone() for name, p in g.model.named_parameters()}
    model = type(g.model)()
    model.load_state_dict(kept)
    cpu_offload(model, torch.device("cpu"))
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    assert model.first.weight.is_meta
    with patch(model, {"a": g.expert()}), torch.no_grad():
        assert torch.equal(model(g.x), want) and model.first.weight.is_meta
    assert [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")] == hooks
    remove_hook_from_submodules(model)


def mark_compiled(g: Ground) -> None:
    # torch leaves a mark of its own on what it compiles
    torch.compile(g.model, backend="eager")


def compiled(g: Ground) -> None:
    torch.compiler.reset()
    before = g.forward()
    model = torch.compile(g.model, backend="eager")
    with torch.no_grad():
        assert torch.equal(model(g.x), before)
        handle = patch(model, {"a": g.expert()})
        torch.testing.assert_close(model(g.x), g.forward(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(model(g.x), before)
        handle.remove()
        assert torch.equal(model(g.x), before)
    torch.compiler.reset()


def tie(g: Ground) -> None:
    g.model.twin = nn.Linear(6, 10)
    g.model.twin.weight = g.model.first.weight


def tied(g: Ground) -> None:
    with torch.no_grad():
        before = g.model.twin(g.x)
        with patch(g.model, {"a": g.expert()}):
            assert torch.equal(g.model.twin(g.x), before)
            assert g.model.twin.weight is g.model.first.weight


class Quantised(nn.Linear):
    """As bitsandbytes stores a layer: int8 values in the place of the weight, a forward of its own."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__(K, N)
        self.weight = nn.Parameter(torch.randint(-127, 127, (N, K), dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 127, self.bias)


def quantise(g: Ground) -> None:
    g.model.first = Quantised(6, 10)


def two_threads(g: Ground) -> None:
    """The operator on one weight with other gates in each thread, and a patched model in each."""
    problems = [Problem(T=33, gate=gate, seed=1) for gate in ("both", "mask")]
    calls = [problem.make(torch.float32) for problem in problems]
    weight = calls[0].weight
    experts = [g.expert(seed) for seed in (5, 6)]
    models = [type(g.model)() for _ in experts]
    handles = [patch(model, {"a": expert}) for model, expert in zip(models, experts)]

    @torch.no_grad()
    def work(i: int) -> list[torch.Tensor]:
        call = calls[i]
        return [gated_lora_linear(call.x, weight, call.bias, call.experts, call.gates), models[i](g.x)]

    want, wrong = [work(0), work(1)], []

    def run(i: int) -> None:
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(work(i), want[i])):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for handle in handles:
        handle.remove()


def swapped_during_a_forward(g: Ground) -> None:
    """The swap comes between two layers: each layer's output is wholly that of the old or of the new
    expert.
    """
    old, new = g.expert(), g.expert(7)
    seen: dict[str, torch.Tensor] = {}
    handle = patch(g.model, {"a": old})

    def swap(module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        seen["first"] = y
        handle.swap("a", new)

    with torch.no_grad():
        hook = g.model.first.register_forward_hook(swap)
        second = g.model.second.register_forward_hook(
            lambda module, args, y: seen.update(second=y, x=args[0])
        )
        g.model(g.x)
        hook.remove()
        second.remove()
        assert torch.equal(seen["second"], g.model.second(seen["x"]))
        handle.swap("a", old)
        assert torch.equal(seen["first"], g.model.first(g.x))
    handle.remove()


def resume_with_another_rank(g: Ground) -> None:
    from tests.training import test_fit as there

    there.run(there.replace(there.BASE, steps=3), run_dir=g.folder)
    assert list_checkpoints(g.folder)
    there.run(run_dir=g.folder, resume=True, model=there.toy(rank=5))


def save_stopped_by(fault: BaseException):
    """A save over an older file, stopped when its data are on the disk but not yet under their name."""

    def act(g: Ground) -> None:
        path = g.folder / "bank.safetensors"
        ExpertBank({"a": g.expert()}).save(path)
        before = path.read_bytes()

        def stop(*_: object) -> None:
            raise fault

        try:
            with g.monkeypatch.context() as patches:
                patches.setattr(writer.os, "replace", stop)
                ExpertBank({"a": g.expert(3)}).save(path)
        finally:
            assert os.listdir(g.folder) == [path.name] and path.read_bytes() == before

    return act


def fused_after_patching(g: Ground) -> None:
    unet = tiny_unet()
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    handle = patch(unet, {"a": Expert({path: LowRank(torch.ones(2, 16), torch.ones(16, 2))})})
    names, output = list(unet.state_dict()), run_unet(unet)
    try:
        unet.fuse_qkv_projections()
    finally:
        assert list(unet.state_dict()) == names and torch.equal(run_unet(unet), output)
        handle.remove()


SWEEP = "tests/fuzz/test_sweep.py::test_a_fault_at_every_moment"
SAVES = (
    "tests/files/test_writer.py::test_76_failed_save_keeps_the_old_file",
    "tests/files/test_writer.py::test_76_ctrl_c_in_the_middle_of_the_data",
    "tests/files/test_stream.py::test_76_full_disk",
    "tests/io/test_merge_files.py::test_76_ctrl_c_and_a_full_disk_leave_the_old_file",
    FIT + "test_a_failed_save_leaves_the_last_good_checkpoint",
    FIT + "test_killed_while_saving_and_broken_newest",
    "tests/robustness/test_interrupted.py::test_76_a_full_disk_is_said_and_leaves_the_old_file",
    "tests/robustness/test_interrupted.py::test_76_kill_9_while_a_bank_is_saved",
    "tests/robustness/test_killed.py::test_76_kill_9_at_every_system_call",
    "tests/robustness/test_killed.py::test_76_no_room_while_it_works",
)
FULL = OSError(errno.ENOSPC, "No space left on device")

CASES = [
    Case(
        "64-twice",
        "patch twice",
        act=lambda g: patch(g.model, {"c": g.expert()}),
        error=MoleStateError,
        words=("first already holds the experts a, b", "handle.remove()"),
        prepare=patched,
        deeper=(PATCH + "test_64_patch_twice",),
    ),
    Case(
        "65-twice",
        "remove twice",
        act=remove_twice,
        error=MoleStateError,
        words=("removed already",),
        deeper=(PATCH + "test_65_remove_twice",),
    ),
    Case(
        "66-other-handle",
        "remove while another handle holds the layer",
        act=other_handle_on_the_layer,
        error=MoleStateError,
        words=("first no longer holds the experts of this patch",),
        deeper=(PATCH + "test_66_remove_while_another_handle_holds_the_layer",),
    ),
    Case(
        "67-attach",
        "an exception at layer k of n",
        act=fault_at("attach", 2, KeyboardInterrupt()),
        error=KeyboardInterrupt,
        deeper=(
            PATCH + "test_67_68_a_fault_half_way_changes_nothing",
            PATCH + "test_67_a_fault_half_way_through_a_unet",
            SWEEP,
        ),
    ),
    Case(
        "67-gates",
        "an exception at layer k of n",
        act=fault_at("make_gate", 3, RuntimeError("no")),
        error=RuntimeError,
        words=("no",),
    ),
    Case(
        "68-pack",
        "out of memory half-way",
        act=fault_at("pack", 2, torch.OutOfMemoryError("full")),
        error=torch.OutOfMemoryError,
        words=("full",),
        deeper=(PATCH + "test_67_68_a_fault_half_way_changes_nothing", SWEEP),
    ),
    Case(
        "68-host",
        "out of memory half-way",
        act=fault_at("attach", 3, MemoryError("full")),
        error=MemoryError,
        words=("full",),
    ),
    Case(
        "69-offload",
        "offload hooks present",
        act=offloaded,
        outcome="kept and honoured: the same answer, weights back on meta afterwards",
        deeper=(
            PATCH + "test_69_accelerates_offload_goes_on_under_a_patch",
            "tests/peft/test_accelerate_diffusers.py::test_sequential_offload",
        ),
    ),
    Case(
        "70-compiled",
        "a compiled model",
        act=compiled,
        prepare=mark_compiled,
        outcome="patched inside its wrapper, computes the mixture; after `remove` the base's bits",
        deeper=(
            "tests/peft/test_accelerate_compile.py::test_acceleration_reaches_a_compiled_model_and_leaves_it",
        ),
    ),
    Case(
        "71-tied",
        "tied weights",
        act=tied,
        prepare=tie,
        outcome="only the named layer is patched, the tie stays; folding it is refused",
        deeper=("tests/patching/test_fold.py::test_a_tied_weight_is_refused",),
    ),
    Case(
        "72-int8",
        "quantised base",
        act=lambda g: patch(g.model, {"a": factors()}),
        prepare=quantise,
        error=MoleKeyError,
        words=("first", "stored as Parameter, int8"),
    ),
    Case(
        "73-threads",
        "two threads with different gates",
        act=two_threads,
        outcome="each thread gets its own answer, bit for bit",
    ),
    Case(
        "74-swap",
        "a swap during a forward",
        act=swapped_during_a_forward,
        deeper=("tests/modules/test_threads.py::test_a_forward_is_wholly_before_or_wholly_after_a_swap",),
        outcome="from another thread the whole forward is before it or after it; from a hook inside, each layer is old or new",
    ),
    Case(
        "75-rank",
        "resume training from another rank",
        act=resume_with_another_rank,
        error=MoleStateError,
        words=("2.weight", "[3, 8]", "[5, 8]"),
        deeper=(FIT + "test_resume_with_another_run_is_refused_and_changes_nothing",),
    ),
    Case(
        "76-full-disk",
        "Ctrl-C or a full disk during save",
        act=save_stopped_by(FULL),
        error=MoleFileError,
        words=("No space left on device",),
        deeper=SAVES,
    ),
    Case(
        "76-ctrl-c",
        "Ctrl-C or a full disk during save",
        act=save_stopped_by(KeyboardInterrupt()),
        error=KeyboardInterrupt,
    ),
    Case(
        "77-fuse",
        "`fuse_qkv_projections()` after patching",
        act=fused_after_patching,
        error=MoleStateError,
        words=("projections hold experts",),
        deeper=(GUARDS + "test_fusing_a_patched_model_is_refused_and_changes_nothing",),
    ),
]
