"""Scales of served adapters: a number for each layer, which becomes part of B."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence

from mole_kernels.patching.block_scales import Scale, check_scales, layer_scales
from mole_kernels.serving.layout import AdapterLayout
from mole_kernels.serving.pool import StoredAdapter


class Strengths:
    """Adapters at the scales that callers ask for.

    Args:
        model: The served model, whose components and blocks scales may name.
        layout: Where its layers' factors lie.
    """

    def __init__(self, model: object, layout: AdapterLayout) -> None:
        self._model, self._layout = model, layout
        # (adapter, number of each layer) -> the adapter at those, for as long as an assignment has it
        self._known: weakref.WeakValueDictionary[tuple[object, ...], StoredAdapter] = (
            weakref.WeakValueDictionary()
        )

    def of(self, name: str, scale: Scale, paths: Collection[str]) -> dict[str, float]:
        """path -> the number that multiplies the adapter there.

        Raises:
            MoleTypeError, MoleValueError, MoleStateError: As in `Handle.set_scales`.
        """
        checked = check_scales({name: scale}, [name])[name]
        by_layer = layer_scales(name, checked, self._model, paths)
        return dict(by_layer) if isinstance(by_layer, Mapping) else dict.fromkeys(paths, by_layer)

    def scaled(
        self, adapters: Sequence[StoredAdapter | None], scales: Mapping[str, Scale]
    ) -> tuple[StoredAdapter | None, ...]:
        """The adapters of one assignment at its scales; equal ones are one adapter, with one set.

        Args:
            adapters: The adapter of each prompt.
            scales: {name: scale} of those that are not to be taken as they are.
        """
        check_scales(scales, list(dict.fromkeys(a.name for a in adapters if a is not None)))
        by_name = {name: self.of(name, scale, self._layout.places) for name, scale in scales.items()}
        return tuple(
            a if a is None or a.name not in by_name else self._at(a, by_name[a.name]) for a in adapters
        )

    def _at(self, adapter: StoredAdapter, numbers: Mapping[str, float]) -> StoredAdapter:
        key = (adapter, *numbers.values())
        scaled = self._known.get(key)
        if scaled is None:
            scaled = StoredAdapter(adapter.name, self._layout.scaled(adapter.name, adapter.vector, numbers))
            self._known[key] = scaled
        return scaled
