"""The LoRA weight autoencoder: 1-D convolutions that compress a flat LoRA some 256 times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleValueError


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder for vectors [length].

    latent_channels of the latent [latent_channels, latent_length]; the compression is factor^stages /
    latent_channels
    The default compresses 256 times (the paper says nearly 300); channels, noise and stages follow code by a
    co-author, an ancestor
    of the paper's autoencoder. One latent channel and the learned positions (see `LoRAAutoencoder`) are ours.

    Args:
        channels: Hidden channels of each stage; every stage shortens by `factor`.
        factor: Stride of the convolutions.
        kernel: Their kernel size.
        noise: Mixed into the input and into the latent while training: v ← (1−n)·v + n·ε.
    """

    length: int
    channels: Sequence[int] = (128, 256, 128, 64)
    factor: int = 4
    kernel: int = 5
    latent_channels: int = 1
    noise: tuple[float, float] = (0.001, 0.1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "noise", tuple(self.noise))
        for name in ("length", "factor", "kernel", "latent_channels"):
            if getattr(self, name) < 1:
                raise MoleValueError(
                    f"AutoencoderConfig: {name}", expected="at least 1", got=getattr(self, name)
                )
        if not self.channels or min(self.channels) < 1:
            raise MoleValueError(
                "AutoencoderConfig: channels", expected="a number >= 1 for each stage", got=self.channels
            )
        if self.kernel % 2 == 0:
            raise MoleValueError(
                "AutoencoderConfig: kernel", expected="an odd number, so that lengths stay", got=self.kernel
            )

    @property
    def padded(self) -> int:
        """length, up to a multiple of factor^stages."""
        step = self.factor ** len(self.channels)
        return -(-self.length // step) * step

    @property
    def latent_length(self) -> int:
        return self.padded // self.factor ** len(self.channels)

    @property
    def ratio(self) -> float:
        """length ÷ numbers in the latent."""
        return self.length / (self.latent_length * self.latent_channels)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LoRAAutoencoder(nn.Module):
    """vector [B,length] -> latent [B,C,L] in −1…1 -> vector [B,length].

    Encoder stage:  [LeakyReLU, InstanceNorm (not in the first)] Conv(kernel) · LeakyReLU · InstanceNorm ·
    Conv(kernel, stride factor)
    Decoder stage:  LeakyReLU · InstanceNorm · ConvTranspose(stride factor) · LeakyReLU · InstanceNorm ·
    Conv(kernel); then one Conv.
    A convolution does not know where in the vector it is, and a LoRA's weights mean something by their place:
    so the decoder adds a
    learned [channels, latent_length] to its first features, and the mean vector of the training set to its
    output (ours, both).
    """

    mean: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = [1, *config.channels]
        stages = [
            _Down(a, b, config.kernel, config.factor, first=i == 0)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        ]
        self.encoder = nn.Sequential(*stages)
        self.to_latent = nn.Conv1d(
            widths[-1], config.latent_channels, config.kernel, padding=config.kernel // 2
        )
        self.from_latent = nn.Conv1d(
            config.latent_channels, widths[-1], config.kernel, padding=config.kernel // 2
        )
        self.place = nn.Parameter(torch.zeros(widths[-1], config.latent_length))
        back = [*reversed(config.channels), config.channels[0]]
        self.decoder = nn.Sequential(
            *(_Up(a, b, config.kernel, config.factor) for a, b in itertools.pairwise(back))
        )
        self.to_vector = nn.Conv1d(back[-1], 1, config.kernel, padding=config.kernel // 2)
        nn.init.normal_(self.place, std=0.5)
        self.register_buffer("mean", torch.zeros(config.length))

    def set_mean(self, vectors: Tensor) -> None:
        """Take the mean of the training set [n,length]: the decoder learns what differs from it."""
        self._check(vectors)
        self.mean.copy_(vectors.float().mean(0))

    def encode(self, vectors: Tensor) -> Tensor:
        """[B,length] -> [B,C,L] in −1…1."""
        self._check(vectors)
        centred = F.pad(vectors - self.mean, (0, self.config.padded - self.config.length))
        return torch.tanh(self.to_latent(self.encoder(centred[:, None])))

    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,L] -> [B,length]. Raises MoleValueError for a latent that is not finite."""
        c = self.config
        if latents.shape[1:] != (c.latent_channels, c.latent_length):
            raise MoleShapeError(
                "decode",
                expected=f"latents [B,{c.latent_channels},{c.latent_length}]",
                got=tuple(latents.shape),
            )
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(latents).all()):
            raise MoleValueError("decode", expected="finite latents", got="NaN or Inf")
        out = self.to_vector(self.decoder(self.from_latent(latents) + self.place))
        return out[:, 0, : c.length] + self.mean

    def forward(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruction; with a generator, noise is mixed into input and latent as in training."""
        if generator is None:
            return self.decode(self.encode(vectors))
        latents = self.encode(_noised(vectors, self.config.noise[0], generator))
        return self.decode(_noised(latents, self.config.noise[1], generator).clamp(-1, 1))

    def _check(self, vectors: Tensor) -> None:
        if vectors.dim() != 2 or vectors.shape[1] != self.config.length:
            raise MoleShapeError(
                "LoRAAutoencoder", expected=f"vectors [B,{self.config.length}]", got=tuple(vectors.shape)
            )


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, factor: int, first: bool) -> None:
        super().__init__()
        self.first = first
        # without the mean and size of a channel an instance of a LoRA would lose how large it is: only the
        # inner norm, with affine
        self.norm_in = nn.Identity() if first else nn.InstanceNorm1d(inputs, affine=True)
        self.same = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.norm = nn.InstanceNorm1d(outputs, affine=True)
        self.shorter = nn.Conv1d(outputs, outputs, max(kernel, factor), stride=factor, padding=0)
        self.reach = max(kernel, factor) - factor

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = self.norm_in(_act(x))
        x = _normed(self.norm, _act(self.same(x)))
        return self.shorter(F.pad(x, (self.reach // 2, self.reach - self.reach // 2)))


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, factor: int) -> None:
        super().__init__()
        self.norm_in = nn.InstanceNorm1d(inputs, affine=True)
        self.longer = nn.ConvTranspose1d(inputs, outputs, factor, stride=factor)
        self.norm = nn.InstanceNorm1d(outputs, affine=True)
        self.same = nn.Conv1d(outputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.longer(_normed(self.norm_in, _act(x)))
        return self.same(_normed(self.norm, _act(x)))


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    # one element has no spread to divide by, and torch refuses it
    return x if x.shape[2] == 1 else norm(x)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def _noised(x: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    return (1 - amount) * x + amount * noise


def weight_preserved_loss(
    reconstruction: Tensor, vectors: Tensor, strength: float = 1.0, power: float = 1.0
) -> Tensor:
    """mean((1 + λ·|w|^p / mean|w|^p) · (w − ŵ)²), λ = strength, p = power: errors of large weights count
    more; λ = 0 is the MSE.

    The paper's loss emphasises larger weights, its formula is not published; this one is ours.
    """
    if reconstruction.shape != vectors.shape:
        raise MoleShapeError(
            "weight_preserved_loss",
            expected=f"the vectors' shape {tuple(vectors.shape)}",
            got=tuple(reconstruction.shape),
        )
    if not (math.isfinite(strength) and strength >= 0 and math.isfinite(power) and power > 0):
        raise MoleValueError(
            "weight_preserved_loss", expected="strength >= 0 and power > 0", got=f"{strength} and {power}"
        )
    error = (reconstruction - vectors).square()
    if strength == 0:
        return error.mean()
    size = vectors.detach().abs().pow(power)
    return ((1 + strength * size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)) * error).mean()
