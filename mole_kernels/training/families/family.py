"""What differs between families beyond their pipelines' own code: packing, sizes, what a batch holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError
from mole_kernels.training.families.step import PipelineStep

DENOISERS = ("transformer", "unet")
# entries of a batch that are no argument of a pipeline
_OF_THE_LOSS = ("latents", "mask", "prior")
# names under which pipelines keep how many pixels a latent place covers
_SCALES = (
    "vae_scale_factor_spatial",
    "vae_spatial_scale_factor",
    "vae_spatial_compression_ratio",
    "vae_scale_factor",
)
_FRAME_SCALES = ("vae_scale_factor_temporal", "vae_temporal_scale_factor", "vae_temporal_compression_ratio")


@dataclass(frozen=True)
class Row:
    """What no pipeline says by itself.

    Args:
        patched: Latents are patched by this factor already, beside the VAE's own.
        packs: The pipeline packs latents itself, so it is handed them as they are.
        frames: The axis of a video's frames.
        unguided: `guidance_scale` at which the pipeline predicts once, without guidance.
        lists: Arguments that are a list of one tensor a sample, cut by the mask of the same name.
        options: More arguments of every call.
        one_time: The pipeline takes one timestep for the whole batch, so each sample is a call.
    """

    patched: int = 1
    packs: bool = False
    frames: int = 2
    unguided: float | None = 1.0
    lists: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    one_time: bool = False


ROWS: dict[str, Row] = {
    "AuraFlowPipeline": Row(one_time=True),
    "CogVideoXPipeline": Row(frames=1),
    "ErnieImagePipeline": Row(patched=2, lists=("prompt_embeds",), one_time=True),
    "Krea2Pipeline": Row(unguided=0.0),
    "Flux2Pipeline": Row(patched=2, packs=True),
    "Flux2KleinPipeline": Row(patched=2, packs=True),
    # its own schedule of steps needs some
    "MochiPipeline": Row(options=(("num_inference_steps", 64),)),
    "QwenImagePipeline": Row(unguided=None, options=(("true_cfg_scale", 1.0),)),
    "SanaPipeline": Row(options=(("use_resolution_binning", False),)),
    "ZImagePipeline": Row(unguided=0.0, lists=("prompt_embeds",)),
}


class Family:
    """The adapter of one pipeline: latents and texts of a batch in, the prediction for them out.

    A batch holds latents [B,C,h,w] (video: [B,C,f,h,w]), normalised as the pipeline's VAE has them, and its
    texts under the names of the pipeline's arguments (prompt_embeds, pooled_prompt_embeds, masks …).

    Args:
        pipe: A diffusers pipeline.

    Raises:
        MoleTypeError: No pipeline with a denoiser, or a packing that is not known.
    """

    def __init__(self, pipe: Any) -> None:
        name = next((n for n in DENOISERS if isinstance(getattr(pipe, n, None), nn.Module)), None)
        if name is None:
            expected = "a diffusers pipeline with a transformer or a UNet"
            raise MoleTypeError("training", expected=expected, got=type(pipe).__name__)
        self.pipe, self.component = pipe, name
        self.step = PipelineStep(pipe, name)
        self.row = next((ROWS[c.__name__] for c in type(pipe).__mro__ if c.__name__ in ROWS), Row())
        self._pack = _packing(pipe)

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's transformer or UNet."""
        return self.step.model

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's: its first parameter's, since experts beside it may be kept in float32."""
        parameters = self.denoiser.parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    @property
    def pixels_per_place(self) -> int:
        """Pixels along a side of one place of the latents."""
        return _first(self.pipe, _SCALES, 8) * self.row.patched

    def packed(self, latents: Tensor) -> Tensor:
        """Latents in the form that the pipeline's loop holds them in."""
        return self._pack(self.pipe, latents)

    def tokens(self, latents: Tensor) -> int:
        """Image tokens of one sample, which decide the shift of the levels."""
        packed = self.packed(latents[:1])
        if packed.dim() == 3:
            return packed.shape[1]
        patch = getattr(self.denoiser.config, "patch_size", 1) or 1
        side = patch if isinstance(patch, int) else patch[-1]
        return max(1, packed[0, 0].numel() // (side * side))

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: float = 1.0,
        model: nn.Module | None = None,
    ) -> Tensor:
        """What the pipeline hands to its scheduler for these latents, packed as `packed` has them.

        Args:
            noisy: [B,C,h,w] or [B,C,f,h,w].
            timesteps: [B] as the scheduler counts them.
            conditions: [B,…] under the names of the pipeline's arguments.
            guidance: Told to a guidance-distilled denoiser; others are called without guidance.
            model: Called in the denoiser's place.

        Raises:
            MoleKeyError: A condition that is no argument of the pipeline.
            MoleStateError: The pipeline refuses them.
        """
        if self.row.one_time and noisy.shape[0] > 1:
            each = [
                self.predict(noisy[i : i + 1], timesteps[i : i + 1], _row(conditions, i), guidance, model)
                for i in range(noisy.shape[0])
            ]
            return torch.cat(each)
        return self.step(timesteps, self.arguments(noisy, conditions, guidance), model)

    def arguments(
        self, latents: Tensor, conditions: Mapping[str, Tensor], guidance: float = 1.0
    ) -> dict[str, Any]:
        """What the pipeline's call takes for latents and conditions of a batch; one step, no decoding.

        Raises:
            MoleKeyError: A condition that is no argument of the pipeline.
        """
        distilled = bool(getattr(self.denoiser.config, "guidance_embeds", False))
        return {
            **self._sizes(latents),
            "latents": latents if self.row.packs else self.packed(latents),
            "num_inference_steps": 1,
            "guidance_scale": guidance if distilled else self.row.unguided,
            "output_type": "latent",
            **dict(self.row.options),
            **self._texts(conditions),
        }

    def _sizes(self, latents: Tensor) -> dict[str, int]:
        scale = self.pixels_per_place
        sizes = {"height": latents.shape[-2] * scale, "width": latents.shape[-1] * scale}
        if latents.dim() == 5 and self.step.accepts("num_frames"):
            sizes["num_frames"] = (latents.shape[self.row.frames] - 1) * _first(
                self.pipe, _FRAME_SCALES, 4
            ) + 1
        return sizes

    def _texts(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        texts: dict[str, Any] = dict(conditions)
        for name in self.row.lists:
            mask = texts.pop(f"{name}_mask", None)
            rows = texts.get(name, ())
            texts[name] = [row if mask is None else row[mask[i].bool()] for i, row in enumerate(rows)]
        for name in texts:
            if not self.step.accepts(name):
                expected = f"arguments of {type(self.pipe).__name__}"
                raise MoleKeyError("batch", expected=expected, got=name)
        return texts

    def check(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The latents of a batch.

        Raises:
            MoleKeyError: There are none.
            MoleShapeError: They are no [B,C,h,w] or [B,C,f,h,w], or other entries have other samples.
        """
        if "latents" not in batch:
            raise MoleKeyError("batch", expected="latents", got=", ".join(sorted(batch)) or "nothing")
        latents = batch["latents"]
        if latents.dim() not in (4, 5):
            raise MoleShapeError(
                "batch: latents", expected="[B,C,h,w] or [B,C,f,h,w]", got=tuple(latents.shape)
            )
        for name, value in batch.items():
            if len(value) != len(latents):
                raise MoleShapeError(f"batch: {name}", expected=f"{len(latents)} samples", got=len(value))
        return latents

    def conditions(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of a batch that go to the pipeline, floating ones in the denoiser's dtype."""
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in batch.items()
            if name not in _OF_THE_LOSS
        }


def _row(values: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: value[i : i + 1] for name, value in values.items()}


def _first(pipe: Any, names: tuple[str, ...], otherwise: int) -> int:
    return next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), otherwise)


def _packing(pipe: Any) -> Callable[[Any, Tensor], Tensor]:
    """How a pipeline packs latents, by the signature of its own `_pack_latents`."""
    pack = getattr(pipe, "_pack_latents", None)
    names = () if pack is None else tuple(inspect.signature(pack).parameters)
    if pack is None:
        return lambda pipe, latents: latents
    if names == ("latents",):
        return lambda pipe, latents: pipe._pack_latents(latents)
    if names[:2] == ("latents", "batch_size"):
        return lambda pipe, latents: pipe._pack_latents(latents, *latents.shape)
    if names == ("latents", "patch_size", "patch_size_t"):
        return lambda pipe, latents: pipe._pack_latents(
            latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
        )
    expected = "a packing of latents that is known"
    raise MoleTypeError(f"training: {type(pipe).__name__}", expected=expected, got=", ".join(names))
