"""How long `set_adapters` takes on SDXL's 722 linear layers with many adapters, in diffusers and accelerated.

python benchmarks/set_adapters.py                    writes results/<machine>/<date>-set-adapters.{json,md}
python benchmarks/set_adapters.py --loaded 2,10      writes nothing

The UNet has its real layers and names on the meta device: `set_adapters` looks at flags, names and scales,
never at a value. Adapters are of rank 1: PEFT adds the first two, and the others are put into the same
dictionaries, because PEFT would take minutes. Both methods run on the same model in turn, between two pairs
of adapters, so that each call changes something.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# run as a script from anywhere, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import header, results_folder
from benchmarks.patching import make_unet
from benchmarks.timing import Budget, paired
from mole_kernels.peft.accelerate import accelerate

LOADED = (2, 10, 50)


def linear_paths(unet: nn.Module) -> list[str]:
    """Those of its transformers: 722."""
    return [
        path for path, module in unet.named_modules() if type(module) is nn.Linear and ".attentions." in path
    ]


def load(unet: Any, names: list[str], paths: list[str]) -> None:
    """More adapters of rank 1: through PEFT the first time, then as copies of the first in every dictionary
    that it is in.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if not hasattr(unet, "peft_config"):
        for name in names:
            inject_adapter_in_model(
                LoraConfig(r=1, lora_alpha=1, target_modules=paths), unet, name, low_cpu_mem_usage=True
            )
        return
    first = next(iter(unet.peft_config))
    unet.peft_config |= dict.fromkeys(names, unet.peft_config[first])
    for layer in [module for module in unet.modules() if isinstance(module, LoraLayer)]:
        for modules in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            modules.update({name: copy.deepcopy(modules[first]).requires_grad_(False) for name in names})
        for kept in (
            layer.scaling,
            layer.r,
            layer.lora_alpha,
            layer.use_rslora,
            layer.use_dora,
            layer.lora_bias,
        ):
            kept.update({name: kept[first] for name in names if first in kept})


def measure(unet: Any, names: list[str], seconds: float) -> dict[str, Any]:
    """Milliseconds of both, and theirs ÷ ours, with `names` loaded and two of them active."""
    pairs = itertools.cycle((([names[0], names[1]], [0.5, 0.8]), ([names[-1], names[0]], [0.3, 1.0])))

    def call(method: Callable[..., None]) -> Callable[[], None]:
        def run() -> None:
            method(*next(pairs))

        return run

    handle = accelerate(unet)
    plain = type(unet).set_adapters
    times = paired(
        {"ours": call(unet.set_adapters), "diffusers": call(lambda *args: plain(unet, *args))},
        Budget(seconds),
    )
    layers = len(handle.layers)
    handle.remove()
    row: dict[str, Any] = {
        "loaded": len(names),
        "active": 2,
        "layers": layers,
        "rounds": times["ours"].rounds,
    }
    row |= {f"{name} ms": [round(t / 1000, 3) for t in result.us] for name, result in times.items()}
    return row | {"diffusers ÷ ours": [round(r, 2) for r in times["diffusers"].ratio]}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| loaded | active | layers | ours, ms | diffusers, ms | diffusers ÷ ours |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(
            "{1} ({0} to {2})".format(*row[key]) for key in ("ours ms", "diffusers ms", "diffusers ÷ ours")
        )
        lines.append(f"| {row['loaded']} | {row['active']} | {row['layers']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--loaded",
        default=",".join(map(str, LOADED)),
        help="numbers of adapters, rising (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="wall time for each number (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    unet = make_unet("sdxl", torch.float32, meta=True)
    paths, names, rows = linear_paths(unet), [], []
    for count in map(int, options.loaded.split(",")):
        new = [f"adapter{i}" for i in range(len(names), count)]
        load(unet, new, paths)
        names += new
        rows.append(measure(unet, names, options.seconds))
        print(table(rows[-1:]), flush=True)
    if tuple(row["loaded"] for row in rows) == LOADED:
        result = header() | {
            "threads": 1,
            "clock": "cpu time of the thread",
            "model": "sdxl on the meta device",
            "cases": rows,
        }
        folder = results_folder(result["host"], result["dirty"])
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{result['utc'][:10]}-set-adapters.json"
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        text = f"# set_adapters, {result['host']}\n\nProcessor time of one thread, "
        text += f"median (p20 to p80), paired rounds.\n\n{table(rows)}\n"
        file.with_suffix(".md").write_text(text)
        print(f"written: {file}")


if __name__ == "__main__":
    main()
