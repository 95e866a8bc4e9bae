"""Several LoRAs by the mean of their predictions: each expert alone on the noise, in one call of a denoiser.

    ε(x, c) = Σ_i w_i ε_i(x, c) ÷ Σ_i w_i       ε_i the model with expert i alone

The mode composite takes it with and without the prompt; guidance is linear in both, so it is LoRA Composite.
The mode guidance leaves the half without the prompt to the base:
ε_base(∅) + s (Σ w_i ε_i(c) ÷ Σ w_i − ε_base(∅)).
Nothing is added in the weights, so experts do not disturb one another; the denoiser runs over as many samples
as there are experts.

Source: Zhong et al., TMLR 2024 (Multi-LoRA Composition); guidance by parts, Liu et al., ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.gates.softmax import GivenGate
from mole_kernels.layers.linear import Gated
from mole_kernels.patching.handle import Handle

Mode = Literal["composite", "guidance"]


class composed_experts:
    """While it is open, a UNet or a Stable Diffusion 3 transformer predicts the mean over its experts.

        with mk.patch(pipe, {"cat": a, "watercolour": b}, gates=found_gates) as handle:
            with composed_experts(pipe, handle, {"cat": 1.0, "watercolour": 1.0}):
                image = pipe("a cat, watercolour").images[0]

    Args:
        pipe: A pipeline with a UNet, or with a transformer whose inputs all have the batch in front.
        handle: A patch made with gates=found_gates (or region_gates) on the denoiser alone: a text is
            encoded once, for all.
        weights: Expert -> w_i > 0; those that are not named take no part.
        mode: "composite" or "guidance".

    Raises:
        MoleTypeError: A pipeline without a denoiser.
        MoleKeyError: An expert that the patch lacks.
        MoleValueError: No weights, or one that is not above 0; another mode.
        MoleStateError: A patch without such gates, or with experts on a text encoder.
    """

    def __init__(
        self, pipe: Any, handle: Handle, weights: Mapping[str, float], mode: Mode = "composite"
    ) -> None:
        where = "composed_experts"
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if not isinstance(denoiser, nn.Module):
            raise MoleTypeError(
                where, expected="a pipeline with a UNet or a transformer", got=type(pipe).__name__
            )
        if mode not in get_args(Mode):
            raise MoleValueError(f"{where}: mode", expected="'composite' or 'guidance'", got=repr(mode))
        for name in weights:
            if name not in handle.names:
                raise MoleKeyError(where, expected=f"experts among {', '.join(handle.names)}", got=repr(name))
        if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
            raise MoleValueError(where, expected="weights above 0", got=dict(weights))
        self._layers = [
            m for m in handle.layers.values() if isinstance(m, Gated) and isinstance(m.gate, GivenGate)
        ]
        if len(self._layers) != len(handle.layers) or not self._layers:
            hint = "mk.patch(pipe, experts, gates=found_gates)"
            raise MoleStateError(where, "the patch has other gates", hint=hint)
        if outside := [path for path in handle.layers if path.startswith("text_encoder")]:
            raise MoleStateError(
                where,
                f"{len(outside)} layers of the patch are in text encoders, as {outside[0]}",
                hint="patch pipe.unet, or experts without their text encoder part",
            )
        self.pipe, self.denoiser, self.mode, self.names = pipe, denoiser, mode, handle.names
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items()}
        self._forward: Any = None
        self._hooks: list[Any] = []
        # [samples,E] of the call that runs
        self._rows = torch.zeros(0, len(self.names))

    def __enter__(self) -> composed_experts:
        if "forward" in vars(self.denoiser):
            raise MoleStateError(
                "composed_experts",
                "the denoiser's forward is replaced already",
                hint="end what replaced it first",
            )
        self._forward = self.denoiser.forward
        self.denoiser.forward = self._predict
        self._hooks = [m.register_forward_pre_hook(partial(self._fill, m)) for m in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.denoiser.forward
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in self._layers:
            gate: Any = module.gate
            gate.set(torch.ones(1, 1, gate.num_experts, device=gate.given.device))

    def _predict(self, *args: Any, **kwargs: Any) -> Any:
        sample: Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        B, k = len(sample), len(self._shares)
        self._rows = self._rows_of(B)
        args, kwargs = _repeated(args, B, k), _repeated(kwargs, B, k)
        out = self._forward(*args, **kwargs)
        shares = torch.tensor(list(self._shares.values()), device=sample.device)

        def mean(value: Tensor) -> Tensor:
            return torch.einsum("kb...,k->b...", value.unflatten(0, (k, B)), shares.to(value))

        return _mapped(out, B * k, mean)

    def _rows_of(self, B: int) -> Tensor:
        """[experts·B,E]: each expert alone on every sample, and no expert where the base is asked for."""
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False))
        if guided and B % 2:
            raise MoleStateError("composed_experts", expected="two halves under guidance", got=f"{B} samples")
        rows = torch.zeros(len(self._shares), B, len(self.names))
        for i, name in enumerate(self._shares):
            first = B // 2 if guided and self.mode == "guidance" else 0
            rows[i, first:, self.names.index(name)] = 1.0
        return rows.flatten(0, 1)

    def _fill(self, module: Any, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before a layer runs: its gate; samples are its batch or, as of time embeddings, its rows."""
        columns = [self.names.index(name) for name in module.experts.names]
        rows = self._rows[:, columns].to(args[0].device)
        module.gate.set(rows[None] if args[0].dim() == 2 else rows[:, None])


def _repeated(value: Any, B: int, k: int) -> Any:
    return _mapped(value, B, lambda t: t.repeat(k, *[1] * (t.dim() - 1)))


def _mapped(value: Any, B: int, change: Any) -> Any:
    """Tensors with B in front changed, in lists, mappings and outputs too."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() and len(value) == B else value
    if isinstance(value, Mapping):
        changed = {key: _mapped(inner, B, change) for key, inner in value.items()}
        return type(value)(**changed) if type(value) is not dict else changed
    if isinstance(value, list | tuple):
        return type(value)(_mapped(inner, B, change) for inner in value)
    return value
