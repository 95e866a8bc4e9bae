"""Named tensors under keys, in safetensors shards of one folder: entries are added, never changed, and
survive a kill.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleTypeError, MoleWarning, printable
from mole_kernels.files.reader import SafetensorsFile
from mole_kernels.files.writer import atomic_save

SHARD_BYTES = 64 * 2**20
# the reader takes 20,000 tensors in a file
SHARD_TENSORS = 4096
# files held open at once: a million pictures have thousands of shards, a process may open about a thousand
# files
MOST_OPEN = 64


class Store:
    """{key: {name: tensor}}; in memory without a folder, else in shards of it.

    Args:
        folder: Made when the first entry is written; a shard that cannot be read is left out with a
            warning, and its entries are made anew.
        process: Names this process's shards, so that several may write at once; others' entries are
            seen after `reopen`.
    """

    def __init__(self, folder: Path | None, process: int = 0) -> None:
        self.folder, self.process = folder, process
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._draft: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, list[str]]] = {}
        self._open: dict[Path, SafetensorsFile] = {}
        self.reopen()

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._places

    def get(self, key: str) -> dict[str, Tensor]:
        """The entry's tensors by name."""
        if key in self._memory:
            return dict(self._memory[key])
        path, names = self._places[key]
        if path not in self._open:
            if len(self._open) >= MOST_OPEN:
                self.close()
            self._open[path] = SafetensorsFile(path)
        tensors = self._open[path].read([f"{key}.{name}" for name in names])
        return {name: tensors[f"{key}.{name}"] for name in names}

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Remembers an entry; with a folder it is on the disk after the next `flush`, which comes by itself
        when enough have gathered.
        """
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._memory[key] = held
        if self.folder is None:
            return
        self._draft |= {f"{key}.{name}": tensor for name, tensor in held.items()}
        size = sum(t.numel() * t.element_size() for t in self._draft.values())
        if size >= SHARD_BYTES or len(self._draft) >= SHARD_TENSORS:
            self.flush()

    def flush(self) -> None:
        """Writes what has gathered as one more shard. Raises MoleFileError, for example for a full disk;
        earlier shards stay.
        """
        if self.folder is None or not self._draft:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MoleFileError(printable(self.folder, 300), f"cannot be made ({error.strerror})") from error
        used_names = {path.name for path in self.folder.glob("shard-*.safetensors")}
        names = (f"shard-{self.process:03d}-{number:05d}.safetensors" for number in count())
        path = self.folder / next(name for name in names if name not in used_names)
        atomic_save(self._draft, path)
        self._draft = {}
        self._memory = {}
        self._enter(path)

    def reopen(self) -> None:
        """Looks at the folder anew."""
        if self.folder is None:
            return
        self.close()
        self._places = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._enter(path)

    def close(self) -> None:
        """Closes the shards; they are opened again when they are read."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open = {}

    def _enter(self, path: Path) -> None:
        try:
            with SafetensorsFile(path) as file:
                entries = list(file.header.entries)
        except (MoleFileError, MoleTypeError) as error:
            warnings.warn(f"{error} This shard of the cache is left out.", MoleWarning, stacklevel=4)
            return
        names_by_key: dict[str, list[str]] = {}
        for entry in entries:
            key, _, name = entry.partition(".")
            names_by_key.setdefault(key, []).append(name)
        self._places |= {key: (path, names) for key, names in names_by_key.items()}


def check_room(folder: Path, needed: int) -> None:
    """MoleFileError unless the disk below `folder` has room for so many bytes."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        hint = "another cache folder, or a cache in float16 or bfloat16"
        raise MoleFileError(
            printable(folder, 300), expected=f"room for {needed:,} bytes", got=f"{free:,} free", hint=hint
        )


def bytes_as(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Bytes of these tensors, were they of this dtype."""
    return sum(t.numel() for t in tensors.values()) * dtype.itemsize
