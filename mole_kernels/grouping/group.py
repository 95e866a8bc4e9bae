"""q, k and v as one product: layers of one attention that are called with the same tensor, computed by the
first call for all of them.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mole_kernels.functional import _as_samples, gated_lora_linear_with_gates
from mole_kernels.grouping import weights as group_weights
from mole_kernels.grouping.pack import Packed, Part, not_worth, pack, part_of, problem_of, refuse, same_down
from mole_kernels.layers import spread
from mole_kernels.layers.linear import GatedLoRALinear, LastGates
from mole_kernels.ops.direct import PLAIN
from mole_kernels.ops.group import beside, group_op
from mole_kernels.precision import autocast_dtype
from mole_kernels.text_cache.layer import has_offload_hook
from mole_kernels.text_cache.state import collect_state

# weights that somebody keeps moving are not laid side by side again and again
MOST_LAID = 8
# groups of a call that nobody took the rest of: so many are forgiven
FORGIVEN = 3
# of K: B's zeros inside compiled graphs, where the number of rows is not looked at
MOST_EXTRA = 1 / 16
# two threads that lay the same weights would each lay some of them
_laying = threading.Lock()
# their attention reads its input for the projections and writes nothing into it
TRUSTED = ("diffusers.", "transformers.")


class Group:
    """Layers of `owner` with one input; the first that is called in a forward of `owner` makes the outputs of
    all.

    An output is handed on only within that forward and thread, for the very tensor (object and version) that
    it was made of, and while
    all that its layer's output depends on stands as it stood; everything else is computed by the layer
    itself.
    always  compute as a group whatever it costs (tests, measurements)
    """

    def __init__(
        self,
        owner: nn.Module | None,
        layers: Sequence[GatedLoRALinear],
        processors: Sequence[nn.Module],
        always: bool,
    ) -> None:
        self.layers, self.processors, self.always = list(layers), list(processors), always
        # FSDP puts Parameters of its own there for a forward, whose memory is not ours to move
        self.weights = [layer.weight for layer in self.layers]
        self.open: dict[int, Pending | str | None] = {}
        self.traced: list[Any] | None = None
        self.trusted = False
        self.kept: Kept | None = None
        self.laid = self.taken = self.wasted = self.shared = 0
        self.apart: Counter[str] = Counter()
        self.hooks: list[Any] = []
        if owner is not None:
            self.hooks = [
                owner.register_forward_pre_hook(self.begin),
                owner.register_forward_hook(self.end, always_call=True),
            ]
        for seat, layer in enumerate(self.layers):
            layer.group = Seat(self, seat)

    def remove(self) -> None:
        """Layers and weights as they were before, each in memory of its own."""
        group_weights.part([layer.weight for layer in self.layers])
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            layer.__dict__.pop("group", None)
        self.layers, self.weights, self.hooks, self.kept = [], [], [], None
        self.open.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the model computes layer by layer: the group belongs to this one
        return Group, (None, (), (), False)

    # -- the owner's forward
    # --------------------------------------------------------------------------------------------------------

    def begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            self.traced = None
            self.trusted = bool(self.layers) and (
                self.always or all(_trusts(module) for module in self.processors)
            )
        elif self.layers:
            self.open[threading.get_ident()] = None

    def end(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            self.traced, self.trusted = None, False
            return
        found = self.open.pop(threading.get_ident(), None)
        if isinstance(found, Pending):
            self._spent(found)

    # -- a layer's forward
    # ----------------------------------------------------------------------------------------------------------

    def take(self, seat: int, layer: GatedLoRALinear, x: Tensor) -> Tensor | None:
        """The layer's output for x; None: the layer is to compute it."""
        if torch.compiler.is_compiling():
            return self._traced(seat, x)
        thread = threading.get_ident()
        # the second: a replica of the layer, which has kept its attributes
        if thread not in self.open or self.layers[seat] is not layer:
            return None
        found = self.open[thread]
        if isinstance(found, str):
            return None
        if found is not None:
            y = found.give(seat, layer, x)
            if y is not None:
                return y
            self._spent(found)
            self.open[thread] = None
        made = self._compute(x)
        if isinstance(made, str):
            self.apart[made] += 1
            # for the rest of this forward
            self.open[thread] = made
            return None
        self.open[thread] = made
        return made.give(seat, layer, x)

    def _spent(self, pending: Pending) -> None:
        if any(y is not None for y in pending.ys):
            self.wasted += 1
        else:
            self.taken += 1

    def _compute(self, x: Tensor) -> Pending | str:
        layers = self.layers
        if reason := self._reason(x):
            return reason
        parts = [part_of(layer) for layer in layers]
        if reason := refuse(parts):
            return reason
        kept = self._known(parts, x)
        if not self.always:
            whole = problem_of(_as_samples(x), parts, kept.shared)
            split = tuple([(part.N, part.experts.ranks) for part in parts])
            if reason := not_worth(whole, split, x.device.index, _wants_gradient(parts, x)):
                return reason
        weights = [layer.weight for layer in layers]
        weight = beside(weights)
        if weight is None:
            if reason := self._lay(weights, x):
                return reason
            weight = beside(weights)
            if weight is None:
                return "its weights were moved meanwhile"
        packed = kept.pack(parts)
        y, token, sample = gated_lora_linear_with_gates(
            x, weight, packed.bias, packed.experts, packed.gates, backend=layers[0].backend
        )
        _note(layers, parts, token, sample)
        self.shared += kept.shared
        return Pending(x, layers, _split(y, parts))

    def _reason(self, x: Tensor) -> str | None:
        """Why this forward's layers compute by themselves."""
        if self.wasted > max(FORGIVEN, self.taken):
            return "its layers are not called with one input"
        if not _seen_by_none(x):
            return "a tracer, tensor mode or tensor subclass looks on"
        if x.is_inference():
            return "an input made under inference_mode counts no versions"
        return _stands_aside(self.layers)

    def _lay(self, weights: list[Tensor], x: Tensor) -> str | None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "its weights do not lie side by side, and a CUDA graph is being captured"
        if self.laid >= MOST_LAID:
            return f"its weights were moved {MOST_LAID} times"
        if any(now is not then for now, then in zip(weights, self.weights)):
            return "its weights are other Parameters than those that were grouped"
        if reason := group_weights.reject(weights):
            return reason
        self.laid += 1
        with _laying:
            group_weights.lay(weights)
        return None

    def _known(self, parts: list[Part], x: Tensor) -> Kept:
        """What was packed of these operands and how, while none of them was written to; begun anew where one
        was.
        """
        tensors = [tensor for part in parts for tensor in part.tensors()]
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or any(t.is_inference() for t in tensors) or _wants_gradient(parts, None):
            # in a captured graph, values may be others when it is run again
            return Kept((), [], False)
        key = tuple([(t.data_ptr(), t._version) for t in tensors])
        if self.kept is None or self.kept.key != key:
            # their memory is held, so that nothing else comes to lie there
            self.kept = Kept(key, [t.detach() for t in tensors], same_down(parts))
        return self.kept

    # -- inside a compiled graph
    # ----------------------------------------------------------------------------------------------------

    def _traced(self, seat: int, x: Tensor) -> Tensor | None:
        """`take` as a compiler may see it: no addresses, no versions, no numbers of rows. Reasons are not
        counted.
        """
        held = self.traced
        if held is not None and held[0] is x and held[1][seat] is not None:
            y: Tensor = held[1][seat]
            held[1][seat] = None
            return y
        layers = self.layers
        # an exported program has copies of the weights, which do not lie side by side
        if (
            torch.compiler.is_exporting()
            or not self.trusted
            or _stands_aside(layers)
            or autocast_dtype(x.device.type) is not None
        ):
            return None
        parts = [part_of(layer) for layer in layers]
        if (
            refuse(parts)
            or _wants_gradient(parts, x)
            or any(layer.weight.dtype != x.dtype for layer in layers)
        ):
            return None
        R = sum([sum(part.experts.ranks) for part in parts])
        extra = R - max([sum(part.experts.ranks) for part in parts])
        if not self.always and (x.device.type != "cuda" or extra > MOST_EXTRA * x.shape[-1]):
            return None
        packed = pack(parts, False)
        (down, up, scale, ranks, _), (gate, phi, phi_bias, pool, pool_bias, _) = packed.experts, packed.gates
        down, up, phi = down.to(x.dtype), up.to(x.dtype), None if phi is None else phi.to(x.dtype)
        weights = [layer.weight for layer in layers]
        bias, backend = packed.bias, layers[0].backend
        y, _, _, _ = group_op(
            _as_samples(x),
            weights,
            bias,
            down,
            up,
            scale,
            ranks,
            gate,
            phi,
            phi_bias,
            pool,
            pool_bias,
            backend,
        )
        ys = _split(y.reshape(*x.shape[:-1], y.shape[-1]), parts)
        own = ys[seat]
        ys[seat] = None
        self.traced = [x, ys]
        return own


class Seat(NamedTuple):
    """What a layer knows of its group."""

    group: Group
    seat: int

    def take(self, layer: GatedLoRALinear, x: Tensor) -> Tensor | None:
        return self.group.take(self.seat, layer, x)


@dataclass
class Kept:
    """How operands stood (held), whether they share A, and their packed form once it was needed."""

    key: tuple[tuple[int, int], ...]
    made_of: list[Tensor]
    shared: bool
    packed: Packed | None = None

    def pack(self, parts: Sequence[Part]) -> Packed:
        if not self.made_of:
            return pack(parts, False)
        if self.packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self.packed = pack(parts, self.shared)
        return self.packed


class Pending:
    """Outputs made of x for layers that have not been called yet, and how x and the layers stood."""

    def __init__(self, x: Tensor, layers: Sequence[nn.Module], ys: list[Tensor | None]) -> None:
        self.x, self.version, self.mode = weakref.ref(x), x._version, _mode(x)
        self.ys, self.stood = ys, [_standing(layer) for layer in layers]

    def give(self, seat: int, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The output of one layer, once; None where anything is not as it was."""
        y = self.ys[seat]
        if (
            y is None
            or self.x() is not x
            or x._version != self.version
            or _mode(x) != self.mode
            or _standing(layer) != self.stood[seat]
        ):
            return None
        self.ys[seat] = None
        return y


def _standing(layer: nn.Module) -> tuple[object, ...]:
    tensors: list[Tensor] = []
    settings: list[object] = []
    collect_state(layer, tensors, settings)
    return (*settings, *[(id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors])


def _mode(x: Tensor) -> tuple[object, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(x.device.type)


def _seen_by_none(x: Tensor) -> bool:
    return (
        type(x) in PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def _stands_aside(layers: Sequence[GatedLoRALinear]) -> str | None:
    for layer in layers:
        if type(layer) is not GatedLoRALinear:
            return "a layer holds experts no longer"
        if not layer.experts_on:
            return "the experts are off"
        if layer.tokens_group is not None:
            return "its tokens are split over ranks"
        if type(layer.weight) not in PLAIN:
            return f"a weight is stored as {type(layer.weight).__name__}"
        if layer.weight.requires_grad:
            return "a base weight wants a gradient"
        if layer.backend != layers[0].backend:
            return "its layers are to use different backends"
        if has_offload_hook(layer) or spread.offloaded(layer.experts):
            return "offload hooks move its tensors"
    return None


def _trusts(module: nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    return type(module if processor is None else processor).__module__.startswith(TRUSTED)


def _wants_gradient(parts: Sequence[Part], x: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return (x is not None and x.requires_grad) or any(
        t.requires_grad for part in parts for t in part.tensors()
    )


def _split(y: Tensor, parts: Sequence[Part]) -> list[Tensor | None]:
    ys: list[Tensor | None] = []
    start = 0
    for part in parts:
        ys.append(y.narrow(-1, start, part.N))
        start += part.N
    return ys


def _note(
    layers: Sequence[GatedLoRALinear], parts: Sequence[Part], token: Tensor | None, sample: Tensor | None
) -> None:
    """What the gates said, layer by layer."""
    start = 0
    for layer, part in zip(layers, parts):
        mine = slice(start, start := start + len(part.experts.ranks))
        given = None if part.gates.gate is None else part.gates.gate.detach()
        last = LastGates(
            None if token is None else token[..., mine], None if sample is None else sample[..., mine], given
        )
        object.__setattr__(layer, "last_gates", last)
