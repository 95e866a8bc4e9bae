"""One kernel launch in the interpreter: its programs take turns, and every access is checked for bounds and
order.

Happens-before is kept with vector clocks: an atomic that releases publishes what its program had stored
before its last barrier, one
that acquires takes it over. Programs run in threads of their own, one at a time; the baton changes hands at
atomics, by lot.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from triton._C.libtriton import ir
from triton.runtime import interpreter as I

SPIN_LIMIT = 2000
# storages above this are checked for their range only: their shadows would fill the memory
SHADOWED = 1 << 26
ACQUIRE = {ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE}
RELEASE = {ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE}


class Bounds(IndexError):
    """A lane outside every tensor of the call."""


class Race(RuntimeError):
    """Two programs touch one byte, one of them writing, and nothing orders them."""


class Deadlock(RuntimeError):
    """A program waits for something that no running program will do."""


class _Abandoned(BaseException):
    """Another program failed: this one unwinds."""


@dataclass
class Counts:
    """What one run (all launches inside one `run`) did."""

    read: int = 0
    written: int = 0
    distinct_read: int = 0
    flops: int = 0
    atomics: int = 0
    launches: int = 0
    switches: int = 0
    names: list[str] = field(default_factory=list)


@dataclass
class _Buffer:
    """Shadow of one storage: which bytes are legal, and who touched each last (program, its clock)."""

    base: int
    legal: np.ndarray
    writer: np.ndarray
    writer_clock: np.ndarray
    reader: np.ndarray
    reader_clock: np.ndarray
    atomic: np.ndarray
    atomic_clock: np.ndarray
    last_read: np.ndarray
    seen: np.ndarray


MANY = -2


class Launch:
    """One kernel launch: its programs, their vector clocks, and the shadows of its tensors."""

    def __init__(
        self,
        grid: tuple[int, int, int],
        tensors: list[torch.Tensor],
        counts: Counts,
        seed: int,
        resident: int,
    ) -> None:
        self.counts, self.rng = counts, random.Random(seed)
        self.programs = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        self.rng.shuffle(self.programs)
        n = len(self.programs)
        self.clock = np.zeros((n, n), np.int32)
        np.fill_diagonal(self.clock, 1)
        self.released: dict[int, np.ndarray] = {}
        self.resident = min(resident, n)
        self.current, self.spins = 0, 0
        self.buffers = self._shadows(tensors, n)

    def _shadows(self, tensors: list[torch.Tensor], n: int) -> list[_Buffer]:
        by_storage: dict[int, _Buffer] = {}
        self.ranges: list[tuple[int, int]] = []
        for t in tensors:
            if t.numel() == 0:
                continue
            storage = t.untyped_storage()
            size, base = storage.nbytes(), storage.data_ptr()
            if size > SHADOWED:
                low = base + t.storage_offset() * t.element_size()
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
                within = (low, low + (last + 1) * t.element_size())
                # one tensor may be two arguments
                self.ranges += [within] * (within not in self.ranges)
                continue
            if base not in by_storage:
                ints = [np.full(size, -1, np.int32) for _ in range(6)]
                by_storage[base] = _Buffer(
                    base, np.zeros(size, bool), *ints, np.zeros(n, np.int32), np.zeros(size, bool)
                )
            legal = torch.from_numpy(by_storage[base].legal)
            # as bytes: the view's strides times its element size, each element that many bytes long
            e = t.element_size()
            view = legal.as_strided((*t.shape, e), (*(s * e for s in t.stride()), 1), t.storage_offset() * e)
            view.fill_(True)
        return list(by_storage.values())

    def touch(self, addresses: np.ndarray, mask: np.ndarray, nbytes: int, kind: str) -> None:
        """Check bounds and order of one access ("read", "write" or "atomic") and record it."""
        p = addresses.reshape(-1).astype(np.int64)
        p = (
            np.broadcast_to(p, mask.size)[mask.reshape(-1).astype(bool)]
            if mask.size != p.size
            else p[mask.reshape(-1).astype(bool)]
        )
        if p.size == 0:
            return
        if kind != "atomic":
            self.spins = 0
        if kind == "read":
            self.counts.read += p.size * nbytes
        else:
            self.counts.written += p.size * nbytes
        if kind == "write" and np.unique(p).size != p.size:
            raise Race(f"program {self.programs[self.current]} writes one address from two lanes")
        inside = 0
        for b in self.buffers:
            here = (p >= b.base) & (p < b.base + b.legal.size)
            if not here.any():
                continue
            q = (p[here] - b.base)[:, None] + np.arange(nbytes)
            if q.max() >= b.legal.size or not b.legal[q].all():
                bad = q[(q >= b.legal.size).any(1) | ~b.legal[np.minimum(q, b.legal.size - 1)].all(1)][0, 0]
                raise Bounds(
                    f"{kind} at byte {bad} of a {b.legal.size}-byte storage, program {self.programs[self.current]}: not in the view"
                )
            inside += int(here.sum())
            if kind == "read":
                b.seen[q] = True
            self._order(b, q[:, 0], kind)
        inside += sum(int(((p >= low) & (p + nbytes <= high)).sum()) for low, high in self.ranges)
        if inside != p.size:
            raise Bounds(
                f"{kind} outside every tensor, program {self.programs[self.current]}: {p.size - inside} of {p.size} lanes"
            )

    def _order(self, b: _Buffer, q: np.ndarray, kind: str) -> None:
        me = self.current
        mine = self.clock[me]

        def unordered(who: np.ndarray, clock: np.ndarray) -> np.ndarray:
            known = (who >= 0) & (who != me)
            return known & (clock > mine[np.where(known, who, 0)])

        def complain(word: str, who: np.ndarray, bad: np.ndarray) -> None:
            if bad.any():
                other = self.programs[int(who[bad][0])]
                raise Race(
                    f"program {self.programs[me]} {kind}s what program {other} {word}, with nothing between them"
                )

        complain("wrote", b.writer[q], unordered(b.writer[q], b.writer_clock[q]))
        if kind != "atomic":
            complain("changed atomically", b.atomic[q], unordered(b.atomic[q], b.atomic_clock[q]))
        if kind != "read":
            complain("read", b.reader[q], unordered(b.reader[q], b.reader_clock[q]))
            if (b.reader[q] == MANY).any():
                late = (b.last_read > mine) & (np.arange(mine.size) != me)
                if late.any():
                    raise Race(
                        f"program {self.programs[me]} {kind}s what others read, with nothing between them"
                    )
        if kind == "read":
            many = (b.reader[q] == MANY) | ((b.reader[q] >= 0) & (b.reader[q] != me))
            b.reader[q] = np.where(many, MANY, me)
            b.reader_clock[q], b.last_read[me] = mine[me], mine[me]
        elif kind == "write":
            b.writer[q], b.writer_clock[q], b.reader[q] = me, mine[me], -1
        else:
            b.atomic[q], b.atomic_clock[q] = me, mine[me]

    def barrier(self) -> None:
        """What was stored so far may be released by what follows."""
        self.clock[self.current, self.current] += 1

    def atomic(self, addresses: np.ndarray, mask: np.ndarray, sem, change) -> I.TensorHandle:
        """One atomic: a point where programs switch, then the synchronisation that `sem` promises."""
        self.switch()
        self.counts.atomics += 1
        self.spins += 1
        if self.spins > SPIN_LIMIT * max(1, self.alive):
            raise Deadlock(
                f"program {self.programs[self.current]} spins, {self.alive} programs running, none makes progress"
            )
        me = self.current
        places = addresses.reshape(-1)[mask.reshape(-1).astype(bool)].tolist()
        for place in places:
            if sem in RELEASE:
                upto = self.clock[me].copy()
                # stores after the last barrier belong to other threads than the one that releases
                upto[me] -= 1
                self.released[place] = np.maximum(self.released.get(place, 0), upto)
        result = change()
        for place in places:
            if sem in ACQUIRE and place in self.released:
                self.clock[me] = np.maximum(self.clock[me], self.released[place])
        return result

    # programs take turns: one thread each, the baton handed on at atomics

    def run(self, body) -> None:
        self.failure: BaseException | None = None
        self.batons = [threading.Semaphore(0) for _ in self.programs]
        self.waiting = list(range(self.resident, len(self.programs)))
        self.live = list(range(self.resident))
        self.alive = len(self.live)
        self.done = threading.Semaphore(0)
        if self.resident == 1:
            for p, program in enumerate(self.programs):
                self.current, self.spins = p, 0
                body(program)
            self._finish()
            return
        threads = {}

        def start(p: int) -> None:
            threads[p] = threading.Thread(target=work, args=(p,), daemon=True)
            threads[p].start()

        def work(p: int) -> None:
            self.batons[p].acquire()
            try:
                if self.failure is None:
                    self._resume(p)
                    body(self.programs[p])
            except _Abandoned:
                pass
            except BaseException as e:
                self.failure = self.failure or e
            self.live.remove(p)
            if self.waiting and self.failure is None:
                self.live.append(self.waiting.pop(0))
                start(self.live[-1])
            self.alive = len(self.live)
            self.spins = 0
            if self.live:
                self.batons[self.rng.choice(self.live)].release()
            else:
                self.done.release()

        for p in list(self.live):
            start(p)
        self.batons[self.rng.choice(self.live)].release()
        self.done.acquire()
        if self.failure is not None:
            raise self.failure
        self._finish()

    def _finish(self) -> None:
        self.counts.distinct_read += sum(int(b.seen.sum()) for b in self.buffers)

    def _resume(self, p: int) -> None:
        self.current = p
        I.interpreter_builder.set_grid_idx(*self.programs[p])

    def switch(self) -> None:
        """Hand the baton to a program drawn by lot (maybe this one)."""
        if self.resident == 1 or len(self.live) == 1:
            return
        nxt, me = self.rng.choice(self.live), self.current
        if nxt == me:
            return
        self.counts.switches += 1
        self.batons[nxt].release()
        self.batons[me].acquire()
        if self.failure is not None:
            raise _Abandoned
        self._resume(me)
