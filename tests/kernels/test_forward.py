"""Forward kernels against float64: every gate kind, awkward sizes, ranks and layouts, the low-rank part
alone, any order of programs.
"""

from dataclasses import replace

import pytest
import torch

from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.strategies import WAYS, reason_against_way
from mole_kernels.reference import sets_of
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.truth import Case, assert_close_to_truth

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GATES = [
    Case(T=20, K=40, N=33, gate=g)
    for g in ("none", "local", "pooled", "both", "constant", "mask", "onehot", "mask+both")
]
SHAPES = [
    Case(T=1),
    Case(T=17, K=63, N=65),
    Case(T=37, K=1, N=8),
    Case(T=39, K=8, N=1),
    Case(B=1, T=1, K=1, N=1, ranks=(1,)),
    Case(B=3, T=35, K=65, N=40, gate="none"),
    Case(ranks=(1, 3)),
    Case(ranks=(16, 24, 8)),
    Case(ranks=(40, 24), T=33, K=33, N=33, gate="local"),
    Case(ranks=(2,) * 7),
    Case(S=2),
    Case(S=2, gate="none", T=33),
    Case(B=3, S=3, ranks=(3, 5), gate="mask+pooled"),
    Case(layout="transposed"),
    Case(layout="sliced"),
    Case(layout="stride0", gate="none"),
    Case(bias=False),
    Case(gate="softmax", ranks=(8, 3, 16)),
    Case(gate="top1", ranks=(4,) * 7),
    Case(gate="top2+mask+pooled", ranks=(2, 3, 4), S=2),
    Case(B=5, S=-3),
    Case(B=4, S=-2, gate="none", ranks=(3,)),
    Case(B=3, S=-7, gate="top1+mask", T=33, K=65, ranks=(5, 6)),
]
RUNS = (
    [(c.alone(), d) for c in GATES for d in (BF16, F32)]
    + [(c, BF16) for c in GATES]
    + [(GATES[-1].alone(), F16)]
)
RUNS += [(c.alone(), BF16 if i % 2 else F32) for i, c in enumerate(SHAPES)] + [
    (c, F32 if i % 2 else BF16) for i, c in enumerate(SHAPES)
]
# roundings of each way: z (and W + ΔW), y; and the base where it is a product of its own
ROUNDINGS = {"two_pass": 2, "persistent": 2, "recompute": 2, "added": 3, "merge": 3, "dense": 2}
# ways that take no sample gate
NO_SAMPLE_GATE = ("recompute", "dense")


def ident(value):
    return str(value) + ("" if value.base else "-alone") if isinstance(value, Case) else str(value)[6:]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case, dtype", RUNS, ids=ident)
def test_forward(case, way, dtype):
    call = case.make(dtype)
    f = forward_of(call, save=way not in ("merge", "dense"))
    if reason_against_way(way, f) is not None:
        return
    if way in ("recompute", "merge", "added", "dense") and case.base:
        # the same tiles with another base: the low-rank part alone tells
        return
    with run(seed=case.T, resident=2), poisoned():
        b = WAYS[way](f, SMALL)
    # where K or N is 1 the roundings of one vector h, or of few outputs, do not average out
    assert_close_to_truth(b.y, call.truth(), dtype, ROUNDINGS[way] if min(case.K, case.N) > 1 else 4, way)
    if f.save:
        assert_close_to_truth(b.h, call.x.double() @ sets_of(call.experts).down.double().mT, dtype, 1, "h")
    assert not b.flags.any(), "flags must be left at zero"


@pytest.mark.parametrize("way", ["two_pass", "persistent", *NO_SAMPLE_GATE])
def test_the_gates_come_back(way):
    call = Case(T=37, gate="local" if way in NO_SAMPLE_GATE else "both").make(F32)
    with run(resident=3), poisoned():
        b = WAYS[way](forward_of(call), SMALL)
    x, g = call.x.double(), call.gates
    local = torch.sigmoid(x @ g.token_weight.double().mT + g.token_bias.double())
    assert_close_to_truth(b.token_gate.view(2, 37, 2), local, F32, 1, "token gate")
    if g.sample_weight is not None:
        h = (x @ call.experts.down.double().mT).mean(1) * g.sample_weight.double()
        pooled = torch.sigmoid(torch.stack([h[:, :8].sum(1), h[:, 8:].sum(1)], 1) + g.sample_bias.double())
        assert_close_to_truth(b.sample_gate, pooled, F32, 1, "sample gate")


@pytest.mark.parametrize("way", WAYS)
def test_small_integers_are_exact(way):
    call = Case(K=24, N=16, ranks=(3, 2), gate="none").make(BF16, integers=True)
    down = torch.zeros_like(call.experts.down)
    down[..., ::8] = 1
    weight = torch.where(torch.arange(24) % 6 == 0, call.weight.sign(), 0)
    call = replace(call, weight=weight, experts=call.experts._replace(down=down, up=call.experts.up.sign()))
    assert call.truth().abs().max() <= 256
    with run(), poisoned():
        b = WAYS[way](forward_of(call), SMALL)
    assert torch.equal(b.y.double(), call.truth())


@pytest.mark.parametrize("way", WAYS)
def test_each_expert_alone(way):
    case = Case(ranks=(3, 8, 5), gate="none" if way == "merge" else "local", base=False, T=9)
    call = case.make(F32)
    for e in range(case.E):
        one = replace(call, gates=call.gates._replace(gate=torch.eye(case.E)[e][None, None]))
        with run(), poisoned():
            b = WAYS[way](forward_of(one), SMALL)
        assert_close_to_truth(b.y, one.truth(), F32, 1, f"expert {e}")


@pytest.mark.parametrize("way", ["two_pass", "persistent", *NO_SAMPLE_GATE])
def test_nan_stays_where_it_belongs(way):
    """A NaN in one token's gate makes NaN of that token's row; a NaN in x, of its token's row, or of its
    sample's where gates pool.
    """
    call = Case(T=20, ranks=(3, 20), gate="mask" if way in NO_SAMPLE_GATE else "mask+pooled").make(BF16)
    gate = call.gates.gate.expand(2, 20, 2).clone()
    gate[1, 7, 1] = float("nan")
    x = call.x.clone()
    x[0, 3, 5] = float("nan")
    with run(), poisoned():
        b = WAYS[way](forward_of(replace(call, x=x, gates=call.gates._replace(gate=gate))), SMALL)
    rows = torch.zeros(2, 20, dtype=torch.bool)
    rows[1, 7], rows[0, 3] = True, True
    if way not in NO_SAMPLE_GATE:
        rows[0] = True
    assert torch.equal(b.y.isnan(), rows[..., None].expand(b.y.shape))


@pytest.mark.parametrize("case", [Case(T=40, K=32), Case(T=40, K=32, gate="local", ranks=(20, 20))], ids=str)
def test_any_order_and_any_number_of_programs(case):
    """Bit-equal however many programs there are and run at a time: one at a time must do, or it could hang on
    a busy GPU.
    """
    f = forward_of(case.make(BF16))
    results = []
    for programs, resident, seed in ((1, 1, 0), (3, 1, 1), (7, 7, 2), (20, 1, 3)):
        with run(seed, resident) as counts, poisoned():
            b = launch.persistent(f, replace(SMALL, programs=programs))
        assert counts.launches == 1 and not b.flags.any()
        results.append(b)
    for b in results[1:]:
        assert torch.equal(b.y, results[0].y) and torch.equal(b.token_gate, results[0].token_gate)


@pytest.mark.parametrize("way", ["two_pass", "persistent", *NO_SAMPLE_GATE])
def test_tensor_descriptors_change_no_bit(way):
    case = Case(T=45, K=72, N=40, gate="local" if way in NO_SAMPLE_GATE else "both")
    f = forward_of(case.make(BF16))
    with run(), poisoned():
        plain, described = (WAYS[way](f, replace(SMALL, tma=tma)) for tma in (False, True))
    assert torch.equal(plain.y, described.y)


def test_bytes_and_operations_are_what_the_tiles_imply():
    case = Case(B=1, T=64, K=64, N=64, ranks=(16,), gate="none", bias=False)
    with run() as counts, poisoned():
        launch.persistent(forward_of(case.make(BF16)), SMALL)
    minimum = case.problem(BF16)
    # two column tiles of 32: x is read twice for y and once for h, w and z once for each of the two row tiles
    elements = 3 * 64 * 64 + 2 * 64 * 64 + 2 * 16 * 64 + 2 * 64 * 16 + 2 * 64 * 16
    assert counts.flops == minimum.flops()
    assert elements * 2 <= counts.read <= elements * 2 * 1.1
    assert minimum.bytes() <= counts.distinct_read + counts.written <= minimum.bytes() + 64 * 16 * 2 * 2 + 512


def test_offsets_past_two_to_the_31():
    """x is a view whose last row begins beyond 2³¹ elements; lazy pages make that cheap."""
    step = (1 << 30) + 64
    storage = torch.empty(step * 2 + 64, dtype=BF16)
    x = storage.as_strided((1, 3, 16), (0, step, 1))
    x.copy_(torch.randn(1, 3, 16))
    call = Case(B=1, T=3, K=16, N=8, ranks=(4,)).make(BF16)
    call = replace(call, x=x)
    for way in ("two_pass", "persistent"):
        with run(), poisoned():
            b = WAYS[way](forward_of(call), SMALL)
        assert_close_to_truth(b.y, call.truth(), BF16, 3, way)


def test_tf32_follows_torchs_switch():
    call = Case(T=20, K=100, gate="none", base=False).make(F32)
    before = torch.backends.cuda.matmul.fp32_precision
    truth, errors = call.truth(), {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            with run(), poisoned():
                y = launch.persistent(forward_of(call), SMALL).y
            errors[precision] = ((y - truth).norm() / truth.norm()).item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-6 < 1e-5 < errors["tf32"] < 1e-3


FAULTS = {
    "a scale 5 % off": lambda c: c._replace(scale=c.scale * 1.05),
    "experts swapped": lambda c: c._replace(scale=c.scale.flip(0)),
    "a lost K tail": lambda c: c._replace(down=torch.where(torch.arange(65) < 64, c.down, 0)),
    "one rank column lost": lambda c: c._replace(up=torch.where(torch.arange(16) == 15, 0, c.up)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_allowance_notices_planted_faults(fault):
    call = Case(T=20, K=65, N=48, gate="local", base=False).make(BF16)
    broken = replace(call, experts=FAULTS[fault](call.experts))
    with run(), poisoned():
        y = launch.two_pass(forward_of(broken), SMALL).y
    with pytest.raises(AssertionError):
        assert_close_to_truth(y, call.truth(), BF16, 2)


@pytest.mark.parametrize("way", ["two_pass", "persistent"])
def test_a_batch_of_two_is_two_batches_of_one(way):
    """Bit for bit, each with its own experts and its own sample gate: nothing of one sample reaches the
    other.
    """
    call = Case(T=21, K=32, S=2).make(BF16)
    with run(resident=2), poisoned():
        both = WAYS[way](forward_of(call), SMALL)
        for b in range(2):
            experts = call.experts._replace(down=call.experts.down[b : b + 1], up=call.experts.up[b : b + 1])
            gates = call.gates._replace(sample_weight=call.gates.sample_weight[b : b + 1])
            one = WAYS[way](
                forward_of(replace(call, x=call.x[b : b + 1], experts=experts, gates=gates)), SMALL
            )
            assert torch.equal(one.y[0], both.y[b])


@pytest.mark.parametrize("way", ["two_pass", "persistent", *NO_SAMPLE_GATE])
def test_gates_of_zero_give_the_base_layer(way):
    """Bit for bit what the same tiles give with no experts at all (up = 0)."""
    call = Case(T=21, K=48, gate="mask").make(BF16)
    zero = replace(call, gates=call.gates._replace(gate=torch.zeros_like(call.gates.gate)))
    none = replace(call, experts=call.experts._replace(up=torch.zeros_like(call.experts.up)))
    with run(), poisoned():
        a, b = (WAYS[way](forward_of(c), SMALL).y for c in (zero, none))
    assert torch.equal(a, b)
