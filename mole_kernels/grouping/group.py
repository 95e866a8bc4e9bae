"""q, k and v as one product: the first layer that is called computes the outputs of all that share its
input.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mole_kernels.functional import as_samples, gated_lora_linear_with_gates
from mole_kernels.grouping import weights as group_weights
from mole_kernels.grouping.compiled import CompiledOutputs, all_trusted, compiled_output
from mole_kernels.grouping.operands import (
    LayerOperands,
    PackedOperands,
    has_equal_down,
    operands_of_layer,
    pack_operands,
    problem_of_group,
    reason_against_packing,
    split_output,
    wants_gradient,
)
from mole_kernels.grouping.pending import CallState, PendingOutputs, call_state
from mole_kernels.grouping.reasons import reason_against_layers, reason_against_one_product
from mole_kernels.layers.fingerprint import layout_of
from mole_kernels.layers.linear import GatedLoRALinear, LastGates
from mole_kernels.ops.direct import unobserved
from mole_kernels.ops.group import beside
from mole_kernels.tally import count, totals

# weights that are moved again and again are not laid side by side for ever
MOST_MOVES = 8
# so many forwards whose layers were called with different inputs are forgiven
FORGIVEN = 3
# two threads that lay the same weights would each lay some of them
_laying = threading.Lock()

COMPUTED, SHARED, WASTED, MOVED = "computed", "shared", "wasted", "moved"


class Group:
    """Layers with one input; the first that is called in a forward of their owner computes the outputs of
    all.

    An output is handed out only within that forward and thread, for the very tensor (object and version) that
    it was made of, and while all that it depends on stands as it stood; everything else is computed by the
    layer itself.

    Args:
        owner: The module whose forward calls the layers, or None for an empty group.
        layers: The layers, in the order of their rows.
        processors: Modules that must be known to leave their input alone, where a compiled graph cannot see
        it.
        always: Compute as a group whatever it costs (for tests and measurements).
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
        # of each thread inside a forward of the owner: outputs, or the reason why there are none
        self.open: dict[int, PendingOutputs | str | None] = {}
        self.compiled: CompiledOutputs | None = None
        self.trusted = False
        self.packing: CachedPacking | None = None
        self.counts: Counter[str] = Counter()
        self.apart: Counter[str] = Counter()
        self.hooks: list[Any] = []
        if owner is not None:
            self.hooks = [
                owner.register_forward_pre_hook(self.begin),
                owner.register_forward_hook(self.end, always_call=True),
            ]
        for place, layer in enumerate(self.layers):
            layer.group = GroupMember(self, place)

    def remove(self) -> None:
        """Leave layers and weights as they were before, each weight in memory of its own."""
        group_weights.take_apart([layer.weight for layer in self.layers])
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            layer.__dict__.pop("group", None)
        self.layers, self.weights, self.hooks, self.packing = [], [], [], None
        self.open.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the model computes layer by layer: the group belongs to this one
        return Group, (None, (), (), False)

    # -- the owner's forward

    def begin(self, *_: Any) -> None:
        """Before a forward of the owner."""
        if torch.compiler.is_compiling():
            self.compiled = None
            self.trusted = bool(self.layers) and (self.always or all_trusted(self.processors))
        elif self.layers:
            # a forward inside a forward ends the outer one's outputs
            self._finish(self.open.get(threading.get_ident()))
            self.open[threading.get_ident()] = None

    def end(self, *_: Any) -> None:
        """After a forward of the owner, and after an exception in it."""
        if torch.compiler.is_compiling():
            self.compiled, self.trusted = None, False
            return
        self._finish(self.open.pop(threading.get_ident(), None))

    # -- a layer's forward

    def take(self, place: int, layer: GatedLoRALinear, x: Tensor) -> Tensor | None:
        """The output of one layer for x [..., K], or None if the layer is to compute it."""
        if torch.compiler.is_compiling():
            return compiled_output(self, place, x)
        thread = threading.get_ident()
        # the second: a replica of the layer, which has kept its attributes
        if thread not in self.open or self.layers[place] is not layer:
            return None
        outputs = self.open[thread]
        if isinstance(outputs, str):
            return None
        if outputs is not None:
            y = outputs.hand_out(place, layer, x)
            if y is not None:
                return y
            self._finish(outputs)
            self.open[thread] = None
        outputs = self._compute(x)
        self.open[thread] = outputs
        if isinstance(outputs, str):
            # for the rest of this forward
            count(outputs, self.apart)
            return None
        return outputs.hand_out(place, layer, x)

    def _finish(self, outputs: PendingOutputs | str | None) -> None:
        if isinstance(outputs, PendingOutputs):
            count(COMPUTED if outputs.all_handed_out() else WASTED, self.counts)

    def _compute(self, x: Tensor) -> PendingOutputs | str:
        """The outputs of all layers, or the reason why each is to compute its own."""
        layers = self.layers
        if reason := self._reason_against(x):
            return reason
        # before anything is read: what another thread writes meanwhile must show
        state = call_state(x, layers)
        if state is None:
            return "a tensor of its layers was made under inference_mode and counts no versions"
        operands = [operands_of_layer(layer) for layer in layers]
        if reason := reason_against_packing(operands):
            return reason
        packing = self._packing(operands, x)
        if not self.always:
            whole = problem_of_group(as_samples(x), operands, packing.shared)
            split = tuple([(part.N, part.experts.ranks) for part in operands])
            if reason := reason_against_one_product(
                whole, split, x.device.index, wants_gradient(operands, x)
            ):
                return reason
        weights = [layer.weight for layer in layers]
        weight = beside(weights)
        if weight is None:
            # once they lie side by side, all is read again: their addresses are part of the state
            return self._lay(weights, x) or self._compute(x)
        return self._product(x, weight, operands, packing, state)

    def _product(
        self,
        x: Tensor,
        weight: Tensor,
        operands: list[LayerOperands],
        packing: CachedPacking,
        state: CallState,
    ) -> PendingOutputs:
        packed = packing.pack(operands)
        y, token_gate, sample_gate = gated_lora_linear_with_gates(
            x, weight, packed.bias, packed.experts, packed.gates, backend=self.layers[0].backend
        )
        _note_gates(self.layers, operands, token_gate, sample_gate)
        if packing.shared:
            count(SHARED, self.counts)
        return PendingOutputs(state, split_output(y, operands))

    def _reason_against(self, x: Tensor) -> str | None:
        """Why this forward's layers compute by themselves, or None."""
        counts = totals(self.counts)
        if counts.get(WASTED, 0) > max(FORGIVEN, counts.get(COMPUTED, 0)):
            return "its layers are not called with one input"
        if not unobserved((x,), ignore_profiler=True):
            return "a tracer, tensor mode or tensor subclass observes the call"
        if x.is_inference():
            return "an input made under inference_mode counts no versions"
        return reason_against_layers(self.layers)

    def _lay(self, weights: list[Tensor], x: Tensor) -> str | None:
        """Move the weights side by side; the reason if they stay where they are."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "its weights do not lie side by side, and a CUDA graph is being captured"
        if totals(self.counts).get(MOVED, 0) >= MOST_MOVES:
            return f"its weights were moved {MOST_MOVES} times"
        if any(now is not then for now, then in zip(weights, self.weights)):
            return "its weights are other Parameters than those that were grouped"
        if reason := group_weights.reason_against_moving(weights):
            return reason
        count(MOVED, self.counts)
        with _laying:
            group_weights.lay_side_by_side(weights)
        return None

    def _packing(self, operands: list[LayerOperands], x: Tensor) -> CachedPacking:
        """The packing of these operands; begun anew if one of them was written to."""
        tensors = [tensor for part in operands for tensor in part.tensors()]
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or any(t.is_inference() for t in tensors) or wants_gradient(operands, None):
            # in a captured graph, values may be others when it is run again
            return CachedPacking((), [], False)
        key = tuple([(t.data_ptr(), t._version, layout_of(t)) for t in tensors])
        packing = self.packing
        if packing is None or packing.key != key:
            # their memory is held, so that nothing else comes to lie there
            packing = CachedPacking(key, [t.detach() for t in tensors], has_equal_down(operands))
            self.packing = packing
        return packing


class GroupMember(NamedTuple):
    """What a layer knows of its group."""

    group: Group
    place: int

    def take(self, layer: GatedLoRALinear, x: Tensor) -> Tensor | None:
        """The layer's output for x, or None if the layer is to compute it."""
        return self.group.take(self.place, layer, x)


@dataclass
class CachedPacking:
    """How operands stood (held), whether they share A, and their packed form once it was needed."""

    key: tuple[tuple[object, ...], ...]
    held: list[Tensor]
    shared: bool
    packed: PackedOperands | None = None

    def pack(self, operands: Sequence[LayerOperands]) -> PackedOperands:
        """The operands of the one call."""
        if not self.held:
            return pack_operands(operands, False)
        if self.packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self.packed = pack_operands(operands, self.shared)
        return self.packed


def _note_gates(
    layers: Sequence[GatedLoRALinear],
    operands: Sequence[LayerOperands],
    token_gate: Tensor | None,
    sample_gate: Tensor | None,
) -> None:
    """Give each layer its share of the gates' values."""
    start = 0
    for layer, part in zip(layers, operands):
        mine = slice(start, start := start + len(part.experts.ranks))
        given_gate = None if part.gates.gate is None else part.gates.gate.detach()
        last = LastGates(
            None if token_gate is None else token_gate[..., mine],
            None if sample_gate is None else sample_gate[..., mine],
            given_gate,
        )
        object.__setattr__(layer, "last_gates", last)
