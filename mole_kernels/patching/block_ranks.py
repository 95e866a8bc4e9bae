"""Equal ranks in equal blocks, so that blocks which are compiled one by one share a graph.

A compressed expert, or a file trained with a rank pattern, has other ranks in each block. `torch.compile` of
a block (`compile_repeated_blocks`) makes a graph for each combination of ranks, and gives up after eight. A
layer's ranks are therefore padded by zeros, up to the widest layer in the same place of the other blocks,
when its block is compiled; in eager execution, and where the whole model is one graph, nothing is padded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from mole_kernels.layers.linear import Gated
from mole_kernels.layers.sharded import is_sharded


def mark(layers: Mapping[str, nn.Module]) -> None:
    """Tell every patched layer the ranks of its like: same path but for the numbers, same sizes, same
    experts.
    """
    alike: dict[tuple[object, ...], list[Gated]] = {}
    for path, module in layers.items():
        if isinstance(module, Gated):
            experts = module.experts
            sizes = experts.down.shape[0], experts.down.shape[2], experts.up.shape[1]
            place = re.sub(r"\b\d+\b", "*", path)
            alike.setdefault((place, sizes, experts.names), []).append(module)
    for members in alike.values():
        widest = tuple(map(max, zip(*(module.experts.ranks for module in members))))
        for module in members:
            module.experts.block_ranks = widest


def pad(modules: Iterable[nn.Module]) -> None:
    """Pad the experts below these modules, where they are compiled by themselves."""
    for block in modules:
        for module in block.modules():
            if isinstance(module, Gated) and (ranks := module.experts.block_ranks) is not None:
                if is_sharded(module.experts.down) or module.experts.down.is_meta:
                    continue
                module.experts.pad_to(ranks)


def compiled(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that `nn.Module.compile` was called on."""
    return [module for module in modules if module._compiled_call_impl is not None]
