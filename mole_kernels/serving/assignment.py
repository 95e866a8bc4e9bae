"""Assignments belong to the caller: every thread and every asyncio task has its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mole_kernels.serving.pool import StoredAdapter
    from mole_kernels.serving.serve import Served


@dataclass(eq=False)
class Assignment:
    """Which adapter each prompt takes; it keeps those adapters, whatever becomes of their names.

    Args:
        names: One name, or None for the base alone, for each prompt.
        adapters: What the names meant when it was made.
        parts: How often the pipeline lays its batch behind itself, where the caller said so.
    """

    names: tuple[str | None, ...]
    adapters: tuple[StoredAdapter | None, ...]
    parts: int | None = None

    def close(self) -> None:
        """Let the adapters go: the model is not served any more."""
        self.names, self.adapters = (), ()


@dataclass(eq=False)
class _Entry:
    """An assignment on a context's stack; `entered` while a `with` block keeps it there."""

    assignment: Assignment
    entered: bool = False


# number of a served model -> the stack of this context. One variable for all of them, as contexts never let
# go of a variable they have seen. Stacks are tuples, as a child context shares its parent's.
_STACKS: ContextVar[Mapping[int, tuple[_Entry, ...]]] = ContextVar(
    "mole_kernels.serving", default=MappingProxyType({})
)
_NUMBERS = itertools.count()


class CallerStacks:
    """The assignments of one served model, a stack for each context; the top one counts."""

    def __init__(self) -> None:
        self._number = next(_NUMBERS)

    def _get(self) -> tuple[_Entry, ...] | None:
        return _STACKS.get().get(self._number)

    def _set(self, stack: tuple[_Entry, ...]) -> None:
        _STACKS.set(MappingProxyType({**_STACKS.get(), self._number: stack}))

    def current(self) -> Assignment | None:
        """This caller's assignment; None where it has never made one. An empty one where it has ended."""
        stack = self._get()
        return None if stack is None else stack[-1].assignment if stack else NOTHING

    def all(self) -> list[Assignment]:
        """Every assignment of this caller, the current one last."""
        return [entry.assignment for entry in self._get() or ()]

    def replaceable(self) -> Assignment | None:
        """The assignment that a new one would replace: the top one, unless a `with` keeps it."""
        stack = self._get()
        return stack[-1].assignment if stack and not stack[-1].entered else None

    def push(self, assignment: Assignment) -> tuple[_Entry, _Entry | None]:
        """Make it current; returns its entry and the one it replaced."""
        stack = self._get() or ()
        replaced = stack[-1] if stack and not stack[-1].entered else None
        entry = _Entry(assignment)
        self._set((*(stack[:-1] if replaced else stack), entry))
        return entry, replaced

    def enter(self, entry: _Entry, replaced: _Entry | None) -> None:
        """A `with` begins: what the entry replaced lies beneath it again, for the end of the block."""
        entry.entered = True
        stack = self._get() or ()
        if replaced is not None and entry in stack:
            place = stack.index(entry)
            self._set((*stack[:place], replaced, *stack[place:]))

    def leave(self, entry: _Entry) -> None:
        """A `with` ends: its entry goes, and an assignment made in the block without a `with` of its own."""
        stack = self._get() or ()
        if entry not in stack:
            return
        place = stack.index(entry)
        above = stack[place + 1 :]
        self._set((*stack[:place], *(above[1:] if above and not above[0].entered else above)))

    def forget(self) -> None:
        """The model is not served any more."""
        _STACKS.set(MappingProxyType({n: stack for n, stack in _STACKS.get().items() if n != self._number}))


NOTHING = Assignment((), ())


class AssignmentScope:
    """What `Served.assign` returns. Use it in a `with` statement to end the assignment with the block."""

    def __init__(self, served: Served, stacks: CallerStacks, entry: _Entry, replaced: _Entry | None) -> None:
        self._served, self._stacks = served, stacks
        self._entry: _Entry | None = entry
        self._replaced = replaced

    def __enter__(self) -> Served:
        if self._entry is not None:
            self._stacks.enter(self._entry, self._replaced)
            self._replaced = None
        return self._served

    def __exit__(self, *exc: object) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._stacks.leave(entry)
