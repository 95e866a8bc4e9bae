"""Where batches come from, and how far a run has come in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.training.checksums import Checksums, check_same_data, checksums

Signature = dict[str, list[Any]]


class TensorBatches:
    """Endless shuffled batches of tensors [D,…] kept in memory: which samples batch n holds depends on (seed,
    n) alone.

    Each epoch goes through all D samples in its own order, but for the last D mod batch_size of that order.
    A run resumes with the same tensors only, bit for bit.

    Args:
        tensors: Tensors [D,…] by name, one row per sample.
        batch_size: Samples per batch, at most D.
        seed: Decides the order of each epoch.
        shuffle: False takes the samples in their own order.
        sources: What a tensor was computed from, by its name. It is compared on resume in the place of the
            tensor's values, which another device would compute a little differently.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        lengths = {key: len(value) for key, value in tensors.items()}
        if not lengths or len(set(lengths.values())) != 1:
            raise MoleShapeError("TensorBatches", expected="tensors with one first dimension", got=lengths)
        self.tensors, self.batch_size, self.seed, self.shuffle = dict(tensors), batch_size, seed, shuffle
        self.samples = next(iter(lengths.values()))
        if not 1 <= batch_size <= self.samples:
            raise MoleValueError(
                "TensorBatches: batch_size",
                expected=f"1 to {self.samples}, the number of samples",
                got=batch_size,
            )
        self.drawn, self._sources = 0, dict(sources or {})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        per_epoch = self.samples // self.batch_size
        epoch, order = -1, torch.arange(self.samples)
        while True:
            if self.shuffle and epoch != self.drawn // per_epoch:
                epoch = self.drawn // per_epoch
                order = torch.randperm(self.samples, generator=counted_generator(self.seed, "epoch", epoch))
            begin = (self.drawn % per_epoch) * self.batch_size
            pick = order[begin : begin + self.batch_size]
            self.drawn += 1
            yield {key: value[pick] for key, value in self.tensors.items()}

    def _settings(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shapes": signature(self.tensors),
        }

    @cached_property
    def _contents(self) -> dict[str, int | str]:
        computed = {name: value for name, value in self.tensors.items() if name not in self._sources}
        return checksums(computed) | self._sources

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the very next batch."""
        return self._settings() | {"drawn": self.drawn, "contents": self._contents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch at which `state` was taken; other data is a MoleStateError."""
        for key, here in self._settings().items():
            if state.get(key) != here:
                raise MoleStateError(
                    f"resume: batches, {key}",
                    expected=f"{state.get(key)!r} as when the run began",
                    got=repr(here),
                )
        check_same_data(state["contents"], self._contents)
        self.drawn = int(state["drawn"])


class BatchStream:
    """The batches of one process out of P: numbers p, p+P, p+2P, … of what `batches` yields, over again when
    it ends.

    A source with `batch(number)` is asked for this process's batches alone; any other is iterated, and the
    others' are dropped.
    A source with `state_dict` and `load_state_dict` is put back by its own state when a run resumes; any
    other is
    counted, and as many batches are drawn and dropped, so it must yield the same ones in the same order each
    time: a checksum of every entry's values tells whether it does.
    The source may describe its batches by a method `signature()`; else the first batch's keys, dtypes and
    shapes
    (without the batch dimension) must be the same when a run resumes.
    """

    def __init__(self, batches: Iterable[Mapping[str, Tensor]], process: int = 0, processes: int = 1) -> None:
        if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
            raise MoleTypeError(
                "batches", expected="an iterable of dicts of tensors", got=type(batches).__name__
            )
        self.source, self.process, self.processes = batches, process, processes
        self.position = 0
        self.signature: Signature | None = None
        # of the values drawn so far; of batch 0 alone where batches are asked for by number
        self.checksums: Checksums = {}
        self._expected: Signature | None = None
        self._iterator: Iterator[Mapping[str, Tensor]] | None = None

    @property
    def stateful(self) -> bool:
        return hasattr(self.source, "state_dict") and hasattr(self.source, "load_state_dict")

    def draw(self) -> tuple[int, Mapping[str, Tensor]]:
        """(number of the batch, the batch) that is next for this process."""
        number = self.position + self.process
        if hasattr(self.source, "batch"):
            batch = self._checked(self.source.batch(number))
            if number == 0 and not self.stateful:
                self.checksums = checksums(batch)
        else:
            batch = [self._next() for _ in range(self.processes)][self.process]
        self.position += self.processes
        return number, batch

    def describe(self, number: int) -> str:
        """What a batch is made of, for messages; "" where the source has no method `describe`."""
        describe = getattr(self.source, "describe", None)
        return str(describe(number)) if callable(describe) else ""

    def state(self) -> dict[str, Any]:
        own = self.source.state_dict() if self.stateful else None  # type: ignore[attr-defined]
        return {
            "position": self.position,
            "processes": self.processes,
            "signature": self.signature,
            "checksums": self.checksums,
            "source": own,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state()` was taken; a source that is another one is a MoleStateError."""
        if self.stateful != (state["source"] is not None):
            kinds = ("one that is counted", "one with its own state")
            raise MoleStateError(
                "resume: batches", expected=kinds[state["source"] is not None], got=kinds[self.stateful]
            )
        if state["processes"] != self.processes:
            raise MoleStateError(
                "resume", expected=f"{state['processes']} processes as before", got=self.processes
            )
        self._expected = state["signature"]
        if self.stateful:
            self.source.load_state_dict(state["source"])  # type: ignore[attr-defined]
            self.position = int(state["position"])
        elif hasattr(self.source, "batch"):
            if state["checksums"]:
                check_same_data(state["checksums"], checksums(self.source.batch(0)))
            self.position, self.checksums = int(state["position"]), state["checksums"]
        while self.position < state["position"]:
            self._next()
            self.position += 1
        if not hasattr(self.source, "batch"):
            check_same_data(state["checksums"], self.checksums)

    def _next(self) -> Mapping[str, Tensor]:
        if self._iterator is None:
            self._iterator = iter(self.source)
        batch = next(self._iterator, None)
        if batch is None:
            batch = self._again()
        batch = self._checked(batch)
        if not self.stateful:
            self.checksums = checksums(batch, self.checksums)
        return batch

    def _again(self) -> Mapping[str, Tensor]:
        """The first batch of the next round through the source."""
        self._iterator = iter(self.source)
        batch = next(self._iterator, None)
        if batch is None:
            hint = (
                "give a source that can be iterated again (a list, a DataLoader), or one with enough batches"
            )
            raise MoleStateError(
                "batches", f"ended after {self.position} batches and cannot start over", hint=hint
            )
        return batch

    def _checked(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch, the first of a run after a look at its keys and shapes."""
        if self.signature is not None and self._expected is None:
            return batch
        own = getattr(self.source, "signature", None)
        self.signature = own() if callable(own) else signature(batch)
        if self._expected is not None and self.signature != self._expected:
            raise MoleStateError(
                "resume: batches", expected=f"{self._expected} as when the run began", got=self.signature
            )
        self._expected = None
        return batch


def signature(batch: Mapping[str, Tensor]) -> Signature:
    """{key: [dtype, sizes without the first]} of a batch's tensors."""
    if not isinstance(batch, Mapping):
        raise MoleTypeError("batches", expected="dicts of tensors", got=type(batch).__name__)
    return {
        key: [str(v.dtype), list(v.shape[1:])] for key, v in sorted(batch.items()) if isinstance(v, Tensor)
    }


def counted_generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator whose draws depend on (seed, path) alone, so that no generator state need be kept to
    resume.
    """
    text = "/".join(str(part) for part in (seed, *path))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
