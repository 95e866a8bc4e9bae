"""What two ranks do on a CPU: each function compares what the ranks have together with one process that has
it all, and returns nothing.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.errors import MoleKeyError, MoleStateError
from mole_kernels.experts.lowrank import Expert, LowRank

K, HIDDEN, N, RANK = 6, 8, 4, 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Net(), nn.Linear(N, N)).requires_grad_(False)


def expert(seed: int, rank: int = RANK) -> Expert:
    g = torch.Generator().manual_seed(seed)
    sizes = {"0.first": (K, HIDDEN), "0.second": (HIDDEN, N)}
    return Expert(
        {
            path: LowRank(torch.randn(rank, k, generator=g), torch.randn(n, rank, generator=g), 0.5)
            for path, (k, n) in sizes.items()
        }
    )


def patched(model: nn.Module, gates: Any = "mole") -> Any:
    torch.manual_seed(1)
    return mk.patch(model, {"a": expert(1), "b": expert(2)}, gates)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


# -- FSDP2
# -------------------------------------------------------------------------------------------------------------------------------


def fsdp(rank: int) -> None:
    """Experts and gates trained on a frozen, sharded base: after each step what one process on the whole
    batch has.
    """
    from torch.distributed.fsdp import fully_shard

    one, many = net(), net()
    base = one(draw(4, 5, K))
    handles = patched(one), patched(many)
    for handle in handles:
        handle.experts_require_grad(), handle.gates_require_grad()
    fully_shard(many[0])
    fully_shard(many)
    optimisers = [torch.optim.SGD(h.expert_parameters() + h.gate_parameters(), lr=0.1) for h in handles]
    x = draw(4, 5, K)
    mine = x[2 * rank : 2 * rank + 2]
    for _ in range(3):
        for model, batch, optimiser in ((one, x, optimisers[0]), (many, mine, optimisers[1])):
            with torch.no_grad():
                # between the steps the pooled gate's p is kept, and must be let go
                close(model(batch), one(batch))
            optimiser.zero_grad()
            model(batch).square().mean().backward()
        for a, b in zip(*([*h.expert_parameters(), *h.gate_parameters()] for h in handles)):
            assert a.grad is not None and b.grad is not None and a.grad.abs().sum() > 0
            close(whole(b.grad), a.grad)
        for optimiser in optimisers:
            optimiser.step()
    handles[0].set_scales({"a": 0.3}), handles[1].set_scales({"a": 0.3})
    with torch.no_grad():
        close(many(mine), one(mine))
    banks, gates = [h.bank() for h in handles], [h.gates() for h in handles]
    for path in ("0.first", "0.second"):
        for name in ("a", "b"):
            close(banks[1].layer(path)[name].down, banks[0].layer(path)[name].down)
        close(gates[1].layers[path].head, gates[0].layers[path].head)
    refused(MoleStateError, "sharded over ranks", lambda: handles[1].swap("a", expert(9)))
    handles[1].remove()
    with torch.no_grad():
        assert torch.equal(many(mine), base[2 * rank : 2 * rank + 2])


def fsdp_loads(rank: int) -> None:
    """Weights loaded into the shards between two evaluations are seen, though no version counts them."""
    from torch.distributed.fsdp import fully_shard

    one, many = net(), net()
    handles = patched(one), patched(many)
    # without this the root stays whole after a forward
    fully_shard(many, reshard_after_forward=True)
    x = draw(2, 3, K)
    for scale in (1.0, -2.0, 0.5):
        with torch.no_grad():
            for a, b in zip(*([*h.expert_parameters(), *h.gate_parameters()] for h in handles)):
                new = draw(*a.shape, seed=int(10 * scale) + 50) * scale
                a.copy_(new)
                sharded = b.to_local()
                sharded.copy_(new.chunk(2)[rank] if len(new.chunk(2)) > rank else new[:0])
            close(many(x), one(x))


def fsdp_first(rank: int) -> None:
    """Patched after sharding, experts would get no gradients of the other ranks: refused, and so is undoing a
    layer's own shard.
    """
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    refused(MoleKeyError, "patch first, then fully_shard", lambda: patched(model))
    model = net()
    handle = patched(model)
    x = draw(2, 3, K)
    with torch.no_grad():
        want = model(x)
        fully_shard(model[0].first)
        fully_shard(model)
        close(model(x), want)
        refused(MoleStateError, "fully_shard the blocks", handle.remove)
        close(model(x), want)


# -- tensor parallel
# ---------------------------------------------------------------------------------------------------------------------


def tensor_parallel(rank: int) -> None:
    """Columns then rows, gates that see every feature; forward, input gradient and expert gradients as in one
    process, on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    styles = {"0.first": ColwiseParallel(), "0.second": RowwiseParallel()}
    for gates in (None, "mole", "softmax"):
        one, many = net(), net()
        x = draw(2, 5, K)
        base = one(x)
        parallelize_module(many, mesh, styles)
        handles = patched(one, gates), patched(many, gates)
        results = []
        for model, handle in zip((one, many), handles):
            parameters = handle.experts_require_grad() + handle.gates_require_grad()
            given = x.clone().requires_grad_()
            y = model(given)
            y.square().sum().backward()
            results.append([y.detach(), given.grad, *(p.grad for p in parameters)])
        for want, got in zip(*results):
            close(got, want)
        maps = [handle.gate_maps() for handle in handles] if gates else []
        for path in maps[0] if maps else ():
            close(maps[1][path].token, maps[0][path].token)
        with torch.no_grad():
            if gates is None:
                refused(MoleStateError, "sharded over ranks", handles[1].fold)
            handles[0].swap("a", expert(9)), handles[1].swap("a", expert(9))
            close(many(x), one(x))
            handles[1].remove()
            close(many(x), base)
    late = net()
    patched(late)
    refused(
        MoleStateError, "parallelize_module first, then patch", lambda: parallelize_module(late, mesh, styles)
    )


# -- context parallel
# --------------------------------------------------------------------------------------------------------------------


def split_tokens(rank: int) -> None:
    """Each rank has some of the tokens, not equally many: gates per sample look at all; gradients add up to
    those of one process.
    """
    x = draw(2, 7, K)
    cut = [slice(0, 5), slice(5, 7)][rank]
    for gates in ("mole", "global", "local", "softmax"):
        one, many = net(), net()
        handles = patched(one, gates), patched(many, gates)
        handles[1].split_tokens(dist.group.WORLD)
        results = []
        for model, handle, tokens in zip((one, many), handles, (slice(None), cut)):
            parameters = handle.experts_require_grad() + handle.gates_require_grad()
            given = x.clone().requires_grad_()
            y = model(given[:, tokens])
            y.square().sum().backward()
            results.append([y.detach(), given.grad, *(p.grad for p in parameters)])
        close(results[1][0], results[0][0][:, cut])
        for want, got in zip(results[0][1:], results[1][1:]):
            total = torch.zeros_like(want) if got is None else got.clone()
            dist.all_reduce(total)
            close(total, want)
        if gates in ("mole", "global"):
            handles[1].split_tokens(None)
            with torch.no_grad():
                assert not torch.allclose(many(x[:, cut]), results[0][0][:, cut], rtol=1e-3)


# -- the ranks
# ---------------------------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], words: str, act: Callable[[], Any]) -> None:
    try:
        act()
    except error as caught:
        assert words in str(caught), caught
        return
    raise AssertionError(f"nothing was refused, though it should say: {words}")


WORKS = {work.__name__: work for work in (fsdp, fsdp_loads, fsdp_first, tensor_parallel, split_tokens)}


def run(rank: int, folder: str) -> None:
    """Every work in turn, in both ranks; what went wrong goes into <folder>/<work>.<rank>, an empty file
    where nothing did.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "localhost")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, work in WORKS.items():
        try:
            work(rank)
            said = ""
        except Exception:
            said = traceback.format_exc()
        with open(f"{folder}/{name}.{rank}", "w") as file:
            file.write(said)
        # a rank that failed alone would leave the other waiting in its next collective
        bad = torch.tensor(float(bool(said)))
        dist.all_reduce(bad)
        if bad:
            sys.exit()
    dist.destroy_process_group()
    # past the interpreter's end: a thread of gloo that still runs there aborts the process now and then,
    # after all its work is written
    os._exit(0)
