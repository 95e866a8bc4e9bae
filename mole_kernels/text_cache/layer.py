"""A layer's forward with a cache before it: an output is reused only after it was shown to be exact."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mole_kernels.gates.gate import ConstantGate, MaskGate, MoLEGate, SampleGate
from mole_kernels.gates.schedule import ScheduleGate
from mole_kernels.gates.softmax import ClusterGate, GivenGate, SoftmaxGate
from mole_kernels.layers.fingerprint import Fingerprint, fingerprint_of
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.ops.direct import unobserved
from mole_kernels.tally import count

if TYPE_CHECKING:
    from mole_kernels.text_cache.cache import TextCache
    from mole_kernels.text_cache.texts import KnownText

# gates whose values follow from their tensors, their settings and the layer's input
GATES = (MoLEGate, ConstantGate, MaskGate, SampleGate, SoftmaxGate, ClusterGate, ScheduleGate, GivenGate)
LAYERS = (nn.Linear, GatedLoRALinear)


class CachedOutput(NamedTuple):
    """An output, its version when it was made, how the layer stood, and the layer's epoch."""

    y: Tensor
    version: int
    state: Fingerprint
    epoch: object


class CachedForward:
    """Replaces a layer's `forward` (and its `_apply`, which `.to()` calls) while a cache is on it."""

    def __init__(self, cache: TextCache | None, owner: nn.Module | None, layer: nn.Module) -> None:
        self.cache, self.owner, self.layer = cache, owner, layer
        # FSDP puts a Parameter of its own there for a forward, and writes into it without a trace
        self.weight = None if cache is None else layer._parameters.get("weight")
        # outputs of earlier epochs are not valid, in any thread
        self.epoch = object()

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for a text x [..., K]: a kept one, or a new one."""
        # first, for a compiler must not look at the rest
        cache = self.cache
        if torch.compiler.is_compiling() or cache is None:
            return _plain_forward(self.layer, x)
        reason = self.reason_against_reuse(x)
        state = None if reason else fingerprint_of(self.layer, x, cache.check)
        if state is None:
            reason = reason or "its tensors were made under inference_mode, which counts no versions"
            count(reason, cache.aside)
            self.forget()
            return _plain_forward(self.layer, x)
        text = cache.texts.find(x, cache.compares_whole(x))
        output = text.outputs.get(self)
        if (
            output is not None
            and output.epoch is self.epoch
            and output.y._version == output.version
            and output.state.same(state)
        ):
            count("reused", cache.counts)
            return output.y
        return self._compute(cache, text, x, state)

    def _compute(self, cache: TextCache, text: KnownText, x: Tensor, state: Fingerprint) -> Tensor:
        """Compute the output; keep it if nothing that it was made of was written to meanwhile."""
        epoch, before = self.epoch, state.with_copies()
        # outside inference mode, so that a write into the output would be seen
        with torch.inference_mode(False), torch.no_grad():
            y = _plain_forward(self.layer, x)
        count("computed", cache.counts)
        after = fingerprint_of(self.layer, x, cache.check)
        if after is not None and after.same(before) and text.is_text(x, cache.compares_whole(x)):
            text.outputs[self] = CachedOutput(y, y._version, before, epoch)
        return y

    def reason_against_reuse(self, x: Tensor) -> str | None:
        """Why this call must be computed by the layer, or None."""
        layer, gate = self.layer, getattr(self.layer, "gate", None)
        if torch.is_grad_enabled():
            return "gradients are on"
        if not unobserved((x,)):
            return "a compiler, profiler, tensor mode or tensor subclass observes the call"
        if has_offload_hook(layer):
            return "offload hooks move its weights"
        if self.owner is None or all(child is not layer for child in self.owner._modules.values()):
            return "its attention calls another layer in its place (PEFT's, for one)"
        if type(layer) not in LAYERS:
            return f"it has become a {type(layer).__name__}"
        if layer._parameters.get("weight") is not self.weight:
            return "its weight is another Parameter than when the cache was opened"
        if gate is not None and type(gate) not in GATES:
            return f"its gate, {type(gate).__name__}, may depend on more than the text"
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        return None

    def forget(self) -> None:
        """Make every kept output invalid, in all threads; also those that are being computed."""
        self.epoch = object()

    def put_on(self) -> None:
        """Replace the layer's forward."""
        self.layer.__dict__["forward"] = self
        self.layer.__dict__["_apply"] = ForgettingApply(self)

    def take_off(self) -> None:
        """Give the layer its forward back."""
        attributes = self.layer.__dict__
        if attributes.get("forward") is self:
            del attributes["forward"]
        # a hook that came later goes on calling what it found
        if attributes.get("_old_forward") is self:
            attributes["_old_forward"] = functools.partial(type(self.layer).forward, self.layer)
        if isinstance(attributes.get("_apply"), ForgettingApply):
            del attributes["_apply"]
        self.forget()
        self.cache = None

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the model has no cache: this one belongs to its model
        return CachedForward, (None, None, self.layer)


class ForgettingApply:
    """`layer._apply(…)`, after every kept output was forgotten.

    `.to()` puts other values behind the same parameters and counts no version.
    """

    def __init__(self, forward: CachedForward) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.forward.forget()
        layer = self.forward.layer
        out = type(layer)._apply(layer, *args, **kwargs)
        # an output that another thread made in the middle is as invalid
        self.forward.forget()
        return out


def has_offload_hook(layer: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers sits on the layer itself."""
    return "_hf_hook" in layer.__dict__ or "_diffusers_hook" in layer.__dict__


def _plain_forward(layer: nn.Module, x: Tensor) -> Tensor:
    return type(layer).forward(layer, x)  # type: ignore[no-any-return]
