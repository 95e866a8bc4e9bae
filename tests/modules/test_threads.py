"""Threads and processes on patched models: every forward sees a model before a change or after it
(docs/memory.md).
"""

from __future__ import annotations

import contextvars
import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.gates.block import BlockRouting
from mole_kernels.modules import forward_lock
from tests.tiny_models import Mlp, make_expert

ROOT = Path(__file__).parents[2]
PATHS = ("first", "second", "mix")
# far more than any of this takes: who waits longer waits for ever
LONG = 60.0


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3))


def slow(model: nn.Module, seconds: float = 0.001) -> None:
    """Other threads get their chance in the middle of each forward."""
    for path in PATHS[:2]:
        model.get_submodule(path).register_forward_hook(lambda *_: time.sleep(seconds))


def two_experts(model: nn.Module) -> dict[str, Any]:
    return {"a": make_expert(model, PATHS), "b": make_expert(model, PATHS, seed=1)}


def together(*works: Callable[[], None]) -> None:
    """Each in a thread of its own; what one raises is raised here, and nobody is waited for for ever."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    if failed:
        raise failed[0]
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"


def among(y: Tensor, states: list[Tensor]) -> int | None:
    return next((i for i, one in enumerate(states) if torch.equal(y, one)), None)


@pytest.mark.parametrize("rank", [2, 4], ids=["in-place", "repacked"])
def test_a_forward_is_wholly_before_or_wholly_after_a_swap(x, rank):
    model = Mlp()
    handle = mk.patch(model, two_experts(model), "mole")
    new, old = make_expert(model, PATHS, rank=rank, seed=7), make_expert(model, PATHS)
    states = []
    with torch.no_grad():
        for expert in (new, old):
            handle.swap("a", expert)
            states.append(model(x))
    slow(model)
    seen: list[int | None] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            seen.append(among(model(x), states))

    def swap() -> None:
        for i in range(20):
            handle.swap("a", (new, old)[i % 2])
            time.sleep(0.002)
        done.set()

    together(run, swap)
    assert set(seen) == {0, 1}


def test_several_changes_are_one_for_the_others(x):
    model = Mlp()
    handle = mk.patch(model, two_experts(model))
    new, old = make_expert(model, PATHS, seed=7), make_expert(model, PATHS)

    def change(i: int) -> None:
        with handle.change():
            handle.swap("a", (new, old)[i])
            handle.set_scales({"a": (0.5, 1.0)[i], "b": (2.0, 1.0)[i]})

    states = []
    with torch.no_grad():
        for i in range(2):
            change(i)
            states.append(model(x))
    slow(model)
    seen: list[int | None] = []

    def swap() -> None:
        for i in range(20):
            change(i % 2)
            time.sleep(0.002)

    together(lambda: seen.extend(among(model(x), states) for _ in range(40)), swap)
    assert None not in seen


def test_held_still_all_steps_see_one_model(x):
    model = Mlp()
    handle = mk.patch(model, two_experts(model))
    steps, entered = [], threading.Event()

    def picture() -> None:
        with handle.hold():
            for _ in range(5):
                steps.append(model(x))
                entered.set()
                time.sleep(0.01)

    def change() -> None:
        entered.wait(LONG)
        handle.set_scales({"a": 0.0})
        assert len(steps) == 5

    together(picture, change)
    assert all(torch.equal(step, steps[0]) for step in steps)
    with torch.no_grad():
        assert not torch.equal(model(x), steps[0])


def test_removal_waits_for_the_forward_that_runs(x):
    model = Mlp()
    with torch.no_grad():
        base = model(x)
        handle = mk.patch(model, two_experts(model))
        want = model(x)
    inside, got = threading.Event(), []

    def linger(*_: Any) -> None:
        inside.set()
        time.sleep(0.05)

    hook = model.first.register_forward_hook(linger)

    def remove() -> None:
        inside.wait(LONG)
        handle.remove()

    together(lambda: got.append(model(x)), remove)
    hook.remove()
    assert torch.equal(got[0], want)
    with torch.no_grad():
        assert torch.equal(model(x), base)
    assert (
        not model._forward_pre_hooks and not model._forward_hooks and not model._forward_hooks_always_called
    )


def test_a_swap_out_of_ones_own_forward_does_not_wait_for_itself(x):
    model = Mlp()
    handle = mk.patch(model, two_experts(model))
    experts = [make_expert(model, PATHS, seed=seed) for seed in (7, 8)]
    barrier = threading.Barrier(2)
    turn: dict[int, int] = {}

    def swap(*_: Any) -> None:
        i = turn[threading.get_ident()]
        # both are in the middle of a forward
        barrier.wait(LONG)
        handle.swap("a", experts[i])

    model.first.register_forward_hook(swap)

    def work(i: int) -> Callable[[], None]:
        def run() -> None:
            turn[threading.get_ident()] = i
            model(x)

        return run

    together(work(0), work(1))
    assert not handle._lock._inside and handle._lock._changing is None


class Stopped(BaseException):
    """As Ctrl-C: past every `except Exception`."""


def test_a_forward_that_was_stopped_blocks_nobody(x, monkeypatch):
    monkeypatch.setattr(forward_lock, "POLL", 0.02)
    model = Mlp()
    handle = mk.patch(model, two_experts(model))

    def stop(*_: Any) -> None:
        raise Stopped

    hook = model.first.register_forward_hook(stop)
    with pytest.raises(Stopped):
        model(x)
    hook.remove()
    # this thread lives on and runs no forward; another one changes
    together(lambda: handle.set_scales({"a": 0.5}))
    with pytest.raises(ZeroDivisionError), handle.hold():
        raise ZeroDivisionError
    failing = model.first.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    failing.remove()
    together(lambda: handle.set_scales({"a": 0.5}))
    assert handle.scales["a"] == 0.5


def test_a_thread_that_dies_holding_blocks_nobody(monkeypatch):
    monkeypatch.setattr(forward_lock, "POLL", 0.02)
    model = Mlp()
    handle = mk.patch(model, two_experts(model))
    together(lambda: handle.hold().__enter__())
    together(lambda: handle.set_scales({"a": 0.5}))
    assert handle.scales["a"] == 0.5


@pytest.mark.parametrize("poll", [0.005, 1000.0], ids=["polls often", "never polls"])
def test_a_change_waits_for_a_long_forward_and_is_woken_by_its_end(x, monkeypatch, poll):
    """Counted, not timed: a forward that outlasts many polls is not given up, and its end wakes the change."""
    monkeypatch.setattr(forward_lock, "POLL", poll)
    model = Mlp()
    handle = mk.patch(model, two_experts(model))
    inside, leave, events, polls = threading.Event(), threading.Event(), [], []
    wait = threading.Condition.wait

    def counted(self: threading.Condition, timeout: float | None = None) -> bool:
        woken = wait(self, timeout)
        if self is handle._lock._free and not woken:
            polls.append(1)
            if len(polls) == 5:
                leave.set()
        return woken

    monkeypatch.setattr(threading.Condition, "wait", counted)

    def hold(*_: Any) -> None:
        inside.set()
        assert leave.wait(LONG)
        events.append("forward")

    hook = model.first.register_forward_hook(hold)

    def change() -> None:
        assert inside.wait(LONG)
        if poll > 1:
            # the forward ends once the change is asleep: nothing but its notice can wake it
            threading.Thread(target=lambda: _asleep(handle) and leave.set()).start()
        handle.set_scales({"a": 0.5})
        events.append("change")

    together(lambda: model(x), change)
    hook.remove()
    assert events == ["forward", "change"] and handle.scales["a"] == 0.5
    assert len(polls) >= 5 if poll < 1 else not polls


def _asleep(handle: Any) -> bool:
    while not handle._lock._asleep:
        time.sleep(0.001)
    return True


def test_many_forwards_do_not_keep_a_change_waiting(x):
    model = Mlp()
    handle = mk.patch(model, two_experts(model))
    slow(model, 0.002)
    done = threading.Event()

    def run() -> None:
        until = time.monotonic() + LONG / 2
        while not done.is_set():
            model(x)
            assert time.monotonic() < until, "the change never came through"

    def change() -> None:
        for i in range(5):
            handle.set_scales({"a": float(i)})
        done.set()

    together(run, run, run, change)


def test_two_handles_with_gates_of_their_own_over_the_same_base(x):
    models = [Mlp(), Mlp()]
    models[1].load_state_dict(models[0].state_dict())
    for path in PATHS:
        # one base in memory
        models[1].get_submodule(path).weight = models[0].get_submodule(path).weight
    handles = [
        mk.patch(model, {"a": make_expert(model, PATHS, seed=i)}, gate)
        for i, (model, gate) in enumerate(zip(models, ("mole", "softmax")))
    ]
    with torch.no_grad():
        want = [model(x) for model in models]
    assert not torch.equal(*want)
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(50):
            if not torch.equal(models[i](x), want[i]):
                wrong.append(i)

    # threads of a served model have the assignment of the context that they run in
    contexts = [contextvars.copy_context() for _ in range(2)]
    together(lambda: contexts[0].run(run, 0), lambda: contexts[1].run(run, 1))
    assert not wrong
    handles[0].remove()
    with torch.no_grad():
        assert torch.equal(models[1](x), want[1])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        time.sleep(0.001)
        return x + self.linear(y)


def test_what_is_kept_for_a_batch_is_not_another_threads(x):
    """A block's router keeps what it said of the batch for the layers of its block; a served model keeps the
    batch's assignment.
    """
    model = nn.Sequential(Block(), Block())
    routing = BlockRouting(model, is_block=lambda path, module: isinstance(module, Block))
    mk.patch(
        model,
        {name: make_expert(model, ["0.linear", "1.linear"], seed=i) for i, name in enumerate("ab")},
        routing,
    )
    check_two_batches(model, x)
    model = nn.Sequential(Block(), Block())
    experts = {name: make_expert(model, ["0.linear", "1.linear"], seed=i) for i, name in enumerate("ab")}
    with mk.serve(model, experts) as served, served.assign(["a"]):
        check_two_batches(model, x)


def check_two_batches(model: nn.Module, x: Tensor) -> None:
    batches = [x, torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(4))]
    with torch.no_grad():
        want = [model(batch) for batch in batches]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(20):
            if not torch.equal(model(batches[i]), want[i]):
                wrong.append(i)

    # threads of a served model have the assignment of the context that they run in
    contexts = [contextvars.copy_context() for _ in range(2)]
    together(lambda: contexts[0].run(run, 0), lambda: contexts[1].run(run, 1))
    assert not wrong


def test_copies_take_turns_of_their_own():
    model = Mlp()
    handle = mk.patch(model, two_experts(model))
    _, its_handle = copy.deepcopy((model, handle))
    with handle.hold():
        together(
            lambda: its_handle.set_scales({"a": 0.5}),
            lambda: its_handle.swap("b", make_expert(model, PATHS, seed=5)),
        )
    assert its_handle._lock is not handle._lock


# -- processes
# --------------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, pickle, sys, threading
import torch, torch.multiprocessing as mp
import mole_kernels as mk
from tests.tiny_models import Mlp, make_expert

PATHS = ("first", "second", "mix")


@torch.no_grad()
def child(given, x, want, changed):
    # torch shares tensors with a spawned process; bytes are its own
    model, handle = pickle.loads(given) if isinstance(given, bytes) else given
    model.first._forward_hooks.clear()
    ok = torch.equal(model(x), want)
    handle.set_scales({"a": 0.25})
    os._exit(0 if ok and torch.equal(model(x), changed) else 1)


@torch.no_grad()
def main(method):
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(2, 6, 6)
    handle = mk.patch(model, {"a": make_expert(model, PATHS), "b": make_expert(model, PATHS, seed=1)}, "mole")
    want = model(x)
    handle.set_scales({"a": 0.25})
    changed = model(x)
    handle.set_scales({"a": 1.0})
    given = (model, handle) if method == "fork" else pickle.dumps((model, handle))
    inside, go = threading.Event(), threading.Event()

    def stop(*_):
        inside.set()
        go.wait(60)

    # a forked child is born while a thread, which it will not have, is in the middle of a forward
    hook = model.first.register_forward_hook(stop)
    thread = threading.Thread(target=torch.no_grad()(model), args=(x,))
    thread.start()
    inside.wait(60)
    process = mp.get_context(method).Process(target=child, args=(given, x, want, changed))
    process.start()
    go.set()
    thread.join()
    hook.remove()
    process.join(100)
    print(process.exitcode, torch.equal(model(x), want))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_patched_model_goes_to_another_process(method, tmp_path):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, str(program), method], capture_output=True, text=True, timeout=200, cwd=ROOT, env=env
    )
    assert out.stdout.strip() == "0 True", out.stderr[-2000:]
