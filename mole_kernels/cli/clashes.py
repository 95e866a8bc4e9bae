"""Installed packages that do not go together: what their metadata says, and what they only say when used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path

# packages whose requirements are looked at; what they ask of others is theirs
LOOKED_AT = (
    "mole-kernels",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
)

Version = Callable[[str], str | None]


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clashes(version_of: Version = installed) -> list[str]:
    """One sentence for each pair of installed packages that do not go together, with the remedy.

    Nothing is imported: a clash may be why an import fails.
    """
    return [*_of_metadata(version_of), *_of_peft_in_transformers(version_of, transformers_asks_for_peft())]


def transformers_asks_for_peft() -> str | None:
    """The oldest PEFT that the installed transformers takes, which it says in its source alone."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).parent / "integrations/peft.py"
    match = (
        re.search(r'^MIN_PEFT_VERSION = "([\d.]+)"', source.read_text(), re.M) if source.exists() else None
    )
    return match[1] if match else None


def _of_peft_in_transformers(version_of: Version, least: str | None) -> list[str]:
    peft, transformers = version_of("peft"), version_of("transformers")
    if least is None or peft is None or _numbers(peft) >= _numbers(least):
        return []
    return [
        f"transformers {transformers} takes LoRAs in text encoders only with peft >= {least}, "
        f"and {peft} is installed. "
        f'Hint: pip install "peft>={least}", or, where that is not out yet, an older transformers: '
        'pip install "mole-kernels[diffusers]" names a set that works'
    ]


def _of_metadata(version_of: Version) -> list[str]:
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return []
    unmet = []
    for package in LOOKED_AT:
        for text in _requirements(package):
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = version_of(requirement.name)
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                unmet.append(
                    f"{package} {version_of(package)} asks for {requirement.name}{requirement.specifier}, "
                    f"and {version} is installed. "
                    f'Hint: pip install "{requirement.name}{requirement.specifier}"'
                )
    return unmet


def _requirements(package: str) -> Iterable[str]:
    try:
        return importlib.metadata.requires(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
