"""Stage 4: the experts of all skills as one, ΔW = Σ_e ΔW_e / T.

The paper's released script takes 1/len(model_id) for its weights, the length of the model's *name*: 1/30 for
"stabilityai/stable-diffusion-2", whatever the number of experts. Its text says 1/T, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mole_kernels.errors import MoleFileError, MoleStateError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.merge import merge
from mole_kernels.files.reader import read_tensors
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.selma.project import Project
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from mole_kernels.training.checkpoint import list_checkpoints, load_checkpoint

# modes of `experts.merge` that the paper's formula and its relatives are; the others take settings of their
# own
MODES = ("delta_mean", "factor_mean", "cat", "svd", "linear")


def skill_bank(project: Project, skills: Sequence[str] = (), step: int | None = None) -> ExpertBank:
    """The trained experts of the named skills, or of all, in the order of the manifest.

    Args:
        project: The run.
        skills: Some of its skills; () for all.
        step: Take the checkpoints of this step, as the paper's script takes those of 3000; None takes the
            experts of the runs' end.

    Raises:
        MoleStateError: An expert, or its checkpoint of that step, is not there.
    """
    names = project.choose(skills)
    if step is not None:
        return ExpertBank({name: expert_at(project, name, step) for name in names})
    if lacking := [name for name in names if not project.expert_file(name).exists()]:
        hint = "run the third stage: mole-kernels train selma"
        raise MoleStateError(str(project.root), f"no expert yet for {', '.join(lacking)}", hint=hint)
    return ExpertBank({name: load_expert(project.expert_file(name)) for name in names})


def expert_at(project: Project, skill: str, step: int) -> Expert:
    """A skill's expert as it was at one checkpoint.

    Raises:
        MoleStateError: No such checkpoint; the message lists those that are there.
        MoleFileError: A checkpoint that holds something else.
    """
    run = project.run_folder(skill)
    folders = dict(list_checkpoints(run))
    if step not in folders:
        raise MoleStateError(
            f"{run}: checkpoint of step {step}",
            expected=f"one of {', '.join(map(str, folders)) or 'none'}",
            got=str(step),
            hint="checkpoints are made every checkpoint_every steps, and the last keep_last are kept",
        )
    weights, _ = read_tensors(folders[step] / "weights.safetensors")
    identity = load_checkpoint(folders[step]).identity
    rank, alpha = int(identity["rank"]), float(identity["alpha"])
    layers = {}
    for key, down in weights.items():
        path, dot, name = key.rpartition(".experts.")
        if dot and name == "down" and f"{path}.experts.up" in weights:
            up = weights[f"{path}.experts.up"]
            # [sets,R,K] and [sets,N,R] of one set
            layers[f"unet.{path}"] = LowRank(
                down.reshape(-1, down.shape[-1]), up.reshape(-1, rank), alpha / rank
            )
    if not layers:
        raise MoleFileError(str(folders[step]), expected="weights of an expert", got="others")
    metadata = {"method": "selma", "expert": skill, "steps": str(step)}
    return Expert(layers, dialect="memory", source=f"{skill} at step {step}", metadata=metadata)


def merge_skills(bank: ExpertBank, mode: str = "delta_mean", rank: int | None = None) -> Expert:
    """One expert of all skills, each with weight exactly 1/T.

    Args:
        bank: The T experts.
        mode: See `mk.merge`.
        rank: See `mk.merge`.

    Returns:
        The merged expert.

    Raises:
        MoleError: As `mk.merge`.
    """
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
