"""One measured case: every method built, verified against float64, counted, timed (hot, cold, launched one by
one), and made rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.cases import DTYPES, GATES, Case
from benchmarks.device import ROTATED, Run, poisoned
from benchmarks.gpu import clock, rules
from benchmarks.gpu.clock import Timed
from benchmarks.gpu.context import Context, Item, Outcome, short
from benchmarks.gpu.methods import AGAIN, COLD, PLAIN, STREAM, TRUTHS, Method, methods, problem_of
from benchmarks.gpu.training import step_of
from benchmarks.layer import Layer
from mole_kernels.errors import MoleBackendError

# of a peer's result; ours are held to the rules. PEFT and the eager layer round every expert's output
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}
ROUNDINGS = 4
MOST_COPIES = 48
# nothing outlasts this many bytes of copies, however small a layer is
MOST_BYTES = 4 << 30


@dataclass
class Work:
    """A case in progress: methods that are right, their modules, and what was found out about each."""

    item: Item
    case: Case
    layer: Layer
    context: Context
    out: Outcome
    chosen: dict[str, Method]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def attempt(self, name: str, stage: str, run: Callable[[], Any]) -> Any:
        """run(), or None and a failure that names the method; the others go on."""
        self.context.at(name)
        try:
            return run()
        except MoleBackendError as refusal:
            # a way that finds out only at the call that it cannot
            self.out.refused[name] = short(refusal)
            return None
        # a compiler, a launch or a peer's own code may raise anything
        except Exception as error:
            self.out.fail(self.item, name, stage, error)
            return None


def case_of(item: Item) -> Case:
    fields = dict(item["case"])
    fields["counts"] = tuple((model, count) for model, count in fields.get("counts", ()))
    return Case(**fields)


def check(item: Item, context: Context) -> Outcome:
    """The rows of one case. A wrong method gets a row that says so, and no time."""
    out, case = Outcome(), case_of(item)
    found = methods(case, context, bool(item.get("compile")))
    wanted = item.get("methods")
    for name, method in found.items():
        if method.refuses is not None:
            out.refused[name] = method.refuses
    usable = {
        n: m
        for n, m in found.items()
        if m.refuses is None and n not in context.skip and (wanted is None or n in (PLAIN, *wanted))
    }
    with torch.no_grad():
        layer = Layer.make(case, device=context.device.kind)
    work = Work(item, case, layer, context, out, usable)
    if case.mode == "training":
        prepare_training(work)
    else:
        with torch.no_grad():
            prepare_forward(work)
    if PLAIN not in work.runs:
        return out
    if item["kind"] == "warm":
        return out
    with torch.set_grad_enabled(case.mode == "training"):
        hot(work)
        if item.get("cold") and case.mode == "forward":
            cold(work)
        if item.get("stream", True):
            stream(work)
    return out


def prepare_forward(work: Work) -> None:
    truths = {name: truth(work.layer) for name, truth in TRUTHS.items()}
    right = work.layer.truth()
    for name, method in work.chosen.items():
        module = work.attempt(name, "build", lambda method=method: method.make(work.layer).eval())
        if module is None:
            continue
        truth = truths.get(name, right)
        facts = work.attempt(
            name, "verify", lambda module=module, truth=truth, name=name: verified(work, module, truth, name)
        )
        if facts is None:
            continue
        work.facts[name] = facts
        if facts["wrong"]:
            work.out.fail(work.item, name, "verify", facts["wrong"])
            work.out.rows.append(row(work, name, None, {}, "hot", "graph"))
            continue
        work.out.passed += 1
        work.modules[name], work.runs[name] = module, (lambda module=module: module(work.layer.x))
        inspect(work, name)


def prepare_training(work: Work) -> None:
    """Each method on leaves of its own; dx, and ours in all, against float64."""
    for name in work.chosen:
        made = work.attempt(
            name, "build", lambda name=name: step_of(name, work.case, work.context.device.kind)
        )
        if made is None:
            continue
        facts = work.attempt(name, "verify", lambda made=made, name=name: verified_step(work, made, name))
        if facts is None:
            continue
        work.facts[name] = facts
        if facts["wrong"]:
            work.out.fail(work.item, name, "verify", facts["wrong"])
            work.out.rows.append(row(work, name, None, {}, "hot", "graph"))
            continue
        work.out.passed += 1
        work.runs[name] = made.run
        inspect(work, name)


def verified(work: Work, module: nn.Module, truth: Tensor, name: str) -> dict[str, Any]:
    """Errors of the whole and of the low-rank part alone; `wrong` says what breaks the rules, or is empty."""
    case, method = work.case, work.chosen[name]
    work.context.device.poison()
    with poisoned():
        y = module(work.layer.x)
    work.context.device.sync()
    if method.ours:
        wrong = "; ".join(rules.broken(y, truth, DTYPES[case.dtype], ROUNDINGS))
    else:
        error = rules.relative(y, truth)
        wrong = (
            "" if error <= ALLOWED[case.dtype] else f"relative error {error:.2e} > {ALLOWED[case.dtype]:.0e}"
        )
    facts: dict[str, Any] = {"err": rules.relative(y, truth), "wrong": wrong}
    if name not in (PLAIN, AGAIN, "merged") and not wrong:
        # the experts' share, from the whole: the base's own rounding is in it, so it tells gross faults;
        # `verify` has W = 0
        share = truth - work.layer.plain_truth()
        facts["share"] = (share.norm() / truth.norm()).item()
    return facts


def verified_step(work: Work, made: Any, name: str) -> dict[str, Any]:
    with poisoned():
        got = made.run()
    work.context.device.sync()
    errors = [rules.relative(g, t) for g, t in zip(got, made.truth())]
    allowed = 1e-4 if work.case.dtype == "fp32" else 0.05
    wrong = (
        "" if max(errors) <= allowed else f"relative error of a gradient {max(errors):.2e} > {allowed:.0e}"
    )
    return {"err": max(errors), "wrong": wrong}


def inspect(work: Work, name: str) -> None:
    """Launches and extra memory of one call."""
    if work.item["kind"] == "warm" or name == AGAIN:
        return
    device, run, facts = work.context.device, work.runs[name], work.facts[name]
    facts["peak"] = work.attempt(name, "memory", lambda: device.peak(run))
    if name != "ours" and not work.item.get("launches"):
        return
    try:
        facts["launches"] = device.launches(run)
    # where the profiler may not look, the count is missing and nothing is wrong
    except Exception as error:
        work.out.refused["launches"] = short(error)


def captured(work: Work, name: str, run: Run) -> Run | None:
    """A graph, replayed once on poisoned outputs: all of them must be written."""
    held: list[Any] = []

    def keep() -> None:
        held[:] = [run()]

    def make() -> Run:
        replay = work.context.device.captured(keep)
        outputs = [
            t for t in (held[0] if isinstance(held[0], (tuple, list)) else held) if isinstance(t, Tensor)
        ]
        for t in outputs:
            t.detach().fill_(math.nan)
        replay()
        work.context.device.sync()
        now = [t for t in (held[0] if isinstance(held[0], (tuple, list)) else held) if isinstance(t, Tensor)]
        if any(bool(t.isnan().any()) for t in now):
            raise ArithmeticError("a replay leaves outputs unwritten, or writes NaN")
        return replay

    return work.attempt(name, "graph", make)


def hot(work: Work) -> None:
    each = clock.calls(floor_us(work.case, work.context.ceilings))
    single = clock.guarded(work.runs, lambda name, run: captured(work, name, run))
    if each == 1 or work.context.device.kind == "cpu":
        each, graphs = 1, single
    else:
        again = {name: clock.repeated(work.runs[name], each) for name in single}
        graphs = clock.guarded(
            again, lambda name, run: work.attempt(name, "graph", lambda: work.context.device.captured(run))
        )
    add_rows(
        work,
        clock.measured(work.context.device, graphs, each, work.context.seconds) if PLAIN in graphs else {},
        "hot",
        "graph",
    )


def stream(work: Work) -> None:
    """Launched one by one, as eager torch does it: host time included."""
    chosen = {name: clock.repeated(run, 10) for name, run in work.runs.items() if name in STREAM}
    add_rows(work, clock.measured(work.context.device, chosen, 10, work.context.seconds / 4), "hot", "stream")


def cold(work: Work) -> None:
    """Every call finds its inputs outside the cache: copies of them, used in turn, hold at least three times
    its size.
    """
    device, case = work.context.device, work.case
    size = case.bytes_min
    copies = max(2, min(MOST_COPIES, math.ceil(ROTATED * device.cache() / size), MOST_BYTES // size))
    if copies * size < ROTATED * device.cache():
        # too small to fill it: no claim about a cold cache is made
        return
    layers = [work.layer, *(Layer.make(case, seed, device.kind) for seed in range(1, copies))]
    runs: dict[str, Run] = {}
    for name in [n for n in COLD if n in work.runs]:
        modules = work.attempt(
            name,
            "cold",
            lambda name=name: [work.modules[name], *(again(work, name, layer) for layer in layers[1:])],
        )
        if modules is not None:

            def rotate(modules: list[nn.Module] = modules) -> None:
                for module, layer in zip(modules, layers):
                    module(layer.x)

            runs[name] = rotate
    graphs = clock.guarded(
        runs, lambda name, run: work.attempt(name, "cold graph", lambda: device.captured(run))
    )
    if PLAIN in graphs:
        add_rows(work, clock.measured(device, graphs, copies, work.context.seconds / 2), "cold", "graph")


def again(work: Work, name: str, layer: Layer) -> nn.Module:
    """The method on another copy; LoRAFusion keeps the tile that it found."""
    if name == "lorafusion":
        from benchmarks.lorafusion import LoRAFusion

        return LoRAFusion(layer, tile=work.modules[name].tile)  # type: ignore[arg-type]
    return work.chosen[name].make(layer).eval()


def floor_us(case: Case, ceilings: dict[str, float], base: bool = False) -> float:
    """The least time by this run's own ceilings: operations over the product's rate, bytes over the
    copy's.
    """
    rate, copy = ceilings.get("bf16_tflops", 800.0), ceilings.get("copy_gb_s", 4000.0)
    flops, size = (case.base_flops, case.base_bytes) if base else (case.flops, case.bytes_min)
    return max(flops / rate * 1e-6, size / copy * 1e-3)


def add_rows(work: Work, times: dict[str, Timed], cache: str, launch: str) -> None:
    work.out.rows += [row(work, name, timed, times, cache, launch) for name, timed in times.items()]


def row(
    work: Work, name: str, timed: Timed | None, times: dict[str, Timed], cache: str, launch: str
) -> dict[str, Any]:
    """One line of the result file; a wrong method's has no time."""
    case, facts = work.case, work.facts.get(name, {})
    base = name in (PLAIN, AGAIN)
    flops, floor = (case.base_flops if base else case.flops), floor_us(case, work.context.ceilings, base)
    made: dict[str, Any] = {
        "id": str(case),
        "op": "gated_lora_linear",
        "model": case.model,
        "counts": dict(case.counts),
        "dtype": case.dtype,
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "B": case.B,
        "E": case.E,
        "ranks": [case.r] * case.E,
        "gate": GATES[case.gate],
        "mode": case.mode,
        "cache": cache,
        "launch": launch,
        "method": name,
        "flop_ratio": round(case.flop_ratio, 4),
        "flops": flops,
        "bytes_min": case.base_bytes if base else case.bytes_min,
        "err": facts.get("err"),
        "peak_mem": facts.get("peak"),
        "launches": facts.get("launches"),
    }
    if facts.get("wrong"):
        return made | {"wrong": facts["wrong"], "us": None, "ratio": None, "roofline": None}
    assert timed is not None
    made["us"] = dict(zip(("p20", "p50", "p80"), (round(t, 3) for t in timed.us)))
    made["rounds"] = len(timed.samples)
    made["ratio"] = {}
    for peer, key in (
        (PLAIN, "plain"),
        ("eager", "eager"),
        ("stacked", "stacked"),
        ("compiled", "compile"),
        ("lorafusion", "lorafusion"),
    ):
        if peer in times:
            low, middle, high = timed.to(times[peer])
            made["ratio"][key] = round(middle, 4)
            if key == "plain":
                made["ratio"] |= {"p20": round(low, 4), "p80": round(high, 4)}
    if AGAIN in times:
        made["aa"] = round(times[AGAIN].to(times[PLAIN])[1], 4)
    made["roofline"] = round(floor / timed.us[1], 4)
    made["tflops"] = round(flops / timed.us[1] * 1e-6, 3)
    return made | predicted(work, name)


def predicted(work: Work, name: str) -> dict[str, Any]:
    """What the dispatcher's model said beforehand, and which way it took: predictions stand beside
    outcomes.
    """
    if (
        work.case.mode != "forward"
        or work.context.device.kind != "cuda"
        or (name not in ("ours", PLAIN) and ":" not in name)
    ):
        return {}
    from mole_kernels.dispatch.choose import candidates_of, choose
    from mole_kernels.dispatch.device import present
    from mole_kernels.dispatch.tables import for_device

    try:
        choice = choose(
            problem_of(work.case, "cuda"), present(), for_device(present()), names=candidates_of(present())
        )
        if name == PLAIN:
            return {"predicted_us": round(choice.plain, 2)}
        way = choice.name if name == "ours" else ours.candidate(name)
        said = choice.of(way).predicted
        return {"predicted_us": None if said is None else round(said, 2)} | (
            {"choice": choice.name} if name == "ours" else {}
        )
    # a prediction is a remark; that it cannot be had must not cost the measurement
    except Exception as error:
        return {"predicted_us": None, "remark": short(error)}


HANDLERS = {"layer": check, "warm": check}
