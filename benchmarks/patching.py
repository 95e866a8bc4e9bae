"""How long it takes to patch a Stable Diffusion UNet, to change scales, to swap an expert and to take
everything off.

    python benchmarks/patching.py --model sd15 --rank 256 --dtype bfloat16

Experts and gates are in memory beforehand: what reading the files takes comes on top. Prints the median of
the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert
from mole_kernels.io.gates import GateFile, GateTensors
from mole_kernels.modules.scan import mole_targets, sizes
from mole_kernels.patching.apply import patch
from mole_kernels.patching.plan import plan

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS = {"sd15": {"cross_attention_dim": 768}, "sdxl": SDXL}


def make_unet(name: str, dtype: torch.dtype, meta: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[name]).to(dtype)
    return unet if meta else unet.to_empty(device="cpu")


def make_inputs(unet: nn.Module, rank: int, dtype: torch.dtype) -> tuple[dict[str, Expert], GateFile]:
    shapes = {path: sizes(layer) for path, layer in mole_targets(unet).items()}
    bank = ExpertBank.new(shapes, ["face", "hand"], rank, dtype=dtype)
    layers = {
        path: GateTensors(torch.zeros(2, K), torch.zeros(2), torch.zeros(2, N), torch.zeros(2))
        for path, (N, K) in shapes.items()
    }
    return bank.experts, GateFile(layers, ("face", "hand"))


class Clock:
    """Milliseconds by the wall and of this process alone (all its threads), which a busy machine does not
    stretch.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.rows.setdefault(name, []).append(
            (1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu))
        )
        return result

    def table(self) -> str:
        lines = [f"{'':24} {'wall ms':>10} {'cpu ms':>10}"]
        for name, times in self.rows.items():
            wall, cpu = (statistics.median(column) for column in zip(*times))
            lines.append(f"{name:24} {wall:10.3f} {cpu:10.3f}")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--rank", type=int, default=256, help="of each of two experts")
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--expert-dtype", default="float16", help="of the experts' files")
    parser.add_argument("--meta", action="store_true", help="a model without weights")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    unet = make_unet(given.model, getattr(torch, given.dtype), given.meta)
    experts, gates = make_inputs(unet, given.rank, getattr(torch, given.expert_dtype))
    print(
        f"{given.model}, {len(mole_targets(unet))} layers, two experts of rank {given.rank} ({given.expert_dtype}), model {given.dtype}"
    )

    clock = Clock()
    for _ in range(given.rounds):
        clock.time("plan", lambda: plan(unet, experts, gates))
        handle = clock.time("patch (plan included)", lambda: patch(unet, experts, gates))
        clock.time("remove", handle.remove)
    with patch(unet, experts, gates) as handle:
        for _ in range(200):
            clock.time("set_scales", lambda: handle.set_scales({"face": 0.5, "hand": 0.8}))
        for _ in range(given.rounds):
            clock.time("swap, same rank", lambda: handle.swap("hand", experts["face"]))
    print(clock.table())


if __name__ == "__main__":
    main()
