"""Training: picture folders, batches, the denoising loss, and one loop with checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_kernels.doors import door

if TYPE_CHECKING:
    from mole_kernels.training.cached import PictureBatches, picture_batches
    from mole_kernels.training.config import TrainConfig
    from mole_kernels.training.data import TensorBatches
    from mole_kernels.training.families.loss import FamilyLoss
    from mole_kernels.training.loop import TrainResult, fit
    from mole_kernels.training.loss import DenoisingLoss, denoising_loss
    from mole_kernels.training.many.job import TrainJob
    from mole_kernels.training.many.run import TrainMany
    from mole_kernels.training.objectives.objective import Diffusion, FlowMatching, objective_of
    from mole_kernels.training.pictures import PictureFolder

# fetched when first used: importing a door needs neither accelerate nor diffusers
_HOME = {
    "TrainConfig": "mole_kernels.training.config",
    "fit": "mole_kernels.training.loop",
    "TrainResult": "mole_kernels.training.loop",
    "DenoisingLoss": "mole_kernels.training.loss",
    "denoising_loss": "mole_kernels.training.loss",
    "TrainJob": "mole_kernels.training.many.job",
    "TrainMany": "mole_kernels.training.many.run",
    "FamilyLoss": "mole_kernels.training.families.loss",
    "Diffusion": "mole_kernels.training.objectives.objective",
    "FlowMatching": "mole_kernels.training.objectives.objective",
    "objective_of": "mole_kernels.training.objectives.objective",
    "PictureFolder": "mole_kernels.training.pictures",
    "PictureBatches": "mole_kernels.training.cached",
    "picture_batches": "mole_kernels.training.cached",
    "TensorBatches": "mole_kernels.training.data",
}

__all__ = [
    "DenoisingLoss",
    "Diffusion",
    "FamilyLoss",
    "FlowMatching",
    "PictureBatches",
    "PictureFolder",
    "TensorBatches",
    "TrainConfig",
    "TrainJob",
    "TrainMany",
    "TrainResult",
    "denoising_loss",
    "fit",
    "objective_of",
    "picture_batches",
]


__getattr__, __dir__ = door(__name__, _HOME)
