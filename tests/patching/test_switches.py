"""enable, disable and set_scales from several threads: every interleaving ends where its calls say."""

import threading
from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mole_kernels.patching.apply import patch
from tests.tiny_models import Mlp, make_expert

X = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3))


def mlp():
    torch.manual_seed(0)
    return Mlp()


class Switching(RuleBasedStateMachine):
    """Blocks that open and close in any order, as overlapping threads have them, and calls without a
    block.
    """

    @initialize()
    def start(self):
        self.model = mlp()
        self.base = self.model(X)
        self.handle = patch(self.model, {"a": make_expert(self.model)})
        self.mixture = self.model(X)
        # the model of it: what lasts, then the open blocks and bare calls in order
        self.requests, self.open = [[True, None]], []

    @rule(on=st.booleans())
    def enter(self, on):
        stack = ExitStack()
        stack.enter_context(self.handle.enable() if on else self.handle.disable())
        self.open.append(stack)
        self.requests.append([on, stack])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data):
        stack = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        stack.close()
        self.requests = [r for r in self.requests if r[1] is not stack]

    @rule(on=st.booleans())
    def call(self, on):
        if on:
            self.handle.enable()
        else:
            self.handle.disable()
        self.requests.append([on, None])

    @invariant()
    def the_latest_request_decides(self):
        if hasattr(self, "requests"):
            assert torch.equal(self.model(X), self.mixture if self.requests[-1][0] else self.base)

    def teardown(self):
        if hasattr(self, "handle"):
            self.handle.remove()
            for stack in self.open:
                stack.close()
            assert torch.equal(self.model(X), self.base)


Switching.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
TestSwitching = Switching.TestCase


def in_threads(*bodies):
    errors = []

    def guarded(body):
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_blocks_of_two_threads_that_overlap():
    """The second begins inside the first and ends after it: that left the experts off for good."""
    model = mlp()
    handle = patch(model, {"a": make_expert(model)})
    mixture = model(X)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with handle.disable():
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second():
        assert first_in.wait(60)
        with handle.disable():
            second_in.set()
            assert first_out.wait(60)
            seen.append(model(X))

    in_threads(first, second)
    assert torch.equal(model(X), mixture) and not torch.equal(seen[0], mixture)


@pytest.mark.parametrize("start", ["together", "one inside the other's wait"])
def test_no_scale_that_a_thread_sets_is_lost(start):
    names = "abcd"
    model = mlp()
    handle = patch(model, {name: make_expert(model, seed=i) for i, name in enumerate(names)})
    for trial in range(10):
        barrier = threading.Barrier(len(names))
        wanted = {name: 0.1 * (i + 1) + 0.01 * trial for i, name in enumerate(names)}

        def set_one(name, wanted=wanted, barrier=barrier):
            barrier.wait(60)
            handle.set_scales({name: wanted[name]})

        if start == "together":
            in_threads(*(lambda n=name: set_one(n) for name in names))
        else:
            # all wait for one forward that is held, each having computed what it will write
            with handle.hold():
                threads = [threading.Thread(target=set_one, args=(name,)) for name in names]
                for thread in threads:
                    thread.start()
            for thread in threads:
                thread.join()
        assert handle.scales == wanted
        got = model(X)
        handle.set_scales(wanted)
        assert torch.equal(model(X), got)
