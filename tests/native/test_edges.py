"""Odd sizes in memory of exactly their size, strides that touch its ends: what an address sanitizer would
object to (`make sanitize`).
"""

import itertools

import pytest
import torch

from mole_kernels.backends import cpu
from mole_kernels.functional import gated_lora_linear
from tests.truth import Case, assert_close_to_truth

pytestmark = pytest.mark.skipif(
    cpu.reason_against(Case().problem(torch.float32)) is not None, reason="no compiled library"
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# on both sides of a vector, a panel, a tile and a block of rows, of K and of what is summed at once
SIZES = [
    Case(B=1, T=1, K=1, N=1, ranks=(1,)),
    Case(B=2, T=5, K=3, N=2, ranks=(1, 2)),
    Case(B=2, T=7, K=15, N=17, ranks=(3, 1), gate="local"),
    Case(B=1, T=13, K=31, N=33, ranks=(5, 4), layout="transposed"),
    Case(B=3, T=33, K=63, N=65, ranks=(7, 2, 8), S=3, gate="mask+pooled"),
    Case(B=1, T=97, K=129, N=127, ranks=(17,), gate="none"),
    Case(B=2, T=67, K=641, N=66, ranks=(15, 1), layout="sliced"),
    Case(B=5, T=71, K=66, N=63, ranks=(3, 6), S=-2, gate="softmax+pooled"),
    Case(B=1, T=257, K=5, N=9, ranks=(2,) * 3, gate="top2+mask"),
    Case(B=2, T=0, K=4, N=5, ranks=(2,)),
    Case(B=2, T=64, K=64, N=64, ranks=(16, 16), layout="stride0"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=lambda c: f"cpu-{c}")
def test_forward_and_every_gradient_at_the_edges(case, dtype):
    call = case.make(dtype)
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in call.tensors().items()
    }
    run = call.with_tensors(leaves)
    y = gated_lora_linear(run.x, run.weight, run.bias, run.experts, run.gates, backend="cpu")
    if dtype != torch.float64:
        assert_close_to_truth(y.detach(), call.truth(), dtype, 8)
    for wanted in itertools.islice(itertools.combinations(leaves, 2), 0, None, 5):
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], torch.ones_like(y), retain_graph=True)
        assert all(g.isfinite().all() for g in grads)
    every = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    assert [g.shape for g in every] == [t.shape for t in leaves.values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_views_that_end_with_their_memory(dtype):
    """x, weight, down and up as the last elements of their storage, backwards columns of weight included."""
    call = Case(B=2, T=9, K=19, N=21, ranks=(3, 4)).make(dtype)

    def at_the_end(t):
        whole = torch.full((t.numel() + 5,), float("nan"), dtype=t.dtype)
        whole[5:] = t.reshape(-1)
        return whole[5:].view(t.shape)

    e = call.experts._replace(down=at_the_end(call.experts.down.mT).mT, up=at_the_end(call.experts.up.mT).mT)
    weight = at_the_end(call.weight.mT).mT
    want = gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates, backend="cpu")
    got = gated_lora_linear(at_the_end(call.x), weight, at_the_end(call.bias), e, call.gates, backend="cpu")
    assert_close_to_truth(
        got, call.truth(), dtype, 4
    ) if dtype != torch.float64 else torch.testing.assert_close(got, want)
