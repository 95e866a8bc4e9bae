"""What a diffusers pipeline makes of pictures and captions before its UNet sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from mole_kernels.errors import MoleTypeError, MoleValueError

Posterior = Literal["mean", "sample"]


class Encoder:
    """The VAE and the text encoders of a pipeline, as functions, each with a key that changes with its
    weights and settings.

    Args:
        pipe: Any diffusers pipeline with a `vae` and `encode_prompt`: Stable Diffusion 1, 2, XL and
            their like.
        posterior: "mean" of the VAE's posterior, or a "sample" drawn by a generator that the caller
            gives.
    """

    def __init__(self, pipe: Any, posterior: Posterior = "mean") -> None:
        if posterior not in ("mean", "sample"):
            raise MoleValueError("Encoder: posterior", expected="'mean' or 'sample'", got=repr(posterior))
        vae = getattr(pipe, "vae", None)
        if (
            not isinstance(vae, nn.Module)
            or not hasattr(vae, "encode")
            or not callable(getattr(pipe, "encode_prompt", None))
        ):
            expected, hint = (
                "a diffusers pipeline with a vae and encode_prompt",
                "else make the latents and text states yourself",
            )
            raise MoleTypeError("Encoder", expected=expected, got=type(pipe).__name__, hint=hint)
        # its configuration is nothing that a type checker knows
        self.vae: Any = pipe.vae
        self.pipe, self.posterior = pipe, posterior
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # SDXL's are trained with zeros for the empty caption, and say so
        self.zero_null = bool(getattr(getattr(pipe, "config", None), "force_zeros_for_empty_prompt", False))

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.vae.parameters())

    @torch.no_grad()
    def latents(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Pixels [B,3,H,W] in -1..1 -> (z − shift)·scaling [B,C,H/f,W/f] float32; generators: one a picture,
        where it samples.
        """
        device = next(self.vae.parameters()).device
        with _wide_enough(self.vae):
            posterior = self.vae.encode(pixels.to(device, self.dtype)).latent_dist
        z = posterior.mean.float().cpu()
        if self.posterior == "sample":
            if generators is None or len(generators) != len(pixels):
                raise MoleValueError(
                    "Encoder.latents",
                    expected=f"{len(pixels)} generators to sample with",
                    got=generators and len(generators),
                )
            noise = torch.stack([torch.randn(mean.shape, generator=g) for mean, g in zip(z, generators)])
            z = z + posterior.std.float().cpu() * noise
        return (z - float(getattr(self.vae.config, "shift_factor", None) or 0.0)) * float(
            self.vae.config.scaling_factor
        )

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> {"encoder_hidden_states" [B,T,K], and for SDXL "text_embeds" [B,P]} on the CPU."""
        device = next(self.vae.parameters()).device
        states = self.pipe.encode_prompt(
            prompt=list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        by_name = {"encoder_hidden_states": states[0].cpu()}
        # (states, negative, pooled, negative pooled) where the UNet also takes a pooled one
        if len(states) >= 3 and isinstance(states[2], Tensor):
            by_name["text_embeds"] = states[2].cpu()
        return by_name

    def null(self) -> dict[str, Tensor]:
        """What takes a dropped caption's place: the empty caption's states [T,K] (and [P]), or zeros where
        the pipeline wants them.
        """
        states = {key: value[0] for key, value in self.text([""]).items()}
        return {key: torch.zeros_like(value) for key, value in states.items()} if self.zero_null else states

    def latent_key(self) -> str:
        """Of the VAE's weights and configuration, and of how its posterior is read."""
        # diffusers' private entries are in another order in each process
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        return digest_of([self.vae], {"config": config, "posterior": self.posterior})

    def text_key(self) -> str:
        """Of every text encoder's weights and configuration, and of the tokenizers' words."""
        parts = getattr(self.pipe, "components", {})
        encoders = {
            name: part
            for name, part in parts.items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
        words = {
            name: _vocabulary(part)
            for name, part in parts.items()
            if name.startswith("tokenizer") and part is not None
        }
        about = {name: part.config.to_dict() for name, part in encoders.items()}  # type: ignore[union-attr, operator]
        return digest_of(
            encoders.values(), {"config": about, "words": words, "pipeline": type(self.pipe).__name__}
        )


def digest_of(modules: Any, about: Mapping[str, Any]) -> str:
    """A checksum of modules' tensors and of what else is said about them."""
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=12)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> list[Any]:
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return [
        type(tokenizer).__name__,
        tokenizer.model_max_length,
        hashlib.blake2b(words, digest_size=12).hexdigest(),
    ]


@contextmanager
def _wide_enough(vae: Any) -> Iterator[None]:
    """float32 for the while, where a VAE says that it overflows in float16, as SDXL's does."""
    if getattr(vae.config, "force_upcast", False) and next(vae.parameters()).dtype == torch.float16:
        vae.float()
        try:
            yield
        finally:
            vae.half()
    else:
        yield
