"""Experts on or off, where several threads may ask for different things at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from mole_kernels.modules.forward_lock import ForwardLock


@dataclass(eq=False)
class _Request:
    """One call of `enable` or `disable`; scoped once its `with` block has begun."""

    on: bool
    scoped: bool = False
    switch: weakref.ref[Switch] | None = None


class Switch:
    """What `enable` and `disable` return; `with` it, the request ends at the block's end."""

    def __init__(self, switches: Switches, request: _Request) -> None:
        self._switches, self._request = switches, request

    def __enter__(self) -> None:
        self._request.scoped = True

    def __exit__(self, *exc: object) -> None:
        self._switches.end(self._request)


class Switches:
    """The requests that hold; the latest one decides, whichever thread made it.

    `with handle.disable():` in two threads that overlap: the experts are off until the later of the two
    blocks ends, and then as they were before. A call without `with` holds until the next one.
    """

    def __init__(self, lock: ForwardLock, apply: Callable[[bool], None]) -> None:
        self._lock, self._apply = lock, apply
        self._lasting = True
        self._requests: list[_Request] = []

    def add(self, on: bool) -> Switch:
        """Apply a request and keep it: until its block ends, or for good where none begins."""
        request = _Request(on)
        switch = Switch(self, request)
        request.switch = weakref.ref(switch)
        with self._lock.change():
            self._settle()
            self._apply(on)
            self._requests.append(request)
        return switch

    def end(self, request: _Request) -> None:
        """Drop a request; what the others ask for holds again."""
        with self._lock.change():
            left = [other for other in self._requests if other is not request]
            self._apply(left[-1].on if left else self._lasting)
            self._requests = left

    def _settle(self) -> None:
        """The oldest requests whose switch nobody can enter any more are what lasts."""
        while self._requests:
            first = self._requests[0]
            if first.scoped or (first.switch is not None and first.switch() is not None):
                return
            self._lasting = first.on
            del self._requests[0]

    def __reduce__(self) -> tuple[object, ...]:
        # a copied or pickled handle begins with no open block
        return _restored, (
            self._lock,
            self._apply,
            self._requests[-1].on if self._requests else self._lasting,
        )


def _restored(lock: ForwardLock, apply: Callable[[bool], None], on: bool) -> Switches:
    switches = Switches(lock, apply)
    switches._lasting = on
    return switches
