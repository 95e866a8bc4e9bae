"""From the caller's assignment to the set of each sample, for one component and one forward at a time.

The sets of a running forward are the thread's: a forward runs in one thread from beginning to end, so that
any number of threads run one model, each with its own batch.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.serving.batching import Batch, SampleOrder, running_call, sample_order
from mole_kernels.serving.pool import Lease, StoredAdapter

if TYPE_CHECKING:
    from mole_kernels.serving.serve import Served

_OUTSIDE: Final = object()
# orders that are remembered, for the latents and embeddings need not be compared at every step
MOST_ORDERS = 64


class ComponentRoute:
    """What the layers of one component read: which set each sample of the running forward takes.

    Args:
        component: Name of the component, for messages.
        module: The component.
        served: Whose assignments it follows.
        first: The component's first layer, whose memory tells whether the component was moved.
    """

    def __init__(self, component: str, module: nn.Module, served: Served, first: LayerExperts) -> None:
        self.component, self.module, self.first = component, module, first
        self._served = served
        # rows of this thread's forward, and what its outer forwards had (a component may call itself)
        self._running = threading.local()
        self._orders: OrderedDict[tuple[object, ...], SampleOrder] = OrderedDict()
        parameters = list(inspect.signature(type(module).forward).parameters)
        self._first = parameters[1] if len(parameters) > 1 else ""
        _keep_hooks_out_of_graphs()
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def current(self) -> Tensor | None:
        """[B] int64, the set of each sample of this thread's forward, −1 for none; None for the base alone.

        Raises:
            MoleStateError: A layer is called outside of a forward of its component, under an assignment.
        """
        rows = getattr(self._running, "rows", _OUTSIDE)
        if rows is _OUTSIDE:
            self._check_outside()
            return None
        return rows  # type: ignore[no-any-return, return-value]

    def regrouped(self, samples: int) -> Tensor:
        """The sets of a layer that sees another number of samples than the forward has (perturbed attention).

        Raises:
            MoleShapeError: The samples take different sets, and are not whole parts of the batch.
        """
        rows: Tensor = self._running.rows
        if self._running.part == 1:
            return rows[:1].expand(samples).contiguous()
        # every part of the batch takes the same sets, so that some of the parts take those of the first ones
        if samples < len(rows) and samples % self._running.part == 0:
            return rows[:samples]
        raise MoleShapeError(
            f"serve, {self.component}",
            f"a layer sees {samples} samples in a forward of {len(rows)}, and cannot tell whose they are",
            hint="assign one adapter to every prompt of a call of this model",
        )

    def _check_outside(self) -> None:
        if self._served.assignment_of_caller() is not None:
            raise MoleStateError(
                f"serve, {self.component}",
                "a layer was called outside of a forward of its component, which alone knows the batch",
                hint=f"call the {type(self.module).__name__} itself, not a method or a part of it",
            )

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    # -- a forward

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        running = self._running
        outer: list[tuple[Any, int, Lease | None]] = getattr(running, "outer", [])
        before = (getattr(running, "rows", _OUTSIDE), getattr(running, "part", 1))
        outer.append((*before, None))
        running.outer = outer
        running.rows, lease = self._begin(self._batch_of(args, kwargs))
        outer[-1] = (*before, lease)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if outer := getattr(self._running, "outer", None):
            self._running.rows, self._running.part, lease = outer.pop()
            if lease is not None:
                lease.release()

    def _begin(self, batch: Batch) -> tuple[Tensor | None, Lease | None]:
        """The rows of a forward that begins, and the lease on the sets they name."""
        assignment = self._served.assignment_of_caller()
        if assignment is None:
            return None, None
        adapters, parts = assignment.adapters, assignment.parts
        # an error's traceback keeps these frames, and must not keep the assignment that ends with the error
        del assignment
        prompts, part = self._rows(adapters, parts, batch)
        self._served.keep_in_place(self.module)
        lease = self._served.lease(adapters)
        sets = [lease.index(adapters[p]) for p in prompts]
        device = batch.device if isinstance(batch, Tensor) else batch[0].device
        # the number of samples after which the sets repeat
        self._running.part = 1 if len(set(sets)) == 1 else part
        return self._tensor(sets, device), lease

    def _tensor(self, sets: list[int], device: torch.device) -> Tensor:
        """The rows as a tensor, the same one for as long as they stay the same."""
        last = getattr(self._running, "last", None)
        if last is None or last[0] != (sets, device):
            with torch.inference_mode(False):
                last = self._running.last = ((sets, device), torch.tensor(sets, device=device))
        return last[1]

    def _rows(
        self, adapters: Sequence[StoredAdapter | None], parts: int | None, batch: Batch
    ) -> tuple[list[int], int]:
        """The prompt of each sample, and how many samples a part of the batch has."""
        B, P = len(batch), len(adapters)
        if all(adapter is adapters[0] for adapter in adapters):
            return [0] * B, 1
        # an encoder sees the prompts, before they are repeated
        call = None if "encoder" in self.component else running_call(self.module)
        shape = None if call is None else (call.name, call.prompts, call.pictures, _length(call.latents))
        key = (B, P, parts, shape)
        order = self._orders.get(key)
        if order is None:
            order = sample_order(f"serve, {self.component}", P, batch, call, parts)
            self._orders[key] = order
            if len(self._orders) > MOST_ORDERS:
                self._orders.popitem(last=False)
        return order.rows(), order.prompts * order.pictures

    def _batch_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        """The samples among a forward's inputs: its first argument, or else its first tensor."""
        for value in (*args[:1], kwargs.get(self._first), *args[1:], *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() > 0:
                return value
            if isinstance(value, list | tuple) and value and all(isinstance(t, Tensor) for t in value):
                return value
        raise MoleShapeError(
            f"serve, {self.component}",
            expected="a tensor among the inputs, to know the batch",
            got="none",
        )

    # -- copies

    def __reduce__(self) -> tuple[Any, ...]:
        # also of copy.deepcopy
        return CopiedRoute, (self.component,)


class CopiedRoute(ComponentRoute):
    """What a copy of a served model has for a route: it refuses, as no `Served` assigns for the copy."""

    def __init__(self, component: str) -> None:
        self.component = component
        self._running = threading.local()

    def _check_outside(self) -> None:
        raise self._error()

    def _batch_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        raise self._error()

    def _error(self) -> MoleStateError:
        return MoleStateError(
            f"serve, {self.component}",
            "this model is a copy of a served one, and assignments are made for the original",
            hint="Served.remove(), copy, and serve each of the two",
        )


@lru_cache(1)
def _keep_hooks_out_of_graphs() -> None:
    """Contexts cannot be traced; a compiled module's hooks are frames of their own, around its graph.

    Done when a model is served, as it imports torch's compiler.
    """
    for name in ("_before", "_after"):
        setattr(ComponentRoute, name, torch.compiler.disable(getattr(ComponentRoute, name)))


def _length(tensor: Tensor | None) -> int | None:
    return None if tensor is None else len(tensor)
