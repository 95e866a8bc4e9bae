"""A model's own names of its layers, so that only what is foreign to it goes to a converter.

`own_names.json` holds those of every denoiser whose pipeline loads LoRA files in diffusers, written by
`python/tools/own_names.py`; a model at hand is asked itself.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from torch import nn

from mole_kernels.errors import MoleKeyError, printable
from mole_kernels.experts.lowrank import flatten

TABLE = Path(__file__).with_name("own_names.json")
# parts of a module's path that wrappers add and files leave out
_WRAPPERS = frozenset({"base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# numbers of a flat name that may each be a block's: more than any model nests
_MOST_NUMBERS = 6


class Denoiser(TypedDict):
    """A row of the table: the plain pipeline, the mixin that loads its LoRA files, the layers (`#`: a
    number).
    """

    pipeline: str
    loader: str
    layers: list[str]


@functools.lru_cache(maxsize=1)
def denoisers() -> Mapping[str, Denoiser]:
    """The table, by the denoiser's class."""
    return json.loads(TABLE.read_text())


class OwnLayers:
    """The layers of one model, or of several that agree, by dotted and by flat name.

    Args:
        layers: Dotted paths; `#` stands for the number of a block.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._by_flat: dict[str, set[str]] = {}
        for path in layers:
            self._by_flat.setdefault(flatten(path), set()).add(path)

    def find(self, name: str) -> str | None:
        """The dotted path that a dotted or flat name means, or None.

        Raises:
            MoleKeyError: Several layers have this flat name.
        """
        paths = {path for pattern in _patterns(name) for path in self._filled(pattern, name)}
        if name in paths:
            return name
        # a name with dots of its own is spelled out: it means this path or none
        if len(paths) > 1 and "." not in name:
            raise MoleKeyError(
                f"layer {printable(name)}",
                f"the flat name stands for {' and for '.join(map(printable, sorted(paths)))}",
                hint="spell the layer with dots",
            )
        return next(iter(paths)) if paths and "." not in name else None

    def _filled(self, pattern: str, name: str) -> Iterable[str]:
        numbers = [
            number
            for number, slot in zip(flatten(name).split("_"), pattern.split("_"), strict=True)
            if slot == "#"
        ]
        for path in self._by_flat.get(pattern, ()):
            parts = iter(numbers)
            yield ".".join(next(parts) if part == "#" else part for part in path.split("."))


@functools.lru_cache(maxsize=4096)
def _patterns(name: str) -> tuple[str, ...]:
    """The flat name with every choice of its numbers as `#`."""
    parts = flatten(name).split("_")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(numbers) > _MOST_NUMBERS:
        return ()
    patterns = []
    for choice in itertools.product((False, True), repeat=len(numbers)):
        blocks = {i for i, chosen in zip(numbers, choice, strict=True) if chosen}
        patterns.append("_".join("#" if i in blocks else part for i, part in enumerate(parts)))
    return tuple(patterns)


@functools.lru_cache(maxsize=64)
def own_layers_of_classes(names: tuple[str, ...]) -> OwnLayers:
    """The layers of these denoiser classes together."""
    return OwnLayers(path for name in names for path in denoisers()[name]["layers"])


def own_layers_of_model(*models: nn.Module) -> OwnLayers:
    """The layers of the models at hand, whatever they were configured to."""
    paths: dict[str, None] = {}
    for model in models:
        for path, module in model.named_modules():
            # containers are no layers, and their flat names may be those of one
            if path and (not module._modules or "weight" in module._parameters):
                paths[".".join(part for part in path.split(".") if part not in _WRAPPERS)] = None
    return OwnLayers(paths)


def classes_with_loader(loaders: Iterable[str]) -> tuple[str, ...]:
    """The denoiser classes whose files these diffusers mixins load."""
    wanted = set(loaders)
    return tuple(name for name, row in denoisers().items() if row["loader"] in wanted)


def classes_with_layers(names: Iterable[str]) -> tuple[str, ...]:
    """The denoiser classes that have a layer of every one of these names."""
    wanted = list(dict.fromkeys(names))
    return tuple(
        cls
        for cls in denoisers()
        if all(own_layers_of_classes((cls,)).find(name) is not None for name in wanted)
    )
