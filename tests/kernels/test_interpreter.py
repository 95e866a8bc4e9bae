"""The interpreter's checks, each on a kernel with a planted fault; if one is not noticed, nothing below can
be trusted.
"""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interpreter import Bounds, Deadlock, Race, run


@triton.jit
def copy_kernel(src, dst, n, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + o, tl.load(src + o, mask=o < n + LIMIT), mask=o < n)


@triton.jit
def dot_kernel(a, b, c, PRECISION: tl.constexpr):
    o = tl.arange(0, 16)
    at = o[:, None] * 16 + o[None, :]
    acc = tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION)
    tl.store(c + at, acc.to(c.dtype.element_ty))


@triton.jit
def bf16_sum_kernel(a, c):
    o = tl.arange(0, 16)
    x = tl.load(a + o)
    tl.store(c + o, x + x)


@triton.jit
def same_place_kernel(dst):
    tl.store(dst, tl.program_id(0))


@triton.jit
def neighbour_kernel(dst, out):
    i = tl.program_id(0)
    tl.store(dst + i, i)
    tl.store(out + i, tl.load(dst + (i + 1) % tl.num_programs(0)))


@triton.jit
def handover_kernel(
    data, flag, out, TICKET: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr, RAISE: tl.constexpr
):
    """The maker of `data` raises `flag`; everyone waits for it, then reads."""
    if TICKET:
        maker = tl.atomic_add(flag + 1, 1) == 0
    else:
        maker = tl.program_id(0) == 0
    o = tl.arange(0, 16)
    if maker:
        tl.store(data + o, o)
        if BARRIER:
            tl.debug_barrier()
        if RAISE:
            tl.atomic_xchg(flag, 1, sem=SEM)
    while tl.atomic_add(flag, 0, sem="acquire") == 0:
        pass
    tl.store(out + tl.program_id(0) * 16 + o, tl.load(data + o))


def test_bf16_multiplies_values():
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.full((16, 16), float("nan"), dtype=torch.bfloat16)
    with run() as counts:
        dot_kernel[(1,)](a, b, c, "ieee")
    assert torch.equal(c, (a.float() @ b.float()).bfloat16())
    assert counts.flops == 2 * 16**3 and counts.read == 2 * 16 * 16 * 2 and counts.written == 16 * 16 * 2


def test_tf32_rounds_its_operands():
    a, b = torch.randn(16, 16), torch.eye(16)
    c = torch.empty(16, 16)
    with run():
        dot_kernel[(1,)](a, b, c, "ieee")
        assert torch.equal(c, a)
        dot_kernel[(1,)](a, b, c, "tf32")
    error = ((c - a).abs() / a.abs()).max().item()
    assert 2**-14 < error <= 2**-11


def test_arithmetic_on_bf16_bits_is_refused():
    with run(), pytest.raises(TypeError, match="cast to float32"):
        bf16_sum_kernel[(1,)](torch.ones(16).bfloat16(), torch.ones(16).bfloat16())


def test_one_element_beyond_the_end_is_noticed():
    src, dst = torch.zeros(40), torch.zeros(40)
    with run():
        copy_kernel[(3,)](src, dst, 40, 0, 16)
        with pytest.raises(Bounds):
            copy_kernel[(3,)](src, dst, 40, 1, 16)


def test_the_gap_beside_a_view_is_out_of_bounds():
    wide = torch.zeros(20)
    with run(), pytest.raises(Bounds):
        copy_kernel[(1,)](wide[2:12], torch.zeros(16), 11, 0, 16)


def test_masked_lanes_are_poison():
    src, dst = torch.ones(8), torch.zeros(16)
    with run():
        copy_kernel[(1,)](src, dst[:10], 10, -2, 16)
    assert dst[:8].eq(1).all() and dst[8:10].isnan().all() and dst[10:].eq(0).all()


def test_two_writers_race():
    with run(), pytest.raises(Race, match="wrote"):
        same_place_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_reading_a_neighbours_store_races():
    n = torch.zeros(4, dtype=torch.int32)
    with run(), pytest.raises(Race):
        neighbour_kernel[(4,)](n, torch.zeros(4, dtype=torch.int32))


def _handover(seed=0, resident=3, ticket=True, barrier=True, sem="release", raised=True):
    data, flag, out = (
        torch.zeros(16, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(4, 16, dtype=torch.int32),
    )
    with run(seed, resident) as counts:
        handover_kernel[(4,)](data, flag, out, ticket, barrier, sem, raised)
    assert torch.equal(out, torch.arange(16, dtype=torch.int32).expand(4, 16))
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_release_and_acquire_order_a_handover(seed):
    assert _handover(seed).switches > 0
    _handover(seed, resident=1)


def test_a_handover_without_release_or_barrier_races():
    with pytest.raises(Race):
        _handover(sem="relaxed")
    with pytest.raises(Race):
        _handover(barrier=False)


def test_a_wait_that_nobody_ends_is_a_deadlock():
    with pytest.raises(Deadlock):
        _handover(raised=False)
    # a fixed maker need not be among those that run at once: the order is shuffled
    with pytest.raises(Deadlock):
        for seed in range(8):
            _handover(seed, resident=1, ticket=False)


def test_the_order_is_shuffled():
    orders = set()
    for seed in range(4):
        flag = torch.zeros(2, dtype=torch.int32)
        out = torch.zeros(8, dtype=torch.int32)
        with run(seed):
            ticket_kernel[(8,)](flag, out)
        orders.add(tuple(out.tolist()))
    assert len(orders) == 4


@triton.jit
def ticket_kernel(counter, out):
    tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))
