"""Keys and values of cross-attention made once per text instead of once per denoising step; every reuse is
shown to be exact first.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import ConstantGate, MaskGate, MoLEGate, SampleGate
from mole_kernels.gates.schedule import ScheduleGate
from mole_kernels.gates.softmax import ClusterGate, GivenGate, SoftmaxGate
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.modules.scan import roots
from mole_kernels.ops.direct import PLAIN, unobserved
from mole_kernels.precision import autocast_dtype

PROJECTIONS = ("to_k", "to_v", "add_k_proj", "add_v_proj")
# what these say follows from their tensors, their settings and the layer's input
GATES = (MoLEGate, ConstantGate, MaskGate, SampleGate, SoftmaxGate, ClusterGate, ScheduleGate, GivenGate)
LAYERS = (nn.Linear, GatedLoRALinear)
SETTINGS = (bool, int, float, str, tuple, type(None))
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLES = 1024
# made by a call, not read by it
MADE = ("last_gates", "_pool")

Check = Literal["sample", "content", "versions"]


def cache_text(model: object, *, check: Check = "sample", texts: int = 4) -> TextCache:
    """k, v = to_k(text), to_v(text) once for each text, bit for bit: for as long as nothing that they depend
    on has changed.

        with mk.cache_text(pipe):
            image = pipe("a cat", num_inference_steps=30).images[0]

    model  an nn.Module or a diffusers pipeline, patched or not; its cross-attention layers' projections of
           the text
    check  what is looked at beside identity and torch's version counters, for writes through `.data` move
           none:
           "sample"    on the CPU the whole text, and some 1024 places of each weight; nothing on other
           devices
           "content"   every element of the text and the weights against copies; on a GPU this waits for the
           device
           "versions"  nothing
    texts  how many texts are kept (guidance by two calls a step needs two)
    Off until asked for; `close`, or the end of `with`, takes it off. While gradients are on, inside compiled
    graphs, CUDA graph capture and
    under offload hooks the layer computes as ever; `report()` says how often and why.
    Raises MoleTypeError (no module), MoleValueError (check, texts), MoleStateError (no cross-attention to
    keep anything of).
    """
    if check not in ("sample", "content", "versions"):
        raise MoleValueError(
            "cache_text", expected="check = 'sample', 'content' or 'versions'", got=repr(check)
        )
    if texts < 1:
        raise MoleValueError("cache_text", expected="texts >= 1", got=texts)
    found: list[tuple[str, nn.Module, nn.Module]] = []
    skipped: dict[str, str] = {}
    for path, owner, layer in cross_projections(model):
        if reason := _reject(layer):
            skipped[path] = reason
        else:
            found.append((path, owner, layer))
    if not found:
        said = f"; {next(iter(skipped))}: {next(iter(skipped.values()))}" if skipped else ""
        raise MoleStateError(
            "cache_text", f"this model has no cross-attention whose keys and values could be kept{said}"
        )
    return TextCache(found, skipped, check, texts)


def cross_projections(model: object) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, attention, layer): the projections that see the text alone. Joint attention, where text and
    picture mix, has none.
    """
    for name, root in roots(model).items():
        for path, owner in root.named_modules(prefix=name):
            if getattr(owner, "is_cross_attention", False) is not True:
                continue
            # this class with added projections lets to_k and to_v see the picture
            added = hasattr(owner, "only_cross_attention") and owner._modules.get("add_k_proj") is not None
            for part in PROJECTIONS[2 if added else 0 :]:
                layer = owner._modules.get(part)
                if layer is not None:
                    yield f"{path}.{part}", owner, layer


def _reject(layer: nn.Module) -> str | None:
    if type(layer) not in LAYERS:
        return f"{type(layer).__name__} may change in ways that leave no trace; only nn.Linear and our own layers are kept"
    if isinstance(layer.__dict__.get("forward"), Forward) or isinstance(
        layer.__dict__.get("_old_forward"), Forward
    ):
        return "another cache is on it"
    if offloaded(layer):
        return "offload hooks move its weights"
    if "forward" in layer.__dict__:
        return "its forward has been replaced on the instance"
    if any(type(t) not in PLAIN for t in layer.parameters()):
        return "its tensors are sharded, or of another class of their own"
    return None


def offloaded(layer: nn.Module) -> bool:
    return "_hf_hook" in layer.__dict__ or "_diffusers_hook" in layer.__dict__


class TextCache:
    """What `cache_text` returns. Also a context manager that closes at its end."""

    def __init__(
        self, found: list[tuple[str, nn.Module, nn.Module]], skipped: dict[str, str], check: Check, texts: int
    ) -> None:
        self.check, self.limit = check, texts
        self.skipped = skipped
        self.known: list[Known] = []
        self.reused = self.computed = 0
        self.aside: Counter[str] = Counter()
        self.layers = {path: Forward(self, owner, layer) for path, owner, layer in found}
        for forward in self.layers.values():
            forward.install()

    def __enter__(self) -> TextCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TextCache({len(self.layers)} layers, {self.reused} reused, {self.computed} computed)"

    def report(self) -> dict[str, Any]:
        """{layers, reused, computed, aside: {reason: calls}, skipped: {path: reason}}; a compiled graph's
        calls are not counted.
        """
        return {
            "layers": len(self.layers),
            "reused": self.reused,
            "computed": self.computed,
            "aside": dict(self.aside),
            "skipped": dict(self.skipped),
        }

    def clear(self) -> None:
        """Forget every key and value; the next call computes them."""
        self.known.clear()
        for forward in self.layers.values():
            forward.kept.clear()

    def close(self) -> None:
        """Take the cache off its layers. Harmless the second time."""
        for forward in self.layers.values():
            forward.remove()
        self.clear()

    def text(self, x: Tensor) -> Known:
        """The text that x is, known or new: the same object and version, or the same bits."""
        whole = self.check == "content" or (self.check == "sample" and x.is_cpu)
        version = _version(x)
        for known in self.known:
            same = known.seen[0] is x and known.seen[1] == version is not None
            if (same and not whole) or (known.layout == _layout(x) and torch.equal(_bits(x), known.bits)):
                # at once, for another thread may do the same
                known.seen = (x, version)
                return known
        # the new one first; the oldest goes, and with it what every layer kept of it
        made = Known(x, version)
        self.known = [made, *self.known[: self.limit - 1]]
        return made


class Known:
    """A text that was seen: the tensor (held, so that no other comes to lie there), its version, and a copy
    of its bits.
    """

    def __init__(self, x: Tensor, version: int | None) -> None:
        self.seen, self.layout = (x, version), _layout(x)
        with torch.inference_mode(False), torch.no_grad():
            self.bits = _bits(x).clone()


class Kept(NamedTuple):
    """An output, its version when it was made, and what it was made of."""

    y: Tensor
    version: int
    state: State


class State(NamedTuple):
    """All that a layer's output depends on beside its input: tensors (held), how they stood, settings, and a
    look at their content.
    """

    tensors: list[Tensor]
    key: tuple[object, ...]
    content: list[Tensor]

    def same(self, other: State) -> bool:
        return self.key == other.key and all(map(torch.equal, self.content, other.content))


class Forward:
    """Stands in for a layer's `forward` (and `_apply`, through which `.to()` goes) while a cache is on it."""

    def __init__(self, cache: TextCache | None, owner: nn.Module | None, layer: nn.Module) -> None:
        self.cache, self.owner, self.layer = cache, owner, layer
        # FSDP puts a Parameter of its own there for a forward, and writes into it without a trace
        self.weight = None if cache is None else layer._parameters.get("weight")
        self.kept: WeakKeyDictionary[Known, Kept] = WeakKeyDictionary()

    def __call__(self, x: Tensor) -> Tensor:
        # first, for a compiler must not look at the rest
        if torch.compiler.is_compiling() or self.cache is None:
            return type(self.layer).forward(self.layer, x)  # type: ignore[no-any-return]
        reason = self.reason(x)
        state = None if reason else state_of(self.layer, x, self.cache.check)
        if state is None:
            self.cache.aside[
                reason or "its tensors were made under inference_mode, which counts no versions"
            ] += 1
            self.kept.clear()
            return type(self.layer).forward(self.layer, x)  # type: ignore[no-any-return]
        known = self.cache.text(x)
        kept = self.kept.get(known)
        if kept is not None and kept.y._version == kept.version and kept.state.same(state):
            self.cache.reused += 1
            return kept.y
        # outside inference mode, so that a write into the output would be seen
        with torch.inference_mode(False), torch.no_grad():
            y: Tensor = type(self.layer).forward(self.layer, x)
        self.cache.computed += 1
        self.kept[known] = Kept(
            y, y._version, state._replace(content=[part.clone() for part in state.content])
        )
        return y

    def reason(self, x: Tensor) -> str | None:
        """Why this call must compute as ever."""
        layer, gate = self.layer, getattr(self.layer, "gate", None)
        if torch.is_grad_enabled():
            return "gradients are on"
        if not unobserved((x,)):
            return "a compiler, profiler, tensor mode or tensor subclass looks on"
        if offloaded(layer):
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

    def install(self) -> None:
        self.layer.__dict__["forward"] = self
        self.layer.__dict__["_apply"] = Moving(self)

    def remove(self) -> None:
        inside = self.layer.__dict__
        if inside.get("forward") is self:
            del inside["forward"]
        # a hook that came later goes on calling what it found
        if inside.get("_old_forward") is self:
            inside["_old_forward"] = functools.partial(type(self.layer).forward, self.layer)
        if isinstance(inside.get("_apply"), Moving):
            del inside["_apply"]
        self.kept.clear()
        self.cache = None

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the model computes as ever: the cache belongs to this one
        return Forward, (None, None, self.layer)


class Moving:
    """`layer._apply(…)`, what was kept forgotten first: `.to()` puts other values behind the same parameters
    and counts no version.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.forward.kept.clear()
        layer = self.forward.layer
        return type(layer)._apply(layer, *args, **kwargs)


def state_of(layer: nn.Module, x: Tensor, check: Check) -> State | None:
    """How the layer stands for input x; None where a tensor counts no versions."""
    tensors: list[Tensor] = []
    settings: list[object] = []
    collect(layer, tensors, settings)
    if any(t.is_inference() for t in tensors):
        return None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    stands = [(id(t), t.data_ptr(), t._version, *_layout(t)) for t in tensors]
    key = (
        tuple(stands),
        tuple(settings),
        autocast_dtype(x.device.type),
        torch.get_float32_matmul_precision(),
        stream,
    )
    if check == "versions":
        return State(tensors, key, [])
    if check == "content":
        return State(tensors, key, [_bits(t) for t in tensors])
    return State(tensors, key, [_sample(t) for t in tensors if t.is_cpu])


def collect(module: nn.Module, tensors: list[Tensor], settings: list[object]) -> None:
    """Every tensor and plain setting of a module and those inside it; all that our layers and gates read is
    among them.
    """
    settings += (
        type(module),
        *((n, v) for n, v in module.__dict__.items() if type(v) in SETTINGS and n not in MADE),
    )
    places = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
    tensors += (t for t in places if isinstance(t, Tensor))
    route = module.route if isinstance(module, LayerExperts) else None
    if route is not None and route.current is not None:
        tensors.append(route.current)
    for child in module._modules.values():
        if child is not None:
            collect(child, tensors, settings)


def _sample(t: Tensor) -> Tensor:
    """At most twice SAMPLES of its elements, evenly spread."""
    flat = _bits(t).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)]


def _bits(t: Tensor) -> Tensor:
    """The elements as integers: −0 is not 0, and a NaN is itself."""
    t = t.detach()
    return t.view(BITS[t.element_size()]) if t.dtype.is_floating_point else t


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.shape, t.stride(), t.dtype, t.device
