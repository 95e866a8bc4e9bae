"""A readers–writer lock: many forwards of a model, or one change to it; changes go first."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# seconds between two checks that the threads waited for still run
POLL = 1.0


class ForwardLock:
    """Any number of forwards at a time, or one change; a forward sees the model before or after a change.

    A thread never waits for itself: a change from a hook in the middle of its own forward happens at once.
    Two such threads cannot wait for each other: a thread that waits for its change does not count as
    inside its forward. Nothing is counted inside a compiled graph.

    Args:
        one_at_a_time: Whether forwards of other threads wait too, for a model that keeps state of its batch.
    """

    def __init__(self, *, one_at_a_time: bool = False) -> None:
        self.one_at_a_time = one_at_a_time
        self.reset()
        _every.add(self)

    def reset(self) -> None:
        """No thread is inside: at the start, and in a child process, without the parent's threads."""
        self._lock = threading.RLock()
        self._free = threading.Condition(self._lock)
        # thread -> how many forwards it is inside of, and how many times it holds the model still
        self._inside: dict[int, int] = {}
        self._holding: dict[int, int] = {}
        self._changing: int | None = None
        # changes within one another, changes that wait, threads that sleep
        self._depth = self._waiting = self._asleep = 0

    # forwards

    def watch(self, roots: Iterable[nn.Module]) -> None:
        """From now on every eager call of these modules is a forward."""
        for root in roots:
            # before the other hooks, which may look at what a change writes
            root.register_forward_pre_hook(self._before, prepend=True)
            root.register_forward_hook(self._after, always_call=True)

    def unwatch(self, roots: Iterable[nn.Module]) -> None:
        for root in roots:
            for table in (root._forward_pre_hooks, root._forward_hooks):
                for key in [key for key, hook in table.items() if self._is_ours(hook)]:
                    del table[key]
                    root._forward_hooks_always_called.pop(key, None)

    def _is_ours(self, hook: Any) -> bool:
        return getattr(hook, "__self__", None) is self

    def _before(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._enter(self._inside)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._leave(self._inside)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """No other thread changes anything inside the block."""
        self._enter(self._holding)
        try:
            yield
        finally:
            self._leave(self._holding)

    def _enter(self, where: dict[int, int]) -> None:
        me = threading.get_ident()
        with self._lock:
            while not self._may_run(me):
                self._wait()
            where[me] = where.get(me, 0) + 1

    def _leave(self, where: dict[int, int]) -> None:
        me = threading.get_ident()
        with self._lock:
            # a forward that began before it was watched ends here without having entered
            left = where.pop(me, 1) - 1
            if left:
                where[me] = left
            elif self._asleep:
                self._free.notify_all()

    def _may_run(self, me: int) -> bool:
        if self._changing == me or me in self._inside or me in self._holding:
            return True
        # a change that waits goes first, or many forwards could keep it waiting for ever
        if self._changing is not None or self._waiting:
            return False
        return not (self.one_at_a_time and (self._inside or self._holding))

    # changes

    @contextmanager
    def change(self) -> Iterator[None]:
        """Wait for the other threads' forwards to end; theirs wait until the block has."""
        me = threading.get_ident()
        with self._lock:
            own = [(table, table.pop(me)) for table in (self._inside, self._holding) if me in table]
            self._waiting += 1
            self._free.notify_all()
            try:
                while self._changing not in (None, me) or self._inside or self._holding:
                    self._wait()
            finally:
                self._waiting -= 1
                for table, count in own:
                    table[me] = count
            self._changing = me
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._changing = None
                self._free.notify_all()

    def _wait(self) -> None:
        self._asleep += 1
        try:
            woken = self._free.wait(POLL)
        finally:
            self._asleep -= 1
        if not woken:
            # Ctrl-C in a forward, or a thread that ended in one, does not call `_leave`
            frames = sys._current_frames()
            for thread in [t for t in self._inside if not self._runs(frames.get(t))]:
                del self._inside[thread]
            for thread in [t for t in self._holding if t not in frames]:
                del self._holding[thread]

    def _runs(self, frame: Any) -> bool:
        """A watched module's forward is on this thread's stack."""
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and any(map(self._is_ours, module._forward_pre_hooks.values())):
                return True
            frame = frame.f_back
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the model has a lock of its own
        return _copy, (self.one_at_a_time,)


def _copy(one_at_a_time: bool) -> ForwardLock:
    return ForwardLock(one_at_a_time=one_at_a_time)


_every: weakref.WeakSet[ForwardLock] = weakref.WeakSet()


def _reset_all() -> None:
    for lock in list(_every):
        lock.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
