"""One metric's figure, with what it was measured by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Result:
    """A figure over pictures.

    Args:
        metric: What was measured, as "CLIP-T".
        value: The figure.
        better: Whether a higher or a lower one is better.
        model: What measured it: class and folder or hub name.
        revision: Of the model's weights: a commit of the hub, or a digest of the files.
        pictures: How many were measured.
        by_picture: The figure of each, where it is a mean of them; (), as for FID, where it is not.
        details: Further figures, as how many pictures show a face.
    """

    metric: str
    value: float
    better: Better
    model: str
    revision: str
    pictures: int
    by_picture: tuple[float, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def mean_result(
    metric: str, values: Sequence[float], model: Any, better: Better = "higher", **details: float
) -> Result:
    """The mean of one value a picture.

    Args:
        metric: Its name.
        values: One a picture.
        model: Has `name` and `revision`.
        better: See `Result`.
        details: See `Result`.
    """
    every = tuple(map(float, values))
    return Result(metric, fmean(every), better, model.name, model.revision, len(every), every, details)


def revision_of(source: str, config: Any = None) -> str:
    """The commit that a hub's model is of, or a digest of the weights in a folder or file.

    Args:
        source: Folder, file, or a name on the hub.
        config: A transformers configuration, which knows its commit.
    """
    if commit := getattr(config, "_commit_hash", None):
        return str(commit)
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    weights = [p for p in files if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".onnx")]
    if not weights:
        return "unknown"
    digest = hashlib.blake2b(digest_size=8)
    for file in weights:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return f"blake2b {digest.hexdigest()}"
