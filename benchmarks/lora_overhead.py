"""What LoRA costs a step of SD1.5's transformer blocks: in PEFT, accelerated, and concatenated by hand.

python benchmarks/lora_overhead.py              CPU, some minutes on one core; writes
results/<machine>/<date>-lora-overhead.{json,md}
python benchmarks/lora_overhead.py --quick      float32, few rounds, writes nothing

Two blocks of each width (320, 640, 1280) with their self- and cross-attention and feed-forward, as in
diffusers, on a batch of two 256² pictures (32², 16², 8² places) and 77 words. Adapters are where diffusers
places them by
default: q, k, v and out of both attentions, 48 layers, two adapters of rank 16. The convolutions of the UNet,
which hold no adapter, are left out: they would only hide the difference.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# run as a script from anywhere, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import DTYPES
from benchmarks.machine import environment, results_folder
from benchmarks.timing import Budget, Times, paired
from mole_kernels import extension
from mole_kernels.peft.accelerate import accelerate
from mole_kernels.peft.status import status

WIDTHS = ((320, 1024), (640, 256), (1280, 64))
BATCH, WORDS, TEXT, RANK = 2, 77, 768, 16
MODEL = (
    "two of SD1.5's transformer blocks of each width, two 256² pictures, 77 words; "
    "q, k, v, out (48 layers), two adapters of rank 16"
)
OVERHEAD = "PEFT's overhead ÷ ours"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Blocks(nn.Module):
    """Two transformer blocks of each width."""

    def __init__(self) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        self.parts = nn.ModuleList(
            BasicTransformerBlock(width, 8, width // 8, cross_attention_dim=TEXT)
            for width, _ in WIDTHS
            for _ in range(2)
        )

    def forward(self, inputs: list[Tensor], text: Tensor) -> list[Tensor]:
        outputs = []
        for i, x in enumerate(inputs):
            for block in self.parts[2 * i : 2 * i + 2]:
                x = block(x, encoder_hidden_states=text)
            outputs.append(x)
        return outputs


class Concatenated(nn.Module):
    """The strongest plain-torch form: the base, then all adapters at once by `addmm` into its output; A and B
    stacked beforehand.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        names = layer.active_adapters
        self.base = layer.base_layer
        self.down = torch.cat([layer.lora_A[n].weight * layer.scaling[n] for n in names]).mT.contiguous()
        self.up = torch.cat([layer.lora_B[n].weight for n in names], 1).mT.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        flat = y.view(-1, y.shape[-1])
        torch.addmm(flat, x.reshape(-1, x.shape[-1]) @ self.down, self.up, out=flat)
        return y


def methods(dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same blocks four times, the base weights shared."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    plain: Any = Blocks().to(dtype).eval().requires_grad_(False)

    def again(model: nn.Module) -> Any:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})

    theirs = again(plain)
    for name in ("a", "b"):
        inject_adapter_in_model(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False), theirs, name
        )
    for module in theirs.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter(["a", "b"])
            module.set_scale("a", 0.7), module.set_scale("b", 0.4)
    theirs.to(dtype).requires_grad_(False)
    ours, stacked = again(theirs), again(theirs)
    accelerate(ours)
    for path, module in list(stacked.named_modules()):
        if hasattr(module, "lora_A"):
            stacked.set_submodule(path, Concatenated(module))
    return {
        "plain": plain,
        "plain again": plain,
        "accelerated": ours,
        "PEFT": theirs,
        "concatenated": stacked,
    }


def check(models: dict[str, nn.Module], inputs: list[Tensor], text: Tensor) -> int:
    """Same answers, and every adapted layer through us; the number of those layers."""
    status(reset=True)
    want = models["PEFT"](inputs, text)
    for name in ("accelerated", "concatenated"):
        for got, right in zip(models[name](inputs, text), want):
            far = ((got - right).float().norm() / right.float().norm()).item()
            if not far <= 20 * torch.finfo(right.dtype).eps:
                raise SystemExit(f"{name}: {far:.1e} away from PEFT, nothing was timed")
    report: Any = status()
    if report["fallbacks"] or not report["accelerated"]:
        raise SystemExit(f"not all layers were accelerated: {report}")
    return report["accelerated"]


def measure(name: str, seconds: float) -> dict[str, Any]:
    dtype = DTYPES[name]
    models = methods(dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(BATCH, places, width, generator=generator).to(dtype) for width, places in WIDTHS]
    text = torch.randn(BATCH, WORDS, TEXT, generator=generator).to(dtype)
    with torch.inference_mode():
        layers = check(models, inputs, text)
        times = paired(
            {key: lambda model=model: model(inputs, text) for key, model in models.items()},
            Budget(seconds, least=9),
        )
    return row(name, layers, times)


def row(dtype: str, layers: int, times: dict[str, Times]) -> dict[str, Any]:
    over = {key: 100 * (result.ratio[1] - 1) for key, result in times.items()}
    return {
        "dtype": dtype,
        "layers": layers,
        "rounds": times["plain"].rounds,
        "ms": {key: [round(t / 1000, 2) for t in result.us] for key, result in times.items()},
        "ratio to plain": {key: [round(r, 4) for r in result.ratio] for key, result in times.items()},
        "overhead, %": {key: round(value, 2) for key, value in over.items()},
        OVERHEAD: round(over["PEFT"] / over["accelerated"], 2)
        if over["accelerated"] > 0
        else "ours has none",
    }


def table(rows: list[dict[str, Any]]) -> str:
    keys = list(rows[0]["ms"])
    lines = [
        "| dtype | " + " | ".join(f"{key}, ÷ plain" for key in keys[1:]) + " | PEFT's overhead ÷ ours |",
        "|---" * (len(keys) + 1) + "|",
    ]
    for r in rows:
        ratios = " | ".join(
            "{1:.3f} ({0:.3f} to {2:.3f})".format(*r["ratio to plain"][key]) for key in keys[1:]
        )
        lines.append(f"| {r['dtype']} | {ratios} | {r[OVERHEAD]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="wall time for each dtype (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if reason := extension.reason_against_library():
        print(f"nothing to measure: {reason}")
        return 2
    rows = []
    for name in ("fp32",) if options.quick else ("fp32", "bf16"):
        rows.append(measure(name, 5.0 if options.quick else options.seconds))
        print(table(rows[-1:]), flush=True)
    if not options.quick:
        result = environment(1) | {"model": MODEL, "cases": rows}
        folder = results_folder(result["host"], result["dirty"])
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{result['utc'][:10]}-lora-overhead.json"
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        text = f"# LoRA on SD1.5's transformer blocks, {result['host']}\n\n"
        text += "Processor time of one thread, paired, median (p20 to p80).\n\n"
        file.with_suffix(".md").write_text(f"{text}{table(rows)}\n")
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
