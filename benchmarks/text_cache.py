"""What keeping the keys and values of cross-attention saves on a CPU: one SDXL-like block, patched with two
experts, paired times.

python -m benchmarks.text_cache
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import get_args

import torch

import mole_kernels as mk
from benchmarks.timing import Budget, clock, interleaved, spread
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.layers.fingerprint import Check
from mole_kernels.modules.scan import mole_targets, sizes


def expert(model: torch.nn.Module, rank: int, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, layer in mole_targets(model).items():
        N, K = sizes(layer)
        layers[path] = LowRank(
            torch.randn(rank, K, generator=generator) / K**0.5,
            torch.randn(N, rank, generator=generator) * 0.1,
            1.0,
        )
    return Expert(layers)


def main(
    width: int = 640, text_width: int = 2048, tokens: int = 1024, batch: int = 2, rank: int = 16
) -> None:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    block = Transformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=width,
        num_layers=1,
        cross_attention_dim=text_width,
        use_linear_projection=True,
    ).eval()
    side = int(tokens**0.5)
    x, text = torch.randn(batch, width, side, side), torch.randn(batch, 77, text_width)
    handle = mk.patch(block, {"a": expert(block, rank, 1), "b": expert(block, rank, 2)})

    def step() -> torch.Tensor:
        with torch.no_grad():
            return block(x, encoder_hidden_states=text).sample

    want = step()
    tick = clock()

    def timed(check: Check | None) -> Callable[[], float]:
        def run() -> float:
            kept = nullcontext() if check is None else handle.cache_text(check=check)
            with kept:
                # the first step fills the cache; what every later step costs is timed
                assert torch.equal(step(), want)
                start = tick()
                step()
                return tick() - start

        return run

    methods = {"computed": timed(None), **{check: timed(check) for check in get_args(Check)}}
    taken = interleaved(methods, Budget(seconds=40, least=12, most=16), lambda run: float(run()))  # type: ignore[arg-type]
    base = taken["computed"]
    for name, times in taken.items():
        ratio = spread([t / b for t, b in zip(times, base)])
        print(
            f"{name:10} {spread(times)[1] * 1e3:8.1f} ms   "
            f"ratio p20 {ratio[0]:.3f}  p50 {ratio[1]:.3f}  p80 {ratio[2]:.3f}"
        )


if __name__ == "__main__":
    main()
