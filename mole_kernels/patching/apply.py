"""A plan carried out: everything allocated first, then swapped in as one step that can be taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mole_kernels.backends.select import BACKENDS
from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.block import BlockGate
from mole_kernels.gates.gate import Gate
from mole_kernels.layers.attach import attach, reason_against_attaching
from mole_kernels.modules.forward_lock import ForwardLock
from mole_kernels.modules.group_offload import in_groups, regroup
from mole_kernels.modules.scan import roots
from mole_kernels.modules.snapshot import Before
from mole_kernels.patching import block_ranks, guards
from mole_kernels.patching.block_scales import Scale, check_scales
from mole_kernels.patching.gates import make_gate
from mole_kernels.patching.handle import Handle
from mole_kernels.patching.handles import keep
from mole_kernels.patching.pack import pack
from mole_kernels.patching.patched import Patched
from mole_kernels.patching.plan import Plan, PlannedLayer, Targets, plan


def patch(
    model: object,
    experts: Any,
    gates: object = None,
    *,
    strict: bool = True,
    targets: Targets | None = None,
    scales: Mapping[str, Scale] | None = None,
    backend: str = "auto",
    allow_large_rank: bool = False,
    cache_text: bool = False,
    group: bool = False,
) -> Handle:
    """Put experts and gates onto the layers they name, all or nothing.

    The base weights of patched layers are frozen until `Handle.remove`, which restores the model bit for
    bit. Experts and the gates of a file are frozen, in the layer's dtype and on its device. Fresh gates are
    trainable, in float32.

    Args:
        model: An nn.Module or a diffusers pipeline.
        experts: {name: file, tensors or Expert}, an ExpertBank, or the path of a file from `Handle.save`.
        gates: None (no gates, or those inside the file from `Handle.save`); the path of a gates file or a
            GateFile; a word for fresh gates: "mole", "local", "global", "constant", "softmax", "top-1" or
            "top-2" (see `plan`); or a callable (path, module, experts) -> Gate or None.
        strict: Whether a key that matches no layer is an error. If False it is a MoleWarning. An expert
            none of whose keys match is always an error.
        targets: Patch only these layers: paths or their endings ("attn2.to_k"), a mapping by path, or a
            callable (path, module) -> bool. None: every layer that an expert has.
        scales: {expert: scale to start with}, 1 for the others; see `Handle.set_scales`.
        backend: "auto", or the one backend that every patched layer uses.
        allow_large_rank: Whether ranks above min(K, N) of a layer are accepted.
        cache_text: Whether keys and values of cross-attention are computed once per text.
        group: Whether projections of one tensor (q, k, v) become one product where that is exact and faster.

    Returns:
        The handle: scales, swap, fold, gate maps, save, remove. `with patch(…):` removes at the end.

    Raises:
        MoleError: Nothing has changed. MoleFileError: a file cannot be read. MoleKeyError: a name matches
            nothing. MoleShapeError: a tensor does not fit its layer. MoleTypeError, MoleValueError: an
            argument is of the wrong kind. MoleStateError: a layer is already patched.

    Example:
        handle = mk.patch(pipe, {"face": "face.safetensors"}, scales={"face": 0.8})
    """
    handle = None
    try:
        handle = apply(
            plan(model, experts, gates, strict=strict, targets=targets, allow_large_rank=allow_large_rank),
            scales=scales,
            backend=backend,
        )
        if group:
            handle.group()
        if cache_text:
            handle.cache_text()
        return handle
    # all or nothing: no half of what was asked for, and no patch whose handle nobody has
    except BaseException:
        if handle is not None:
            handle.remove()
        raise


def apply(
    planned: Plan,
    *,
    scales: Mapping[str, Scale] | None = None,
    backend: str = "auto",
    packed: Mapping[str, LayerExperts] | None = None,
) -> Handle:
    """Carry out a plan. Whatever is raised on the way, Ctrl-C and a full memory included, the model is as it
    was.

    packed  path -> the experts of each planned layer, where they are not to be packed from its factors
    """
    if backend != "auto" and backend not in BACKENDS:
        raise MoleValueError("backend", expected=f"'auto' or one of {', '.join(BACKENDS)}", got=repr(backend))
    check_scales(scales or {}, planned.names)
    for path, layer in planned.layers.items():
        if reason := reason_against_attaching(layer.module):
            raise MoleStateError(f"patch, layer {path}", f"it has changed since it was planned: {reason}")
    served = packed is not None
    # a model patched under inference_mode must still be trainable afterwards
    with torch.inference_mode(False), torch.no_grad():
        if packed is None:
            packed = {path: pack(path, layer.factors, layer.module) for path, layer in planned.layers.items()}
        made_gates = {
            path: make_gate(planned.gates, layer, layer.gates, packed[path])
            for path, layer in planned.layers.items()
        }
    patched = [_record(layer, packed[path], made_gates[path]) for path, layer in planned.layers.items()]
    places = guards.guarded(
        roots(planned.model),
        {path: layer.parent for path, layer in planned.layers.items() if layer.parent is not None},
    )
    parts = _used_roots(planned)
    regrouped = in_groups(parts)
    # a block's router keeps what it said of the batch for the layers of the block
    lock = ForwardLock(one_at_a_time=any(isinstance(entry.gate, BlockGate) for entry in patched))
    before = Before([*(p.module for p in patched), *(module for module, _, _ in places), *parts])
    try:
        for entry in patched:
            for name in entry.flags:
                entry.module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
            attach(entry.module, entry.experts, entry.gate, backend)
        block_ranks.mark({entry.path: entry.module for entry in patched})
        block_ranks.pad(block_ranks.compiled(module for module, _, _ in places))
        guards.install(places)
        lock.watch(parts)
        handle = Handle(patched, planned, places, parts, lock)
        handle.set_scales(scales or {})
        regroup(regrouped)
        # a served model is taken off by what serves it
        if not served:
            keep(handle, parts)
        return handle
    # Ctrl-C and running out of memory must not leave half a patch either
    except BaseException:
        before.restore()
        raise


def _used_roots(planned: Plan) -> list[nn.Module]:
    """The module, or those components of the pipeline that hold a planned layer."""
    parts = roots(planned.model)
    return [
        root
        for name, root in parts.items()
        if not name or any(f"{path}.".startswith(f"{name}.") for path in planned.layers)
    ]


def _record(layer: PlannedLayer, experts: LayerExperts, gate: Gate | None) -> Patched:
    flags = {name: p.requires_grad for name, p in layer.module._parameters.items() if p is not None}
    ranks = dict(zip(experts.names, experts.ranks))
    return Patched(layer.path, layer.module, experts, gate, flags, ranks)
