"""The layers of a frozen model in a forward that mixes the samples of several jobs.

A job's rows have to come out of a mixed forward with the bits that they have alone. Whether a layer computes
all rows in one call or job by job is therefore tried out, once for each shape: both ways on random numbers,
outputs and gradients compared bit for bit. Libraries choose other summation orders for other numbers of rows
(convolutions, single rows), and only there a job's rows have a call of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.layers.attach import PLAIN_CLASS, attach, detach
from mole_kernels.layers.linear import Gated
from mole_kernels.operands import Experts, Gates
from mole_kernels.training.many.activations import MixedActivation, is_activation

_BY_TYPE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# how a layer computes the rows of several jobs: in one call; in one call beside a row that no job has, which
# keeps the operator to torch's own base product as few rows do; or job by job
Way = Literal["together", "beside a spare row", "apart"]


class Part(NamedTuple):
    """A job's rows of the running forward: `rows` samples, in the order of the parts."""

    job: str
    rows: int


class MixedLayers:
    """Every linear layer and convolution of a model, able to compute the rows of several jobs.

    Args:
        model: The frozen denoiser; changed in place until `remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts: tuple[Part, ...] = ()
        # (layer and operand shapes) -> whether one call gives every job's bits
        self.verdicts: dict[tuple[object, ...], Way] = {}
        self.layers: dict[str, MixedLayer] = {}
        self.activations: list[MixedActivation] = []
        for path, module in model.named_modules():
            if "forward" in module.__dict__:
                continue
            if type(module) in _BY_TYPE:
                self.layers[path] = MixedLayer(module, self)
            elif is_activation(module):
                self.activations.append(MixedActivation(module, self))

    def add(self, job: str, experts: dict[str, LayerExperts]) -> None:
        """Take a job's experts, by the path of their layer.

        Raises:
            MoleStateError: A layer that cannot take them; nothing changes.
        """
        if unknown := [path for path in experts if path not in self.layers]:
            raise MoleStateError(f"job {job}", f"{unknown[0]} is no plain linear layer or convolution")
        for path, own in experts.items():
            self.layers[path].add(job, own)

    def drop(self, job: str) -> None:
        """Forget a job's experts."""
        for layer in self.layers.values():
            layer.drop(job)

    @contextmanager
    def running(self, parts: Sequence[Part]) -> Iterator[None]:
        """Inside, forwards of the model have these jobs' samples, in this order."""
        before, self.parts = self.parts, tuple(parts)
        try:
            yield
        finally:
            self.parts = before

    def collect(self, jobs: Collection[str]) -> None:
        """After a backward: the gradients of pooled factors go to the own parameters of these jobs."""
        into, grads, buffers = list[Tensor](), list[Tensor](), list[Tensor]()
        for layer in self.layers.values():
            if not layer.used or layer.pool is None:
                continue
            layer.used = False
            buffers += layer.pool.grads
            for job, own, views in zip(layer.own, layer.own.values(), layer.pool.grad_views):
                for parameter, grad in zip((own.down, own.up), views) if job in jobs else ():
                    if parameter.grad is None:
                        parameter.grad = torch.empty_like(parameter)
                        into.append(parameter.grad)
                        grads.append(grad)
                    else:
                        parameter.grad = parameter.grad + grad
        if into:
            torch._foreach_copy_(into, grads)
        if buffers:
            torch._foreach_zero_(buffers)

    @torch.no_grad()
    def written(self, job: str) -> None:
        """After a job's optimiser step: its factors go into the pools."""
        into, own = list[Tensor](), list[Tensor]()
        for layer in self.layers.values():
            if layer.pool is not None and job in layer.own:
                into += layer.pool.views[list(layer.own).index(job)]
                own += (layer.own[job].down, layer.own[job].up)
        if into:
            torch._foreach_copy_(into, own)

    def remove(self) -> None:
        """Every layer is the plain one again."""
        for layer in self.layers.values():
            layer.remove()
        for activation in self.activations:
            activation.module.__dict__.pop("forward", None)


class _Aligned(torch.autograd.Function):
    """x, and its gradient, in memory of their own: some products sum otherwise where rows begin elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()


class MixedLayer:
    """One layer: each job's experts, and a pool [J,R,K], [J,N,R] of all of them for one call."""

    def __init__(self, module: nn.Module, owner: MixedLayers) -> None:
        self.module, self.owner = module, owner
        self.own: dict[str, LayerExperts] = {}
        self.pool: Pool | None = None
        self.used = False
        module.__dict__["forward"] = self.forward

    # -- jobs

    def add(self, job: str, experts: LayerExperts) -> None:
        """Take a job's experts."""
        if not self.own:
            del self.module.__dict__["forward"]
            attach(self.module, experts)
            self.module.__dict__["forward"] = self.forward
        self.own[job] = experts
        self.pool = None

    def drop(self, job: str) -> None:
        """Forget a job's experts; the last one leaves the plain layer."""
        if self.own.pop(job, None) is None:
            return
        self.pool = None
        if not self.own:
            del self.module.__dict__["forward"]
            detach(self.module)
            self.module.__dict__["forward"] = self.forward

    def remove(self) -> None:
        """The plain layer again."""
        for job in list(self.own):
            self.drop(job)
        self.module.__dict__.pop("forward", None)

    # -- a forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer for the rows of all parts."""
        parts = self.owner.parts
        total = sum(part.rows for part in parts)
        if len(parts) <= 1 or (x.shape[0] % total and not self.own):
            return self._for_job(x, parts[0].job if parts else None)
        if x.shape[0] % total:
            raise MoleStateError(
                "training many",
                f"a layer sees {x.shape[0]} samples in a forward of {total}, and cannot tell whose they are",
                hint="train the jobs one by one on this model",
            )
        times = x.shape[0] // total
        rows = [part.rows * times for part in parts]
        way = self._way(x, parts, rows)
        if way == "apart":
            return torch.cat([self._alone(piece, p.job) for piece, p in zip(x.split(rows), parts)])
        self.used = bool(self.own)
        return self._together(x, parts, times, way)

    def _alone(self, x: Tensor, job: str, own: dict[str, LayerExperts] | None = None) -> Tensor:
        """`_for_job` of a part of the rows, and its gradient, in memory that begins as it does alone."""
        return _Aligned.apply(self._for_job(_Aligned.apply(x), job, own))  # type: ignore[no-any-return]

    def _for_job(self, x: Tensor, job: str | None, own: dict[str, LayerExperts] | None = None) -> Tensor:
        """The layer as a job has it alone."""
        own = self.own if own is None else own
        module = self.module
        if job not in own:
            plain = PLAIN_CLASS.get(type(module), type(module))
            return plain.forward(module, x)  # type: ignore[no-any-return, attr-defined]
        module._modules["experts"] = own[job]  # type: ignore[index]
        return type(module).forward(module, x)  # type: ignore[no-any-return]

    def _together(
        self, x: Tensor, parts: Sequence[Part], times: int, way: Way, pool: Pool | None = None
    ) -> Tensor:
        """All rows in one call."""
        module = self.module
        if not isinstance(module, Gated):
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        if pool is None:
            self.pool = pool = self.pool or Pool(list(self.own.values()))
        sets = pool.sets([(p.job, p.rows * times) for p in parts], list(self.own))
        if way == "together":
            return self._pooled(x, pool, sets)
        return self._pooled(torch.cat([x, torch.zeros_like(x[:1])]), pool, [*sets, -1])[:-1]

    def _pooled(self, x: Tensor, pool: Pool, sets: Sequence[int]) -> Tensor:
        """The layer's own forward with the pool as its experts."""
        children = self.module._modules
        own = children["experts"]
        children["experts"], gate = pool.for_rows(sets)  # type: ignore[assignment]
        if gate is not None:
            children["gate"] = gate  # type: ignore[assignment]
        try:
            return type(self.module).forward(self.module, x)  # type: ignore[no-any-return]
        finally:
            children["experts"] = own
            children.pop("gate", None)

    def _way(self, x: Tensor, parts: Sequence[Part], rows: Sequence[int]) -> Way:
        module = self.module
        factors = tuple((self.own[p.job].ranks if p.job in self.own else ()) for p in parts)
        weight: Tensor = module.weight  # type: ignore[assignment]
        shape = (tuple(weight.shape), weight.dtype, module.bias is None, getattr(module, "stride", None))
        key = (shape, tuple(x.shape), x.stride(), x.dtype, x.requires_grad, tuple(rows), factors)
        if key not in self.owner.verdicts:
            ways: tuple[Way, ...] = ("together", "beside a spare row") if self.own else ("together",)
            # few numbers may round alike by chance
            tries = range(max(1, min(16, 8192 // max(1, x.numel()))))
            exact = (way for way in ways if all(self._is_exact(way, x, parts, rows, seed) for seed in tries))
            self.owner.verdicts[key] = next(exact, "apart")
        return self.owner.verdicts[key]

    def _is_exact(self, way: Way, x: Tensor, parts: Sequence[Part], rows: Sequence[int], seed: int) -> bool:
        """Whether together call gives each job's bits, for random x, factors and output gradient."""
        generator = torch.Generator(x.device).manual_seed(seed)

        def random_like(t: Tensor) -> Tensor:
            return torch.empty_like(t).normal_(generator=generator)

        own = {job: _like(experts, random_like) for job, experts in self.own.items()}
        pool = Pool(list(own.values())) if own else None
        xs, times = random_like(x.detach()), x.shape[0] // sum(p.rows for p in parts)
        pooled, apart = xs.clone().requires_grad_(), xs.clone().requires_grad_()
        before = self.module._modules.get("experts")
        try:
            with torch.enable_grad():
                y = self._together(pooled, parts, times, way, pool)
                pieces = zip(apart.split(list(rows)), parts)
                joined = torch.cat([self._alone(piece, p.job, own) for piece, p in pieces])
                if not torch.equal(y, joined):
                    return False
                dy = random_like(y.detach())
                y.backward(dy)
                joined.backward(dy)
        finally:
            if before is not None:
                self.module._modules["experts"] = before
        if pool is not None and not pool.agrees(own, {p.job for p in parts}):
            return False
        return torch.equal(pooled.grad, apart.grad)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PoolExperts:
    """What a gated layer asks of its `LayerExperts`, for one call."""

    experts: Experts
    route: None = None

    def operands(self, samples: int | None = None) -> Experts:
        """The pool, and the set of each row."""
        del samples
        return self.experts

    def is_idle(self) -> bool:
        """False: some row takes a set."""
        return False


@dataclass(frozen=True)
class PoolScales:
    """What a gated layer asks of its gate: each row's scale as a given gate."""

    gates: Gates

    def operands(self, experts: PoolExperts) -> Gates:
        """The scales."""
        del experts
        return self.gates


class Pool:
    """The factors of J jobs on one layer, ranks padded with zeros: down [J,R,K], up [J,N,R]."""

    def __init__(self, experts: Sequence[LayerExperts]) -> None:
        first, self.rank = experts[0], max(e.down.shape[1] for e in experts)
        self.down = first.down.new_zeros(len(experts), self.rank, first.down.shape[2])
        self.up = first.up.new_zeros(len(experts), first.up.shape[1], self.rank)
        self.grads = (torch.zeros_like(self.down), torch.zeros_like(self.up))
        ranks = [own.down.shape[1] for own in experts]
        # [1,R_j,K] and [1,N,R_j]: where job j's factors lie, and their gradients
        self.views, self.grad_views = (
            [(down[j : j + 1, :r], up[j : j + 1, :, :r]) for j, r in enumerate(ranks)]
            for down, up in ((self.down, self.up), self.grads)
        )
        for (down, up), own in zip(self.views, experts):
            down.copy_(own.down.detach())
            up.copy_(own.up.detach())
        for tensor, grad in zip((self.down, self.up), self.grads):
            tensor.requires_grad_().grad = grad
        self.scales = torch.stack([e.scale[0] for e in experts])
        self._one_scale = bool((self.scales == self.scales[0]).all())

    def sets(self, parts: Sequence[tuple[str, int]], jobs: Sequence[str]) -> list[int]:
        """The set of each row: its job's, −1 where its job lacks the layer."""
        place = {job: j for j, job in enumerate(jobs)}
        return [place.get(job, -1) for job, rows in parts for _ in range(rows)]

    def for_rows(self, sets: Sequence[int]) -> tuple[PoolExperts, PoolScales | None]:
        """Experts and gate of one call; jobs of different scales have them as a given gate."""
        assignment = torch.tensor(sets, device=self.down.device)
        scale, gate = self.scales[:1], None
        if not self._one_scale:
            scales = self.scales[assignment.clamp_min(0)][:, None, None].to(self.down.dtype)
            scale, gate = torch.ones_like(scale), PoolScales(Gates(gate=scales))
        return PoolExperts(Experts(self.down, self.up, scale, (self.rank,), assignment)), gate

    def agrees(self, own: dict[str, LayerExperts], jobs: Collection[str]) -> bool:
        """Whether the gradients here are, bit for bit, those of the jobs' own parameters."""
        return all(
            torch.equal(view, p.grad)  # type: ignore[arg-type]
            for (job, experts), views in zip(own.items(), self.grad_views)
            if job in jobs
            for view, p in zip(views, (experts.down, experts.up))
        )


def _like(experts: LayerExperts, random_like: Any) -> LayerExperts:
    """Random factors of the same sizes and scale, which ask for gradients."""
    copy = LayerExperts(
        random_like(experts.down.detach()),
        random_like(experts.up.detach()),
        experts.base_scale.clone(),
        experts.names,
        experts.ranks,
    )
    copy.requires_grad_(True)
    return copy
