"""Has a layer changed? Which tensors, versions and settings its output was computed from."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mole_kernels.experts.layer import LayerExperts
from mole_kernels.precision import autocast_dtype

SETTINGS = (bool, int, float, str, tuple, type(None))
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLES = 1024
# results of a call, which no call reads
RESULTS = ("_last_gates", "_pool")

Check = Literal["sample", "content", "versions"]


class Fingerprint(NamedTuple):
    """All that the output of a layer depends on beside its input, at one moment.

    Attributes:
        tensors: Its tensors, held so that no other ones come to lie in their memory.
        key: Their identity, address, version and layout, and every plain setting.
        content: Some or all of their elements, as integers.
    """

    tensors: list[Tensor]
    key: tuple[object, ...]
    content: list[Tensor]

    def same(self, other: Fingerprint) -> bool:
        """Whether nothing has changed between the two."""
        return self.key == other.key and all(map(torch.equal, self.content, other.content))

    def with_copies(self) -> Fingerprint:
        """The same state, with the content as it is now."""
        return self._replace(content=[part.clone() for part in self.content])


def fingerprint_of(layer: nn.Module, x: Tensor, check: Check) -> Fingerprint | None:
    """How the layer stands for an input x; None if one of its tensors counts no versions."""
    tensors: list[Tensor] = []
    settings: list[object] = []
    collect_tensors(layer, tensors, settings)
    if any(t.is_inference() for t in tensors):
        return None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    versions = [(id(t), t.data_ptr(), t._version, *layout_of(t)) for t in tensors]
    key = (
        tuple(versions),
        tuple(settings),
        autocast_dtype(x.device.type),
        torch.get_float32_matmul_precision(),
        stream,
    )
    if check == "versions":
        return Fingerprint(tensors, key, [])
    if check == "content":
        return Fingerprint(tensors, key, [bits_of(t) for t in tensors])
    return Fingerprint(tensors, key, [_sample(t) for t in tensors if t.is_cpu])


def collect_tensors(module: nn.Module, tensors: list[Tensor], settings: list[object]) -> None:
    """Append every tensor and plain setting of a module and those inside it; our layers and gates read no
    others.
    """
    settings += (
        type(module),
        *((n, v) for n, v in module.__dict__.items() if type(v) in SETTINGS and n not in RESULTS),
    )
    places = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
    tensors += (t for t in places if isinstance(t, Tensor))
    route = module.route if isinstance(module, LayerExperts) else None
    if route is not None and route.current is not None:
        tensors.append(route.current)
    for child in module._modules.values():
        if child is not None:
            collect_tensors(child, tensors, settings)


def _sample(t: Tensor) -> Tensor:
    """At most twice SAMPLES of its elements, evenly spread."""
    flat = bits_of(t).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)]


def bits_of(t: Tensor) -> Tensor:
    """The elements as integers: −0 is not 0, and a NaN is itself."""
    t = t.detach()
    return t.view(BITS[t.element_size()]) if t.dtype.is_floating_point else t


def version_of(t: Tensor) -> int | None:
    """The tensor's version, or None if it counts none."""
    return None if t.is_inference() else t._version


def layout_of(t: Tensor) -> tuple[object, ...]:
    """Shape, strides, dtype and device."""
    return t.shape, t.stride(), t.dtype, t.device
