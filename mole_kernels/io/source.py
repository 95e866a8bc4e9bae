"""What a path to an adapter means: a file, or a folder as PEFT, diffusers and the hub's cache lay it out."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mole_kernels.errors import MoleFileError, printable
from mole_kernels.files.opening import CONVERTER, PathLike
from mole_kernels.io.adapter_config import FILE, AdapterConfig

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
# the files that PEFT and diffusers write, in this order; then whatever lies there alone
NAMES = tuple(f"{stem}{end}" for stem in ("adapter_model", "pytorch_lora_weights") for end in (SUFFIX, INDEX))
PICKLED = ("adapter_model.bin", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class AdapterSource:
    """The weights of one adapter, and the settings that lie beside them.

    Attributes:
        weights: Path of the file of weights, or of its index.
        config: Path of PEFT's settings in the same folder, or None.
        sure: Whether these settings can only be this file's.
    """

    weights: str
    config: str | None
    sure: bool

    def settings(self, where: str) -> AdapterConfig | None:
        """The settings beside the file, or None.

        Raises:
            MoleFileError, MoleKeyError: As `AdapterConfig.from_file`.
        """
        return None if self.config is None else AdapterConfig.from_file(self.config, where)


def find_adapter(path: PathLike) -> AdapterSource:
    """The file of weights that a path means, with the settings that lie beside it.

    Args:
        path: A file, or a folder with one adapter: what `save_pretrained` and `save_lora_weights` write, a
            folder with one safetensors file, or a folder whose one subfolder holds an adapter.

    Raises:
        MoleFileError: A folder that holds no adapter, several, or only a pickle.
    """
    name = os.fsdecode(path)
    if not os.path.isdir(name):
        return _with_config(name)
    where = printable(name, 300)
    try:
        files = sorted(os.listdir(name))
    except OSError as error:
        raise MoleFileError(where, f"the folder cannot be read ({error.strerror})") from None
    known = next((file for file in NAMES if file in files), None)
    weights = [known] if known else [file for file in files if file.endswith((INDEX, SUFFIX))]
    indices = [file for file in weights if file.endswith(INDEX)]
    # an index stands for its shards
    weights = indices or weights
    if len(weights) == 1:
        return _with_config(os.path.join(name, weights[0]))
    if weights:
        raise MoleFileError(
            where,
            f"the folder holds {len(weights)} files: {_some(weights)}",
            expected="one adapter",
            hint="give the path of one of them",
        )
    if pickled := next(
        (file for file in (*PICKLED, *files) if file in files and file.endswith(".bin")), None
    ):
        raise MoleFileError(
            where,
            f"the folder's weights are the pickle {printable(pickled)}, which is not opened here",
            hint=CONVERTER.replace("FILE", printable(os.path.join(name, pickled), 300)),
        )
    inner = [file for file in files if os.path.isfile(os.path.join(name, file, FILE))]
    if len(inner) == 1:
        return find_adapter(os.path.join(name, inner[0]))
    if inner:
        raise MoleFileError(
            where,
            expected="one adapter",
            got=f"a folder that holds {_some(inner)}",
            hint="give the path of one of them",
        )
    raise MoleFileError(
        where,
        expected="an adapter",
        got="a folder without a safetensors file",
        hint=f"an adapter's folder holds {NAMES[0]} or {NAMES[2]}",
    )


def adapter_name(path: PathLike) -> str:
    """An adapter's name from its file's or folder's: printable, without dots."""
    stem = os.path.basename(os.fsdecode(path).rstrip("/\\"))
    for end in (INDEX, SUFFIX):
        stem = stem.removesuffix(end)
    return "".join(c if c.isprintable() and c != "." else "_" for c in stem)[:128] or "expert"


def _with_config(weights: str) -> AdapterSource:
    folder, name = os.path.split(weights)
    config = os.path.join(folder, FILE)
    if not os.path.lexists(config):
        return AdapterSource(weights, None, True)
    try:
        others = [
            file
            for file in os.listdir(folder or ".")
            if file != name and file.endswith((SUFFIX, ".bin", INDEX))
        ]
    except OSError:
        others = []
    return AdapterSource(weights, config, name.startswith("adapter_model.") or not others)


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:5]) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
