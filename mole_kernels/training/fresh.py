"""A fresh expert for training: which layers, which random factors, and what its file says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mole_kernels.errors import MoleValueError
from mole_kernels.experts.bank import ExpertBank, Init
from mole_kernels.experts.lowrank import Expert
from mole_kernels.modules.scan import attention_targets, mole_targets, sizes
from mole_kernels.training.data import counted_generator


@dataclass(frozen=True)
class FreshExpert:
    """What one expert begins as.

    Args:
        name: Of the expert, in its file and in the checkpoints.
        rank: R of A [R,K] and B [N,R].
        alpha: The scale is alpha/rank; None means scale 1.
        init: How A is drawn, "kaiming" or "gaussian"; B is zero.
    """

    name: str
    rank: int
    alpha: float | None = None
    init: Init = "kaiming"

    def bank(self, layers: Mapping[str, nn.Module], seed: int) -> ExpertBank:
        """The factors for these layers, drawn by (seed, name)."""
        shapes = {path: sizes(layer) for path, layer in layers.items()}
        generator = counted_generator(seed, "expert", self.name)
        return ExpertBank.new(shapes, [self.name], self.rank, self.alpha, generator=generator, init=self.init)

    def identity(self) -> dict[str, str]:
        """What a resume compares, and the file's metadata begin with."""
        about = {"method": "mole", "stage": "2", "expert": self.name}
        return about | {"rank": str(self.rank), "alpha": str(self.alpha)}

    def trained(self, expert: Expert, component: str, steps: int, late_loss: float) -> Expert:
        """The expert as its file holds it.

        Args:
            expert: Paths are below the component.
            component: "unet" or "transformer".
            steps: Optimiser steps in all.
            late_loss: Mean of the last losses.
        """
        metadata = self.identity() | {"steps": str(steps), "loss": f"{late_loss:.6g}"}
        layers = {f"{component}.{path}": factors.to(device="cpu") for path, factors in expert.layers.items()}
        return Expert(layers, dialect="memory", source=f"trained expert {self.name}", metadata=metadata)


def layers_to_adapt(
    model: nn.Module, component: str, targets: Mapping[str, nn.Module] | None, where: str
) -> Mapping[str, nn.Module]:
    """The layers by path: those given, else MoLE's in a UNet and the attention's in a transformer.

    Raises:
        MoleValueError: There are none.
    """
    if targets is None:
        targets = mole_targets(model) if component == "unet" else attention_targets(model)
    if not targets:
        hint = "pass targets=, the layers to adapt"
        problem = "the model has no Transformer2DModel layers, and no attention of known names"
        raise MoleValueError(f"{where}: targets", problem, hint=hint)
    return targets
