"""The papers: training of experts and gates, fusion of concepts, regions, predicted LoRAs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_kernels.doors import door

if TYPE_CHECKING:
    from mole_kernels.methods.auto_regions import MaskSettings, automatic_regions, found_gates
    from mole_kernels.methods.composed import composed_experts
    from mole_kernels.methods.difflora.generate import Sampling, generate_experts
    from mole_kernels.methods.difflora.store import load_predictor
    from mole_kernels.methods.lora import train_expert
    from mole_kernels.methods.mix_of_show.augment import Augmentation
    from mole_kernels.methods.mix_of_show.augmented import AugmentedConcept
    from mole_kernels.methods.mix_of_show.concept import (
        Concept,
        load_concept,
        load_fusion_config,
        save_concept,
    )
    from mole_kernels.methods.mix_of_show.data import concept_batches
    from mole_kernels.methods.mix_of_show.edlora import EDLoRATraining, paper_training, train_edlora
    from mole_kernels.methods.mix_of_show.folder import load_fused, save_fused
    from mole_kernels.methods.mix_of_show.fusion import fuse_pipeline
    from mole_kernels.methods.mix_of_show.fusion_check import noise_errors
    from mole_kernels.methods.mix_of_show.fusion_records import FusionSettings
    from mole_kernels.methods.mix_of_show.joint import regional_flux
    from mole_kernels.methods.mix_of_show.paper_options import read_paper_options
    from mole_kernels.methods.mix_of_show.prompts import sample_concepts
    from mole_kernels.methods.mix_of_show.regions import Region, parse_regions, read_regions
    from mole_kernels.methods.mix_of_show.sampling import region_gates, regional
    from mole_kernels.methods.mix_of_show.tokens import concept_tokens, read_concepts
    from mole_kernels.methods.mix_of_show.transformers import regional_transformer
    from mole_kernels.methods.mole.sampling import sample_pictures
    from mole_kernels.methods.mole.stages import train_gates, train_unet
    from mole_kernels.methods.selma.merging import merge_skills

# fetched when first used: importing a door needs neither accelerate nor diffusers
_HOME = {
    "train_expert": "mole_kernels.methods.lora",
    "train_unet": "mole_kernels.methods.mole.stages",
    "train_gates": "mole_kernels.methods.mole.stages",
    "sample_pictures": "mole_kernels.methods.mole.sampling",
    "Region": "mole_kernels.methods.mix_of_show.regions",
    "read_regions": "mole_kernels.methods.mix_of_show.regions",
    "parse_regions": "mole_kernels.methods.mix_of_show.regions",
    "regional": "mole_kernels.methods.mix_of_show.sampling",
    "region_gates": "mole_kernels.methods.mix_of_show.sampling",
    "regional_transformer": "mole_kernels.methods.mix_of_show.transformers",
    "regional_flux": "mole_kernels.methods.mix_of_show.joint",
    "EDLoRATraining": "mole_kernels.methods.mix_of_show.edlora",
    "paper_training": "mole_kernels.methods.mix_of_show.edlora",
    "train_edlora": "mole_kernels.methods.mix_of_show.edlora",
    "MaskSettings": "mole_kernels.methods.auto_regions",
    "automatic_regions": "mole_kernels.methods.auto_regions",
    "composed_experts": "mole_kernels.methods.composed",
    "found_gates": "mole_kernels.methods.auto_regions",
    "Augmentation": "mole_kernels.methods.mix_of_show.augment",
    "AugmentedConcept": "mole_kernels.methods.mix_of_show.augmented",
    "read_paper_options": "mole_kernels.methods.mix_of_show.paper_options",
    "concept_batches": "mole_kernels.methods.mix_of_show.data",
    "Concept": "mole_kernels.methods.mix_of_show.concept",
    "load_concept": "mole_kernels.methods.mix_of_show.concept",
    "save_concept": "mole_kernels.methods.mix_of_show.concept",
    "load_fusion_config": "mole_kernels.methods.mix_of_show.concept",
    "concept_tokens": "mole_kernels.methods.mix_of_show.tokens",
    "read_concepts": "mole_kernels.methods.mix_of_show.tokens",
    "sample_concepts": "mole_kernels.methods.mix_of_show.prompts",
    "FusionSettings": "mole_kernels.methods.mix_of_show.fusion_records",
    "fuse_pipeline": "mole_kernels.methods.mix_of_show.fusion",
    "noise_errors": "mole_kernels.methods.mix_of_show.fusion_check",
    "save_fused": "mole_kernels.methods.mix_of_show.folder",
    "load_fused": "mole_kernels.methods.mix_of_show.folder",
    "merge_skills": "mole_kernels.methods.selma.merging",
    "Sampling": "mole_kernels.methods.difflora.generate",
    "generate_experts": "mole_kernels.methods.difflora.generate",
    "load_predictor": "mole_kernels.methods.difflora.store",
}

__all__ = [
    "Augmentation",
    "AugmentedConcept",
    "Concept",
    "EDLoRATraining",
    "FusionSettings",
    "MaskSettings",
    "Region",
    "Sampling",
    "automatic_regions",
    "composed_experts",
    "concept_batches",
    "concept_tokens",
    "found_gates",
    "fuse_pipeline",
    "generate_experts",
    "load_concept",
    "load_fused",
    "load_fusion_config",
    "load_predictor",
    "merge_skills",
    "noise_errors",
    "paper_training",
    "parse_regions",
    "read_concepts",
    "read_paper_options",
    "read_regions",
    "region_gates",
    "regional",
    "regional_flux",
    "regional_transformer",
    "sample_concepts",
    "sample_pictures",
    "save_concept",
    "save_fused",
    "train_edlora",
    "train_expert",
    "train_gates",
    "train_unet",
]


__getattr__, __dir__ = door(__name__, _HOME)
