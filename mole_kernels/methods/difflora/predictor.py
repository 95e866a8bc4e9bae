"""All parts of DiffLoRA as one module: pictures of a person go in, latents of their LoRA come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.methods.difflora.autoencoder import LoRAAutoencoder
from mole_kernels.methods.difflora.denoiser import DenoiserConfig, LoRADenoiser
from mole_kernels.methods.difflora.features import ImageEncoder, MixedImageFeatures, Picture, SmallImages
from mole_kernels.methods.difflora.manifest import Manifest

KINDS = ("face", "image")
References = Mapping[str, Tensor]


class Predictor(nn.Module):
    """z0 ~ p(z | c),  c = mean over references of mixed(face(picture), image(picture));  LoRA =
    layout(decode(z0·std + mean)).

    Args:
        manifest: The layout of the vectors.
        encoders: "face" and "image": a `SmallImages` is part of the model and trains with it; any other
            is frozen and stays outside.
        latent_mean: [C,L]; with `latent_std` it gives the denoiser's latents mean 0 and variance 1 over
            the training set (ours).
        latent_std: A scalar.
        timesteps: Of the noise schedule.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        manifest: Manifest,
        autoencoder: LoRAAutoencoder,
        features: MixedImageFeatures,
        denoiser: LoRADenoiser,
        encoders: Mapping[str, ImageEncoder],
        timesteps: int = 1000,
    ) -> None:
        super().__init__()
        _check_sizes(manifest, autoencoder, features, denoiser)
        self.manifest, self.timesteps = manifest, timesteps
        self.autoencoder, self.features, self.denoiser = autoencoder, features, denoiser
        if set(encoders) != set(KINDS):
            raise MoleKeyError("Predictor: encoders", expected=" and ".join(KINDS), got=sorted(encoders))
        for kind, encoder in encoders.items():
            check_encoder(kind, encoder, self.dims[kind])
        self.own = nn.ModuleDict({kind: e for kind, e in encoders.items() if isinstance(e, SmallImages)})
        self.given: dict[str, ImageEncoder] = {
            kind: e for kind, e in encoders.items() if not isinstance(e, SmallImages)
        }
        shape = (autoencoder.config.latent_channels, autoencoder.config.latent_length)
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_std", torch.ones(()))

    @classmethod
    def new(
        cls,
        manifest: Manifest,
        autoencoder: LoRAAutoencoder,
        encoders: Mapping[str, ImageEncoder],
        *,
        dim: int = 1024,
        hidden: int = 256,
        **shape: Any,
    ) -> Predictor:
        """Fresh features of width `dim` and a fresh denoiser for an autoencoder; shape: depth, width, heads,
        patch, mlp_ratio.
        """
        c = autoencoder.config
        missing = [kind for kind in KINDS if kind not in encoders]
        if missing:
            raise MoleKeyError("Predictor: encoders", expected=" and ".join(KINDS), got=sorted(encoders))
        features = MixedImageFeatures(encoders["face"].dim, encoders["image"].dim, dim, hidden)
        denoiser = LoRADenoiser(DenoiserConfig(c.latent_channels, c.latent_length, dim, **shape))
        return cls(manifest, autoencoder, features, denoiser, encoders)

    @property
    def dims(self) -> dict[str, int]:
        """Width of each encoder's features."""
        return {"face": self.features.face_dim, "image": self.features.image_dim}

    def prepare(self, pictures: Sequence[Picture], where: str = "prepare") -> dict[str, Tensor]:
        """What is made of n pictures once: {"face": [n,…], "image": [n,…]}, features of a frozen encoder,
        pixels for one that trains.

        Raises MoleValueError for no pictures or one without a face, MoleShapeError where an encoder gives
        features of another size.
        """
        if not len(pictures):
            raise MoleValueError(where, expected="at least one picture of each person", got="none")
        prepared = {}
        for kind in KINDS:
            if kind in self.own:
                prepared[kind] = self.own[kind].pixels(pictures)  # type: ignore[operator]
                continue
            try:
                features = self.given[kind](pictures)
            # no face in a picture: the encoder does not know whose it is
            except MoleValueError as error:
                raise MoleValueError(
                    f"{where}, {kind} encoder", error.problem, expected=error.expected, got=error.got
                ) from error
            if features.shape != (len(pictures), self.dims[kind]):
                raise MoleShapeError(
                    f"{where}, {kind} encoder",
                    expected=f"features [{len(pictures)},{self.dims[kind]}]",
                    got=tuple(features.shape),
                    hint="the model was trained with an encoder of that width",
                )
            prepared[kind] = features
        return prepared

    def condition(self, references: References) -> Tensor:
        """[B,dim] from face [B,n,…] and image [B,n,…] as `prepare` makes them."""
        device = self.denoiser.null.device
        parts = {}
        for kind in KINDS:
            held = references[kind].to(device)
            parts[kind] = (
                self.own[kind](held.flatten(0, 1)).unflatten(0, held.shape[:2]) if kind in self.own else held
            )
        return self.features(parts["face"], parts["image"])

    @torch.no_grad()
    def latents(self, vectors: Tensor) -> Tensor:
        """[B,C,L] of vectors [B,length], as the denoiser sees them."""
        return (self.autoencoder.encode(vectors.to(self.latent_mean)) - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Vectors [B,length] of latents [B,C,L] as the denoiser sees them. Raises MoleValueError for latents
        that are not finite.
        """
        # the autoencoder's own latents lie within −1…1
        return self.autoencoder.decode((latents * self.latent_std + self.latent_mean).clamp(-1, 1))

    def set_latent_scale(self, latents: Tensor) -> None:
        """Take mean and spread of the autoencoder's latents [n,C,L] of the training set."""
        with torch.no_grad():
            self.latent_mean.copy_(latents.mean(0))
            # one spread for all places: those that say more stay larger, and count more in the loss
            self.latent_std.copy_((latents - latents.mean(0)).square().mean().sqrt().clamp_min(1e-6))


def check_encoder(kind: str, encoder: ImageEncoder, dim: int) -> None:
    """MoleTypeError or MoleShapeError unless this encoder's features are `dim` wide."""
    if not callable(encoder) or not isinstance(getattr(encoder, "dim", None), int):
        raise MoleTypeError(
            f"{kind} encoder",
            expected="an ImageEncoder: pictures to features, with .dim",
            got=type(encoder).__name__,
        )
    if encoder.dim != dim:
        raise MoleShapeError(
            f"{kind} encoder",
            expected=f"features {dim} wide",
            got=encoder.dim,
            hint="the one the model was trained with",
        )


def _check_sizes(
    manifest: Manifest, autoencoder: LoRAAutoencoder, features: MixedImageFeatures, denoiser: LoRADenoiser
) -> None:
    c, d = autoencoder.config, denoiser.config
    pairs = {
        "autoencoder: length": (manifest.length, c.length),
        "denoiser: latents": ((c.latent_channels, c.latent_length), (d.latent_channels, d.latent_length)),
        "denoiser: condition_dim": (features.dim, d.condition_dim),
    }
    for name, (wanted, got) in pairs.items():
        if wanted != got:
            raise MoleShapeError(f"Predictor, {printable(name)}", expected=wanted, got=got)
