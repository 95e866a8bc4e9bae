"""The paper's stages 2 and 3 in miniature: each expert alone on close-ups of its half, then gates alone on scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor

from mole_kernels.demo import data
from mole_kernels.demo.evaluate import encode_captions, encode_pictures
from mole_kernels.demo.model import Pipeline
from mole_kernels.patch.apply import patch

if TYPE_CHECKING:

    from mole_kernels.experts.lowrank import Expert
    from mole_kernels.patch.handle import Handle

GATE_KINDS = ("constant", "local", "global", "mole")


@dataclass(frozen=True)
class Plan:
    """Rank, steps, batches and learning rates of one seed's training."""

    rank: int = 16
    closeups: int = 2048
    expert_steps: int = 350
    expert_batch: int = 32
    expert_lr: float = 2e-3
    scenes: int = 2048
    gate_steps: int = 120
    gate_batch: int = 16
    gate_lr: float = 2e-2
    # a constant has one number per layer and expert, and moves too slowly at the gates' rate
    constant_lr: float = 6e-2


def train_expert(pipe: Pipeline, half: int, plan: Plan, seed: int) -> tuple[Expert, list[float]]:
    """Stage 2: a fresh expert on sharp close-ups of one half, the base frozen. Returns it with its losses."""
    from mole_kernels.experts.bank import ExpertBank
    from mole_kernels.patch.targets import mole_targets, sizes

    name, g = data.HALVES[half], Generator().manual_seed(1000 * seed + half)
    shapes = {path: sizes(module) for path, module in mole_targets(pipe.unet).items()}
    handle = patch(pipe.unet, ExpertBank.new(shapes, [name], plan.rank, generator=g))
    try:
        pictures = data.closeups(data.load_split("train"), plan.closeups, g, half)
        losses = _fit(pipe, handle.expert_parameters(), pictures, plan.expert_steps, plan.expert_batch, plan.expert_lr, seed)
        return handle.bank().experts[name], losses
    finally:
        handle.remove()


def sharp_scenes(plan: Plan, seed: int) -> data.Pictures:
    """The scenes of stage 3."""
    return data.scenes(data.load_split("train"), plan.scenes, Generator().manual_seed(1000 * seed + 500))


def train_gates(pipe: Pipeline, handle: Handle, kind: str, scenes: data.Pictures, plan: Plan, seed: int) -> list[float]:
    """Stage 3: the fresh gates of a patched pipeline on sharp scenes, base and experts frozen. Returns the losses."""
    lr = plan.constant_lr if kind == "constant" else plan.gate_lr
    return _fit(pipe, handle.gate_parameters(), scenes, plan.gate_steps, plan.gate_batch, lr, seed)


def ends(losses: list[float]) -> list[float]:
    """Mean loss of the first and of the last tenth."""
    tenth = max(1, len(losses) // 10)
    return [sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth]


def _fit(
    pipe: Pipeline, parameters, pictures: data.Pictures, steps: int, batch: int, lr: float, seed: int
) -> list[float]:
    from mole_kernels.training.config import TrainConfig
    from mole_kernels.training.data import TensorBatches
    from mole_kernels.training.loop import fit
    from mole_kernels.training.loss import DenoisingLoss

    tensors: dict[str, Tensor] = {
        "latents": encode_pictures(pipe, pictures.pixels),
        "encoder_hidden_states": encode_captions(pipe, pictures.captions),
    }
    loss = DenoisingLoss(pipe.scheduler, null=encode_captions(pipe, [""]), cond_dropout=0.1)
    config = TrainConfig(steps=steps, lr=lr, warmup=max(1, steps // 15), schedule="cosine", weight_decay=0.0, seed=seed)
    batches = TensorBatches(tensors, batch, seed=seed)
    return fit(pipe.unet, parameters, batches, config, loss_fn=loss, progress=False).losses
