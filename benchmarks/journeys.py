"""How many Python functions lie on the ways through the package that users take.

python benchmarks/journeys.py                 a table: calls, functions, files of each way, warm
python benchmarks/journeys.py --against DIR   the same of another tree of this project beside it

Counted by sys.setprofile on a model of two linear layers with two experts: every call of a function written in
Python, torch's own included; "package" counts those of this package alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
K, RANK = 16, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x))
        return out


@contextmanager
def counted(into: list[tuple[str, str]]) -> Iterator[None]:
    """(file, function) of every Python call inside the block, its own frames left out."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            into.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        del into[-2:]


def journeys(folder: Path) -> dict[str, Callable[[], object]]:
    """name -> the work; each is run once before it is counted."""
    import mole_kernels as mk
    from mole_kernels.experts.lowrank import Expert, LowRank
    from mole_kernels.io.save import save_expert

    torch.manual_seed(0)
    files = {}
    for name in ("face", "hand"):
        layers = {
            path: LowRank(torch.randn(RANK, K), torch.randn(K, RANK), 1.0) for path in ("first", "second")
        }
        files[name] = str(folder / f"{name}.safetensors")
        save_expert(Expert(layers), files[name])
    x = torch.randn(2, 5, K)
    plain, gated = Net(), Net()
    handle, trained = mk.patch(plain, files), mk.patch(gated, files, gates="mole")
    for parameter in trained.gate_parameters():
        parameter.requires_grad_(True)
    served_net = Net()
    served = mk.serve(served_net, files)
    layer: Any = handle.layers["first"]
    gate_layer: Any = trained.layers["first"]

    def patched() -> None:
        with mk.patch(Net(), files):
            pass

    def one_layer() -> None:
        with torch.no_grad():
            layer(x)

    def assigned() -> None:
        with torch.no_grad(), served.assign(["face", "hand"]):
            served_net(x)

    return {
        "two LoRA files to a patched model and back": patched,
        "one patched layer, no gradient": one_layer,
        "one patched layer, gates train": lambda: gate_layer(x),
        "two layers served, two people": assigned,
    } | _of_peft(x)


def _of_peft(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return {}
    import mole_kernels as mk

    config = LoraConfig(r=RANK, target_modules=["first", "second"], init_lora_weights=False)
    model = get_peft_model(Net(), config)  # type: ignore[arg-type]
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    mk.accelerate(model)
    layer: Any = model.base_model.model.first

    def one_layer() -> None:
        with torch.no_grad():
            layer(x)

    return {"one PEFT layer of two adapters, accelerated": one_layer}


def count() -> dict[str, dict[str, int]]:
    """name -> calls, functions and files of all Python, and calls of the package."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, work in journeys(Path(folder)).items():
            work()
            calls: list[tuple[str, str]] = []
            with counted(calls):
                work()
            # the frame of `work` itself
            calls = calls[1:]
            out[name] = {
                "calls": len(calls),
                "functions": len(set(calls)),
                "files": len({file for file, _ in calls}),
                "package": sum("mole_kernels" in file for file, _ in calls),
            }
    return out


def of_tree(root: Path) -> dict[str, dict[str, int]]:
    """`count` in a process that imports the package of that tree."""
    code = "import json, runpy, sys; print(json.dumps(runpy.run_path(sys.argv[1])['count']()))"
    run = subprocess.run(
        [sys.executable, "-c", code, __file__],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd="/",
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"{root}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="root of another tree of this project")
    asked = parser.parse_args()
    here = of_tree(ROOT)
    there = of_tree(asked.against.resolve()) if asked.against else {}
    print("| way | calls | functions | files | calls of the package |\n|---|---|---|---|---|")
    for name, found in here.items():
        before = there.get(name)
        cells = [f"{before[key]} → {value}" if before else f"{value}" for key, value in found.items()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
