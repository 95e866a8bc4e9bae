"""Stage 3: one low-rank expert per skill, on attention's q, k, v and output, from the pictures of stage 2."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from mole_kernels.errors import MoleStateError, MoleValueError, printable
from mole_kernels.experts.lowrank import Expert
from mole_kernels.files.text import read_text
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.lora import train_expert
from mole_kernels.methods.selma.pictures import METADATA
from mole_kernels.methods.selma.project import Project, checked, read_lines, write_lines
from mole_kernels.modules.scan import mole_targets
from mole_kernels.training.cached import PictureBatches, picture_batches
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.loop import RunOptions
from mole_kernels.training.pictures import PictureFolder
from mole_kernels.training.processes import processes

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class SkillTraining:
    """How an expert is trained.

    Args:
        rank: Rank of the expert.
        alpha: Its scale is alpha/rank.
        resolution: Side of the pictures in pixels, or (height, width).
        batch_size: Pictures a step, process and accumulation.
        flip: Every picture also mirrored, once an epoch each: a random flip in expectation, and from
            cached latents.
        multiple: Picture sizes are multiples of it; 64 fits Stable Diffusion.
        config: The run.
    """

    config: TrainConfig
    rank: int = 128
    alpha: float = 128.0
    resolution: int | tuple[int, int] = 512
    batch_size: int = 16
    flip: bool = True
    multiple: int = 64

    def lasting(self) -> dict[str, Any]:
        """What must be the same when a run goes on; `fit` compares the rest."""
        return {key: value for key, value in asdict(self).items() if key != "config"} | {
            "lr": self.config.lr,
            "seed": self.config.seed,
        }


def _paper(
    steps: int, batch_size: int, accumulation: int, resolution: int, checkpoint_every: int
) -> SkillTraining:
    config = TrainConfig(
        steps=steps,
        lr=3e-4,
        accumulation=accumulation,
        mixed_precision="bf16",
        seed=42,
        checkpoint_every=checkpoint_every,
        keep_last=20,
    )
    return SkillTraining(config, resolution=resolution, batch_size=batch_size)


# sd: Stable Diffusion 1.4 and 2, sdxl: rank, alpha, lr, steps, batch, accumulation, resolution, seed, flip
# and interval of checkpoints are
# those of the paper's code. Weight decay 0.01, clipping at 1 and bf16 (there: fp16 base under float32
# factors) are this package's choice.
# The paper's batch of 64 is 16 x 4 on however many GPUs; its merge takes the checkpoint of step 3000
# (`skill_bank(…, step=3000)`), here the run's end is taken.
PRESETS: Mapping[str, SkillTraining] = {
    "sd": _paper(5000, 16, 4, 512, 500),
    "sdxl": _paper(10_000, 4, 8, 1024, 2000),
    "small": SkillTraining(
        TrainConfig(
            steps=1000, lr=3e-4, accumulation=4, seed=42, checkpoint_every=100, gradient_checkpointing=True
        ),
        rank=16,
        alpha=16.0,
        batch_size=1,
    ),
}


def train_skill(
    project: Project,
    skill: str,
    pipe: Any,
    training: SkillTraining,
    *,
    cache: Path | None = None,
    **run: Unpack[RunOptions],
) -> Expert:
    """Trains the expert of a skill on its pictures and writes its file; a run that was broken off goes on
    from its checkpoint.

    An expert that has all its steps is read, not trained again. cache: where latents and text states are
    kept, None for memory.
    """
    state, target = processes(), project.expert_file(skill)
    if state.is_main_process:
        project.settle("train", skill, training.lasting())
    state.wait_for_everyone()
    captions = _digest_of(project.pictures_folder(skill) / METADATA)
    done = project.noted("train", skill) or {}
    steps = done.get("steps")
    if isinstance(steps, int) and steps >= training.config.steps and target.exists():
        # an expert outlives its pictures, which may be removed to save room
        if captions is not None and done.get("captions") not in (None, captions):
            raise MoleStateError(
                f"{project.root}: train of {skill}, captions",
                "pictures or captions have changed since the expert was trained",
                hint=f"take {target.name} and the run folder of {skill} away to train it anew",
            )
        return load_expert(target)
    batches = _batches(pipe, project.pictures_folder(skill), training, cache, bool(run.get("progress", True)))
    options: RunOptions = {"run_dir": project.run_folder(skill), "resume": True, **run}
    expert = train_expert(
        pipe,
        batches,
        name=skill,
        rank=training.rank,
        alpha=training.alpha,
        config=training.config,
        null=batches.null,
        targets=skill_targets(pipe),
        init="gaussian",
        **options,
    )
    expert = replace(expert, metadata={**expert.metadata, "method": "selma"})
    if state.is_main_process:
        save_expert(expert, target)
        figures = {"steps": int(expert.metadata["steps"]), "loss": float(expert.metadata["loss"])}
        project.note("train", skill, figures | {"captions": captions})
    state.wait_for_everyone()
    return expert


def join_pictures(project: Project, skills: Sequence[str], name: str = "joint") -> None:
    """The pictures of several skills as those of one more, by links: `train_skill` on it is the paper's joint
    training.
    """
    rows = []
    folder = project.pictures_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    for skill in skills:
        own = project.pictures_folder(skill)
        for number, row in enumerate(read_lines(own / METADATA), 1):
            checked(row, own / METADATA, number, file_name=str, text=str)
            link = folder / f"{skill}-{row['file_name']}"
            if not link.is_symlink():
                link.symlink_to(Path("..", "..", skill, own.name, row["file_name"]))
            rows.append(row | {"file_name": link.name})
    if not rows:
        raise MoleStateError(
            f"{project.root}: {', '.join(skills)}",
            "have no pictures",
            hint="run the second stage: mole-kernels selma pictures",
        )
    write_lines(folder / METADATA, rows)


def size_multiple(pipe: Any) -> int:
    """What picture sizes must be multiples of: the VAE's factor times what the UNet halves by; 64 for Stable
    Diffusion.
    """
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1 + len(pipe.unet.config.block_out_channels) - 1)


def skill_targets(pipe: Any) -> dict[str, nn.Module]:
    """{path: layer} of to_q, to_k, to_v and to_out.0 of every attention of the UNet."""
    unet = getattr(pipe, "unet", pipe)
    layers = {
        path: layer
        for path, layer in mole_targets(unet).items()
        if path.endswith(tuple(f".{name}" for name in ATTENTION))
    }
    if not layers:
        raise MoleValueError(
            "selma: targets",
            expected=f"layers called {', '.join(ATTENTION)}",
            got=f"none in {type(unet).__name__}",
        )
    return layers


class MirroredFolder(PictureFolder):
    """A folder of pictures, each there twice: as it is, and with left and right exchanged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._own = len(self.pictures)
        self.pictures += [replace(p, name=f"{p.name} mirrored", digest=f"{p.digest}m") for p in self.pictures]

    def pixels(self, i: int) -> Tensor:
        pixels = super().pixels(i % self._own)
        return pixels if i < self._own else pixels.flip(-1)


def _digest_of(path: Path) -> str | None:
    """A hash of metadata.jsonl, which holds every caption and its picture's name; None where there is
    none.
    """
    return hashlib.blake2b(read_text(path).encode(), digest_size=12).hexdigest() if path.exists() else None


def _batches(
    pipe: Any, path: Path, training: SkillTraining, cache: Path | None, progress: bool
) -> PictureBatches:
    if not (path / METADATA).exists():
        hint = "run the second stage to its end: mole-kernels selma pictures"
        raise MoleStateError(
            printable(path, 300), f"holds no {METADATA}: its pictures are not all made", hint=hint
        )
    kind = MirroredFolder if training.flip else PictureFolder
    folder = kind(path, training.resolution, multiple=training.multiple)
    size = min(training.batch_size, len(folder))
    return picture_batches(pipe, folder, size, cache=cache, seed=training.config.seed, progress=progress)
