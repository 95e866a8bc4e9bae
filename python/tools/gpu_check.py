"""Every backend that takes CUDA tensors, held to float64 on this machine's GPU: forward, the low-rank part alone, all gradients.

    python python/tools/gpu_check.py            exit 0: all right; 1: something is wrong; 2: there is no NVIDIA GPU here

A case that fails or raises is listed, and the rest still runs. Speed is not measured here.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mole_kernels.backends.select import BACKENDS  # noqa: E402
from mole_kernels.functional import gated_lora_linear  # noqa: E402
from tests.backends.test_backends import GRAD_ROUNDINGS, ROUNDINGS, assert_gradient  # noqa: E402
from tests.cases import CASES  # noqa: E402
from tests.truth import DTYPES, Call, Case, assert_close_to_truth  # noqa: E402

console = Console()
DEFAULT_ROUNDINGS = {"triton": (4, 8)}


def on_gpu(call: Call) -> Call:
    moved = call.with_tensors({name: t.cuda() for name, t in call.tensors().items()})
    return replace(moved, weight=call.weight.cuda(), bias=None if call.bias is None else call.bias.cuda())


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    forward, backward = DEFAULT_ROUNDINGS.get(backend) or (ROUNDINGS[backend], GRAD_ROUNDINGS[backend])
    for variant in (case, case.alone()):
        call = variant.make(dtype)
        gpu = on_gpu(call)
        y = gated_lora_linear(gpu.x, gpu.weight, gpu.bias, gpu.experts, gpu.gates, backend=backend)
        assert_close_to_truth(y.cpu(), call.truth(), dtype, forward, f"base {variant.base}")
    call = case.make(dtype)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in on_gpu(call).tensors().items()}
    run = on_gpu(call).with_tensors(leaves)
    y = gated_lora_linear(run.x, run.weight, run.bias, run.experts, run.gates, backend=backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.cuda())))
    truth, terms = call.truth_grads(dy)
    for name, t in truth.items():
        size = max(t.norm().item(), 2 * terms if t.numel() == case.E else 0)
        assert_gradient(got[name].cpu(), t, dtype, size, backward, f"d{name}")


def main() -> int:
    if not torch.cuda.is_available():
        console.print("torch sees no NVIDIA GPU: nothing was run", style="red")
        return 2
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    passed, wrong = Counter[str](), []
    for backend, kernel in BACKENDS.items():
        for dtype in DTYPES:
            for case in CASES:
                if kernel.reject(replace(case.problem(dtype), device="cuda")) is not None:
                    continue
                try:
                    check(case, backend, dtype)
                    passed[backend] += 1
                # whatever one case raises, the others still say what they have to say
                except Exception as error:
                    wrong.append(f"{backend}, {dtype}, {case}: {type(error).__name__}: {str(error).splitlines()[0]}")
    for line in wrong:
        console.print(line, style="red", markup=False)
    console.print(f"{sum(passed.values())} passed, {len(wrong)} failed   ({', '.join(f'{b} {n}' for b, n in passed.items())})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
