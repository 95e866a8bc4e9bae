"""Concepts of random weights for the tiny pipelines."""

from __future__ import annotations

import torch

from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.methods.mix_of_show.concept import Concept
from mole_kernels.methods.mix_of_show.tokens import cross_attentions, text_encoders
from mole_kernels.modules.scan import scan, sizes

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def attention_layers(pipe):
    return {
        path: m
        for path, m in scan(pipe).layers.items()
        if path.endswith(tuple(f".{name}" for name in ATTENTION))
    }


def random_concept(pipe, number: int, rank: int = 2, size: float = 0.3, **alphas) -> Concept:
    """Two tokens <aN> <bN> with embeddings of their own in every layer, and an expert on all attention
    layers.
    """
    g = torch.Generator().manual_seed(100 + number)
    layers = {}
    for path, module in attention_layers(pipe).items():
        n, k = sizes(module)
        layers[path] = LowRank(
            torch.randn(rank, k, generator=g) / k**0.5, size * torch.randn(n, rank, generator=g)
        )
    count = len(cross_attentions(pipe.unet))
    widths = {
        name: encoder.get_input_embeddings().weight.shape[1]
        for name, (encoder, _) in text_encoders(pipe).items()
    }
    embeddings = {
        token: {name: torch.randn(count, width, generator=g) for name, width in widths.items()}
        for token in (f"<a{number}>", f"<b{number}>")
    }
    return Concept(f"<a{number}> <b{number}>", Expert(layers), embeddings, **alphas)
