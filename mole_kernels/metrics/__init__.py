"""What papers report of pictures: likeness to texts, references and one another, preference, distances,
and how
sure a difference is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_kernels.doors import door

if TYPE_CHECKING:
    from mole_kernels.metrics.distances import fid, kid
    from mole_kernels.metrics.faces import InsightFaceModel, face_similarity
    from mole_kernels.metrics.folders import Sample, read_samples
    from mole_kernels.metrics.models import ClipModel, ImageModel
    from mole_kernels.metrics.preference import hps, image_reward, pick_score
    from mole_kernels.metrics.protocols import PROTOCOLS, Protocol, compositions, human_prompts
    from mole_kernels.metrics.result import Result
    from mole_kernels.metrics.scores import clip_i, clip_t, dino, diversity
    from mole_kernels.metrics.sheet import comparison_page, contact_sheet
    from mole_kernels.metrics.statistics import Comparison, compare

# fetched when first used: importing the door needs neither transformers nor torchmetrics
_HOME = {
    "fid": "mole_kernels.metrics.distances",
    "kid": "mole_kernels.metrics.distances",
    "InsightFaceModel": "mole_kernels.metrics.faces",
    "face_similarity": "mole_kernels.metrics.faces",
    "Sample": "mole_kernels.metrics.folders",
    "read_samples": "mole_kernels.metrics.folders",
    "ClipModel": "mole_kernels.metrics.models",
    "ImageModel": "mole_kernels.metrics.models",
    "hps": "mole_kernels.metrics.preference",
    "image_reward": "mole_kernels.metrics.preference",
    "pick_score": "mole_kernels.metrics.preference",
    "PROTOCOLS": "mole_kernels.metrics.protocols",
    "Protocol": "mole_kernels.metrics.protocols",
    "compositions": "mole_kernels.metrics.protocols",
    "human_prompts": "mole_kernels.metrics.protocols",
    "Result": "mole_kernels.metrics.result",
    "clip_i": "mole_kernels.metrics.scores",
    "clip_t": "mole_kernels.metrics.scores",
    "dino": "mole_kernels.metrics.scores",
    "diversity": "mole_kernels.metrics.scores",
    "comparison_page": "mole_kernels.metrics.sheet",
    "contact_sheet": "mole_kernels.metrics.sheet",
    "Comparison": "mole_kernels.metrics.statistics",
    "compare": "mole_kernels.metrics.statistics",
}

__all__ = [
    "PROTOCOLS",
    "ClipModel",
    "Comparison",
    "ImageModel",
    "InsightFaceModel",
    "Protocol",
    "Result",
    "Sample",
    "clip_i",
    "clip_t",
    "compare",
    "comparison_page",
    "compositions",
    "contact_sheet",
    "dino",
    "diversity",
    "face_similarity",
    "fid",
    "hps",
    "human_prompts",
    "image_reward",
    "kid",
    "pick_score",
    "read_samples",
]


__getattr__, __dir__ = door(__name__, _HOME)
