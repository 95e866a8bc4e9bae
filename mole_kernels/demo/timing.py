"""What one denoising step costs: the base UNet, PEFT, MoLE's own eager layer, and this package, in turn on
the same inputs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_kernels.demo import data
from mole_kernels.demo.model import CAPTION_TOKENS, FACTOR, LATENT_CHANNELS, TEXT_WIDTH
from mole_kernels.patching.apply import patch

if TYPE_CHECKING:
    from mole_kernels.experts.bank import ExpertBank
    from mole_kernels.io import GateFile


class EagerMoLE(nn.Module):
    """MoLE's layer expert by expert, as its paper's code computes it: y = base(x) + Σ_e o_e · l_e(x) · g_e,
    g_e from the pooled o_e.
    """

    def __init__(self, base: nn.Module, factors: Mapping, gates) -> None:
        super().__init__()
        self.base = base
        dtype = next(base.parameters()).dtype
        self.downs = nn.ParameterList([f.down.to(dtype) for f in factors.values()])
        self.ups = nn.ParameterList([f.up.to(dtype) for f in factors.values()])
        self.scales = [f.scale for f in factors.values()]
        self.phi, self.phi_bias, self.head, self.head_bias = (
            t.to(dtype) for t in (gates.phi, gates.phi_bias, gates.head, gates.head_bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        local = torch.sigmoid(F.linear(tokens, self.phi, self.phi_bias))
        total: Tensor | None = None
        for e, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            out = F.linear(F.linear(tokens, down), up) * self.scales[e]
            pooled = torch.sigmoid(F.linear(out.mean(1), self.head[e : e + 1], self.head_bias[e : e + 1]))
            out = out * local[..., e : e + 1] * pooled[:, None]
            total = out if total is None else total + out
        assert total is not None
        if x.dim() == 4:
            total = total.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.base(x) + total


def eager_unet(unet: nn.Module, bank: ExpertBank, gates: GateFile) -> nn.Module:
    """A copy of the UNet with every adapted layer wrapped in EagerMoLE."""
    unet = copy.deepcopy(unet)
    for path in bank.paths():
        parent, _, name = inside(path).rpartition(".")
        layer = EagerMoLE(unet.get_submodule(inside(path)), bank.layer(path), gates.layers[path])
        setattr(unet.get_submodule(parent), name, layer)
    return unet.requires_grad_(False).eval()


def peft_unet(unet: nn.Module, bank: ExpertBank) -> nn.Module:
    """A copy of the UNet with the same experts as PEFT adapters, all active, without gates (PEFT has
    none).
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    unet = copy.deepcopy(unet)
    for name, expert in bank.experts.items():
        rank = next(iter(expert.layers.values())).down.shape[0]
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[inside(path) for path in expert.layers],
            init_lora_weights=False,
        )
        inject_adapter_in_model(config, unet, adapter_name=name)
    for path in bank.paths():
        layer = unet.get_submodule(inside(path))
        assert isinstance(layer, LoraLayer)
        for name, factor in bank.layer(path).items():
            for part, factors in ((layer.lora_A, factor.down), (layer.lora_B, factor.up * factor.scale)):
                weight = part.get_parameter(f"{name}.weight")
                # 1x1 convolutions keep theirs with two more dimensions
                weight.data.copy_(factors.reshape(weight.shape))
        layer.set_adapter(list(bank.names))
    return unet.requires_grad_(False).eval()


def inside(path: str) -> str:
    """A path of the pipeline as one of its UNet."""
    return path.removeprefix("unet.")


def step_input(pictures: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text states of one guided step for so many pictures: twice as many samples."""
    g, n = torch.Generator().manual_seed(seed), 2 * pictures
    latents = torch.randn(n, LATENT_CHANNELS, data.HEIGHT // FACTOR, data.WIDTH // FACTOR, generator=g)
    return latents, torch.full((n,), 500), torch.randn(n, CAPTION_TOKENS, TEXT_WIDTH, generator=g)


@torch.no_grad()
def step_times(
    unet: nn.Module, bank: ExpertBank, gates: GateFile, pictures: int = 8, rounds: int = 40
) -> dict:
    """Times of one UNet call, interleaved, as paired ratios to the base in the same round.

    Returns {"pictures", "rounds", "base_ms", "ratio": {name: {"p20", "median", "p80"}}, "agree": greatest
    difference ours - eager}.
    "base again" is the base measured twice: what the ratios are uncertain by. Leaves `unet` as it was.
    """
    ours = copy.deepcopy(unet)
    handle = patch(ours, bank, gates)
    models = {
        "base": unet,
        "base again": unet,
        "peft": peft_unet(unet, bank),
        "eager MoLE": eager_unet(unet, bank, gates),
        "ours": ours,
    }
    inputs = step_input(pictures)
    outputs = {name: model(*inputs).sample for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(rounds + 3):
        # another order each round, so that no one always follows the same neighbour
        shift = turn % len(names)
        order = names[shift:] + names[:shift]
        for name in order if turn % 2 else order[::-1]:
            begun = time.perf_counter()
            models[name](*inputs)
            times[name].append(time.perf_counter() - begun)
    handle.remove()
    base = times["base"][3:]
    ratio = {
        name: _spread([t / b for t, b in zip(seconds[3:], base, strict=True)])
        for name, seconds in times.items()
        if name != "base"
    }
    agree = (outputs["ours"] - outputs["eager MoLE"]).abs().max().item()
    return {
        "pictures": pictures,
        "rounds": rounds,
        "base_ms": 1000 * statistics.median(base),
        "ratio": ratio,
        "agree": agree,
    }


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=5)
    return {"p20": cuts[0], "median": statistics.median(values), "p80": cuts[3]}
