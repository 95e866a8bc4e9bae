"""Write a random expert as large as SDXL's: all 722 layers that MoLE adapts, any rank; what merging and
compressing are measured on.

    python python/tools/sdxl_expert.py OUT.safetensors [--rank 256] [--dtype float16] [--seed 0] [--decay 1.0]

The singular values of each ΔW fall like exp(−decay·i/8), which a trained expert's do roughly; decay 0 is
flat. Written a layer at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from mole_kernels.cli.models import skeleton
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.io.stream import save_layers
from mole_kernels.modules.scan import mole_targets, sizes


def layers(rank: int, dtype: torch.dtype, seed: int, decay: float) -> Iterator[tuple[str, LowRank]]:
    draw = torch.Generator().manual_seed(seed)
    root = torch.exp(-decay / 16 * torch.arange(rank))
    for path, module in mole_targets(skeleton("sdxl")).items():
        N, K = sizes(module)
        # random directions are almost orthogonal, so the columns' lengths are almost the singular values'
        # roots
        down, up = (
            torch.randn(rank, K, generator=draw) / K**0.5,
            torch.randn(N, rank, generator=draw) / N**0.5,
        )
        yield (
            path,
            LowRank(
                (down * root[:, None]).to(dtype),
                (up * root).to(dtype),
                0.5,
                conv=isinstance(module, torch.nn.Conv2d),
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decay", type=float, default=1.0)
    given = parser.parse_args()
    save_layers(
        layers(given.rank, getattr(torch, given.dtype), given.seed, given.decay),
        given.out,
        "diffusers",
        made="random",
    )


if __name__ == "__main__":
    main()
