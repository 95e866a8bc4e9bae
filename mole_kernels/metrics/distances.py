"""How far two sets of pictures are apart: FID and KID, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.metrics.folders import Sample
from mole_kernels.metrics.result import Result, revision_of


class Inception(torch.nn.Module):
    """The Inception network that FID is defined by, from torch-fidelity: uint8 [B,3,H,W] -> [B,2048].

    Args:
        weights: Its file, pt_inception-2015-12-05-6726825d.pth.

    Raises:
        MoleStateError: torch-fidelity is missing.
        MoleFileError: No such weights.
    """

    num_features = 2048

    def __init__(self, weights: str) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise MoleFileError(
                printable(weights, 300),
                expected="Inception's weights, pt_inception-2015-12-05-6726825d.pth",
                got="no file",
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MoleStateError(
                "FID", f"needs torch-fidelity ({error})", hint='pip install "mole-kernels[metrics]"'
            ) from error
        try:
            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
            ).eval()
        # what a file of other weights comes to
        except (RuntimeError, KeyError, EOFError, AttributeError, UnpicklingError) as error:
            raise MoleFileError(
                printable(weights, 300), f"holds no Inception weights ({printable(error, 200)})"
            ) from error
        self.name, self.revision = f"Inception v3 {Path(weights).name}", revision_of(weights)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.net(pictures)[0].flatten(1)
        return features


def fid(samples: Sequence[Sample], references: Sequence[Sample], model: Any) -> Result:
    """Fréchet distance ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) between the features of two sets.

    With `Inception` it is FID; with another extractor (DINOv2: "FD-DINO") figures have another scale.

    Args:
        samples: At least two pictures.
        references: At least two pictures.
        model: `Inception` or an `ImageModel`.

    Raises:
        MoleValueError: Fewer than two pictures on a side, which have no covariance.
        MoleStateError: torchmetrics is missing.

    Source: Heusel et al., NeurIPS 2017.
    """
    _at_least(2, samples, references, "FID")
    metric = _metric("fid", "FrechetInceptionDistance", feature=model)
    _feed(metric, samples, references)
    details = {"references": float(len(references))}
    value = float(metric.compute())
    return Result("FID", value, "lower", model.name, model.revision, len(samples), (), details)


def kid(
    samples: Sequence[Sample],
    references: Sequence[Sample],
    model: Any,
    *,
    subset: int | None = None,
    subsets: int = 100,
    seed: int = 0,
) -> Result:
    """Squared maximum mean discrepancy with a cubic kernel: the mean over subsets, an unbiased estimate.

    Args:
        samples: At least two pictures.
        references: At least two pictures.
        model: As for `fid`.
        subset: Pictures of each subset; None for 1000, or as many as there are.
        subsets: How many subsets.
        seed: Of their choice.

    Raises:
        MoleValueError: Fewer pictures than a subset has.
        MoleStateError: torchmetrics is missing.

    Source: Bińkowski et al., ICLR 2018.
    """
    size = min(1000, len(samples), len(references)) if subset is None else subset
    _at_least(max(size, 2), samples, references, "KID")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        metric = _metric("kid", "KernelInceptionDistance", feature=model, subsets=subsets, subset_size=size)
        _feed(metric, samples, references)
        mean, spread = metric.compute()
    details = {"spread": float(spread), "subset": float(size), "references": float(len(references))}
    return Result("KID", float(mean), "lower", model.name, model.revision, len(samples), (), details)


def _metric(module: str, name: str, **settings: Any) -> Any:
    try:
        import importlib

        kind = getattr(importlib.import_module(f"torchmetrics.image.{module}"), name)
    except ImportError as error:
        raise MoleStateError(
            name, f"needs torchmetrics ({error})", hint='pip install "mole-kernels[metrics]"'
        ) from error
    return kind(**settings)


def _feed(metric: Any, samples: Sequence[Sample], references: Sequence[Sample]) -> None:
    for part, real in ((references, True), (samples, False)):
        for sample in part:
            image = sample.image()
            flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels = flat.view(image.height, image.width, 3).permute(2, 0, 1)[None]
            metric.update(pixels.contiguous(), real=real)


def _at_least(count: int, samples: Sequence[Sample], references: Sequence[Sample], metric: str) -> None:
    if min(len(samples), len(references)) < count:
        raise MoleValueError(
            metric,
            expected=f"at least {count} pictures on each side",
            got=f"{len(samples)} and {len(references)}",
        )
