"""Experts for a small model of two linear layers and a 1x1 convolution, and PEFT's own merge of the same
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mole_kernels.experts.lowrank import Expert, LowRank

# path -> (N, K, is a convolution), in the model's order
LAYERS = {"first": (10, 6, False), "inner.second": (5, 10, False), "mix": (7, 5, True)}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.inner = nn.ModuleDict({"second": nn.Linear(10, 5)})
        self.mix = nn.Conv2d(5, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner["second"](torch.tanh(self.first(x)))
        return self.mix(y.mT.unflatten(2, (2, -1)))


def small_expert(
    seed: int,
    rank: int = 3,
    scale: float = 0.5,
    dtype: torch.dtype = torch.float32,
    without: Sequence[str] = (),
    name: str = "memory",
) -> Expert:
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for path, (n, k, conv) in LAYERS.items():
        down, up = (
            torch.randn(rank, k, generator=draw) / k**0.5,
            torch.randn(n, rank, generator=draw) / rank**0.5,
        )
        if path not in without:
            layers[path] = LowRank(down.to(dtype), up.to(dtype), scale, conv)
    return Expert(layers, dialect="diffusers", source=name)


def deltas(expert: Expert) -> dict[str, Tensor]:
    return {path: layer.delta(torch.float64) for path, layer in expert.layers.items()}


def peft_merge(
    files: Sequence[Path], weights: Sequence[float], how: str, seed: int = 0, **arguments: object
) -> dict[str, Tensor]:
    """path -> ΔW (float64) of PEFT's `add_weighted_adapter` on these files."""
    from peft import LoraConfig, PeftModel
    from peft.utils import set_peft_model_state_dict

    from mole_kernels.io.experts import load_expert

    experts = [load_expert(path) for path in files]
    model = None
    for i, expert in enumerate(experts):
        config = LoraConfig(
            r=max(expert.ranks()),
            lora_alpha=1,
            target_modules=list(expert.layers),
            rank_pattern={f"^{path}": layer.rank for path, layer in expert.layers.items()},
            alpha_pattern={f"^{path}": layer.scale * layer.rank for path, layer in expert.layers.items()},
        )
        if model is None:
            model = PeftModel(Small(), config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        state = {}
        for path, layer in expert.layers.items():
            tail = (slice(None), slice(None)) + (None, None) * layer.conv
            state[f"base_model.model.{path}.lora_A.weight"] = layer.down.float()[tail]
            state[f"base_model.model.{path}.lora_B.weight"] = layer.up.float()[tail]
        found = set_peft_model_state_dict(model, state, adapter_name=str(i))
        assert not found.unexpected_keys
    assert model is not None
    inject = model.base_model.inject_adapter

    def seeded(*args: object, **more: object) -> None:
        inject(*args, **more)
        # the new adapter's own initial values draw too: begin where the merge begins
        torch.manual_seed(seed)

    model.base_model.inject_adapter = seeded
    model.base_model.add_weighted_adapter(
        [str(i) for i in range(len(files))], list(weights), "merged", how, **arguments
    )
    out = {}
    for path in LAYERS:
        layer = model.base_model.model.get_submodule(path)
        if "merged" in getattr(layer, "lora_A", {}):
            scale, down, up = (
                layer.scaling["merged"],
                layer.lora_A["merged"].weight,
                layer.lora_B["merged"].weight,
            )
            out[path] = scale * up.detach().double().flatten(1) @ down.detach().double().flatten(1)
    return out
