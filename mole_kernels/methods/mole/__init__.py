"""MoLE (Zhu et al., NeurIPS 2024): the UNet trained further (stage 1), experts one by one (stage 2), then
their gates (stage 3).
"""

from mole_kernels.methods.lora import train_expert
from mole_kernels.methods.mole.presets import PRESETS, ExpertPreset, MoLEPreset
from mole_kernels.methods.mole.sampling import prompt_arguments, sample_pictures
from mole_kernels.methods.mole.stages import train_gates, train_unet

__all__ = [
    "PRESETS",
    "ExpertPreset",
    "MoLEPreset",
    "prompt_arguments",
    "sample_pictures",
    "train_expert",
    "train_gates",
    "train_unet",
]
