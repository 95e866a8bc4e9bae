"""Named settings of MoLE's three stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mole_kernels.training.config import TrainConfig


@dataclass(frozen=True)
class ExpertPreset:
    """One expert of stage 2: its alpha (scale alpha/rank) and its run."""

    alpha: float
    config: TrainConfig


@dataclass(frozen=True)
class MoLEPreset:
    """Settings of the stages.

    Args:
        rank: Of every expert.
        experts: Name -> settings, in the order of the gates' rows; an expert of another name takes the
            first one's.
        gates: The run of stage 3.
        resolution: Side of the pictures in pixels.
        batch_size: Pictures a batch and process, of stages 1 and 2.
        gates_batch_size: The same of stage 3; None for batch_size.
        unet: The run of stage 1, None where the paper has none.
    """

    rank: int
    experts: Mapping[str, ExpertPreset]
    gates: TrainConfig
    resolution: int
    batch_size: int = 1
    unet: TrainConfig | None = None
    gates_batch_size: int | None = None

    def expert(self, name: str) -> ExpertPreset:
        """The settings of the expert of this name."""
        return self.experts.get(name) or next(iter(self.experts.values()))


def _paper(
    expert_accumulation: int,
    gate_accumulation: int,
    resolution: int,
    batch_size: int,
    unet: TrainConfig | None,
    gates_batch_size: int | None = None,
) -> MoLEPreset:
    face = TrainConfig(
        steps=30_000, lr=2e-5, accumulation=expert_accumulation, mixed_precision="bf16", checkpoint_every=1000
    )
    hand = replace(face, steps=60_000, lr=1e-5)
    gates = replace(face, steps=50_000, lr=1e-5, accumulation=gate_accumulation)
    return MoLEPreset(
        256,
        {"face": ExpertPreset(64.0, face), "hand": ExpertPreset(128.0, hand)},
        gates,
        resolution,
        batch_size,
        unet,
        gates_batch_size,
    )


_STAGE_1 = TrainConfig(
    steps=300_000,
    lr=2e-6,
    optimiser="lion",
    betas=(0.9, 0.99),
    accumulation=4,
    snr_gamma=5.0,
    mixed_precision="bf16",
    checkpoint_every=1000,
)
_SMALL = TrainConfig(
    steps=1000,
    lr=1e-4,
    warmup=50,
    schedule="cosine",
    accumulation=4,
    snr_gamma=5.0,
    cond_dropout=0.05,
    gradient_checkpointing=True,
    checkpoint_every=100,
)
_DEMO_EXPERT = TrainConfig(
    steps=350, lr=2e-3, warmup=23, schedule="cosine", weight_decay=0.0, cond_dropout=0.1
)

# sd15, sdxl: rank, alphas, optimisers, lr, steps, accumulation, min-SNR and precision are those of the
# official code (JiePKU/MoLE), as are the batches of its data_config: 4 for SD1.5; for SDXL 2 for the experts
# and 3 for the gates, each on 2 GPUs. Weight decay 0.01, a constant rate, no warm-up and clipping at 1 are
# this package's choice, as are Lion's betas (its paper's), bf16 in stage 3 and the checkpoints' interval.
# Stage 1 is SD1.5's only, batch 4 on each of 4 GPUs.
# small: this package's own, for one small GPU or a CPU: activations computed again in the backward, one
# picture at a time.
# demo: as the demo on digits trains its small UNet on a CPU; a learned constant there wants three times the
# gates' lr.
PRESETS: Mapping[str, MoLEPreset] = {
    "sd15": _paper(4, 6, 512, 4, _STAGE_1),
    "sdxl": _paper(16, 12, 1024, 2, None, 3),
    "small": MoLEPreset(
        rank=16,
        experts={"expert": ExpertPreset(16.0, _SMALL)},
        gates=replace(_SMALL, steps=500, lr=1e-3, warmup=25),
        resolution=512,
        unet=replace(_SMALL, lr=1e-5),
    ),
    "demo": MoLEPreset(
        rank=16,
        experts={"low": ExpertPreset(16.0, _DEMO_EXPERT), "high": ExpertPreset(16.0, _DEMO_EXPERT)},
        gates=TrainConfig(
            steps=120, lr=2e-2, warmup=8, schedule="cosine", weight_decay=0.0, cond_dropout=0.1
        ),
        resolution=32,
        batch_size=16,
        unet=replace(_DEMO_EXPERT, lr=2e-4),
    ),
}
