"""Times of the candidates of one call on the GPU of this machine: verified first, then interleaved replays of
captured graphs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_kernels.backends import cuda, stacked, triton
from mole_kernels.dispatch.choose import HOPPER
from mole_kernels.dispatch.suite import SuiteCase
from mole_kernels.errors import printable
from mole_kernels.operands import Call, Experts, Gates, Need, Outputs, Saved

# calls in one graph, replays of each: interleaved, in alternating order
CALLS, ROUNDS, WARM = 10, 9, 3
# of the whole result against the stacked backend's: wrong code is off by far more, a 16-bit rounding by far
# less
TOLERANCE = 0.05


def measure(case: SuiteCase, names: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of "plain" and of each of `names`; and why one has none."""
    failed: dict[str, str] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    try:
        runs = programs(case, names)
        truth = [t.float() for t in runs["stacked"]()]
    except RuntimeError as reason:
        return {}, {"stacked": _short(reason)}
    for name, run in runs.items():
        try:
            if name != "plain" and (wrong := error(run(), truth)) > TOLERANCE:
                failed[name] = f"wrong by {wrong:.1%} against the stacked backend"
                continue
            graphs[name] = captured(run)
        except Exception as reason:
            # whatever a compiler or a launch raises: one candidate must not cost the others their times
            failed[name] = _short(reason)
    return timed(graphs), failed


def _short(reason: Exception) -> str:
    return f"{type(reason).__name__}: {printable(str(reason).partition(chr(10))[0], 200)}"


def programs(case: SuiteCase, names: list[str]) -> dict[str, Callable[[], list[Tensor]]]:
    """What to run for the plain layer and for each candidate, on the same random inputs."""
    p, device = case.problem, case.problem.device
    draw = torch.Generator(device).manual_seed(0)

    def new(*shape: int, dtype: torch.dtype = p.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=draw, device=device) * scale).to(dtype)

    x, weight, bias = new(p.B, p.T, p.K), new(p.N, p.K, scale=p.K**-0.5), new(p.N)
    down, up = new(p.S, p.R, p.K, scale=p.K**-0.5), new(p.S, p.N, p.R, scale=p.R**-0.5)
    scale = torch.ones(p.E, device=device)
    shape = (p.B, p.T, p.E) if case.use.by_token else (1, 1, p.E)
    gate = torch.rand(*shape, generator=draw, device=device) if p.given_gate else None
    token_weight, token_bias = (new(p.E, p.K, scale=p.K**-0.5), new(p.E)) if p.token_gate else (None, None)
    sample_weight = new(p.S, p.R, dtype=torch.float32) if p.sample_gate else None
    sample_bias = new(p.E, dtype=torch.float32) if p.sample_gate else None
    operands = Call(
        x,
        weight,
        bias,
        Experts(down, up, scale, p.ranks),
        Gates(gate, token_weight, token_bias, sample_weight, sample_bias),
        case.use.save or case.use.backward,
    )
    if not case.use.backward:
        runs: dict[str, Callable[[], list[Tensor]]] = {"plain": lambda: [F.linear(x, weight, bias)]}
        for name in names:
            forward = stacked.forward if name == "stacked" else _way(name)
            runs[name] = lambda forward=forward: list(forward(operands))  # type: ignore[misc]
        return runs
    dy = new(p.B, p.T, p.N)
    saved = Saved(*stacked.forward(operands)[1:])
    # what training experts and MoLE's gates asks for; given gates and scales are constants there
    need = Need(
        x=True,
        down=True,
        up=True,
        scale=False,
        gate=False,
        token_weight=p.token_gate,
        token_bias=p.token_gate,
        sample_weight=p.sample_gate,
        sample_bias=p.sample_gate,
    )
    runs = {"plain": lambda: [dy @ weight]}
    for name in names:
        run, way = (cuda.backward if name in HOPPER else triton.backward), name.removeprefix("cuda_")
        runs[name] = lambda run=run, way=way: list(run(operands, saved, dy, need, way=way))  # type: ignore[misc]
    return runs


def _way(name: str) -> Callable[[Call], Outputs]:
    if name in HOPPER:
        return lambda call: cuda.forward(call, way=name.removeprefix("cuda_"))
    return lambda call: triton.forward(call, way=name)


def error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative error of an output; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(got, truth):
        if b.numel():
            off = ((a.float() - b).norm() / b.norm().clamp_min(1e-30)).item()
            worst = max(worst, off if off == off else float("inf"))
    return worst


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """CALLS calls in one graph, after warming up on a stream of their own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph


def timed(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Median microseconds of a call; the graphs take turns, every second round backwards."""
    times_of: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(ROUNDS + 1):
        for name in graphs if i % 2 == 0 else reversed(graphs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if i:
                # the first round warms clocks and caches
                times_of[name].append(begin.elapsed_time(end) * 1e3 / CALLS)
    return {name: statistics.median(times) for name, times in times_of.items()}
