"""Every backend and every way held to float64 on this device, by the rules of `rules.py`: an item for each
check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.cases import DTYPES
from benchmarks.device import poisoned
from benchmarks.gpu import rules
from benchmarks.gpu.context import Context, Item, Outcome
from mole_kernels.attention.regional import regional_attention, regional_attention_ref
from mole_kernels.backends.select import BACKENDS
from mole_kernels.functional import gated_lora_linear
from mole_kernels.methods.mix_of_show.regions import Region, shares
from tests import cases as problems
from tests.truth import Case, CaseCall

# roundings on the way to y and to a gradient: h, its gated form, the base and the sum; twice as many
# backwards
ROUNDINGS = {"reference": (1, 4)}
USUAL = (4, 8)
BY_NAME = {str(case): case for case in problems.CASES}
EXPERTS = Case(ranks=(3, 8, 5), gate="local", base=False)
CONSTANT = replace(EXPERTS, gate="none")
INTEGERS = Case(K=24, N=16, ranks=(3, 2), gate="none")
LARGER = (
    Case(B=2, T=300, K=320, N=640, ranks=(16, 16)),
    Case(B=2, T=300, K=320, N=640, ranks=(16, 16), gate="none"),
    Case(B=1, T=1100, K=640, N=384, ranks=(64, 64)),
)
CAPTURED = Case(B=2, T=70, K=64, N=96)
BY_NAME |= {str(case): case for case in LARGER}
SHORT = {dtype: name for name, dtype in DTYPES.items()}


def items(device: str, quick: bool = False) -> Iterator[Item]:
    """All checks, the most important first: the dispatcher's choice in bfloat16, then each way, then other
    dtypes, then plain torch.
    """
    compiled = ours.compiled_backends()
    automatic = (
        compiled
        if device == "cuda"
        else ["cpu", *(name for name in compiled if name not in ("triton", "cuda"))]
    )
    forced = (
        [name for name, b in BACKENDS.items() if isinstance(b, ours.Forced)]
        if device == "cuda" or ours.interpreting()
        else []
    )
    plain = ["stacked", "reference"]
    few, every = [*problems.GATE_KINDS, *LARGER], list(BY_NAME.values())
    if quick:
        few = every = [problems.GATE_KINDS[0], problems.GATE_KINDS[3], LARGER[0]]
    small = [*automatic, *forced]
    yield from _rules(automatic, ("bf16",), few)
    for backend in small:
        for kind in ("integers", "experts", "graph", "nan", "faults"):
            yield {"id": f"{kind} {backend} bf16", "kind": kind, "backend": backend, "dtype": "bf16"}
    yield from (
        {"id": f"regional {dtype} D{D}", "kind": "regional", "dtype": dtype, "D": D}
        for dtype in ("bf16", "fp32")
        for D in (40, 128, 160)
    )
    yield from _rules(forced, ("bf16",), few)
    yield from _rules(automatic, ("bf16",), every)
    yield from _rules(automatic, ("fp32", "fp16"), few)
    # Hopper's ways are compiled already: their checks cost next to nothing
    yield from _rules(
        [name for name in forced if has_backward(name) or name.startswith("cuda:")], ("bf16",), every
    )
    yield from _rules(forced, ("fp32", "fp16"), problems.GATE_KINDS[:1] if quick else problems.GATE_KINDS[:4])
    yield from _rules(plain, ("bf16", "fp32"), few)
    if not quick:
        if device == "cuda":
            yield from (
                {"id": f"offsets {b} bf16", "kind": "offsets", "backend": b, "dtype": "bf16"} for b in small
            )
        # what the others share their kernels with has been through these: left out where time runs short
        rest = [
            *_rules(automatic, ("fp32", "fp16"), every),
            *_rules(forced, ("bf16",), every),
            *_rules(forced, ("fp32", "fp16"), few),
        ]
        yield from ({**item, "extra": True} for item in rest)


def unique(found: Iterator[Item]) -> list[Item]:
    """The first of those with the same id."""
    return list({item["id"]: item for item in reversed(list(found))}.values())[::-1]


def _rules(backends: Any, dtypes: tuple[str, ...], cases: list[Case]) -> Iterator[Item]:
    for dtype in dtypes:
        for case in cases:
            for backend in backends:
                yield {
                    "id": f"rules {backend} {dtype} {case}",
                    "kind": "rules",
                    "backend": backend,
                    "dtype": dtype,
                    "case": str(case),
                }


def moved(t: Tensor, kind: str) -> Tensor:
    """The same strides and offset on the device."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(kind)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def on_device(call: CaseCall, kind: str) -> CaseCall:
    there = call.with_tensors({name: moved(t, kind) for name, t in call.tensors().items()})
    experts = there.experts._replace(
        **{
            n: t.to(kind)
            for n, t in there.experts._asdict().items()
            if isinstance(t, Tensor) and n not in call.tensors()
        }
    )
    bias = None if call.bias is None else moved(call.bias, kind)
    return replace(there, weight=moved(call.weight, kind), bias=bias, experts=experts)


def run(call: CaseCall, backend: str) -> Tensor:
    return gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates, backend=backend)


def roundings(backend: str, case: Case) -> tuple[int, int]:
    forward, backward = ROUNDINGS.get(backend, USUAL)
    # the roundings of one vector h, or of few outputs, do not average out
    return (forward if min(case.K, case.N) > 1 or forward == 1 else 2 * forward), backward


def usable(case: Case, dtype: torch.dtype, item: Item, context: Context, out: Outcome) -> bool:
    reason = BACKENDS[item["backend"]].reason_against(
        replace(case.problem(dtype), device=context.device.kind)
    )
    if reason is not None:
        out.refused[item["backend"]] = reason
    return reason is None


def check_rules(item: Item, context: Context) -> Outcome:
    """G1 to G4 of y and of the low-rank part alone; G7; the same on another stream; all gradients."""
    out, backend, dtype, case = Outcome(), item["backend"], DTYPES[item["dtype"]], BY_NAME[item["case"]]
    if not usable(case, dtype, item, context, out):
        return out
    for variant in (case, case.alone()):
        call = variant.make(dtype)
        there = on_device(call, context.device.kind)
        context.device.poison()
        with poisoned():
            y, again, aside = (
                run(there, backend),
                run(there, backend),
                context.device.aside(lambda there=there: run(there, backend)),
            )
        context.device.sync()
        part = "forward" if variant.base else "low-rank part"
        eager = run(call, "stacked")
        out.judge(
            item,
            backend,
            part,
            rules.broken(y.cpu(), call.truth(), dtype, roundings(backend, case)[0], eager),
        )
        # two runs of torch's own products may differ where its library picks a split by the address
        if backend not in ("stacked", "reference"):
            out.judge(item, backend, f"{part}, G7", [] if rules.same(y, again) else ["G7: two runs differ"])
            out.judge(
                item,
                backend,
                f"{part}, another stream",
                [] if rules.same(y, aside) else ["differs on another stream"],
            )  # type: ignore[arg-type]
    check_gradients(item, context, out, case.make(dtype), dtype, roundings(backend, case)[1])
    return out


def check_gradients(
    item: Item, context: Context, out: Outcome, call: CaseCall, dtype: torch.dtype, most: int
) -> None:
    backend = item["backend"]
    if BACKENDS[backend].reason_against(
        replace(call.case.problem(dtype), device=context.device.kind)
    ) or not has_backward(backend):
        return
    there = on_device(call, context.device.kind)
    leaves = {name: t.detach().requires_grad_() for name, t in there.tensors().items()}
    dy = torch.randn(*call.x.shape[:2], call.weight.shape[0], generator=torch.Generator().manual_seed(7)).to(
        dtype
    )
    with poisoned():
        y = run(there.with_tensors(leaves), backend)
        got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(context.device.kind))))
    context.device.sync()
    truth, terms = call.truth_grads(dy)
    for name, t in truth.items():
        # a handful of numbers, each a sum over all tokens that may cancel: judged against the size of its
        # terms
        size = max(t.norm().item(), 2 * terms if t.numel() == call.case.E else 0)
        out.judge(item, backend, f"d{name}", rules.broken_gradient(got[name].cpu(), t, dtype, size, most))


def has_backward(backend: str) -> bool:
    """A way whose backward is another one's is checked there."""
    found = BACKENDS[backend]
    return not isinstance(found, ours.Forced) or found.has_backward


def saves_nothing(backend: str) -> bool:
    return backend.endswith(":merge")


def check_experts(item: Item, context: Context) -> Outcome:
    """G5: each expert alone, by one-hot gates."""
    out, backend, dtype = Outcome(), item["backend"], DTYPES[item["dtype"]]
    case = CONSTANT if saves_nothing(backend) else EXPERTS
    if not usable(replace(case, gate=f"{case.gate}+constant"), dtype, item, context, out):
        return out
    for e in range(case.E):
        call = case.make(dtype)
        call = replace(call, gates=call.gates._replace(gate=torch.eye(case.E)[e][None, None]))
        with poisoned():
            y = run(on_device(call, context.device.kind), backend)
        context.device.sync()
        out.judge(
            item,
            backend,
            f"expert {e} alone",
            rules.broken(y.cpu(), call.truth(), dtype, roundings(backend, case)[0]),
        )
    return out


def integers(dtype: torch.dtype) -> CaseCall:
    """Numbers so small that every partial sum is exact."""
    call = INTEGERS.make(dtype, integers=True)
    down = torch.zeros_like(call.experts.down)
    down[..., ::8] = 1
    weight = torch.where(torch.arange(INTEGERS.K) % 6 == 0, call.weight.sign(), 0)
    return replace(call, weight=weight, experts=call.experts._replace(down=down, up=call.experts.up.sign()))


def check_integers(item: Item, context: Context) -> Outcome:
    """G6: bit-equal."""
    out, dtype = Outcome(), DTYPES[item["dtype"]]
    if not usable(INTEGERS, dtype, item, context, out):
        return out
    call = integers(dtype)
    with poisoned():
        y = run(on_device(call, context.device.kind), item["backend"])
    wrong = int((y.cpu().double() != call.truth()).sum())
    out.judge(
        item, item["backend"], "integers", [f"G6: {wrong} of {y.numel()} numbers differ"] if wrong else []
    )
    return out


def check_graph(item: Item, context: Context) -> Outcome:
    """A captured forward, and a captured step of training, replayed on changed inputs and changed gates: what
    a fresh call gives.
    """
    out, backend, dtype = Outcome(), item["backend"], DTYPES[item["dtype"]]
    case = replace(
        CAPTURED, gate="none" if saves_nothing(backend) else "local" if "recompute" in backend else "both"
    )
    if not usable(case, dtype, item, context, out):
        return out
    second = on_device(replace(case, seed=1).make(dtype), context.device.kind)
    for training in (False, True):
        if training and not has_backward(backend):
            continue
        call = on_device(case.make(dtype), context.device.kind)
        leaves = {name: t.detach().requires_grad_(training) for name, t in call.tensors().items()}
        held: list[Tensor] = []
        step = _step(call.with_tensors(leaves), backend, training, held)
        replay = context.device.captured(step)
        with torch.no_grad():
            for name, t in second.tensors().items():
                leaves[name].copy_(t)
        for _ in range(2):
            replay()
        context.device.sync()
        fresh: list[Tensor] = []
        new = {name: t.detach().clone().requires_grad_(training) for name, t in second.tensors().items()}
        # the base stays the captured one's
        _step(
            replace(second.with_tensors(new), weight=call.weight, bias=call.bias), backend, training, fresh
        )()
        context.device.sync()
        equal = len(held) == len(fresh) and all(rules.same(a, b) for a, b in zip(held, fresh))
        stage = "graph of a training step" if training else "graph"
        out.judge(
            item, backend, stage, [] if equal else ["a replay on changed inputs differs from a fresh call"]
        )
    return out


def _step(call: CaseCall, backend: str, training: bool, held: list[Tensor]) -> Callable[[], None]:
    """y, and with `training` all gradients, into `held`."""

    def step() -> None:
        with torch.set_grad_enabled(training):
            y = run(call, backend)
            grads = (
                torch.autograd.grad(y, list(call.tensors().values()), torch.ones_like(y)) if training else ()
            )
        held[:] = [y.detach(), *grads]

    return step


def check_nan(item: Item, context: Context) -> Outcome:
    """G1: a NaN in one token's gate makes NaN of that token's row only; one in x, of its row, or its sample's
    where gates pool.
    """
    out, backend, dtype = Outcome(), item["backend"], DTYPES[item["dtype"]]
    pools = "recompute" not in backend and not saves_nothing(backend)
    case = Case(
        T=20, ranks=(3, 20), gate="mask+pooled" if pools else "mask" if not saves_nothing(backend) else "none"
    )
    if not usable(case, dtype, item, context, out):
        return out
    call = case.make(dtype)
    x = call.x.clone()
    x[0, 3, 5] = float("nan")
    rows = torch.zeros(2, 20, dtype=torch.bool)
    rows[0, 3] = True
    if call.gates.gate is not None:
        gate = call.gates.gate.expand(2, 20, 2).clone()
        gate[1, 7, 1], rows[1, 7] = float("nan"), True
        call = replace(call, gates=call.gates._replace(gate=gate))
    rows[0] |= pools
    y = run(on_device(replace(call, x=x), context.device.kind), backend).cpu()
    right = torch.equal(y.isnan(), rows[..., None].expand(y.shape))
    out.judge(item, backend, "NaN", [] if right else ["G1: NaN spreads elsewhere than it should"])
    return out


FAULTS: dict[str, Callable[[CaseCall], CaseCall]] = {
    "a scale 5 % off": lambda c: replace(c, experts=c.experts._replace(scale=c.experts.scale * 1.05)),
    "experts swapped": lambda c: replace(c, experts=c.experts._replace(scale=c.experts.scale.flip(0))),
    "a lost K tail": lambda c: replace(c, experts=c.experts._replace(down=_without(c.experts.down, -1, 8))),
    "one rank column lost": lambda c: replace(
        c, experts=c.experts._replace(up=_without(c.experts.up, -1, 1))
    ),
    "one element zeroed": lambda c: replace(c, experts=c.experts._replace(up=_element(c.experts.up))),
    "one wrong gate row": lambda c: replace(c, gates=c.gates._replace(gate=_row(c))),
    "gates in fp8": lambda c: replace(c, gates=c.gates._replace(gate=_fp8(c))),
}


def _without(t: Tensor, axis: int, last: int) -> Tensor:
    t = t.clone()
    t.narrow(axis, t.shape[axis] - last, last).zero_()
    return t


def _element(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[t.abs().argmax()] = 0
    return t


def _row(c: CaseCall) -> Tensor:
    gate = c.gates.gate.expand(c.x.shape[0], c.x.shape[1], -1).clone()  # type: ignore[union-attr]
    gate[0, 5] = gate[0, 5].flip(-1) + 0.25
    return gate


def _fp8(c: CaseCall) -> Tensor:
    return c.gates.gate.to(torch.float8_e4m3fn).to(c.gates.gate.dtype)  # type: ignore[union-attr]


def check_faults(item: Item, context: Context) -> Outcome:
    """G8: planted faults, each of which the rules must notice on this device."""
    out, backend, dtype = Outcome(), item["backend"], DTYPES[item["dtype"]]
    case = Case(T=20, K=65, N=48, gate="none" if saves_nothing(backend) else "mask", base=False)
    if not usable(case, dtype, item, context, out):
        return out
    call = case.make(dtype)
    for fault, plant in FAULTS.items():
        if call.gates.gate is None and "gate" in fault:
            continue
        y = run(on_device(plant(call), context.device.kind), backend)
        seen = rules.broken(y.cpu(), call.truth(), dtype, roundings(backend, case)[0])
        out.judge(item, backend, f"fault: {fault}", [] if seen else ["G8: the rules did not notice it"])
    return out


def check_offsets(item: Item, context: Context) -> Outcome:
    """A view of x whose last row begins beyond 2³¹ elements."""
    out, dtype, case = Outcome(), DTYPES[item["dtype"]], Case(B=1, T=3, K=16, N=8, ranks=(4,), gate="none")
    step = (1 << 30) + 64
    if not usable(case, dtype, item, context, out):
        return out
    if context.device.memory() < 3 * step * 2 * 2:
        out.refused[item["backend"]] = "too little memory for a tensor of 2^31 elements"
        return out
    call = case.make(dtype)
    storage = torch.empty(2 * step + 64, dtype=dtype, device=context.device.kind)
    x = storage.as_strided((1, 3, 16), (0, step, 1))
    x.copy_(call.x)
    y = run(replace(on_device(call, context.device.kind), x=x), item["backend"])
    out.judge(item, item["backend"], "offsets past 2^31", rules.broken(y.cpu(), call.truth(), dtype, 4))
    return out


def check_regional(item: Item, context: Context) -> Outcome:
    """Regional attention, overlapping regions and texts of different lengths, against float64; two runs are
    equal.
    """
    out, dtype = Outcome(), DTYPES[item["dtype"]]
    g = torch.Generator().manual_seed(0)
    B, H, D, L, (h, w) = 2, 3, item["D"], 77, (13, 10)
    regions = [Region("x", box=box) for box in ((0, 0, 0.75, 0.75), (0.25, 0.25, 1, 1), (0.5, 0, 1, 1))]
    q = torch.randn(B, H, h * w, D, generator=g).to(dtype)
    k, v = (torch.randn(B, 4, H, L, D, generator=g).to(dtype) for _ in "kv")
    table, lengths = (
        shares(regions, h, w).expand(B, -1, -1).contiguous(),
        torch.randint(1, L + 1, (B, 4), generator=g),
    )
    backend = "triton" if context.device.kind == "cuda" else "gathered"
    there = [t.to(context.device.kind) for t in (q, k, v, table, lengths)]
    with poisoned():
        y, again = (regional_attention(*there, backend=backend) for _ in range(2))
    context.device.sync()
    truth = regional_attention_ref(q.double(), k.double(), v.double(), table.double(), lengths)
    eager = regional_attention(q, k, v, table, lengths, backend="gathered")
    name = f"{backend} regional"
    out.judge(
        item,
        name,
        "forward",
        rules.broken(y.cpu().flatten(1, 2), truth.flatten(1, 2), dtype, 4, eager.flatten(1, 2)),
    )
    out.judge(item, name, "G7", [] if rules.same(y, again) else ["G7: two runs differ"])
    return out


HANDLERS = {
    "regional": check_regional,
    "rules": check_rules,
    "experts": check_experts,
    "integers": check_integers,
    "graph": check_graph,
    "nan": check_nan,
    "faults": check_faults,
    "offsets": check_offsets,
}
