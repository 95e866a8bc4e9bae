"""One case: check every method against float64, then time them all against the plain layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.layer import Layer
from benchmarks.peers import methods
from benchmarks.timing import Budget, Times, paired
from mole_kernels.backends import cpu
from mole_kernels.operands import Call, Need, Saved

# relative error that a method of this dtype may have; ours is held to less by the tests
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def verify(case: Case, layer: Layer, modules: dict[str, nn.Module]) -> dict[str, float]:
    """Relative error of each method against float64. PEFT has no gates and is checked against the ungated
    sum.
    """
    truth, errors = layer.truth(), {}
    for name, module in modules.items():
        if name == "plain":
            right = layer.plain_truth()
        elif name == "peft":
            right = layer.ungated_truth()
        else:
            right = truth
        errors[name] = error(module(layer.x), right)
        if not errors[name] <= ALLOWED[case.dtype]:
            raise SystemExit(
                f"{case}: {name} is wrong: relative error {errors[name]:.2e} > {ALLOWED[case.dtype]:.0e}; nothing is timed"
            )
    return errors


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """The rows of one case, one for each method."""
    layer = Layer.make(case)
    return forward(case, layer, seconds) if case.mode == "forward" else backward(case, layer, seconds)


def forward(case: Case, layer: Layer, seconds: float) -> list[dict[str, Any]]:
    modules = methods(layer)
    with torch.no_grad():
        errors = verify(case, layer, modules)
        runs: dict[str, Callable[[], object]] = {
            name: (lambda m=module: m(layer.x)) for name, module in modules.items()
        }
        close = {"plain": runs["plain"], "plain again": runs["plain"]} | {
            n: runs[n] for n in ("ours", "operator", "stacked")
        }
        far = {"plain": runs["plain"]} | {n: runs[n] for n in ("eager", "peft") if n in runs}
        times = paired(far, Budget(seconds * 0.25, least=7, most=15)) | paired(close, Budget(seconds * 0.75))
    return [row(case, name, t, errors.get(name)) for name, t in times.items()]


def backward(case: Case, layer: Layer, seconds: float) -> list[dict[str, Any]]:
    """Gradients of x, A, B and the gates, against the plain layer's gradient of x; ours through autograd,
    graph kept.
    """
    modules = methods(layer)
    layer.experts.requires_grad_(True)
    layer.gate.requires_grad_(True)
    x = layer.x.requires_grad_(True)
    dy = torch.randn(2, case.M // 2, case.N).to(x.dtype)
    leaves = [
        x,
        layer.experts.down,
        layer.experts.up,
        layer.gate.phi,
        layer.gate.phi_bias,
        layer.gate.head_bias,
    ]
    outputs = {name: modules[name](x) for name in ("plain", "ours")}
    outputs["eager"] = eager_output(layer, x)

    def gradients(name: str) -> tuple[Tensor, ...]:
        wanted = [x] if name == "plain" else leaves
        return torch.autograd.grad(outputs[name], wanted, dy, retain_graph=True)

    runs: dict[str, Callable[[], object]] = {name: (lambda n=name: gradients(n)) for name in outputs}
    ours, peers = gradients("ours"), gradients("eager")
    allowed = 0.05 if case.dtype == "bf16" else 1e-4
    for mine, theirs in list(zip(ours, peers))[:3]:
        if error(mine, theirs.double()) > allowed:
            raise SystemExit(
                f"{case}: a gradient is off by {error(mine, theirs.double()):.1e} from the eager layer's; nothing is timed"
            )
    runs["operator"] = operator_backward(layer, dy)
    order = {"plain": runs["plain"], "plain again": runs["plain"]} | {
        n: runs[n] for n in ("ours", "operator", "eager")
    }
    times = paired(order, Budget(seconds))
    return [row(case, name, t, None) for name, t in times.items()]


def operator_backward(layer: Layer, dy: Tensor) -> Callable[[], object]:
    """The same gradients from the compiled operator alone, without autograd."""
    with torch.no_grad():
        experts = layer.experts.operands()
        gates = layer.gate.operands(layer.experts)
        call = Call(layer.x.detach(), layer.base.weight, layer.base.bias, experts, gates, save=True)
        saved = Saved(*cpu.forward(call)[1:])
        need = Need(**dict.fromkeys(Need._fields, True) | {"scale": False, "gate": False})

    def run() -> object:
        with torch.no_grad():
            return cpu.backward(call, saved, dy, need)

    return run


def eager_output(layer: Layer, x: Tensor) -> Tensor:
    """The paper's layer on the packed parameters themselves, so that its gradients are those of the same
    leaves.
    """
    e, gate = layer.experts, layer.gate
    local = torch.sigmoid(nn.functional.linear(x, gate.phi, gate.phi_bias))
    y = layer.base(x)
    for i, name in enumerate(e.names):
        span = e.span(name)
        o = nn.functional.linear(nn.functional.linear(x, e.down[0, span]), e.up[0, :, span]) * float(
            e.scale[i]
        )
        g = torch.sigmoid(
            nn.functional.linear(o.mean(1, keepdim=True), gate.head[i : i + 1], gate.head_bias[i : i + 1])
        )
        y = y + o * local[..., i : i + 1] * g
    return y


def row(case: Case, method: str, times: Times, wrong: float | None) -> dict[str, Any]:
    flops = case.flops if method not in ("plain", "plain again") else case.base_flops
    return {
        "id": str(case),
        "op": "gated_lora_linear",
        "model": case.model,
        "dtype": case.dtype,
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "E": case.E,
        "ranks": [case.r] * case.E,
        "gate": "local+global",
        "mode": case.mode,
        "cache": "hot",
        "method": method,
        "rounds": times.rounds,
        "us": dict(zip(("p20", "p50", "p80"), (round(t, 2) for t in times.us))),
        "ratio": {
            "plain": round(times.ratio[1], 4),
            "p20": round(times.ratio[0], 4),
            "p80": round(times.ratio[2], 4),
        },
        "flop_ratio": round(case.flop_ratio, 4),
        "flops": flops,
        "bytes_min": case.bytes_min,
        "gflops": round(flops / times.us[1] / 1e3, 2),
        "err": wrong,
        "peak_mem": None,  # held by tests/backends/test_cpu_extension.py: y, and h in float32
    }
