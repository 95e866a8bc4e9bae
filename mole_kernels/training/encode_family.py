"""What a pipeline with a transformer makes of pictures and captions, under its call's own names."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mole_kernels.errors import MoleTypeError, MoleValueError
from mole_kernels.training.encode import Encoder, Posterior, digest_of
from mole_kernels.training.families.family import Family


class FamilyEncoder(Encoder):
    """The VAE and the text encoders of a pipeline with a transformer, as `Family` takes what they make.

    Latents are normalised as the VAE's configuration says: (z − mean)/std by channel, or (z − shift)·scaling.
    Texts are what `encode_prompt` returns, under the names of its return statement that are arguments of the
    pipeline's call; a list of tensors of unlike length gets a mask.

    Args:
        pipe: A diffusers pipeline with a `vae`, `encode_prompt` and a transformer.
        posterior: "mean", or a "sample" drawn by a generator that the caller gives.

    Raises:
        MoleTypeError: No such pipeline, or one whose latents are made in another way.
    """

    def __init__(self, pipe: Any, posterior: Posterior = "mean") -> None:
        if posterior not in ("mean", "sample"):
            raise MoleValueError("Encoder: posterior", expected="'mean' or 'sample'", got=repr(posterior))
        vae = getattr(pipe, "vae", None)
        self.names = prompt_names(pipe)
        if not isinstance(vae, nn.Module) or not hasattr(vae, "encode") or not self.names:
            expected = "a diffusers pipeline with a vae and encode_prompt"
            hint = "else make the latents and text states yourself"
            raise MoleTypeError("Encoder", expected=expected, got=type(pipe).__name__, hint=hint)
        self.family = Family(pipe)
        if self.family.row.patched > 1 or self.family.row.frames != 2:
            expected = "latents that the VAE makes by itself"
            got = f"{type(pipe).__name__}, which patches or turns them"
            raise MoleTypeError("Encoder", expected=expected, got=got, hint="make the latents yourself")
        self.vae: Any = vae
        self.pipe, self.posterior, self.zero_null = pipe, posterior, False
        self.factor = self.family.pixels_per_place
        # a VAE of videos sees a picture as a video of one frame
        self._video = any(isinstance(module, nn.Conv3d) for module in vae.modules())

    @property
    def channels(self) -> int:
        """Of the latents."""
        config = self.vae.config
        return int(config.get("z_dim") or config.get("latent_channels"))

    @torch.no_grad()
    def latents(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Pixels [B,3,H,W] in -1..1 -> normalised latents [B,C,h,w], or [B,C,1,h,w] where the denoiser is one
        of videos.
        """
        device = next(self.vae.parameters()).device
        inputs = pixels.to(device, self.dtype)
        out = self.vae.encode(inputs[:, :, None] if self._video else inputs)
        if hasattr(out, "latent_dist"):
            z, std = out.latent_dist.mean.float().cpu(), getattr(out.latent_dist, "std", None)
        else:
            z, std = out.latent.float().cpu(), None
        if self.posterior == "sample" and std is not None:
            if generators is None or len(generators) != len(pixels):
                expected = f"{len(pixels)} generators to sample with"
                raise MoleValueError("Encoder.latents", expected=expected, got=generators and len(generators))
            noise = torch.stack([torch.randn(latent.shape, generator=g) for latent, g in zip(z, generators)])
            z = z + std.float().cpu() * noise
        z = self._normalised(z)
        return z[:, :, 0] if self._video and not self.family.step.accepts("num_frames") else z

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> the arguments of the pipeline's call, [B,…] each, on the CPU."""
        parameters = inspect.signature(self.pipe.encode_prompt).parameters
        asked: dict[str, Any] = {
            "prompt": list(captions),
            "device": next(self.vae.parameters()).device,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        # second and third prompts that have no default
        asked |= {n: None for n, p in parameters.items() if p.default is p.empty and n not in asked}
        out = self.pipe.encode_prompt(**{name: value for name, value in asked.items() if name in parameters})
        states = dict(zip(self.names, out if isinstance(out, tuple) else (out,)))
        texts: dict[str, Tensor] = {}
        for name, value in states.items():
            if name.startswith("negative") or value is None or not self.family.step.accepts(name):
                continue
            if isinstance(value, Tensor):
                texts[name] = value.cpu()
            elif isinstance(value, list):
                texts |= padded(name, [v.cpu() for v in value])
        # a pipeline may say nothing of a mask where every place holds a word
        mask = f"{self.names[0]}_mask"
        if mask in self.names and mask not in texts and self.names[0] in texts:
            texts[mask] = torch.ones(texts[self.names[0]].shape[:2], dtype=torch.int64)
        return texts

    def latent_key(self) -> str:
        """Of the VAE's weights and configuration, and of how its posterior is read."""
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        pipeline = type(self.pipe).__name__
        return digest_of([self.vae], {"config": config, "posterior": self.posterior, "pipeline": pipeline})

    def _normalised(self, z: Tensor) -> Tensor:
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shape = (1, -1, *(1,) * (z.dim() - 2))
            return (z - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        return (z - float(config.get("shift_factor") or 0.0)) * float(config.get("scaling_factor") or 1.0)


def padded(name: str, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """States [T_i,K] of unlike length as one [B,T,K], and a mask [B,T] of what is theirs."""
    longest = max(len(s) for s in states)
    whole = states[0].new_zeros(len(states), longest, *states[0].shape[1:])
    mask = torch.zeros(len(states), longest, dtype=torch.int64)
    for i, s in enumerate(states):
        whole[i, : len(s)] = s
        mask[i, : len(s)] = 1
    return {name: whole, f"{name}_mask": mask}


def prompt_names(pipe: Any) -> tuple[str, ...]:
    """The names in the last return statement of a pipeline's `encode_prompt`; () where there are none."""
    try:
        source = textwrap.dedent(inspect.getsource(type(pipe).encode_prompt))
    except (AttributeError, OSError, TypeError):
        return ()
    returns = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]
    for value in reversed(returns):
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        if parts and all(isinstance(part, ast.Name) for part in parts):
            return tuple(part.id for part in parts if isinstance(part, ast.Name))
    return ()
