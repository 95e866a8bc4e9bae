"""What this machine can do: versions, the extension, the backends, and whether each of them computes
rightly.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.text import Text

from mole_kernels import extension
from mole_kernels.backends.select import report
from mole_kernels.cli.clashes import clashes
from mole_kernels.cli.screen import facts, out, table
from mole_kernels.errors import printable
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Experts, Gates

PACKAGES = (
    "mole-kernels",
    "torch",
    "triton",
    "diffusers",
    "peft",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
)
# float64 arithmetic reordered over a few hundred terms; float32 rounds at 6e-8 each
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass
class Check:
    """One backend on one device.

    usable   it takes a small float32 problem
    reason   why it does not, else None
    error    largest relative error of y and of all gradients against float64, None where it was not run
    right    the error is within what rounding explains
    """

    backend: str
    device: str
    usable: bool
    reason: str | None
    error: float | None = None
    right: bool | None = None


def show(as_json: bool) -> bool:
    """Print the report; False where a usable backend computes wrongly."""
    findings = examine()
    healthy = all(check.right is not False for check in findings["backends"])
    if as_json:
        print(
            json.dumps(
                findings
                | {"backends": [asdict(check) for check in findings["backends"]], "healthy": healthy},
                indent=2,
            )
        )
        return healthy
    console = out()
    console.print(
        facts(
            (name, version or Text("not installed", style="yellow"))
            for name, version in findings["versions"].items()
        ),
        "",
    )
    console.print(facts([("extension", _extension(findings["extension"])), *_rest(findings)]), "")
    for clash in findings["clashes"]:
        console.print(Text(f"! {clash}", style="yellow"))
    rows = [[check.backend, check.device, *_verdict(check)] for check in findings["backends"]]
    console.print(
        table(
            "Backends, in order of preference",
            ("backend", "device", "usable", "largest error against float64, or why not"),
            rows,
        )
    )
    return healthy


def examine() -> dict[str, Any]:
    """versions, extension, devices, in_use (device -> backend of "auto") and the checks of every backend on
    every device.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    checks = [_check(name, device, reason) for device in devices for name, reason in report(device).items()]
    in_use = {
        device: next((c.backend for c in checks if c.device == device and c.usable), None)
        for device in devices
    }
    return {
        "versions": {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        }
        | _versions(),
        "clashes": clashes(),
        "extension": extension.describe(),
        "devices": {
            device: torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
            for device in devices
        },
        "in_use": in_use,
        "backends": checks,
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    # a checkout that was never installed still has a version
    versions["mole-kernels"] = versions["mole-kernels"] or sys.modules["mole_kernels"].__version__
    return versions


def _check(name: str, device: str, reason: str | None) -> Check:
    if reason is not None:
        return Check(name, device, usable=False, reason=reason)
    dtype = torch.float32
    error = _error(name, device, dtype)
    return Check(name, device, usable=True, reason=None, error=error, right=error <= TOLERANCE[dtype])


def _error(name: str, device: str, dtype: torch.dtype) -> float:
    """Largest relative error of y and of every gradient on a small problem with both gates, against the
    float64 reference.
    """
    truth = _run("reference", "cpu", torch.float64, torch.float64)
    results = _run(name, device, dtype, torch.float64)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, truth))


def _run(name: str, device: str, dtype: torch.dtype, out_dtype: torch.dtype) -> list[torch.Tensor]:
    """y and the gradients of sum(y · weights), the same numbers for every backend."""
    draw = torch.Generator().manual_seed(0)
    shapes = (
        (2, 15, 24),
        (20, 24),
        (20,),
        (1, 9, 24),
        (1, 20, 9),
        (2,),
        (2, 24),
        (2,),
        (1, 9),
        (2,),
        (2, 15, 20),
    )
    x, weight, bias, down, up, scale, token_weight, token_bias, sample_weight, sample_bias, dy = (
        torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes
    )
    trained = [t.to(device, dtype).requires_grad_() for t in (x, down, up, token_weight, token_bias)]
    # scales and pooled gates stay float32, except in the float64 truth
    float32 = [
        t.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        for t in (scale, sample_weight, sample_bias)
    ]
    experts = Experts(trained[1], trained[2], float32[0], (5, 4))
    gates = Gates(
        token_weight=trained[3], token_bias=trained[4], sample_weight=float32[1], sample_bias=float32[2]
    )
    y = gated_lora_linear(
        trained[0], weight.to(device, dtype), bias.to(device, dtype), experts, gates, backend=name
    )
    grads = torch.autograd.grad(y, [*trained, *float32], dy.to(device, dtype))
    return [t.detach().to("cpu", out_dtype) for t in (y, *grads)]


def _extension(findings: dict[str, Any]) -> Text:
    if not findings["usable"]:
        return Text(f"not usable: {printable(findings['reason'], 2000)}", style="yellow")
    cuda = (
        f"CUDA for {findings['cuda_archs']}"
        if findings.get("cuda_archs")
        else f"no CUDA ({findings.get('no_cuda') or 'built without nvcc'})"
    )
    return Text(
        f"{findings['library']}, {findings['instruction_set']}, "
        f"built with torch {findings['built_with_torch']}, {cuda}"
    )


def _rest(findings: dict[str, Any]) -> list[tuple[str, object]]:
    devices = ", ".join(f"{device} ({what})" for device, what in findings["devices"].items())
    return [
        ("devices", devices),
        ("in use", ", ".join(f"{device}: {backend}" for device, backend in findings["in_use"].items())),
    ]


def _verdict(check: Check) -> list[Text]:
    if not check.usable:
        return [Text("no", style="yellow"), Text(printable(check.reason, 2000))]
    if check.right:
        return [Text("yes", style="green"), Text(f"{check.error:.1e}")]
    return [
        Text("WRONG", style="bold red"),
        Text(f"{check.error:.1e}, more than rounding explains; please report this with doctor --json"),
    ]
