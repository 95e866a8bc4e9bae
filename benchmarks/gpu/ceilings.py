"""What bounds a layer here: the rate of a large copy and of a large product, measured in the same run as
everything else.
"""

from __future__ import annotations

import torch

from benchmarks.device import Device
from benchmarks.gpu.context import Context, Item, Outcome
from benchmarks.timing import Budget, interleaved, spread

# elements of the copy, edge of the product
LARGE = {"cuda": (1 << 30, 8192), "cpu": (1 << 22, 384)}


def check(item: Item, context: Context) -> Outcome:
    out = Outcome()
    out.rows.append({"ceilings": measure(context.device)})
    out.passed = 1
    return out


def measure(device: Device) -> dict[str, float]:
    """copy_gb_s counts bytes read and written; bf16_tflops a square product of random data."""
    elements, edge = LARGE[device.kind]
    source = torch.randn(edge, edge, device=device.kind)
    a, b = source.bfloat16(), source.mT.contiguous().bfloat16()
    x = torch.randint(0, 100, (elements,), dtype=torch.uint8, device=device.kind)
    y = torch.empty_like(x)
    runs = {"copy": lambda: y.copy_(x), "gemm": lambda: a @ b}
    taken = interleaved(runs, Budget(seconds=1.0, least=7, most=25), device.elapsed)
    copy, gemm = (spread(taken[name][2:])[1] for name in ("copy", "gemm"))
    return {"copy_gb_s": round(2e-3 * elements / copy, 2), "bf16_tflops": round(2e-6 * edge**3 / gemm, 3)}


HANDLERS = {"ceilings": check}
