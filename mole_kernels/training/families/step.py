"""The denoiser as its own pipeline calls it: one step of the pipeline's loop, stopped at the scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleError, MoleStateError, MoleTypeError


class PredictionReached(BaseException):
    """Ends a pipeline's call when its scheduler is handed the prediction; nothing may swallow it."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction


class PipelineStep:
    """prediction = what the pipeline hands to its scheduler in one step, with gradients.

    The pipeline's own `__call__` runs on a copy of the pipeline whose scheduler has the batch's timesteps as
    its only step and keeps what it is handed. So ids, packing, masks, guidance embeddings, scales of the
    timestep and the sign of the prediction are the pipeline's, whatever its family. Nothing of the pipeline
    itself changes; several threads may call.

    Args:
        pipe: A diffusers pipeline; its text encoders are not used.
        denoiser: Name of its component, "transformer" or "unet".

    Raises:
        MoleTypeError: No pipeline with such a denoiser and a scheduler.
    """

    def __init__(self, pipe: Any, denoiser: str) -> None:
        model, scheduler = getattr(pipe, denoiser, None), getattr(pipe, "scheduler", None)
        call = getattr(type(pipe).__call__, "__wrapped__", None)
        if not isinstance(model, nn.Module) or scheduler is None or call is None:
            expected = f"a diffusers pipeline with a {denoiser} and a scheduler"
            raise MoleTypeError("training", expected=expected, got=type(pipe).__name__)
        self.model: nn.Module = model
        self.pipe, self.denoiser, self.scheduler, self._call = pipe, denoiser, scheduler, call
        self._class = type(
            type(pipe).__name__,
            (type(pipe),),
            {"_execution_device": property(_device), "device": property(_device), "progress_bar": _no_bar},
        )
        self._stopping = type(
            type(scheduler).__name__,
            (type(scheduler),),
            {
                "set_timesteps": _set_timesteps,
                "step": _stop,
                "scale_model_input": _as_it_is,
                # some pipelines multiply given latents with it
                "init_noise_sigma": 1.0,
            },
        )

    def __call__(
        self, timesteps: Tensor, arguments: Mapping[str, Any], model: nn.Module | None = None
    ) -> Tensor:
        """The prediction for the latents among `arguments`.

        Args:
            timesteps: [B] as the scheduler counts them.
            arguments: Of the pipeline's call: latents, prompt_embeds and the like, height, width.
            model: Called in the denoiser's place, such as one that accelerate has wrapped.

        Raises:
            MoleStateError: The pipeline refuses the arguments, or never reaches its scheduler.
        """
        pipe = copy.copy(self.pipe)
        pipe.__class__ = self._class
        scheduler = copy.copy(self.scheduler)
        scheduler.__class__ = self._stopping
        device = next(self.model.parameters()).device
        # the loop goes over the first axis: one step, of every sample's own time
        scheduler._wanted = timesteps.to(device)[None]
        pipe.__dict__["_training_device"] = device
        pipe.__dict__["scheduler"] = scheduler
        pipe.__dict__[self.denoiser] = (
            self.model if model in (None, self.model) else _Called(self.model, model)
        )
        try:
            self._call(pipe, **arguments)
        except PredictionReached as reached:
            return reached.prediction
        except MoleError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MoleStateError(
                f"training: {type(self.pipe).__name__}",
                f"the pipeline refuses the batch ({type(error).__name__}: {error})",
                hint="a batch holds latents and, under the pipeline's own names, its text's states",
            ) from error
        raise MoleStateError(f"training: {type(self.pipe).__name__}", "never called its scheduler's step")

    def accepts(self, name: str) -> bool:
        """Whether the pipeline's call has this argument."""
        return name in inspect.signature(self._call).parameters


class _Called:
    """A denoiser's attributes, and another module's call."""

    def __init__(self, inner: nn.Module, model: nn.Module) -> None:
        self._inner, self._model = inner, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _device(pipe: Any) -> torch.device:
    return pipe.__dict__["_training_device"]


class _NoBar(nullcontext):
    """A progress bar that shows nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def update(self, *_: Any) -> None:
        """Nothing."""


def _no_bar(self: Any, iterable: Any = None, total: Any = None) -> Any:
    return _NoBar() if iterable is None else iterable


# what diffusers' `retrieve_timesteps` looks for in a signature is named, whether it is read or not
def _set_timesteps(
    self: Any,
    num_inference_steps: int | None = None,
    device: Any = None,
    sigmas: Any = None,
    mu: float | None = None,
    timesteps: Any = None,
    **_: Any,
) -> None:
    self.timesteps = self._wanted
    self.num_inference_steps = len(self._wanted)


def _stop(self: Any, model_output: Tensor, *_: Any, **__: Any) -> None:
    raise PredictionReached(model_output)


def _as_it_is(self: Any, sample: Tensor, *_: Any, **__: Any) -> Tensor:
    return sample
