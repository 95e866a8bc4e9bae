"""Gates for the patched layers: rows picked from a file by expert name, or fresh ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, printable
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import ConstantGate, Gate, MoLEGate
from mole_kernels.gates.softmax import SoftmaxGate
from mole_kernels.io.gates import GateFile, GateTensors
from mole_kernels.modules.names import Names, few
from mole_kernels.modules.scan import sizes

if TYPE_CHECKING:
    from mole_kernels.patching.plan import PlannedLayer
    from mole_kernels.patching.sources import GateMaker


@dataclass
class GateMatch:
    """Which of a gate file's layers meet which patched layer.

    layers     path -> the file's tensors, all the file's experts in them
    unmatched  the file's layers that no patched layer has
    missing    patched layers that the file lacks
    extra      experts of the file that are not among the patched ones
    """

    layers: dict[str, GateTensors] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def reason_against_match(self) -> str:
        parts = []
        if self.unmatched:
            parts.append(f"{len(self.unmatched)} of its layers are not patched: {few(self.unmatched)}")
        if self.missing:
            parts.append(f"{len(self.missing)} patched layers have no gates in it: {few(self.missing)}")
        if self.extra:
            parts.append(f"it gates experts that are not given: {few(self.extra)}")
        return "; ".join(parts)


def match_gates(
    file: GateFile, names: Names, layers: Mapping[str, PlannedLayer], experts: Sequence[str], where: str
) -> GateMatch:
    """Lay a gate file over the patched layers. Raises where an expert has no row or a tensor does not fit its
    layer.
    """
    known = list(file.expert_names)
    absent = [name for name in experts if name not in known]
    if absent:
        raise MoleKeyError(
            where,
            expected=f"gates for the experts {', '.join(experts)}",
            got=f"gates for {few(known, 8) or 'none'}",
            hint="gates find their experts by name: name the experts as the gates file does",
        )
    match = GateMatch(extra=[name for name in known if name not in experts])
    for key, tensors in file.layers.items():
        path = names.find(key)
        if path is None or path not in layers:
            match.unmatched.append(key)
        elif path in match.layers:
            raise MoleKeyError(where, f"two of its layers name {path}, the second is {printable(key)}")
        else:
            _check_shapes(tensors, layers[path], len(known), f"{where}, {printable(key)}")
            match.layers[path] = tensors
    match.missing = [path for path in layers if path not in match.layers]
    return match


def make_gate(
    spec: GateFile | GateMaker | str | None,
    layer: PlannedLayer,
    tensors: GateTensors | None,
    experts: LayerExperts,
) -> Gate | None:
    """The gate module of one layer, on the experts' device."""
    N, K = sizes(layer.module)
    E, device = len(experts.names), experts.down.device
    # what trains is kept in float32 even where the layer is half precision
    dtype = torch.float64 if experts.down.dtype == torch.float64 else torch.float32
    if spec is None:
        return None
    if isinstance(spec, GateFile):
        rows = [list(spec.expert_names).index(name) for name in experts.names]
        return (
            None if tensors is None else _from_tensors(tensors, rows, N, K, experts.down.dtype, dtype, device)
        )
    if spec == "constant":
        return ConstantGate(E, learned=True, device=device)
    if isinstance(spec, str) and spec.startswith(("softmax", "top-")):
        # one expert alone has a softmax of 1: a gate that says nothing
        top_k = None if spec == "softmax" else min(int(spec.removeprefix("top-")), E)
        return SoftmaxGate(K, E, top_k=top_k, device=device, dtype=dtype)
    if isinstance(spec, str):
        return MoLEGate(K, N, E, local=spec != "global", pooled=spec != "local", device=device, dtype=dtype)
    gate = spec(layer.path, layer.module, experts)
    if gate is not None and not isinstance(gate, Gate):
        raise MoleTypeError(
            f"gates for {layer.path}", expected="a Gate or None from the callable", got=type(gate).__name__
        )
    return gate


def _from_tensors(
    tensors: GateTensors,
    rows: list[int],
    N: int,
    K: int,
    layer_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> MoLEGate:
    # made on meta: its random start would only be thrown away
    gate = MoLEGate(
        K, N, len(rows), local=tensors.phi is not None, pooled=tensors.head is not None, device="meta"
    )
    for name in ("phi", "phi_bias", "head", "head_bias"):
        tensor: Tensor | None = getattr(tensors, name)
        if tensor is None:
            continue
        # phi meets x in one product, so it comes in the layer's dtype; the others stay wide
        to = layer_dtype if name == "phi" else dtype
        setattr(
            gate, name, nn.Parameter(tensor.detach()[rows].to(device=device, dtype=to), requires_grad=False)
        )
    return gate


def _check_shapes(tensors: GateTensors, layer: PlannedLayer, E: int, where: str) -> None:
    N, K = sizes(layer.module)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "phi": ("[E,K]", (E, K)),
        "phi_bias": ("[E]", (E,)),
        "head": ("[E,N]", (E, N)),
        "head_bias": ("[E]", (E,)),
    }
    for name, (letters, shape) in expected.items():
        tensor: Tensor | None = getattr(tensors, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise MoleShapeError(
                where,
                expected=f"{name} {letters} = {list(shape)} for layer {layer.path}",
                got=tuple(tensor.shape),
                hint="these gates belong to another model or another number of experts",
            )
