"""What people would prefer, as models guess it: PickScore, HPS and ImageReward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mole_kernels.errors import MoleFileError, MoleStateError, printable
from mole_kernels.metrics.folders import Sample, with_texts
from mole_kernels.metrics.models import ClipModel
from mole_kernels.metrics.result import Result, mean_result, revision_of
from mole_kernels.metrics.scores import clip_t


def pick_score(samples: Sequence[Sample], model: ClipModel) -> Result:
    """PickScore: exp(logit_scale) · cos(picture, prompt), by a CLIP trained on choices.

    Args:
        samples: Pictures with texts.
        model: yuvalkirstain/PickScore_v1, a CLIP-H in transformers' layout.

    Source: Kirstain et al., NeurIPS 2023.
    """
    scored = clip_t(samples, model)
    values = [model.scale * value for value in scored.by_picture]
    return mean_result("PickScore", values, model, scale=model.scale)


def hps(samples: Sequence[Sample], model: ClipModel) -> Result:
    """HPS v2: cos(picture, prompt), by a CLIP trained on rankings.

    Args:
        samples: Pictures with texts.
        model: HPS v2 or v2.1 in transformers' layout.

    Source: Wu et al., arXiv 2306.09341.
    """
    return mean_result("HPS v2", clip_t(samples, model).by_picture, model)


class ImageRewardModel:
    """ImageReward by its own package.

    Args:
        source: Folder with ImageReward.pt and med_config.json.
        device: Where it runs.

    Raises:
        MoleStateError: The package is missing.
        MoleFileError: A file is missing.
    """

    def __init__(self, source: str, device: str | None = None) -> None:
        files = [Path(source) / name for name in ("ImageReward.pt", "med_config.json")]
        if lacking := [path.name for path in files if not path.is_file()]:
            raise MoleFileError(
                printable(source, 300),
                expected="a folder with ImageReward.pt and med_config.json",
                got=f"none of {', '.join(lacking)}",
            )
        try:
            import ImageReward
        except ImportError as error:
            raise MoleStateError(
                "ImageReward", f"needs its package ({error})", hint="pip install image-reward"
            ) from error
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = ImageReward.load(str(files[0]), device=where, med_config=str(files[1]))
        self.name, self.revision = f"ImageReward {source}", revision_of(source)

    def score(self, text: str, image: Any) -> float:
        """The reward of one picture."""
        with torch.no_grad():
            return float(self.model.score(text, image))


def image_reward(samples: Sequence[Sample], model: ImageRewardModel) -> Result:
    """ImageReward: the mean over pictures of the reward for their prompt.

    Source: Xu et al., NeurIPS 2023.
    """
    own = with_texts(samples, "ImageReward")
    return mean_result("ImageReward", [model.score(s.text, s.image()) for s in own], model)
