"""Acceleration under threads: forced interleavings give what each thread gets alone, and no count is lost."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mole_kernels as mk
from mole_kernels import tally
from mole_kernels.peft import forward as peft_forward
from tests.peft_models import K, calls, draw, twins

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


def beside(work: Callable[[], object]) -> object:
    """Run `work` in another thread to its end, and return what it returned."""
    out: list[object] = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and out, "the other thread did not end, or raised"
    return out[0]


def in_the_middle(monkeypatch: pytest.MonkeyPatch, name: str, work: Callable[[], object]) -> None:
    """Let another thread do `work` when the next forward comes to `name`; once."""
    function = getattr(peft_forward, name)
    todo = [work]

    def interrupted(*args: Any) -> Any:
        if todo:
            beside(todo.pop())
        return function(*args)

    monkeypatch.setattr(peft_forward, name, interrupted)


@pytest.mark.parametrize("where", ["read_operands", "_mixture", "count"])
@pytest.mark.parametrize("merged", [False, True])
def test_taken_off_in_the_middle_of_a_forward(monkeypatch: pytest.MonkeyPatch, where: str, merged: bool):
    """The other thread gives the class back; this forward still ends with PEFT's answer."""
    plain, fast = twins((4, 2))
    handle = mk.accelerate(fast)
    if merged:
        plain[0].merge(), fast[0].merge()
    x = draw(3, K)
    in_the_middle(monkeypatch, where, lambda: handle.remove() or True)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    # a merged layer comes neither to the mixture nor to its count
    if not (merged and where != "read_operands"):
        assert type(fast[0]) is type(plain[0])
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["read_operands", "_mixture", "count"])
def test_accelerated_again_in_the_middle_of_a_forward(monkeypatch: pytest.MonkeyPatch, where: str):
    plain, fast = twins((4, 2))
    x = draw(3, K)
    in_the_middle(monkeypatch, where, lambda: mk.accelerate(fast))
    for _ in range(2):
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls() == (2, {})


@pytest.mark.parametrize("names", [["a0"], ["a1"], ["a1", "a0"], []], ids=str)
def test_other_adapters_in_the_middle_of_a_forward(monkeypatch: pytest.MonkeyPatch, names: list[str]):
    """A forward computes the adapters that were active when it read them, all of them or none."""
    plain, fast = twins((4, 2))
    x = draw(3, K)
    before = plain(x)
    plain[0].set_adapter(list(names))
    after = plain(x)
    in_the_middle(monkeypatch, "_mixture", lambda: fast[0].set_adapter(list(names)) or True)
    torch.testing.assert_close(fast(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast(x), after, rtol=1e-5, atol=1e-5)


def test_two_threads_accelerate_one_model_at_once(monkeypatch: pytest.MonkeyPatch):
    _, fast = twins((4,))
    mk.accelerate(fast).remove()
    # the second thread comes between the look at the class and its exchange
    in_the_middle(monkeypatch, "accelerated_class", lambda: mk.accelerate(fast))
    handle = mk.accelerate(fast)
    assert list(handle.layers) == ["0"] and not handle.skipped
    fast(draw(3, K))
    assert calls() == (1, {})


class SlowCounter(Counter):
    """Lets another thread count in the middle of `counter[key] += 1`."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.other = threading.Thread(target=work)
        self.begun = False

    def __missing__(self, key: object) -> int:
        if not self.begun:
            self.begun = True
            self.other.start()
            # it cannot end before this count has; without the lock it would, and be overwritten
            self.other.join(0.05)
        return 0


def test_no_count_is_lost_between_reading_and_writing():
    counter: Counter[str] = SlowCounter(lambda: tally.count("call", counter))
    tally.count("call", counter)
    counter.other.join(10)
    assert tally.totals(counter) == {"call": 2}


def test_a_reset_loses_no_count(monkeypatch: pytest.MonkeyPatch):
    """Every call is in exactly one report, whatever the threads do."""
    _, fast = twins((4,))
    x, stop = draw(2, K), threading.Event()
    reported: list[int] = []

    def report() -> None:
        while not stop.is_set():
            reported.append(mk.status(reset=True)["accelerated"])

    thread = threading.Thread(target=report)
    thread.start()
    with torch.no_grad():
        for _ in range(200):
            fast(x)
    stop.set()
    thread.join(10)
    assert sum(reported) + mk.status()["accelerated"] == 200
