"""Counters that lose no count under threads: `counter[key] += 1` reads, adds and writes in three steps."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Hashable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

_lock = threading.Lock()


def count(key: Key, *counters: Counter[Key]) -> None:
    """Add one to `key` in each of the counters, in one step for all other threads."""
    with _lock:
        for counter in counters:
            counter[key] += 1


def totals(counter: Counter[Key], *, reset: bool = False) -> dict[Key, int]:
    """Copy the counts, the most frequent key first.

    Args:
        counter: A counter that only `count` changes.
        reset: Begin again at zero, with no count lost in between.
    """
    with _lock:
        counts = dict(counter.most_common())
        if reset:
            counter.clear()
    return counts


def _new_lock() -> None:
    # a thread of the parent may hold it, and does not exist in a child process
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)
