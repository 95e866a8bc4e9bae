"""From the name a file gives a layer to the layer of this model, and what to say where there is none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mole_kernels.errors import printable
from mole_kernels.experts.lowrank import Expert, flatten, is_denoiser, split_component
from mole_kernels.io.dialects.families import agree, families, families_of, titles
from mole_kernels.modules.scan import Scan, denoiser, sizes

# a text encoder holds this level in some versions of transformers and not in others
_OPTIONAL_LEVEL = "text_model_"


class Names:
    """Every spelling under which a file may know a layer: dotted or flat, with or without the component."""

    def __init__(self, scanned: Scan) -> None:
        self.components = scanned.components
        self._exact: dict[str, str] = {path: path for path in scanned.all_paths()}
        self._exact |= scanned.first
        self._flat: dict[str, set[str]] = {}
        for spelling, path in self._exact.items():
            flat = flatten(spelling)
            for name in {flat, flat.replace(_OPTIONAL_LEVEL, "")}:
                self._flat.setdefault(name, set()).add(path)
        self._layers = [*scanned.layers, *scanned.patched]

    def find(self, key: str) -> str | None:
        """The one path that `key` names, or None."""
        spellings = self._spellings(key)
        for spelling in spellings:
            if spelling in self._exact:
                return self._exact[spelling]
        for spelling in spellings:
            flat = flatten(spelling)
            for name in (flat, flat.replace(_OPTIONAL_LEVEL, "")):
                paths = self._flat.get(name, set())
                if len(paths) == 1:
                    return next(iter(paths))
        return None

    def nearest(self, key: str, count: int = 2) -> list[str]:
        """Existing layers whose names come closest."""
        close: list[str] = []
        for spelling in self._spellings(key):
            close += difflib.get_close_matches(spelling, self._layers, count, cutoff=0.6)
        return list(dict.fromkeys(close))[:count]

    def _spellings(self, key: str) -> list[str]:
        key = key.replace(".base_layer", "")
        spellings = [key]
        if self.components:
            default = denoiser(self.components)
            component, rest = split_component(key)
            # a file calls the denoiser by a name that this pipeline may not have
            if component is not None and is_denoiser(component) and component not in self.components:
                key = rest
            if default is not None:
                spellings.append(f"{default}.{key}")
        else:
            component, rest = split_component(key)
            if component is not None:
                spellings.append(rest)
        return spellings


def few(names: Sequence[str], count: int = 3) -> str:
    """The first names and how many more there are, safe to print."""
    shown = ", ".join(printable(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def hint_for(expert: Expert, scanned: Scan, model: object) -> str:
    """Why a file may fit nothing in this model."""
    if text := other_family(expert, scanned, model):
        return text
    names = Names(scanned)
    nearest = names.nearest(next(iter(expert.layers)))
    if nearest:
        return f"nearest layers here: {few(nearest)}"
    if scanned.layers:
        return f"layers here are called {few(list(scanned.layers))}"
    return "this model has no nn.Linear or nn.Conv2d that can be patched"


def other_family(expert: Expert, scanned: Scan, model: object) -> str:
    """What the file's names look like and what this model is, where the two differ; else ""."""
    theirs, ours = families_of(expert), families_of_model(scanned)
    if not theirs or agree(theirs, ours):
        return ""
    kind = type(model).__name__
    return f"these look like keys of a {titles(theirs)}; " + (
        f"this {kind} is a {titles(ours)}" if ours else f"this is a {kind}"
    )


def families_of_model(scanned: Scan) -> tuple[str, ...]:
    """Which known model these layers are, by their names."""
    return families({path: sizes(m)[1] for path, m in (scanned.layers | scanned.patched).items()})
