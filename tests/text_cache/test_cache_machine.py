"""No sequence of writes, casts, hooks and threads makes the cache give another text's or another thread's
tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor
from torch.nn import functional as F

import mole_kernels as mk
from mole_kernels.text_cache import layer as cached_layer
from tests.text_cache.test_cache import Cross, Scene
from tests.tiny_models import make_expert

CONTEXTS = st.integers(0, 1)
TEXTS = st.integers(0, 2)


class CacheMachine(RuleBasedStateMachine):
    """Two threads, each waited for, so that every order is one that was chosen; the layers without a cache
    judge.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene("mole", texts=3)
        self.layers = [self.scene.cross.to_k, self.scene.cross.to_v]
        self.dtype = torch.float32
        g = torch.Generator().manual_seed(5)
        self.texts = [torch.randn(2, 5, 12, generator=g) for _ in range(3)]
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        # outputs that a context holds, and what they were when it got them
        self.held: list[tuple[int, Tensor, Tensor]] = []
        self.unhook: Callable[[], object] | None = None
        self.seed = 10

    def teardown(self) -> None:
        for thread in self.threads:
            thread.shutdown()

    def drawn(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)

    def fresh(self, layer: Any, x: Tensor) -> Tensor:
        """What the layer computes without its cache, and without offloading."""
        offloaded = self.unhook is not None
        if offloaded:
            self.offload()
        with torch.no_grad():
            y: Tensor = type(layer).forward(layer, x)
        if offloaded:
            self.offload()
        return y

    # -- calls

    @invariant()
    def every_context_gets_what_its_text_gives(self) -> None:
        """So that the next step always finds every output kept."""
        for context, thread in enumerate(self.threads):
            for x in self.texts:
                for layer in self.layers:
                    got = thread.submit(_no_grad, layer, x).result()
                    assert torch.equal(got, self.fresh(layer, x))
                    if not any(got is y for _, y, _ in self.held):
                        self.held.append((context, got, got.clone()))

    @rule(context=CONTEXTS, text=TEXTS)
    def call_with_a_copy(self, context: int, text: int) -> None:
        layer, x = self.layers[0], self.texts[text].clone()
        got = self.threads[context].submit(_no_grad, layer, x).result()
        assert torch.equal(got, self.fresh(layer, x))

    @rule(context=CONTEXTS, text=TEXTS)
    def call_under_autocast(self, context: int, text: int) -> None:
        layer, x = self.layers[0], self.texts[text]

        def work() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return _no_grad(layer, x)

        got = self.threads[context].submit(work).result()
        with torch.autocast("cpu", torch.bfloat16):
            want = self.fresh(layer, x)
        assert got.dtype == want.dtype and torch.equal(got, want)

    @rule(context=CONTEXTS, text=TEXTS)
    def call_with_gradients(self, context: int, text: int) -> None:
        layer, x = self.layers[1], self.texts[text]
        got = self.threads[context].submit(lambda: layer(x).detach()).result()
        assert torch.equal(got, self.fresh(layer, x))

    @precondition(lambda self: self.held)
    @rule(choice=st.randoms(use_true_random=False))
    def a_consumer_writes_into_an_output(self, choice: Any) -> None:
        """Allowed to whoever got the tensor: that context's own view changes, and no other context's."""
        context, y, _ = choice.choice(self.held)
        y.mul_(2)
        self.held = [
            (c, other, other.clone() if c == context and other.data_ptr() == y.data_ptr() else was)
            for c, other, was in self.held
        ]

    @invariant()
    def what_a_context_holds_is_its_own(self) -> None:
        for context, y, was in self.held:
            assert torch.equal(y, was)
            for other_context, other, _ in self.held:
                assert context == other_context or y.data_ptr() != other.data_ptr()

    @rule(context=CONTEXTS)
    def a_thread_ends_and_another_begins(self, context: int) -> None:
        self.threads[context].shutdown()
        self.threads[context] = ThreadPoolExecutor(1)
        self.held = [entry for entry in self.held if entry[0] != context]

    # -- texts

    @rule(text=TEXTS, how=st.sampled_from(["in place", "view", "data", "numpy", "rebound", "new", "swapped"]))
    def write_a_text(self, text: int, how: str) -> None:
        x, values = self.texts[text], self.drawn(2, 5, 12)
        if how == "in place":
            x.copy_(values)
        elif how == "view":
            x[0].copy_(values[0])
        elif how == "data":
            x.data.copy_(values)
        elif how == "numpy" and self.dtype == torch.float32:
            x.numpy()[:] = values.numpy()
        elif how == "rebound":
            x.data = values
        elif how == "new":
            self.texts[text] = values
        else:
            other = (text + 1) % 3
            self.texts[text], self.texts[other] = self.texts[other], x

    # -- the layers

    @rule(which=st.integers(0, 1), how=st.sampled_from(["in place", "data", "rebound", "expert", "gate"]))
    def write_a_layer(self, which: int, how: str) -> None:
        layer = self.layers[which]
        with torch.no_grad():
            weight = (
                layer.experts.down if how == "expert" else layer.gate.phi if how == "gate" else layer.weight
            )
            values = self.drawn(*weight.shape)
            if how == "data":
                weight.data.copy_(values)
            elif how == "rebound":
                weight.data = values
            else:
                weight.copy_(values)

    @rule(scale=st.sampled_from([0.0, 0.5, 1.0]))
    def set_scale(self, scale: float) -> None:
        self.scene.handle.set_scales({"a": scale})

    @rule(rank=st.integers(1, 4))
    def swap(self, rank: int) -> None:
        self.seed += 1
        self.scene.handle.swap("a", make_expert(self.scene.model, rank=rank, seed=self.seed))

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        self.scene.model.to(dtype)
        self.texts = [x.to(dtype) for x in self.texts]
        self.dtype = dtype

    @rule()
    def cast_there_and_back(self) -> None:
        self.scene.model.bfloat16().to(self.dtype)

    @rule()
    def offload(self) -> None:
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules

        if self.unhook is None:
            cpu_offload(self.layers[0], torch.device("cpu"))
            self.unhook = lambda: remove_hook_from_submodules(self.layers[0])
        else:
            self.unhook()
            self.unhook = None

    @rule()
    def clear(self) -> None:
        self.scene.cache.clear()


# an offloaded layer has no tensors to write to, and is called through its hook
for name in ("write_a_layer", "set_scale", "swap", "cast", "cast_there_and_back"):
    setattr(CacheMachine, name, precondition(lambda self: self.unhook is None)(getattr(CacheMachine, name)))

TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


# -- the middle of a call, in chosen places


def in_the_middle(monkeypatch: pytest.MonkeyPatch, when: str, work: Callable[[], object]) -> None:
    """Let another thread do `work` just before or after the next output is computed."""
    function = cached_layer._plain_forward
    todo = [work]

    def other_thread() -> None:
        if todo:
            thread = threading.Thread(target=todo.pop())
            thread.start()
            thread.join(10)
            assert not thread.is_alive()

    def interrupted(layer: Any, x: Tensor) -> Tensor:
        if when == "before":
            other_thread()
        y = function(layer, x)
        if when == "after":
            other_thread()
        return y

    monkeypatch.setattr(cached_layer, "_plain_forward", interrupted)


# each with its inverse, exact in floating point
MIDDLES: dict[str, tuple[Callable[[Scene], Any], Callable[[Scene], Any]]] = {
    "the text": (lambda s: s.text.mul_(2), lambda s: s.text.mul_(0.5)),
    "the text, through .data": (lambda s: s.text.data.mul_(2), lambda s: s.text.data.mul_(0.5)),
    "a weight": (
        lambda s: s.cross.to_k.weight.detach().mul_(2),
        lambda s: s.cross.to_k.weight.detach().mul_(0.5),
    ),
    "a weight, through .data": (
        lambda s: s.cross.to_k.weight.data.mul_(2),
        lambda s: s.cross.to_k.weight.data.mul_(0.5),
    ),
    "a scale": (lambda s: s.cross.to_k.experts.scale.mul_(2), lambda s: s.cross.to_k.experts.scale.mul_(0.5)),
    "clear": (lambda s: s.cache.clear(), lambda s: None),
    "close": (lambda s: s.cache.close(), lambda s: None),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MIDDLES)
def test_written_in_the_middle_of_a_call_and_back_again(
    monkeypatch: pytest.MonkeyPatch, name: str, when: str
):
    """What was computed of the values before is never given out for those after, nor the other way round."""
    s = Scene()
    change, back = MIDDLES[name]
    in_the_middle(monkeypatch, when, lambda: change(s))
    s()
    back(s)
    assert torch.equal(s(), s.fresh())
    change(s)
    assert torch.equal(s(), s.fresh())


@pytest.mark.parametrize("when", ["before", "after", "between calls"])
def test_a_cast_in_the_middle_of_a_call_is_seen_without_a_look_at_values(
    monkeypatch: pytest.MonkeyPatch, when: str
):
    """`.to()` goes through `_apply`, may leave address and version as they were, and is seen all the same."""
    layer = Cross().eval()
    text = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))

    def cast() -> None:
        layer.to_k._apply(lambda t: t.data.mul_(2))

    with torch.no_grad(), mk.cache_text(layer, check="versions") as cache:
        if when != "between calls":
            in_the_middle(monkeypatch, when, cast)
        layer(text)
        if when == "between calls":
            cast()
        for reused in (1, 3):
            assert torch.equal(layer(text)[0], F.linear(text, layer.to_k.weight))
            assert cache.reused == reused


def test_threads_that_know_one_text_share_no_output():
    s = Scene()
    mine, again = s(), s()
    assert torch.equal(mine, again) and s.cache.reused == 2
    with torch.no_grad():
        first = s.cross.to_k(s.text)
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(lambda: _no_grad(s.cross.to_k, s.text)).result()
            theirs.zero_()
        assert first.data_ptr() != theirs.data_ptr() and torch.equal(s.cross.to_k(s.text), s.fresh()[0])


def test_no_thread_pushes_out_anothers_text():
    s = Scene(texts=1)
    s.warm()
    others = [torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with ThreadPoolExecutor(1) as pool:
        for text in others:
            pool.submit(lambda text=text: s(text)).result()
    before = s.cache.computed
    s()
    assert s.cache.computed == before


def _no_grad(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)
