"""`serve`: a pipeline whose every prompt names the adapter it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.layers import offload
from mole_kernels.modules.group_offload import in_groups, regroup
from mole_kernels.modules.scan import roots, sizes
from mole_kernels.modules.snapshot import all_or_nothing
from mole_kernels.patching.apply import apply
from mole_kernels.patching.block_scales import Scale
from mole_kernels.patching.families import OnBase
from mole_kernels.patching.handle import Handle
from mole_kernels.patching.patched import Patched
from mole_kernels.patching.plan import Plan, Targets, plan
from mole_kernels.patching.sources import Source
from mole_kernels.patching.swap import match_held
from mole_kernels.serving.adapters import at_strength, servable
from mole_kernels.serving.assignment import Assignment, AssignmentScope, CallerStacks
from mole_kernels.serving.layout import AdapterLayout
from mole_kernels.serving.pool import AdapterPool, Lease, PoolStats, StoredAdapter
from mole_kernels.serving.route import ComponentRoute
from mole_kernels.serving.strength import Strengths

# the one expert of every served layer: the set that a sample takes
ADAPTER = "adapter"


def serve(
    model: object,
    adapters: Mapping[str, Source],
    *,
    capacity: int | None = None,
    rank: int | None = None,
    targets: Targets | None = None,
    evict: bool = True,
    backend: str = "auto",
) -> Served:
    """Give every sample of a batch its own adapter, or none. In-process: this starts no server.

    The layers that any of the adapters has are patched, all or nothing, and read their factors from a pool on
    the device. Each adapter is stored once; samples that share one read the same memory. Changing an
    assignment recompiles nothing. See docs/serving.md for lifetimes, threads and guidance.

    Args:
        model: An nn.Module or a diffusers pipeline.
        adapters: {name: path, tensors or Expert}, at least one. The layers of all of them together are those
            that can be adapted.
        capacity: Number of adapters on the device at a time; the others wait on the host. Default: as many as
            are given.
        rank: Rank of the pool; smaller adapters are padded with zeros. Default: the largest rank given.
        targets: Restrict the layers, as in `patch`.
        evict: Whether a full pool pushes out the least recently used adapter, or refuses.
        backend: "auto", or the backend of every patched layer.

    Returns:
        The served model. `Served.remove` restores it bit for bit.

    Raises:
        MoleValueError: No adapters, or a capacity below 1.
        MoleKeyError, MoleShapeError, MoleTypeError, MoleStateError, MoleFileError: As in `plan`.

    Example:
        >>> served = mk.serve(pipe, {"anna": "anna.safetensors", "ben": "ben.safetensors"}, capacity=8)
        >>> with served.assign(["anna", "ben", None]):
        ...     images = pipe(["a portrait of anna", "ben on a bike", "a tree"]).images
    """
    if not isinstance(adapters, Mapping):
        raise MoleTypeError("serve", expected="{name: path, tensors or Expert}", got=type(adapters).__name__)
    experts = {name: servable(name, source, model) for name, source in adapters.items()}
    if not experts:
        raise MoleValueError("serve", expected='adapters: {"anna": "anna.safetensors"}', got="none")
    layers = plan(model, experts, targets=targets)
    largest = max(f.rank for layer in layers.layers.values() for f in layer.factors.values())
    return Served(
        layers,
        capacity=capacity if capacity is not None else len(experts),
        rank=largest if rank is None else rank,
        evict=evict,
        backend=backend,
    )


class Served:
    """A model under `serve`: adapters to add and drop, batches to assign.

    Any thread and any asyncio task may call any method, and run the model under an assignment of its own. As
    a context manager it removes everything at the end of the block.
    """

    def __init__(
        self,
        layers: Plan,
        *,
        capacity: int,
        rank: int,
        evict: bool,
        backend: str,
    ) -> None:
        if rank < 1:
            raise MoleValueError("serve", expected="rank >= 1", got=rank)
        modules = {path: layer.module for path, layer in layers.layers.items()}
        self._plan = layers
        self._layout = AdapterLayout.of({path: sizes(module) for path, module in modules.items()}, rank)
        dtype, device = offload.compute_dtype(next(iter(modules.values()))), _device(layers)
        self._pool = AdapterPool(capacity, self._layout.size, dtype, device, evict=evict)
        self._stacks = CallerStacks()
        # adapters whose ΔW is no multiple of their scale
        self._fixed: set[str] = set()
        self._strengths = Strengths(layers.model, self._layout)
        self._experts = {path: self._views(path) for path in modules}
        for name in layers.names:
            held = {path: layer for path, layer in layers.layers.items() if name in layer.factors}
            self._store(name, {path: layer.factors[name] for path, layer in held.items()}, 1.0)
        shapes = replace(layers, names=(ADAPTER,), experts={}, unmatched={})
        self._handle: Handle = apply(shapes, packed=self._experts, backend=backend)
        self._routes: dict[str, ComponentRoute] = {}
        try:
            self._add_routes()
            # the caller that serves has no adapter until it assigns one
            self._stacks.leave(self._stacks.push(Assignment((), ()))[0])
        # Ctrl-C: the model must be as it was
        except BaseException:
            self._take_off()
            raise

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handle.active:
            self.remove()

    def __repr__(self) -> str:
        pool = self._pool
        used = f"{len(pool.resident)} of {pool.capacity} sets in use"
        return f"Served({len(pool.names)} adapters, {used}, {self.nbytes / 1e6:.1f} MB on {pool.sets.device})"

    def __reduce__(self) -> tuple[object, ...]:
        raise MoleStateError(
            "copy of a Served",
            "its pool and its callers belong to this process and this model",
            hint="remove(), copy the model, and serve each of the two",
        )

    # -- what is there

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, on the device or not."""
        return self._pool.names

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters on the device, the least recently used first."""
        return self._pool.resident

    @property
    def stats(self) -> PoolStats:
        """Hits, misses and evictions so far."""
        return self._pool.stats

    @property
    def layers(self) -> dict[str, nn.Module]:
        """path -> patched module."""
        return self._handle.layers

    @property
    def nbytes(self) -> int:
        """Bytes of the pool on the device."""
        return self._pool.sets.numel() * self._pool.sets.element_size()

    @property
    def layout(self) -> AdapterLayout:
        """Where every layer's factors lie in an adapter's vector."""
        return self._layout

    # -- adapters

    def add(self, name: str, source: Source, *, scale: Scale = 1.0) -> None:
        """Take an adapter, or replace one for every later `assign`.

        Assignments that have the old one keep computing with it.

        Args:
            name: The name to assign it by.
            source: Path, tensors or Expert.
            scale: A number, or numbers by component and block as in `Handle.set_scales`.

        Raises:
            MoleKeyError: A key of it matches no served layer; nothing has changed then, as with every error.
            MoleShapeError: Its rank is above the pool's, or a layer has another size.
        """
        self._check_active("add")
        expert = servable(name, source, self._handle.model)
        held = [Patched(path, m, self._experts[path], None, {}, {}) for path, m in self.layers.items()]
        self._store(name, match_held(held, self._plan, name, expert, strict=True), scale)

    def drop(self, name: str) -> None:
        """Forget an adapter: later assignments of it are refused, those that have it keep computing with it.

        Raises:
            MoleKeyError: There is no such adapter.
        """
        self._check_active("drop")
        self._pool.drop(name)

    # -- batches

    def assign(
        self,
        names: Sequence[str | None],
        *,
        parts: int | None = None,
        scales: Mapping[str, Scale] | None = None,
    ) -> AssignmentScope:
        """Name the adapter of each prompt, for this thread or asyncio task, until it assigns again.

        In a `with` statement it ends with the block, and what was assigned before holds again. Tasks, and
        calls through `asyncio.to_thread`, inherit the assignment they start under; plain threads do not.
        Guidance, perturbed copies and several pictures per prompt are read from the diffusers pipeline that
        runs; a batch whose order cannot be told is refused before anything is drawn.

        Args:
            names: One name for each prompt of the call, None for the base alone. One name for each picture is
                taken too. An empty list: the base for all.
            parts: How often the batch is laid behind itself, where no pipeline runs that tells it (2 for a
                loop of one's own with classifier-free guidance).
            scales: {name: scale} for this assignment only, as in `add`. Each takes a set of its own.

        Raises:
            MoleKeyError: An unknown adapter; the sample is named.
            MoleStateError: More adapters than the pool has room for, or a full pool that does not evict.
                Whatever is raised, the assignment before it holds.
        """
        self._check_active("assign")
        if isinstance(names, str):
            raise MoleValueError(
                "assign", expected="one name, or None, for each prompt in a list", got=repr(names)
            )
        if parts is not None and parts < 1:
            raise MoleValueError("assign", expected="parts >= 1", got=parts)
        for name, scale in (scales or {}).items():
            if name in self._fixed and scale != 1:
                raise MoleValueError(
                    "assign, scales",
                    f"ΔW of {name!r} is no multiple of its scale (DoRA, OFT)",
                    hint="add it under a name of its own with that scale",
                )
        adapters = self._strengths.scaled(self._pool.look_up(list(names)), scales or {})
        assignment = Assignment(tuple(names), adapters, parts)
        self._pool.admit(assignment, self._stacks.replaceable())
        return AssignmentScope(self, self._stacks, *self._stacks.push(assignment))

    def prefetch(self, names: Sequence[str | None]) -> None:
        """Start copying adapters that a later batch takes; on a GPU beside whatever runs.

        Sets that anything assigned has are left alone; what finds no room is copied when it is needed.

        Raises:
            MoleKeyError: An unknown adapter.
        """
        self._check_active("prefetch")
        self._pool.prefetch(self._pool.look_up(list(names)))

    def remove(self) -> None:
        """Take everything off, once the forwards that run have ended: the model is bit for bit as before.

        Raises:
            MoleStateError: Other threads or tasks have an assignment; their next step would draw the base.
        """
        self._check_active("remove")
        own = self._stacks.all()
        if others := [list(a.names) for a in self._pool.assigned if a not in own]:
            raise MoleStateError(
                "Served.remove",
                f"{len(others)} other callers have an assignment, one of them {others[0]}",
                hint="let them end first: leave their `with`, or assign([]) there",
            )
        with self._handle.change():
            self._take_off()
        for assignment in own:
            assignment.close()
        self._stacks.forget()

    # -- for the routes

    def assignment_of_caller(self) -> Assignment | None:
        """The assignment that a forward of this thread or task computes with; None for the base alone.

        Raises:
            MoleStateError: The caller has never assigned, while others have: it may not mean the base.
        """
        assignment = self._stacks.current()
        if assignment is None and self._pool.assigned:
            raise MoleStateError(
                "serve",
                "this thread has no assignment of its own, and another one has",
                hint="assign in the thread that runs the model ([] for the base alone), or hand the "
                "assignment over: asyncio.to_thread, or contextvars.copy_context().run",
            )
        return assignment if assignment is not None and any(assignment.adapters) else None

    def lease(self, adapters: Sequence[StoredAdapter | None]) -> Lease:
        """Hold the sets of these adapters for a forward."""
        return self._pool.lease(adapters)

    def keep_in_place(self, component: nn.Module) -> None:
        """The layers' factors are views of the pool; made anew where `.to()` gave them memory of their own.

        Args:
            component: The one whose forward begins.
        """
        if self._is_in_place(component):
            return
        with self._handle.change():
            # another thread may have done so while this one waited
            if not self._is_in_place(component):
                self._place(component)

    # -- inside

    def _views(self, path: str) -> LayerExperts:
        down, up = self._layout.views(self._pool.sets, path)
        with torch.inference_mode(False):
            scale = torch.ones(1, device=down.device)
            return LayerExperts(down, up, scale, (ADAPTER,), (self._layout.rank,))

    def _store(self, name: str, factors: Mapping[str, LowRank], scale: Scale) -> None:
        strengths = self._strengths.of(name, scale, factors)
        vector = self._pool.empty_vector()
        scaled = {path: at_strength(f, strengths[path]) for path, f in factors.items()}
        self._layout.flatten(name, scaled, vector)
        self._pool.add(name, vector)
        self._fixed.discard(name)
        if any(isinstance(f, OnBase) and f.at_strength is not None for f in factors.values()):
            self._fixed.add(name)

    def _is_in_place(self, component: nn.Module) -> bool:
        pool = self._pool.sets
        for route in self._routes.values():
            if route.module is component and offload.offloaded(route.first):
                return False
            if route.module is component and route.first.down.dtype == pool.dtype:
                return route.first.down.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
        return False

    def _place(self, component: nn.Module) -> None:
        for experts in self._experts.values():
            # a hook would bring the whole pool with every call
            offload.stay(experts)
        first = next(route.first for route in self._routes.values() if route.module is component).down
        if (first.device, first.dtype) != (self._pool.sets.device, self._pool.sets.dtype):
            self._pool.place(first.dtype, first.device)
        with all_or_nothing(list(self._experts.values())), torch.inference_mode(False):
            for path, experts in self._experts.items():
                down, up = self._layout.views(self._pool.sets, path)
                experts.down = nn.Parameter(down, requires_grad=False)
                experts.up = nn.Parameter(up, requires_grad=False)
        regroup(in_groups(route.module for route in self._routes.values()))

    def _add_routes(self) -> None:
        for name, root in roots(self._handle.model).items():
            paths = [path for path in self.layers if not name or path.startswith(f"{name}.")]
            if paths:
                route = ComponentRoute(name or "model", root, self, self._experts[paths[0]])
                self._routes[name] = route
                for path in paths:
                    self._experts[path].route = route

    def _take_off(self) -> None:
        self._handle.remove()
        for route in self._routes.values():
            route.remove()

    def _check_active(self, what: str) -> None:
        if not self._handle.active:
            raise MoleStateError(
                f"Served.{what}", "this was removed already", hint="mole_kernels.serve makes a new one"
            )


def _device(layers: Plan) -> torch.device:
    """Where the first layer computes."""
    module = next(iter(layers.layers.values())).module
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if not weight.is_meta:
        return weight.device
    factor = next(iter(next(iter(layers.layers.values())).factors.values()))
    return offload.execution_device(module) or factor.down.device
