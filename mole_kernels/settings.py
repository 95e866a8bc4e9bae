"""The one file that reads the environment (the build reads its own in setup.py)."""

from __future__ import annotations

import os


def extension_disabled() -> bool:
    """MOLE_NO_EXTENSION=1: behave as if the compiled library were not there."""
    return os.environ.get("MOLE_NO_EXTENSION", "0") not in ("", "0")


def tables_folder() -> str | None:
    """MOLE_TABLES=folder: measured tables looked for there before the shipped ones (`mole-kernels tune`
    writes them).
    """
    return os.environ.get("MOLE_TABLES") or None
