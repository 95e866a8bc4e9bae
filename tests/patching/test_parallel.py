"""Patched models over two processes: FSDP2, DTensor weights, tokens split over ranks (docs/memory.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed
import torch.multiprocessing

from tests.patching import parallel_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """Two processes are started once for all of it: starting them is most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(parallel_ranks.run, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("work", parallel_ranks.WORKS)
def test_two_ranks_have_together_what_one_process_has(ranks, work):
    for rank in range(2):
        file = ranks / f"{work}.{rank}"
        assert file.exists(), "an earlier work failed"
        assert file.read_text() == "", file.read_text()


@torch.no_grad()
def test_a_gathered_parameter_makes_a_pooled_gates_vector_anew():
    """FSDP puts a parameter in whose values changed in the same memory and under the same version."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import unsafe_setattr_param

    model = parallel_ranks.net()
    handle = parallel_ranks.patched(model)
    x = parallel_ranks.draw(2, 3, parallel_ranks.K)
    before = model(x)
    for layer in handle.layers.values():
        layer.gate.head.data.mul_(-3)
        unsafe_setattr_param(layer.gate, "head", layer.gate.head)
    after = model(x)
    assert not torch.allclose(after, before)
    for layer in handle.layers.values():
        layer.gate.forget()
    assert torch.equal(model(x), after)
