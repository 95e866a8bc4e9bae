"""How like a person's references the faces in pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.metrics.folders import Sample, references_of
from mole_kernels.metrics.result import Result, mean_result, revision_of


class FaceModel(Protocol):
    """Finds the largest face of a picture.

    Attributes:
        name: What results call it.
        revision: Of its weights.
        face: Its vector [K] float32 of length 1, or None where there is no face.
    """

    name: str
    revision: str

    def face(self, image: Any) -> Tensor | None: ...


class InsightFaceModel:
    """A `FaceModel`: detection and ArcFace of InsightFace.

    Args:
        source: Folder of a model pack, as buffalo_l: det_10g.onnx, w600k_r50.onnx.
        threshold: Detections below it are no faces.

    Raises:
        MoleFileError: No model pack there.
        MoleStateError: The package is missing.
    """

    def __init__(self, source: str, threshold: float = 0.5) -> None:
        path = Path(source)
        if not path.is_dir() or not list(path.glob("*.onnx")):
            raise MoleFileError(
                printable(source, 300),
                expected="a model pack of InsightFace: det_10g.onnx, w600k_r50.onnx, as of buffalo_l",
                got="no .onnx file",
            )
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise MoleStateError(
                "face similarity", f"needs insightface ({error})", hint='pip install "mole-kernels[faces]"'
            ) from error
        # it looks for ROOT/models/NAME
        root = path.parent.parent if path.parent.name == "models" else path.parent
        self._app: Any = FaceAnalysis(
            name=path.name, root=str(root), allowed_modules=["detection", "recognition"]
        )
        self._app.prepare(ctx_id=0 if torch.cuda.is_available() else -1, det_thresh=threshold)
        self.name, self.revision = f"InsightFace {path.name}", revision_of(source)

    def face(self, image: Any) -> Tensor | None:
        """[K] of the largest face."""
        import numpy as np

        # OpenCV's order of channels
        faces = self._app.get(np.asarray(image.convert("RGB"))[:, :, ::-1].copy())
        if not faces:
            return None
        largest = max(faces, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
        return torch.from_numpy(np.asarray(largest.normed_embedding)).float()


def face_similarity(samples: Sequence[Sample], references: Sequence[Sample], model: FaceModel) -> Result:
    """The mean over pictures of the mean cosine with the references' faces of their subject.

    A picture without a face counts 0, so that hiding the face does not help; `details` has the share of
    pictures with one, and the mean over these.

    Args:
        samples: Pictures.
        references: Pictures of the persons; those without a face are left out.
        model: Finds the faces.

    Raises:
        MoleValueError: No reference of a picture's subject shows a face.
    """
    if not samples or not references:
        raise MoleValueError(
            "face similarity", expected="pictures and references", got=f"{len(samples)} and {len(references)}"
        )
    wanted = [model.face(reference.image()) for reference in references]
    values, seen = [], []
    for sample in samples:
        places = references_of(sample, references, "face similarity")
        faces = [face for i in places if (face := wanted[i]) is not None]
        if not faces:
            raise MoleValueError(
                f"face similarity, {printable(sample.path.name)}",
                f"none of its {len(places)} references shows a face",
            )
        own = model.face(sample.image())
        values.append(0.0 if own is None else float((torch.stack(faces) @ own).mean()))
        if own is not None:
            seen.append(values[-1])
    with_face = sum(seen) / len(seen) if seen else 0.0
    return mean_result(
        "face similarity", values, model, faces=len(seen) / len(samples), where_faces=with_face
    )
