"""Sharded safetensors: an index names, for each key, the file beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleKeyError, printable
from mole_kernels.files.limits import MAX_HEADER, MAX_TENSORS, check_json_size, check_key, parse_json
from mole_kernels.files.reader import PathLike, SafetensorsFile, open_regular


def read_sharded(
    index: PathLike, *, keys: Iterable[str] | None = None, root: PathLike | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata of the shards together); every shard must lie in the index's own folder."""
    where = printable(index, 300)
    shard_of = read_index(index, root=root)
    folder = os.path.dirname(os.path.realpath(os.path.join(root, index) if root is not None else index))
    wanted = list(shard_of if keys is None else keys)
    missing = [key for key in wanted if key not in shard_of]
    if missing:
        raise MoleKeyError(where, f"names no tensor {', '.join(printable(key) for key in missing[:5])}")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(shard_of[key] for key in wanted):
        with SafetensorsFile(shard, root=folder) as file:
            tensors.update(file.read([key for key in wanted if shard_of[key] == shard]))
            metadata.update(file.header.metadata)
    return {key: tensors[key] for key in wanted}, metadata


def read_index(index: PathLike, *, root: PathLike | None = None) -> dict[str, str]:
    """key -> file name; a name that is more than a plain name of this folder is refused."""
    where = printable(index, 300)
    with open_regular(index, root=root) as file:
        if os.fstat(file.fileno()).st_size > MAX_HEADER:
            raise MoleFileError(where, expected=f"an index of at most {MAX_HEADER:,} bytes", got="more")
        text = file.read(MAX_HEADER)
    check_json_size(text, where)
    found = parse_json(text, where, "the index")
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or len(names) > MAX_TENSORS:
        raise MoleFileError(where, expected="an index with a weight_map", got="something else")
    for key, name in names.items():
        check_key(key, where)
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or name in ("", ".", "..")
            or any(c in name for c in "/\\:")
        ):
            raise MoleFileError(
                where,
                f"'{printable(key)}' is said to lie in '{printable(name)}'",
                expected="a file beside the index",
            )
    return names
