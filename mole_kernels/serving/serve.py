"""`serve`: a pipeline whose every prompt names the expert it wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.layers import spread
from mole_kernels.layers.conv import conv_of
from mole_kernels.modules.group_offload import in_groups, regroup
from mole_kernels.modules.scan import roots, sizes
from mole_kernels.modules.snapshot import all_or_nothing
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from mole_kernels.patching.plan import Targets, plan
from mole_kernels.patching.sources import Source, read_expert
from mole_kernels.patching.swap import match_held
from mole_kernels.serving.layout import Layout
from mole_kernels.serving.pool import Pool, Stats
from mole_kernels.serving.route import Route

IDENTITY = "identity"


def serve(
    model: object,
    identities: Mapping[str, Source],
    *,
    capacity: int | None = None,
    rank: int | None = None,
    targets: Targets | None = None,
    evict: bool = True,
    backend: str = "auto",
) -> Served:
    """Patch a model so that every sample of a batch has its own expert, or none; all or nothing, and
    `Served.remove` takes it off.

        served = mk.serve(pipe, {"anna": "anna.safetensors", "ben": "ben.safetensors"}, capacity=8)
        with served.assign(["anna", "ben", None]):
            images = pipe(["a portrait of anna", "ben on a bike", "a tree"]).images

    model       an nn.Module or a diffusers pipeline
    identities  {name: path | tensors | Expert}; at least one, whose layers (all of them together) are those
                that can be adapted
    capacity    identities on the device at a time; the others wait on the host. Default: as many as are given
    rank        the pool's rank, that of the largest identity by default; smaller ones are padded with zeros
    targets     as in `patch`
    evict       whether a full pool pushes out the least recently used identity, or refuses

    Every identity is stored once; samples that share one read the same memory. An assignment is a tensor:
    changing it recompiles nothing.
    The errors are those of `plan`; MoleValueError where there are no identities.
    """
    experts = {name: read_expert(name, source, model) for name, source in identities.items()}
    if not experts:
        raise MoleValueError(
            "serve", expected="at least one identity", got="none", hint='{"anna": "anna.safetensors"}'
        )
    made = plan(model, experts, targets=targets)
    largest = max(f.rank for layer in made.layers.values() for f in layer.factors.values())
    union = {path: _zeros(layer.module) for path, layer in made.layers.items()}
    handle = patch(model, {IDENTITY: Expert(union, source="serve")}, targets=targets, backend=backend)
    try:
        return Served(handle, experts, capacity or len(experts), largest if rank is None else rank, evict)
    # a wrong rank or capacity, a full memory, Ctrl-C: the model must be as it was
    except BaseException:
        handle.remove()
        raise


def _zeros(module: nn.Module) -> LowRank:
    N, K = sizes(module)
    return LowRank(torch.zeros(1, K), torch.zeros(N, 1), conv=conv_of(module))


class Served:
    """What `serve` returns: identities to add and drop, batches to assign. Also a context manager that
    removes it all at its end.
    """

    def __init__(
        self, handle: Handle, experts: Mapping[str, Expert], capacity: int, rank: int, evict: bool
    ) -> None:
        self._handle = handle
        # layers read the assignment of the one batch that runs
        handle._turns.one_at_a_time = True
        layers = handle.layers
        self._layout = Layout.of({path: sizes(module) for path, module in layers.items()}, rank)
        first = self._experts(next(iter(layers)))
        self._pool = Pool(capacity, self._layout.size, first.down.dtype, first.down.device, evict=evict)
        self._routes = self._make_routes()
        try:
            self._place()
            for name, expert in experts.items():
                self.add(name, expert)
            self._route_to([], None)
        except BaseException:
            self._unroute()
            raise

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handle.active:
            self.remove()

    def __repr__(self) -> str:
        pool, where = self._pool, f"{self.nbytes / 1e6:.1f} MB on {self._pool.sets.device}"
        return f"Served({len(pool.names)} identities, {len(pool.resident)} of {pool.capacity} sets in use, {where})"

    # -- what is there
    # --------------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Every identity, on the device or not."""
        return self._pool.names

    @property
    def resident(self) -> tuple[str, ...]:
        """The identities on the device, the least recently used first."""
        return self._pool.resident

    @property
    def stats(self) -> Stats:
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
    def layout(self) -> Layout:
        """Where every layer's factors lie in an identity's vector."""
        return self._layout

    # -- identities
    # -----------------------------------------------------------------------------------------------------------------

    def add(self, name: str, source: Source) -> None:
        """Take an identity, or replace one (from the next `assign` on); a key that meets no layer is an error
        and changes nothing.
        """
        self._check_active("add")
        expert = read_expert(name, source, self._handle.model)
        held = list(self._handle._patched.values())
        factors = match_held(held, self._handle._plan, name, expert, strict=True)
        vector = self._pool.empty_vector()
        self._layout.flatten(name, factors, vector)
        with self._handle.change():
            self._pool.add(name, vector)

    def drop(self, name: str) -> None:
        """Forget an identity; samples that are still assigned to it read whatever comes into its place, so
        assign anew.
        """
        self._check_active("drop")
        with self._handle.change():
            self._pool.drop(name)
            self._route_to([], None)

    # -- batches
    # --------------------------------------------------------------------------------------------------------------------

    def assign(self, names: Sequence[str | None], *, parts: int | None = None) -> _Assigned:
        """Each prompt's identity, or None for the bare base, from now on; `with served.assign(…):` ends with
        none for all.

        parts  how often the pipeline lays its batch behind itself: found out by itself for classifier-free
               guidance (2)
        Pictures per prompt and guidance are followed by themselves; a batch of another size is an error
        before anything is drawn.
        Raises MoleKeyError for an unknown identity, MoleStateError where the pool has no room; nothing
        changes then.
        """
        self._check_active("assign")
        if isinstance(names, str):
            raise MoleValueError(
                "assign", expected="one name, or None, for each prompt in a list", got=repr(names)
            )
        with self._handle.change():
            self._place()
            self._route_to(self._pool.take(list(names)), parts)
        return _Assigned(self)

    def prefetch(self, names: Sequence[str | None]) -> None:
        """Start bringing identities to the device for a batch to come; those of the current batch stay, and
        what finds no room waits.
        """
        self._check_active("prefetch")
        with self._handle.change():
            self._place()
            self._pool.prefetch(names)

    def remove(self) -> None:
        """Take everything off: the model is bit for bit as before."""
        self._check_active("remove")
        with self._handle.change():
            self._handle.remove()
            self._unroute()

    # -- inside
    # ---------------------------------------------------------------------------------------------------------------------

    def _experts(self, path: str) -> LayerExperts:
        return self._handle._patched[path].experts

    def _make_routes(self) -> dict[str, Route]:
        model = self._handle.model
        parts = roots(model)
        pipeline = None if isinstance(model, nn.Module) else model
        used = {
            name
            for name in parts
            if name == "" or any(path.startswith(f"{name}.") for path in self._handle.layers)
        }
        return {name: Route(name or "model", parts[name], pipeline) for name in parts if name in used}

    def _place(self) -> None:
        """The layers' factors are views of the pool; made anew where `.to()` or a hook has given the layers
        tensors of their own.
        """
        pool = self._pool
        for path in self._handle.layers:
            # a hook would bring the whole pool with every call
            spread.stay(self._experts(path))
        first = self._experts(next(iter(self._handle.layers))).down
        if first.untyped_storage().data_ptr() == pool.sets.untyped_storage().data_ptr():
            return
        if first.device != pool.sets.device:
            pool.place(first.device)
        with (
            all_or_nothing([self._experts(path) for path in self._handle.layers]),
            torch.inference_mode(False),
        ):
            for path in self._handle.layers:
                experts = self._experts(path)
                down, up = self._layout.views(pool.sets, path)
                experts.ranks = (self._layout.rank,)
                experts.down, experts.up = (
                    nn.Parameter(down, requires_grad=False),
                    nn.Parameter(up, requires_grad=False),
                )
                experts.route = next(
                    route for name, route in self._routes.items() if name == "" or path.startswith(f"{name}.")
                )
        regroup(in_groups(self._handle._roots))

    def _route_to(self, sets: list[int], parts: int | None) -> None:
        """With no sets at all the layers are switched off: the base at its own speed, bit for bit."""
        with self._handle.change():
            if sets:
                self._handle.enable()
            else:
                self._handle.disable()
            for route in self._routes.values():
                route.assign(sets, parts)

    def _unroute(self) -> None:
        for route in self._routes.values():
            route.remove()

    def _check_active(self, what: str) -> None:
        if not self._handle.active:
            raise MoleStateError(
                f"Served.{what}", "this was removed already", hint="mole_kernels.serve makes a new one"
            )


class _Assigned:
    """What `assign` returns: nothing to do with it, or `with` it to end with no identity for anyone."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def __enter__(self) -> Served:
        return self._served

    def __exit__(self, *exc: object) -> None:
        self._served._route_to([], None)
