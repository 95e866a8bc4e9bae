"""S sets of adapters on the device, filled from the host by need: least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleValueError

NONE = -1


@dataclass
class Stats:
    """What the pool has done: identities found on the device, copied to it, and pushed out for others."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Pool:
    """capacity sets [capacity,size] on a device, and every identity's vector [size] on the host (pinned where
    there is a GPU).

    evict  True: an identity that no sample of the batch needs makes room; False: a full pool refuses
    Not for two threads at once: `Served` sees to that.
    """

    def __init__(
        self, capacity: int, size: int, dtype: torch.dtype, device: torch.device, *, evict: bool = True
    ) -> None:
        if capacity < 1:
            raise MoleValueError("serve", expected="capacity >= 1 identity on the device", got=capacity)
        self.capacity, self.size, self.dtype, self.evict = capacity, size, dtype, evict
        self.stats = Stats()
        self._host: dict[str, Tensor] = {}
        # identity -> its set, the least recently used first
        self._sets: OrderedDict[str, int] = OrderedDict()
        self.place(device)

    def place(self, device: torch.device) -> None:
        """Make the sets anew on `device`; what is needed is copied there when it is."""
        self.sets = torch.zeros(self.capacity, self.size, dtype=self.dtype, device=device)
        self._sets.clear()
        self._held: set[str] = set()
        self._free = list(range(self.capacity - 1, -1, -1))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: dict[int, torch.cuda.Event] = {}

    # -- identities
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._host)

    @property
    def resident(self) -> tuple[str, ...]:
        """Those on the device, the least recently used first."""
        return tuple(self._sets)

    def empty_vector(self) -> Tensor:
        """Where an identity is written before `add`: [size] on the host."""
        return torch.empty(self.size, dtype=self.dtype, pin_memory=self.sets.device.type == "cuda")

    def add(self, name: str, vector: Tensor) -> None:
        """Take or replace an identity; a set that held the old one is free again."""
        if vector.shape != (self.size,) or vector.dtype != self.dtype:
            raise MoleValueError(
                f"identity {name!r}",
                expected=f"a vector [{self.size}] of {self.dtype}",
                got=f"{tuple(vector.shape)} of {vector.dtype}",
            )
        self._release(name)
        self._host[name] = vector

    def drop(self, name: str) -> None:
        self._check_known([name])
        self._release(name)
        del self._host[name]

    # -- by need
    # --------------------------------------------------------------------------------------------------------------------

    def take(self, names: Sequence[str | None]) -> list[int]:
        """The set of each sample's identity, −1 for None; those that are not on the device are copied there.

        Raises before anything is copied: MoleKeyError for an unknown identity (the sample named),
        MoleStateError where they do not fit.
        """
        sets = self._fetch(names)
        self._held = {name for name in names if name is not None}
        if self._copies is not None:
            stream = torch.cuda.current_stream(self.sets.device)
            for place in set(sets) - {NONE}:
                if place in self._arrived:
                    stream.wait_event(self._arrived[place])
        return sets

    def prefetch(self, names: Sequence[str | None]) -> None:
        """Start copying identities that the next batch will need; on a GPU beside whatever runs, from pinned
        memory.

        The last batch's stay; what finds no room beside them is left for `take`.
        """
        self._check_known(names)
        room = len(self._free) + (sum(name not in self._held for name in self._sets) if self.evict else 0)
        new = [name for name in dict.fromkeys(names) if name is not None and name not in self._sets]
        for name in self._held:
            # most recent, so that none of them is the first to go
            if name in self._sets:
                self._sets.move_to_end(name)
        self._fetch(new[:room])

    def _fetch(self, names: Sequence[str | None]) -> list[int]:
        self._check_known(names)
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        missing = [name for name in wanted if name not in self._sets]
        if len(wanted) > self.capacity:
            raise MoleStateError(
                "serve",
                f"the batch has {len(wanted)} identities and the pool room for {self.capacity}",
                hint="capacity=…",
            )
        if len(missing) > len(self._free) and not self.evict:
            raise MoleStateError(
                "serve",
                f"the pool is full ({len(self._sets)} of {self.capacity} sets), {missing[0]!r} does not fit",
                hint="evict=True, a larger capacity, or drop() one",
            )
        for name in wanted:
            if name in self._sets:
                self.stats.hits += 1
                self._sets.move_to_end(name)
        for name in missing:
            self.stats.misses += 1
            # those wanted now are the most recent, so the first is one that is not
            place = self._free.pop() if self._free else self._evict_first()
            self._copy(name, place)
            self._sets[name] = place
        return [NONE if name is None else self._sets[name] for name in names]

    def _evict_first(self) -> int:
        self.stats.evictions += 1
        return self._sets.popitem(last=False)[1]

    def _copy(self, name: str, place: int) -> None:
        if self._copies is None:
            self.sets[place].copy_(self._host[name])
            return
        # a set is written only after the work that may still read it
        self._copies.wait_stream(torch.cuda.current_stream(self.sets.device))
        with torch.cuda.stream(self._copies):
            self.sets[place].copy_(self._host[name], non_blocking=True)
            self._arrived[place] = event = torch.cuda.Event()
            event.record()

    def _release(self, name: str) -> None:
        place = self._sets.pop(name, None)
        if place is not None:
            self._free.append(place)

    def _check_known(self, names: Sequence[str | None]) -> None:
        for sample, name in enumerate(names):
            if name is not None and name not in self._host:
                known = ", ".join(list(self._host)[:5]) + (" …" if len(self._host) > 5 else "")
                raise MoleKeyError(
                    "serve",
                    expected=f"an identity of the pool ({known or 'it is empty'})",
                    got=f"{name!r} for sample {sample}",
                )
