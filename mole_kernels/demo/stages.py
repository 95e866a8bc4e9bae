"""The paper's stages 2 and 3 in miniature: each expert alone on close-ups of its half, then gates alone on
scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator

from mole_kernels.demo import data
from mole_kernels.demo.evaluate import encode_captions, encode_pictures
from mole_kernels.demo.model import Pipeline
from mole_kernels.methods import mole
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches

if TYPE_CHECKING:
    from mole_kernels.experts.lowrank import Expert
    from mole_kernels.patching.handle import Handle

GATE_KINDS = ("constant", "local", "global", "mole")


@dataclass(frozen=True)
class DigitTraining:
    """Rank, steps, batches and learning rates of one seed's training."""

    rank: int = 16
    closeups: int = 1536
    expert_steps: int = 400
    expert_batch: int = 16
    expert_lr: float = 3e-3
    scenes: int = 1024
    gate_steps: int = 120
    gate_batch: int = 16
    gate_lr: float = 3e-2
    # one number per layer and expert moves too slowly at the gates' rate
    constant_lr: float = 9e-2
    # min-SNR weighting: without it the noisy steps, where a digit takes its shape, hardly count (77 % read
    # instead of 85 %)
    snr_gamma: float = 2.0


def train_digit_expert(
    pipe: Pipeline, half: int, plan: DigitTraining, seed: int
) -> tuple[Expert, list[float]]:
    """Stage 2: a fresh expert on sharp close-ups of one half, the base frozen. Returns it with its losses."""
    losses: list[float] = []
    expert = mole.train_expert(
        pipe,
        batches_of(pipe, closeups_of(half, plan, seed), plan.expert_batch, seed),
        name=data.HALVES[half],
        rank=plan.rank,
        config=_config(plan, plan.expert_steps, plan.expert_lr, seed),
        null=encode_captions(pipe, [""]),
        progress=False,
        on_step=lambda _, loss: losses.append(loss),
    )
    return expert, losses


def train_digit_gates(
    pipe: Pipeline, handle: Handle, kind: str, scenes: data.Pictures, plan: DigitTraining, seed: int
) -> list[float]:
    """Stage 3: the fresh gates of a patched pipeline on sharp scenes, base and experts frozen. Returns the
    losses.
    """
    config = _config(plan, plan.gate_steps, plan.constant_lr if kind == "constant" else plan.gate_lr, seed)
    batches = batches_of(pipe, scenes, plan.gate_batch, seed)
    return mole.train_gates(handle, batches, config, null=encode_captions(pipe, [""]), progress=False).losses


def closeups_of(half: int, plan: DigitTraining, seed: int) -> data.Pictures:
    """The close-ups of stage 2."""
    return data.closeups(
        data.load_split("train"), plan.closeups, Generator().manual_seed(1000 * seed + half), half
    )


def sharp_scenes(plan: DigitTraining, seed: int) -> data.Pictures:
    """The scenes of stage 3."""
    return data.scenes(data.load_split("train"), plan.scenes, Generator().manual_seed(1000 * seed + 500))


def scene_batches(pipe: Pipeline, pictures: int, batch: int, seed: int = 0) -> TensorBatches:
    """Batches of sharp scenes for training, drawn and encoded now.

    Args:
        pipe: The pipeline of `load_pipeline`, which encodes pictures and captions.
        pictures: How many scenes are drawn.
        batch: Pictures in a batch.
        seed: Of the scenes and of their order.

    Returns:
        Batches with "latents" [batch,4,6,18] and "encoder_hidden_states" [batch,tokens,K].
    """
    scenes = data.scenes(data.load_split("train"), pictures, Generator().manual_seed(1000 * seed + 500))
    return batches_of(pipe, scenes, batch, seed)


def ends(losses: list[float]) -> list[float]:
    """Mean loss of the first and of the last tenth."""
    tenth = max(1, len(losses) // 10)
    return [sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth]


def batches_of(pipe: Pipeline, pictures: data.Pictures, batch: int, seed: int) -> TensorBatches:
    """The pictures' latents and text states, shuffled by seed."""
    tensors = {
        "latents": encode_pictures(pipe, pictures.pixels),
        "encoder_hidden_states": encode_captions(pipe, pictures.captions),
    }
    return TensorBatches(tensors, batch, seed=seed)


def _config(plan: DigitTraining, steps: int, lr: float, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=lr,
        warmup=max(1, steps // 15),
        schedule="cosine",
        weight_decay=0.0,
        cond_dropout=0.1,
        snr_gamma=plan.snr_gamma,
        seed=seed,
    )
