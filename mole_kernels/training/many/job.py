"""One job: what a user asks for, and its own state, random streams, optimiser and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.bank import Init
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.layers.conv import conv_of
from mole_kernels.patching.pack import pack
from mole_kernels.training.checkpoint import (
    Checkpoint,
    clear_unfinished,
    list_checkpoints,
    load_latest,
    save_checkpoint,
)
from mole_kernels.training.config import TrainConfig, learning_rate
from mole_kernels.training.data import BatchStream, counted_generator
from mole_kernels.training.fresh import FreshExpert, layers_to_adapt
from mole_kernels.training.many.flat import FlatOptimiser
from mole_kernels.training.objectives.noised import Noised

Status = Literal["running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class TrainJob:
    """One expert to train, as `train_expert` takes it.

    Args:
        name: Of the expert and of the job.
        batches: See `BatchStream`.
        config: Steps, learning rate, seed and the like.
        rank: R of A [R,K] and B [N,R].
        alpha: The scale is alpha/rank; None means scale 1.
        init: How A is drawn.
        targets: Layers by path, None for the usual ones.
        null: What a dropped condition becomes.
        loss: A `DenoisingLoss` or `FamilyLoss` of its own, None for that of the base.
        resume: Go on from the newest checkpoint of its run.
    """

    name: str
    batches: Iterable[Mapping[str, Tensor]]
    config: TrainConfig
    rank: int
    alpha: float | None = None
    init: Init = "kaiming"
    targets: Mapping[str, nn.Module] | None = None
    null: Mapping[str, Tensor] | Tensor | None = None
    loss: Any = None
    resume: bool = False


class RunningJob:
    """A job under way. Its parameters, draws, optimiser and checkpoints are those it would have alone.

    Args:
        job: What was asked for.
        model: The frozen denoiser.
        component: "unet" or "transformer".
        loss: The job's loss.
        folder: Of its checkpoints, None for none.

    Raises:
        MoleValueError: A mixed precision, or no layer to adapt.
        MoleStateError: A resume that does not fit.
    """

    def __init__(
        self, job: TrainJob, model: nn.Module, component: str, loss: Any, folder: Path | None
    ) -> None:
        if job.config.mixed_precision not in (None, "no"):
            got = repr(job.config.mixed_precision)
            raise MoleValueError(f"job {job.name}: mixed_precision", expected="None or 'no'", got=got)
        self.job, self.loss, self.folder, self.component = job, loss, folder, component
        self.config = replace(job.config, mixed_precision="no")
        self.plan = FreshExpert(job.name, job.rank, job.alpha, job.init)
        layers = layers_to_adapt(model, component, job.targets, f"job {job.name}")
        fresh = self.plan.bank(layers, self.config.seed).experts[job.name]
        self.experts: dict[str, LayerExperts] = {}
        self._convs = {path: conv_of(layer) for path, layer in layers.items()}
        for path, layer in layers.items():
            own = pack(path, {job.name: fresh.layers[path]}, layer)
            # a step of 1e-5 vanishes beside a 16-bit weight
            self.experts[path] = own.float() if own.down.element_size() < 4 else own
        self.named: dict[str, Parameter] = {
            f"{path}.experts.{name}": p
            for path, own in self.experts.items()
            for name, p in (("down", own.down), ("up", own.up))
        }
        for p in self.named.values():
            p.requires_grad_(True)
        self.stream = BatchStream(job.batches)
        self.optimiser = FlatOptimiser(list(self.named.values()), self.config)
        self.ema = (
            None
            if self.config.ema_decay is None
            else {name: p.detach().clone() for name, p in self.named.items()}
        )
        self.step, self.losses, self._saved = 0, list[float](), -1
        self.status: Status = "running"
        self.error: Exception | None = None
        # batches of the running step, and their losses so far
        self._batches, self.total, self._number = 0, 0.0, -1
        if folder is not None:
            self._open(folder, job.resume)
        if self.step >= self.config.steps:
            self.status = "done"

    @property
    def bytes(self) -> int:
        """Memory that the job adds beside activations: factors, their pool, both gradients, two moments of
        the optimiser (one for Lion), in bytes.
        """
        factors = sum(p.numel() * p.element_size() for p in self.named.values())
        return factors * (4 + (1 if self.config.optimiser == "lion" else 2) + (self.ema is not None))

    def draw(self, dtype: torch.dtype, device: torch.device) -> Noised:
        """The next batch, noised by the job's own random stream."""
        self._number, batch = self.stream.draw()
        batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        return self.loss.noised(batch, counted_generator(self.config.seed, "batch", self._number), dtype)  # type: ignore[no-any-return]

    def check(self, loss: Tensor) -> None:
        """Count a batch's loss.

        Raises:
            MoleStateError: It is not finite.
        """
        value = float(loss.detach().float())
        if not math.isfinite(value):
            names = self.stream.describe(self._number)
            about = f" (batch {self._number}{': ' + names if names else ''})"
            self._stop(f"the loss is {value}{about}")
        self.total += value / self.config.accumulation

    def advance(self) -> bool:
        """A batch's gradients are there: take the optimiser's step if it was the last batch of a step.

        Returns:
            Whether the parameters have changed.

        Raises:
            MoleStateError: The gradient is not finite.
        """
        self._batches += 1
        if self._batches < self.config.accumulation:
            return False
        limit = math.inf if self.config.grad_clip is None else self.config.grad_clip
        norm = self.optimiser.step(learning_rate(self.config, self.step), limit)
        if not math.isfinite(norm):
            self._stop(f"the gradient's norm is {norm}")
        if self.ema is not None:
            for name, p in self.named.items():
                self.ema[name].lerp_(p.detach(), 1.0 - float(self.config.ema_decay or 0.0))
        self.step += 1
        self.losses.append(self.total)
        self._batches, self.total = 0, 0.0
        if self.step == self.config.steps or self.step % (self.config.checkpoint_every or math.inf) == 0:
            self.save()
        if self.step == self.config.steps:
            self.status = "done"
        return True

    @torch.no_grad()
    def expert(self) -> Expert:
        """The expert as it stands (copies), the running mean where the job keeps one."""
        values = self.named if self.ema is None else self.ema
        layers = {}
        for path, own in self.experts.items():
            down, up = (values[f"{path}.experts.{name}"][0].detach().clone() for name in ("down", "up"))
            layers[path] = LowRank(down, up, own.base_scale[0].item(), conv=self._convs[path])
        late = self.losses[-50:]
        mean = sum(late) / len(late) if late else math.nan
        expert = Expert(layers, dialect="memory", source=self.job.name, metadata={})
        return self.plan.trained(expert, self.component, self.step, mean)

    def save(self) -> None:
        """A checkpoint of this step, which `fit` and this class read."""
        if self.folder is None or self._saved == self.step:
            return
        generator = torch.Generator().manual_seed(self.config.seed)
        checkpoint = Checkpoint(
            step=self.step,
            weights={name: p.detach() for name, p in self.named.items()},
            ema=self.ema,
            optimiser=self.optimiser.state_dict(),
            losses=self.losses,
            rng=[{"cpu": generator.get_state()}],
            data=self.stream.state(),
            config=self.config.to_dict(),
            identity=self.plan.identity(),
        )
        save_checkpoint(self.folder, checkpoint, self.config.keep_last)
        self._saved = self.step

    def _stop(self, problem: str) -> None:
        raise MoleStateError(
            f"job {self.job.name}: step {self.step + 1}",
            problem,
            hint="its last checkpoint stays; try a lower lr, more warmup, or look at that batch",
        )

    def _open(self, folder: Path, resume: bool) -> None:
        if not resume and list_checkpoints(folder):
            hint = "resume=True goes on from them; another name or folder begins anew"
            raise MoleStateError(f"job {self.job.name}: {folder}", "already holds checkpoints", hint=hint)
        clear_unfinished(folder)
        c = load_latest(folder) if resume else None
        if c is None:
            return
        c.check_kinds()
        for name, before, here in self.config.differences(c.config):
            expected = f"{before!r} as when the run began"
            raise MoleStateError(f"resume: config.{name}", expected=expected, got=repr(here))
        c.check_identity(self.plan.identity())
        c.check_weights(self.named)
        with c.understood():
            self.stream.restore(c.data)
            self.optimiser.load_state_dict(c.optimiser)
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(c.weights[name])
        if c.ema is not None:
            self.ema = {name: c.ema[name].to(p) for name, p in self.named.items()}
        self.step = self._saved = c.step
        self.losses = list(c.losses)
