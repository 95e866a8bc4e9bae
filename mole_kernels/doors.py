"""Rooms as doors: `mk.methods.train_expert` without an import of everything behind it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def door(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are fetched when first used.

    Args:
        package: The package's `__name__`.
        homes: name -> the module that defines it.
    """
    namespace = vars(sys.modules[package])

    def fetch(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value = getattr(importlib.import_module(homes[name]), name)
        return value

    return fetch, lambda: sorted({*namespace, *homes})
