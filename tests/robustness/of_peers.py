"""P01 to P14: faults that other packages had, each as it would show here."""

from __future__ import annotations

import gc
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels.errors import MoleKeyError, MoleValueError
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.functional import gated_lora_linear
from mole_kernels.patching.apply import patch
from tests.peft_models import K, draw, twins
from tests.robustness import of_arguments, of_states
from tests.robustness.cases import Case, Ground, patched
from tests.robustness.of_files import factors
from tests.truth import Case as Problem

SAYS = {
    1: "int32 offsets that wrap at many tokens (vLLM)",
    2: "no kernel for an unlisted width (vLLM)",
    3: "rank above 128 asserted late (vLLM)",
    4: "wrong beyond the first rows (Punica)",
    5: "deadlock with skewed segments (Punica)",
    6: "ranks below 8 and equal to 32 wrong (LoRAX)",
    7: "black images at ranks 96 and 128 (Nunchaku)",
    8: "a LoRA lacking some blocks trips an assertion (Nunchaku)",
    9: "zero keys loaded silently (diffusers)",
    10: "memory grows per load and unload (diffusers)",
    11: "a NaN LoRA destroys fused weights (diffusers)",
    12: "dtype mismatch under autocast, NaN from backward (Unsloth)",
    13: "fused dropout with a wrong input gradient (fms-acceleration)",
    14: "scale changes recompile (diffusers)",
}


def right(*problems: Problem):
    """The low-rank part alone, against float64, whatever backend is chosen."""

    def act(g: Ground) -> None:
        for problem in problems:
            call = problem.alone().make(torch.float32)
            y = gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates)
            wide = problem.alone().make(torch.float32)
            experts = wide.experts._replace(
                down=wide.experts.down.double(),
                up=wide.experts.up.double(),
                scale=wide.experts.scale.double(),
            )
            gates = wide.gates._replace(
                **{name: t.double() for name, t in wide.gates._asdict().items() if isinstance(t, Tensor)}
            )
            bias = None if wide.bias is None else wide.bias.double()
            truth = gated_lora_linear(
                wide.x.double(), wide.weight.double(), bias, experts, gates, backend="reference"
            )
            # √(sum of products) roundings, and a little for the gates
            torch.testing.assert_close(
                y.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()), msg=str(problem)
            )

    return act


def every_row(g: Ground) -> None:
    """257 rows at once are 257 rows one at a time."""
    call = Problem(B=1, T=257, K=48, N=40, ranks=(5, 3), gate="local").make(torch.float32)
    run = partial(
        gated_lora_linear, weight=call.weight, bias=call.bias, experts=call.experts, gates=call.gates
    )
    together = run(call.x)
    alone = torch.cat([run(call.x[:, t : t + 1]) for t in range(257)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def skewed(g: Ground) -> None:
    """Nearly all samples name one of the sets, one names another, one none."""
    call = Problem(B=18, T=3, K=32, N=24, ranks=(4,), S=-3, gate="none").make(torch.float32)
    sets = torch.tensor([2] * 16 + [0, -1])
    experts = call.experts._replace(assignment=sets)
    y = gated_lora_linear(call.x, call.weight, call.bias, experts, call.gates)
    for b, s in enumerate(sets.tolist()):
        want = F.linear(call.x[b], call.weight, call.bias)
        if s >= 0:
            want = want + float(experts.scale[0]) * call.x[b] @ experts.down[s].mT @ experts.up[s].mT
        torch.testing.assert_close(y[b], want, rtol=1e-4, atol=1e-4)


def some_layers_each(g: Ground) -> None:
    whole = g.expert()
    parts = {
        "a": Expert({"first": whole.layers["first"]}),
        "b": Expert({"mix": whole.layers["mix"], "second": whole.layers["second"]}),
    }
    handle = patch(g.model, {"whole": whole})
    want = g.forward()
    handle.remove()
    handle = patch(g.model, parts, "constant")
    handle.remove()
    handle = patch(g.model, parts)
    assert torch.equal(g.forward(), want)
    handle.remove()


def live_tensors() -> int:
    gc.collect()
    # subclasses that answer isinstance by looking something up are nobody's leak
    return sum(type(thing) in (Tensor, torch.nn.Parameter) for thing in gc.get_objects())


def loads_and_unloads(g: Ground) -> None:
    def cycle(seed: int) -> None:
        handle = patch(g.model, {"a": g.expert(seed), "b": g.expert(seed + 1)}, "mole")
        g.forward()
        handle.swap("a", g.expert(seed + 2, rank=4))
        g.forward()
        handle.remove()

    cycle(0)
    cycle(1)
    before = live_tensors()
    for seed in range(30):
        cycle(seed)
    assert live_tensors() <= before


def autocast(g: Ground) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        handle = patch(g.model, {"a": g.expert()}, "mole")
        parameters = handle.experts_require_grad() + handle.gates_require_grad()
        with torch.autocast("cpu", dtype):
            loss = g.model(g.x).float().square().mean()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in parameters
        )
        handle.remove()
        g.model.zero_grad(set_to_none=True)


def dropout(g: Ground) -> None:
    gradients = []
    for model in twins((4,), lora_dropout=0.5):
        model.train()
        x = draw(3, K).requires_grad_()
        torch.manual_seed(0)
        model(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def patched_and_marked(g: Ground) -> None:
    patched(g)
    of_states.mark_compiled(g)


def rescaled(g: Ground) -> None:
    torch.compiler.reset()
    assert g.handle is not None
    graphs: list[object] = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(g.model, backend=counting)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for weight in (1.0, 0.25, 0.0, -2.0):
            g.handle.set_scales({"a": weight})
            torch.testing.assert_close(compiled(g.x), g.forward(), rtol=1e-5, atol=1e-6)
    assert graphs
    g.handle.set_scales({"a": 1.0})
    torch.compiler.reset()


def folded_nan(g: Ground) -> None:
    """A run that diverges leaves NaN in a patched expert; folding it into the weights is refused."""
    handle = patch(g.model, {"a": Expert({"first": LowRank(torch.ones(2, 6), torch.ones(10, 2))})})
    with torch.no_grad():
        for parameter in handle.expert_parameters():
            parameter.fill_(float("nan"))
    held = [parameter.clone() for parameter in g.model.parameters()]
    try:
        handle.fold()
    finally:
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(held, g.model.parameters()))
        handle.remove()


def nan_factors(g: Ground) -> dict[str, Tensor]:
    return {key: tensor.clone().fill_(float("nan")) for key, tensor in factors().items()}


def peer(number: int, act, outcome: str, *deeper: str, prepare=lambda g: None) -> Case:
    return Case(
        f"P{number:02d}-{act.__name__.replace('_', '-')}",
        SAYS[number],
        act=act,
        outcome=outcome,
        deeper=deeper,
        prepare=prepare,
    )


def named(name: str, act):
    act.__name__ = name
    return act


WIDTHS = [
    Problem(T=5, K=K, N=N, ranks=(2,), gate="none")
    for K, N in ((1, 1), (3, 7), (97, 1001), (1000, 33), (2570, 9))
]
SMALL = [Problem(T=9, ranks=(rank,), gate="local") for rank in (1, 2, 3, 4, 5, 6, 7, 31, 32, 33)]
KERNELS = "tests/kernels/test_forward.py::"
CASES = [
    peer(
        1,
        named("far_apart", lambda g: of_arguments.far_apart(g)),
        "64-bit offsets: right result past 2³¹ elements",
        KERNELS + "test_offsets_past_two_to_the_31",
        "tests/backends/test_cpu_extension.py::test_offsets_past_two_to_the_31",
    ),
    peer(
        2,
        named("widths", right(*WIDTHS)),
        "right at any width, 1 and primes included",
        "tests/kernels/test_widths.py::test_forward",
    ),
    peer(
        3,
        named("ranks_130_and_200", right(Problem(T=5, K=256, N=256, ranks=(130, 200)))),
        "right",
        "tests/backends/test_backends.py::test_forward",
    ),
    peer(
        4, every_row, "every row is what it is alone", KERNELS + "test_a_batch_of_two_is_two_batches_of_one"
    ),
    peer(
        5,
        skewed,
        "right, and it ends; the interpreter names a wait that nobody ends",
        "tests/kernels/test_routing.py::test_an_assignment_is_a_gather",
        "tests/kernels/test_interpreter.py::test_a_wait_that_nobody_ends_is_a_deadlock",
    ),
    peer(
        6, named("small_ranks", right(*SMALL)), "right at ranks 1 to 7 and 31 to 33", KERNELS + "test_forward"
    ),
    peer(
        7,
        named(
            "ranks_96_and_128",
            right(Problem(T=5, K=160, N=160, ranks=(96,)), Problem(T=5, K=160, N=160, ranks=(128, 96))),
        ),
        "right",
        KERNELS + "test_forward",
    ),
    peer(
        8,
        some_layers_each,
        "each layer holds the experts that name it",
        "tests/patching/test_plan.py::test_layers_experts_and_order",
    ),
    Case(
        "P09-zero-keys",
        SAYS[9],
        source=lambda g: factors("other.block"),
        error=MoleKeyError,
        words=("none of its 1 layers",),
        deeper=("tests/patching/test_plan.py::test_31_no_key_matches_is_always_an_error",),
    ),
    peer(10, loads_and_unloads, "as many live tensors after 30 cycles of patch, swap and remove as before"),
    Case(
        "P11-nan",
        SAYS[11],
        source=nan_factors,
        error=MoleValueError,
        words=("12 NaN and 0 Inf",),
        deeper=("tests/patching/test_fold.py::test_overflow_is_refused",),
    ),
    Case(
        "P11-fold",
        SAYS[11],
        act=folded_nan,
        error=MoleValueError,
        words=("fold, layer first", "would hold NaN"),
    ),
    peer(
        12,
        autocast,
        "finite gradients in each parameter's own dtype, in bf16 and fp16",
        "tests/peft/test_accelerate.py::test_autocast",
    ),
    peer(
        13,
        dropout,
        "with dropout in training PEFT's own forward runs: the same input gradient, bit for bit",
        "tests/peft/test_accelerate_aside.py::test_dropout_only_counts_in_training",
    ),
    peer(14, rescaled, "scales are tensors: nothing recompiles", prepare=patched_and_marked),
]
