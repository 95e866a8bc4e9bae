"""Administration, assignments and forwards of several callers, interleaved against a model of them."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.errors import MoleStateError
from mole_kernels.experts.lowrank import Expert
from mole_kernels.serving.assignment import AssignmentScope
from tests.tiny_models import Mlp, make_expert

PATHS = ("first", "second", "mix")
NAMES = "abcd"
EXPERTS = 6
SAMPLES = 3
CALLERS = 3

# the first one has most to do
callers = st.sampled_from([0, 0, 0, *range(1, CALLERS)])
experts = st.integers(0, EXPERTS - 1)
names = st.sampled_from(NAMES)
# mostly what fits a pool of two sets
batches = st.tuples(names, names).flatmap(
    lambda pair: st.lists(st.sampled_from([None, *pair]), min_size=SAMPLES, max_size=SAMPLES)
) | st.permutations(NAMES).map(lambda order: list(order[:SAMPLES]))


def merged(model: nn.Module, expert: Expert) -> nn.Module:
    """A copy with s·B·A in its weights: nothing of the package computes it."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path, factor in expert.layers.items():
            weight = model.get_submodule(path).weight
            weight += (factor.scale * (factor.up.double() @ factor.down.double())).float().view_as(weight)
    return model


torch.manual_seed(0)
BASE = Mlp()
X = torch.randn(SAMPLES, 6, 6, generator=torch.Generator().manual_seed(1))
VERSIONS = [make_expert(BASE, PATHS, rank=1 + i % 2, seed=i) for i in range(EXPERTS)]
with torch.no_grad():
    SOLO = {i: merged(BASE, expert)(X) for i, expert in enumerate(VERSIONS)} | {None: BASE(X)}


@dataclass
class Entry:
    """An assignment as its caller means it: each sample's addition, and whether a `with` keeps it."""

    versions: tuple[int | None, ...]
    scope: AssignmentScope | None = None


@dataclass
class Caller:
    """A thread with a context of its own, and the assignments that it expects to have."""

    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    context: contextvars.Context = field(default_factory=contextvars.Context)
    stack: list[Entry] = field(default_factory=list)
    has_assigned: bool = False

    def run(self, work: Callable[[], Any]) -> Any:
        return self.thread.submit(self.context.run, work).result()

    def versions(self) -> tuple[int | None, ...]:
        return self.stack[-1].versions if self.stack else (None,) * SAMPLES


class Serving(RuleBasedStateMachine):
    """A pool of two sets, four names, three callers."""

    evict = True

    @initialize()
    def begin(self) -> None:
        self.model = copy.deepcopy(BASE)
        self.callers = [Caller() for _ in range(CALLERS)]
        self.moved = False
        # name -> the number of its last addition; that number -> the expert that was added
        self.now = {"a": 0, "b": 1, "c": 2}
        self.expert_of: dict[int | None, int | None] = {None: None, 0: 0, 1: 1, 2: 2}
        self.served = mk.serve(
            self.model, {n: VERSIONS[i] for n, i in self.now.items()}, capacity=2, rank=2, evict=self.evict
        )

    @rule(who=callers, name=names, version=experts)
    def add(self, who: int, name: str, version: int) -> None:
        self.callers[who].run(lambda: self.served.add(name, VERSIONS[version]))
        self.now[name] = len(self.expert_of)
        self.expert_of[self.now[name]] = version

    @rule(who=callers, name=names)
    def drop(self, who: int, name: str) -> None:
        assert self._try(who, lambda: self.served.drop(name)) == (name in self.now)
        self.now.pop(name, None)

    @rule(who=callers, wanted=st.lists(names, max_size=3))
    def prefetch(self, who: int, wanted: list[str]) -> None:
        assert self._try(who, lambda: self.served.prefetch(wanted)) == set(wanted).issubset(self.now)

    @rule(who=callers, batch=batches)
    def begin_with(self, who: int, batch: list[str | None]) -> None:
        self.assign(who, batch, entered=True)

    @rule(who=callers, batch=batches)
    def assign(self, who: int, batch: list[str | None], entered: bool = False) -> None:
        caller = self.callers[who]
        scopes: list[AssignmentScope] = []
        fits = set(batch) - {None} <= set(self.now) and len(set(batch) - {None}) <= 2
        done = self._try(who, lambda: scopes.append(self.served.assign(batch)))
        assert done == fits or not self.evict
        if not done:
            return
        caller.has_assigned = True
        entry = Entry(tuple(None if name is None else self.now[name] for name in batch))
        bare = caller.stack.pop() if caller.stack and caller.stack[-1].scope is None else None
        if entered:
            caller.run(scopes[0].__enter__)
            entry.scope = scopes[0]
            caller.stack += [bare] if bare else []
        caller.stack.append(entry)

    @precondition(lambda self: any(e.scope for c in self.callers for e in c.stack))
    @rule(data=st.data(), which=st.integers(0, 3))
    def leave(self, data: st.DataObject, which: int) -> None:
        """The end of any `with` of a caller, the innermost or not."""
        inside = [i for i, c in enumerate(self.callers) if any(entry.scope for entry in c.stack)]
        who = data.draw(st.sampled_from(inside))
        caller = self.callers[who]
        entered = [entry for entry in caller.stack if entry.scope is not None]
        entry = entered[which % len(entered)]
        caller.run(lambda: entry.scope.__exit__(None, None, None))
        place = caller.stack.index(entry)
        above = caller.stack[place + 1 :]
        caller.stack = caller.stack[:place] + (above[1:] if above and above[0].scope is None else above)
        self.forward(who)

    @rule(who=callers)
    def child(self, who: int) -> None:
        """A task that this caller starts has its assignment, and keeps its own to itself."""
        caller = self.callers[who]
        child = caller.run(contextvars.copy_context)

        def work() -> Tensor | None:
            out = self._forward()
            self.served.assign([])
            return out

        refused = self._is_refused(caller)
        self._check(caller, caller.thread.submit(child.run, work).result(), refused)

    @rule(who=callers)
    def forward(self, who: int) -> None:
        caller = self.callers[who]
        refused = self._is_refused(caller)
        self._check(caller, caller.run(self._forward), refused)

    @rule(who=callers, other=callers, name=names, version=experts, batch=batches, what=st.integers(0, 4))
    def forward_and_something_else(
        self, who: int, other: int, name: str, version: int, batch: list[str | None], what: int
    ) -> None:
        """Another caller changes something, or draws, between two layers of a forward."""
        caller = self.callers[who]
        if who == other:
            return
        wanted = {v for c in (caller, self.callers[other]) for v in c.versions()} - {None}
        works: list[Callable[[], None]] = [
            lambda: self.add(other, name, version),
            lambda: self.drop(other, name),
            lambda: self.prefetch(other, [name]),
            lambda: self.assign(other, batch, entered=False),
            # a forward that finds no room, or the model moved, waits for the one that runs
            lambda: self.forward(other) if len(wanted) < 2 and not self.moved else None,
        ]
        once, refused = [works[what]], self._is_refused(caller)
        hook = self.model.first.register_forward_hook(lambda *_: once.pop()() if once else None)
        try:
            out = caller.run(self._forward)
        finally:
            hook.remove()
        self._check(caller, out, refused)
        self.moved = self.moved and not set(caller.versions()) - {None}

    @rule(who=callers)
    def move(self, who: int) -> None:
        """The layers get memory of their own, as `.to()` gives them."""
        self.model.double().float()
        self.moved = True

    @invariant()
    def the_pool_is_whole(self) -> None:
        if hasattr(self, "served"):
            assert set(self.served.names) == set(self.now) and len(self.served.resident) <= 2

    def teardown(self) -> None:
        if not hasattr(self, "served"):
            return
        for caller in self.callers:
            others = [e for c in self.callers if c is not caller for e in c.stack]
            if any(set(entry.versions) - {None} for entry in others):
                with pytest.raises(MoleStateError, match="other callers"):
                    caller.run(self.served.remove)
        for caller in self.callers:
            caller.run(lambda caller=caller: self._end_all(caller))
        self.served.remove()
        with torch.no_grad():
            assert torch.equal(self.model(X), SOLO[None])
        for caller in self.callers:
            caller.thread.shutdown()

    def _end_all(self, caller: Caller) -> None:
        for entry in reversed(caller.stack):
            if entry.scope is not None:
                entry.scope.__exit__(None, None, None)
        self.served.assign([])

    def _forward(self) -> Tensor | None:
        with torch.no_grad():
            try:
                return self.model(X)
            except mk.MoleError:
                return None

    def _is_refused(self, caller: Caller) -> bool:
        """A caller that has never assigned, while others have."""
        return not caller.has_assigned and any(set(c.versions()) - {None} for c in self.callers)

    def _check(self, caller: Caller, out: Tensor | None, refused: bool) -> None:
        if refused:
            assert out is None
        elif out is None:
            # a pool that does not evict may be full of what others took; one that does never is
            assert not caller.has_assigned or not self.evict
        else:
            want = torch.stack([SOLO[self.expert_of[v]][i] for i, v in enumerate(caller.versions())])
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)

    def _try(self, who: int, work: Callable[[], Any]) -> bool:
        try:
            self.callers[who].run(work)
        except mk.MoleError:
            return False
        return True


class ServingWithoutEviction(Serving):
    """A full pool refuses."""

    evict = False


BUDGET = settings(
    max_examples=250,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
TestServing = Serving.TestCase
TestServing.settings = BUDGET
TestServingWithoutEviction = ServingWithoutEviction.TestCase
TestServingWithoutEviction.settings = settings(BUDGET, max_examples=100)
