"""Stage 4: the experts of all skills as one, ΔW = Σ_e ΔW_e / T.

The paper's released script takes 1/len(model_id) for its weights, the length of the model's *name*: 1/30 for
"stabilityai/stable-diffusion-2", whatever the number of experts. Its text says 1/T, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mole_kernels.errors import MoleStateError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert
from mole_kernels.experts.merge import merge
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.selma.project import Project
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle

# modes of `experts.merge` that the paper's formula and its relatives are; the others take settings of their
# own
MODES = ("delta_mean", "factor_mean", "cat", "svd", "linear")


def skill_bank(project: Project, skills: Sequence[str] = ()) -> ExpertBank:
    """The trained experts of the named skills, or of all, in the order of the manifest; one that is not there
    is a MoleStateError.
    """
    names = project.choose(skills)
    if lacking := [name for name in names if not project.expert_file(name).exists()]:
        hint = "run the third stage: mole-kernels train selma"
        raise MoleStateError(str(project.root), f"no expert yet for {', '.join(lacking)}", hint=hint)
    return ExpertBank({name: load_expert(project.expert_file(name)) for name in names})


def merge_skills(bank: ExpertBank, mode: str = "delta_mean", rank: int | None = None) -> Expert:
    """One expert of all, each with weight exactly 1/T. mode, rank: see `experts.merge.merge`."""
    merged = merge(bank, mode=mode, rank=rank)
    return Expert(
        merged.layers,
        merged.dialect,
        merged.source,
        {"method": "selma", "merge": mode, "experts": ", ".join(bank.names)},
    )


def save_merged(project: Project, merged: Expert) -> None:
    """Writes the merged expert as the project's; diffusers reads it with load_lora_weights."""
    save_expert(merged, project.merged_file)


def patch_unmerged(model: Any, bank: ExpertBank, backend: str = "auto") -> Handle:
    """The same mixture kept apart: every expert on the model with weight 1/T, to be changed by
    `Handle.set_scales`.
    """
    return patch(model, bank, scales=dict.fromkeys(bank.names, 1 / len(bank)), backend=backend)
