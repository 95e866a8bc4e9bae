"""The adapter pool: S sets on the device, filled from the host by need, kept while a forward reads them.

A set is written only while no forward reads it. A forward takes a `Lease` on its sets when it begins and
returns it when it ends. Assignments keep the host vectors of their adapters, so that one that was replaced or
dropped can be copied back for as long as an assignment needs it.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleValueError

if TYPE_CHECKING:
    from mole_kernels.serving.assignment import Assignment

NONE = -1
# seconds between two looks for leases that were lost rather than returned
POLL = 1.0


class StoredAdapter:
    """One adapter on the host. Adding the same name again makes another one.

    Args:
        name: The name it was added under.
        vector: [size], in the pool's dtype, pinned where the pool is on a GPU.
    """

    __slots__ = ("__weakref__", "name", "vector")

    def __init__(self, name: str, vector: Tensor) -> None:
        self.name, self.vector = name, vector


@dataclass
class PoolStats:
    """What the pool has done.

    Args:
        hits: Adapters of an assignment that were on the device already.
        misses: Adapters that were copied to the device.
        evictions: Adapters whose set another one took.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(eq=False)
class _Set:
    """One set: what it holds, how many forwards read it, its last copy, and the streams that read it."""

    index: int
    adapter: StoredAdapter | None = None
    readers: int = 0
    copied: torch.cuda.Event | None = None
    streams: set[torch.cuda.Stream] = field(default_factory=set)


class Lease:
    """The sets that a forward reads; none of them changes until `release`.

    Args:
        pool: The pool they are in.
        places: adapter -> its set.
    """

    def __init__(self, pool: AdapterPool, places: dict[StoredAdapter, _Set]) -> None:
        self._pool, self._places = pool, places
        self._thread = threading.get_ident()

    def index(self, adapter: StoredAdapter | None) -> int:
        """The set of an adapter, −1 for None."""
        return NONE if adapter is None else self._places[adapter].index

    def release(self) -> None:
        """The forward has ended. A second call does nothing."""
        self._pool.release(self._take())

    def _take(self) -> list[tuple[_Set, int]]:
        places, self._places = self._places, {}
        return [(place, self._thread) for place in places.values()]

    def __del__(self) -> None:
        # a finaliser may run while this very thread holds the pool's lock, so it only leaves a note
        self._pool.lost.extend(self._take())


class AdapterPool:
    """`capacity` sets [capacity,size] on a device, and every adapter's vector [size] on the host.

    Any thread may call any method: one mutex guards the tables, and nothing else is locked while it is held.

    Args:
        capacity: Number of adapters on the device at a time.
        size: Elements of one adapter.
        dtype: Element type of the sets.
        device: Where the sets lie.
        evict: Whether the least recently used adapter makes room; if not, a full pool refuses.
    """

    def __init__(
        self, capacity: int, size: int, dtype: torch.dtype, device: torch.device, *, evict: bool = True
    ) -> None:
        if capacity < 1:
            raise MoleValueError("serve", expected="capacity >= 1 adapter on the device", got=capacity)
        self.capacity, self.size, self.evict = capacity, size, evict
        self.stats = PoolStats()
        # leases that nobody returned; appended to without the lock
        self.lost: deque[tuple[_Set, int]] = deque()
        self._mutex = threading.Condition(threading.RLock())
        self._by_name: dict[str, StoredAdapter] = {}
        # adapter -> its set, the least recently used first
        self._resident: OrderedDict[StoredAdapter, _Set] = OrderedDict()
        self._assigned: weakref.WeakSet[Assignment] = weakref.WeakSet()
        # thread -> how many sets its forwards hold
        self._holding: dict[int, int] = {}
        self._sets = [_Set(index) for index in range(capacity)]
        self._free = self._sets[::-1]
        self._make(dtype, device)

    def _make(self, dtype: torch.dtype, device: torch.device) -> None:
        self.sets = torch.zeros(self.capacity, self.size, dtype=dtype, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def place(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the sets anew elsewhere; sets that are being read keep their index and are filled again."""
        with self._mutex:
            self._collect()
            self._make(dtype, device)
            for adapter, place in list(self._resident.items()):
                place.copied, place.streams = None, set()
                if place.readers:
                    self._copy(adapter, place)
                else:
                    del self._resident[adapter]
                    place.adapter = None
                    self._free.append(place)

    # -- adapters

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, on the device or not."""
        return tuple(self._by_name)

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters on the device, the least recently used first."""
        with self._mutex:
            return tuple(adapter.name for adapter in self._resident if not self._is_orphan(adapter))

    @property
    def assigned(self) -> tuple[Assignment, ...]:
        """The assignments that some caller still has and that take an adapter."""
        with self._mutex:
            return tuple(assignment for assignment in self._assigned if any(assignment.adapters))

    def empty_vector(self) -> Tensor:
        """Where an adapter is written before `add`: [size] on the host."""
        return torch.empty(self.size, dtype=self.sets.dtype, pin_memory=self.sets.device.type == "cuda")

    def add(self, name: str, vector: Tensor) -> None:
        """Take an adapter, or replace one for every later assignment."""
        if vector.shape != (self.size,):
            raise MoleValueError(
                f"adapter {name!r}", expected=f"a vector [{self.size}]", got=list(vector.shape)
            )
        with self._mutex:
            self._by_name[name] = StoredAdapter(name, vector)

    def drop(self, name: str) -> None:
        """Refuse the name from now on."""
        with self._mutex:
            self.look_up([name])
            del self._by_name[name]

    def look_up(self, names: Sequence[str | None]) -> tuple[StoredAdapter | None, ...]:
        """The adapter that each name means now, None for None.

        Raises:
            MoleKeyError: A name that is not in the pool, with the sample that asks for it.
        """
        with self._mutex:
            for sample, name in enumerate(names):
                if name is not None and name not in self._by_name:
                    known = ", ".join(list(self._by_name)[:5]) + (" …" if len(self._by_name) > 5 else "")
                    raise MoleKeyError(
                        "serve",
                        expected=f"an adapter of the pool ({known or 'it is empty'})",
                        got=f"{name!r} for sample {sample}",
                    )
            return tuple(None if name is None else self._by_name[name] for name in names)

    # -- sets

    def admit(self, assignment: Assignment, replaced: Assignment | None) -> None:
        """Bring an assignment's adapters to the device as far as there is room beside the running forwards.

        Args:
            assignment: The new one.
            replaced: The caller's last one, which need not be reserved.

        Raises:
            MoleStateError: Its adapters do not fit at all, or the pool is full and does not evict; nothing
                has changed then.
        """
        with self._mutex:
            self._collect()
            wanted = _distinct(assignment.adapters)
            if len(wanted) > self.capacity:
                raise MoleStateError(
                    "serve",
                    f"the batch has {len(wanted)} adapters and the pool room for {self.capacity}",
                    hint="capacity=…",
                )
            missing = [adapter for adapter in wanted if adapter not in self._resident]
            reserved = {a for other in self._assigned if other is not replaced for a in other.adapters}
            room = self._room(wanted, reserved)
            if len(missing) > len(room) and not self.evict:
                raise self._full(missing[0])
            self.stats.hits += len(wanted) - len(missing)
            for adapter in wanted:
                if adapter in self._resident:
                    self._resident.move_to_end(adapter)
            self._fill(missing, room)
            self._assigned.add(assignment)

    def prefetch(self, adapters: Iterable[StoredAdapter | None]) -> None:
        """Start copying adapters where there is room beside all that is assigned; the others wait."""
        with self._mutex:
            self._collect()
            wanted = _distinct(adapters)
            reserved = {adapter for assignment in self._assigned for adapter in assignment.adapters}
            missing = [adapter for adapter in wanted if adapter not in self._resident]
            room = [p for p in self._room(wanted, reserved) if p.adapter is None or p.adapter not in reserved]
            self._fill(missing, room)

    def lease(self, adapters: Iterable[StoredAdapter | None]) -> Lease:
        """Hold the sets of these adapters for a forward; waits while other threads' forwards fill the pool.

        Raises:
            MoleStateError: They do not fit beside what is held, and no forward's end would help.
        """
        with self._mutex:
            wanted = _distinct(adapters)
            while True:
                self._collect()
                missing = [adapter for adapter in wanted if adapter not in self._resident]
                reserved = {a for other in self._assigned for a in other.adapters} if missing else set()
                room = self._room(wanted, reserved) if missing else []
                if len(missing) <= len(room):
                    break
                # a thread that holds sets must not wait for one that may be waiting for them
                if not self._holding or threading.get_ident() in self._holding or not self._could_fit(wanted):
                    raise self._full(missing[0])
                self._mutex.wait(POLL)
            self._fill(missing, room)
            places = {adapter: self._resident[adapter] for adapter in wanted}
            me = threading.get_ident()
            for adapter, place in places.items():
                self._resident.move_to_end(adapter)
                self._read(place)
                self._holding[me] = self._holding.get(me, 0) + 1
            return Lease(self, places)

    def release(self, held: Iterable[tuple[_Set, int]]) -> None:
        """Take a lease's sets back."""
        with self._mutex:
            for place, thread in held:
                place.readers -= 1
                self._holding[thread] -= 1
                if not self._holding[thread]:
                    del self._holding[thread]
            self._mutex.notify_all()

    def _collect(self) -> None:
        while self.lost:
            self.release([self.lost.popleft()])

    def _is_orphan(self, adapter: StoredAdapter) -> bool:
        return self._by_name.get(adapter.name) is not adapter

    def _room(self, wanted: Sequence[StoredAdapter], reserved: set[StoredAdapter | None]) -> list[_Set]:
        """Sets that may be written now, in the order in which they should be."""
        orphans: list[_Set] = []
        idle: list[_Set] = []
        assigned: list[_Set] = []
        for adapter, place in self._resident.items():
            if place.readers or adapter in wanted:
                continue
            kind = assigned if adapter in reserved else orphans if self._is_orphan(adapter) else idle
            kind.append(place)
        return self._free[::-1] + orphans + (idle + assigned if self.evict else [])

    def _could_fit(self, wanted: Sequence[StoredAdapter]) -> bool:
        return self.evict and len(wanted) <= self.capacity

    def _fill(self, missing: Sequence[StoredAdapter], room: Sequence[_Set]) -> None:
        for adapter, place in zip(missing, room):
            old, place.adapter = place.adapter, None
            if old is None:
                self._free.remove(place)
            else:
                self.stats.evictions += not self._is_orphan(old)
                del self._resident[old]
            self.stats.misses += 1
            try:
                self._copy(adapter, place)
            # Ctrl-C or a failed copy leaves a set whose content is unknown
            except BaseException:
                self._free.append(place)
                raise
            place.adapter = adapter
            self._resident[adapter] = place

    @torch.no_grad()
    def _copy(self, adapter: StoredAdapter, place: _Set) -> None:
        if self._copies is None:
            self.sets[place.index].copy_(adapter.vector)
            return
        # write only after the work that may still read the set, on whatever stream it was queued
        for stream in (*place.streams, torch.cuda.current_stream(self.sets.device)):
            self._copies.wait_stream(stream)
        place.streams = set()
        with torch.cuda.stream(self._copies):
            self.sets[place.index].copy_(adapter.vector, non_blocking=True)
            place.copied = torch.cuda.Event()
            place.copied.record()

    def _read(self, place: _Set) -> None:
        place.readers += 1
        if self._copies is not None:
            stream = torch.cuda.current_stream(self.sets.device)
            place.streams.add(stream)
            if place.copied is not None:
                stream.wait_event(place.copied)

    def _full(self, adapter: StoredAdapter) -> MoleStateError:
        held = sum(place.readers > 0 for place in self._sets)
        reason = (
            f"forwards hold {held} of its {self.capacity} sets"
            if held
            else f"all {self.capacity} sets in use"
        )
        return MoleStateError(
            "serve",
            f"the pool is full ({reason}), {adapter.name!r} does not fit",
            hint="a larger capacity" if self.evict else "evict=True, a larger capacity, or drop() one",
        )


def _distinct(adapters: Iterable[StoredAdapter | None]) -> list[StoredAdapter]:
    return list(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
