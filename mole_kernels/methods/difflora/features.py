"""Mixed image features: what the denoiser is told of a person, from one or several pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleFileError, MoleShapeError, MoleStateError, MoleValueError

Picture = Any  # a PIL.Image.Image


class ImageEncoder(Protocol):
    """Pictures to features; `dim` is their width."""

    @property
    def dim(self) -> int: ...

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """[n, dim] float32 for n pictures."""
        ...


class MixedImageFeatures(nn.Module):
    """mixed = Σ_k g_k P_k f_k, k in {face, image};  g = softmax(MLP([f_face, f_image])).

    face [B,F], image [B,I] -> [B,dim]; with several references face [B,n,F], image [B,n,I], their mixed
    features are averaged, so that
    the order of the pictures does not matter.
    The paper has a gate network in the manner of a mixture of experts over a face and an image embedding;
    softmax, the MLP's form and
    the average are ours.
    """

    def __init__(self, face_dim: int, image_dim: int, dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.face_dim, self.image_dim, self.dim = face_dim, image_dim, dim
        self.face, self.image = nn.Linear(face_dim, dim), nn.Linear(image_dim, dim)
        self.gate = nn.Sequential(
            nn.LayerNorm(face_dim + image_dim),
            nn.Linear(face_dim + image_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2),
        )

    def weights(self, face: Tensor, image: Tensor) -> Tensor:
        """g [...,2]: what counts for the face and for the image; they sum to 1."""
        for name, tensor, dim in (("face", face, self.face_dim), ("image", image, self.image_dim)):
            if tensor.dim() not in (2, 3) or tensor.shape[-1] != dim:
                raise MoleShapeError(
                    "MixedImageFeatures", expected=f"{name} [B,{dim}] or [B,n,{dim}]", got=tuple(tensor.shape)
                )
        if face.shape[:-1] != image.shape[:-1]:
            raise MoleShapeError(
                "MixedImageFeatures",
                expected="as many face as image features",
                got=f"{tuple(face.shape)}, {tuple(image.shape)}",
            )
        return torch.softmax(self.gate(torch.cat([face, image], -1)), -1)

    def forward(self, face: Tensor, image: Tensor) -> Tensor:
        g = self.weights(face, image)
        mixed = g[..., :1] * self.face(face) + g[..., 1:] * self.image(image)
        return mixed if mixed.dim() == 2 else mixed.mean(1)


class ClipImages:
    """A CLIP vision model of transformers, from a local folder or given; frozen.  features: its projected
    image embeddings.
    """

    def __init__(
        self, model: str | Path | nn.Module, processor: Any = None, device: str | torch.device = "cpu"
    ) -> None:
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        if isinstance(model, str | Path):
            if not Path(model).is_dir():
                raise MoleFileError(str(model), expected="a folder with a CLIP vision model", got="none")
            processor = processor or CLIPImageProcessor.from_pretrained(str(model), local_files_only=True)
            model = CLIPVisionModelWithProjection.from_pretrained(str(model), local_files_only=True)
        self.model: Any
        self.model = model.to(device).eval().requires_grad_(False)
        side = int(self.model.config.image_size)
        self.processor: Any = (
            processor if processor is not None else CLIPImageProcessor(size=side, crop_size=side)
        )

    @property
    def dim(self) -> int:
        return int(self.model.config.projection_dim)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        pixels = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")[
            "pixel_values"
        ]
        return (
            self.model(pixel_values=pixels.to(self.model.device, self.model.dtype)).image_embeds.float().cpu()
        )


class InsightFaces:
    """Face embeddings of the insightface package (ArcFace, 512 wide), of the largest face in each picture.

    Args:
        root: The folder with its models. Raises MoleStateError where the package is missing,
            MoleValueError for a picture without a face.
    """

    dim = 512

    def __init__(self, root: str | Path, name: str = "buffalo_l") -> None:
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise MoleStateError(
                "InsightFaces",
                "the package insightface is not installed",
                hint="pip install insightface onnxruntime",
            ) from error
        self._app: Any = FaceAnalysis(name=name, root=str(root))
        self._app.prepare(ctx_id=-1)

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        import numpy

        embeddings = []
        for i, picture in enumerate(pictures):
            # the package reads blue, green, red
            faces = self._app.get(numpy.asarray(picture.convert("RGB"))[:, :, ::-1])
            if not faces:
                raise MoleValueError(
                    "InsightFaces", expected="a face in every picture", got=f"none in picture {i}"
                )
            largest = max(
                faces, key=lambda face: (face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1])
            )
            embeddings.append(torch.as_tensor(largest.normed_embedding))
        return torch.stack(embeddings).float()


class SmallImages(nn.Module):
    """A small convolutional encoder that trains with the rest: pictures of any size -> [n,dim]. For recipes
    and tests.
    """

    def __init__(self, dim: int = 64, channels: int = 32, size: int = 32) -> None:
        super().__init__()
        self._dim, self.size = dim, size
        widths = [3, channels, 2 * channels, 2 * channels]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * (size // 8) ** 2, dim))

    @property
    def dim(self) -> int:
        return self._dim

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """[n,3,size,size] in −1…1."""
        import numpy

        small = [numpy.asarray(p.convert("RGB").resize((self.size, self.size))) for p in pictures]
        return torch.from_numpy(numpy.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def forward(self, pictures: Sequence[Picture] | Tensor) -> Tensor:
        """Pictures, or their pixels [n,3,H,W] in −1…1."""
        pixels = pictures if isinstance(pictures, Tensor) else self.pixels(pictures)
        if pixels.shape[-1] != self.size or pixels.shape[-2] != self.size:
            pixels = nn.functional.interpolate(pixels, (self.size, self.size), mode="area")
        return self.body(pixels)
