"""MoLE (Zhu et al., NeurIPS 2024): the UNet trained further (stage 1), experts one by one (stage 2), then
their gates (stage 3).
"""

from mole_kernels.methods.mole.presets import PRESETS, ExpertPreset, Preset
from mole_kernels.methods.mole.sampling import prompts, sample
from mole_kernels.methods.mole.stages import train_expert, train_gates, train_unet

__all__ = [
    "PRESETS",
    "ExpertPreset",
    "Preset",
    "prompts",
    "sample",
    "train_expert",
    "train_gates",
    "train_unet",
]
