"""What several papers share in training: one LoRA on a frozen denoiser, by its family's loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mole_kernels.errors import MoleTypeError, MoleValueError
from mole_kernels.experts.bank import Init
from mole_kernels.experts.lowrank import Expert
from mole_kernels.layers.linear import Gated
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.families.loss import FamilyLoss
from mole_kernels.training.fresh import FreshExpert, layers_to_adapt
from mole_kernels.training.loop import LossFunction, RunOptions, fit
from mole_kernels.training.loss import DenoisingLoss
from mole_kernels.training.objectives.objective import objective_of

Batches = Iterable[Mapping[str, Tensor]]
NullConditions = Mapping[str, Tensor] | Tensor


def train_expert(
    pipe_or_unet: Any,
    batches: Batches,
    *,
    name: str,
    rank: int,
    alpha: float | None = None,
    config: TrainConfig,
    scheduler: Any = None,
    null: NullConditions | None = None,
    targets: Mapping[str, nn.Module] | None = None,
    init: Init = "kaiming",
    loss_fn: LossFunction | None = None,
    **run: Unpack[RunOptions],
) -> Expert:
    """Train one LoRA: y = W x + (alpha/rank)·B A x on every target layer, A and B alone.

    Factors are trained and returned in float32; the model is bit for bit as before at the end. Fresh
    weights are
    those of `ExpertBank.new` by `init`, drawn from `config.seed` and `name`.

    Args:
        pipe_or_unet: A diffusers pipeline with a UNet or a transformer, or a UNet itself; then `scheduler`
            is needed.
        batches: For a UNet dicts of latents [B,4,h,w], encoder_hidden_states [B,T,K] and what else
            `DenoisingLoss` takes; for a transformer what `Family` takes. See `BatchStream` for what may
            yield them.
        name: Name of the expert in its file and in the checkpoints.
        rank: Rank R of A [R,K] and B [N,R].
        alpha: The scale is alpha/rank; None means scale 1.
        config: Steps, learning rate, seed and the like.
        scheduler: The scheduler whose noise the UNet was trained on; None takes the pipeline's.
        null: What a dropped condition becomes, see `DenoisingLoss`; needed where `config.cond_dropout` > 0.
        targets: Layers by path; None takes those of MoLE (`mole_targets`) in a UNet, and a transformer's
            attention (`attention_targets`).
        init: How A is drawn, "kaiming" or "gaussian"; B is zero.
        loss_fn: As `fit` takes it, such as a `FamilyLoss` with settings of its own; None makes one of
            `scheduler`, `null` and `config`.
        run: run_dir, resume, progress, on_step and trackers of `fit`.

    Returns:
        The trained expert, its paths below ``unet.`` or ``transformer.``, with steps and late loss as
        metadata.

    Raises:
        MoleTypeError: No UNet or transformer, or no scheduler.
        MoleValueError: No layer to adapt.
        MoleStateError: What `fit` raises.

    Source: stage 2 of MoLE (Zhu et al., NeurIPS 2024, section 3.3; JiePKU/MoLE), and LoRA (Hu et al., ICLR
    2022).
    """
    learner = denoiser_and_loss(pipe_or_unet, scheduler, null, config, "train_expert", loss_fn)
    model, plan = learner.model, FreshExpert(name, rank, alpha, init)
    fresh = plan.bank(layers_to_adapt(model, learner.component, targets, "train_expert"), config.seed)
    with patch(model, fresh) as handle:
        widen_to_float32(layer.experts for layer in gated_layers(handle))
        result = fit(
            model,
            handle.expert_parameters(),
            batches,
            config,
            loss_fn=learner.loss,
            identity=plan.identity(),
            **run,
        )
        trained = handle.bank().experts[name]
    return plan.trained(trained, learner.component, result.steps, result.late_loss())


class Learner(NamedTuple):
    """A denoiser, the name of its component, and the loss it is trained by."""

    model: nn.Module
    component: str
    loss: LossFunction


def denoiser_and_loss(
    model: Any,
    scheduler: Any,
    null: NullConditions | None,
    config: TrainConfig,
    where: str,
    loss_fn: LossFunction | None = None,
) -> Learner:
    """What is trained of a pipeline, and by which loss.

    Args:
        model: A pipeline with a UNet or a transformer, or a UNet.
        scheduler: Overrides the pipeline's, if not None.
        null: What a dropped condition becomes.
        config: Its `cond_dropout` and `snr_gamma`.
        where: The caller, for messages.
        loss_fn: Taken as it is, if not None.

    Raises:
        MoleTypeError: No denoiser, or no scheduler.
        MoleValueError: A null of another form than the denoiser's.
    """
    transformer = getattr(model, "transformer", None)
    if isinstance(transformer, nn.Module) and not isinstance(model, nn.Module):
        if isinstance(null, Tensor):
            raise MoleValueError(
                f"{where}: null", expected="a dict of the pipeline's arguments", got="one tensor"
            )
        if loss_fn is None:
            wanted = model.scheduler if scheduler is None else scheduler
            objective = objective_of(wanted, snr_gamma=config.snr_gamma)
            loss_fn = FamilyLoss(model, objective=objective, null=null, cond_dropout=config.cond_dropout)
        return Learner(transformer, "transformer", loss_fn)
    if loss_fn is not None and isinstance(model, nn.Module):
        return Learner(model, "unet", loss_fn)
    unet, scheduler = unet_and_scheduler(model, scheduler, where)
    return Learner(
        unet, "unet", loss_fn or DenoisingLoss(scheduler, null, config.cond_dropout, config.snr_gamma)
    )


def unet_and_scheduler(model: Any, scheduler: Any, where: str) -> tuple[nn.Module, Any]:
    """The UNet and the scheduler of a pipeline, or a UNet and the scheduler given with it.

    Args:
        model: A pipeline with `unet`, or a UNet.
        scheduler: Overrides the pipeline's, if not None.
        where: The caller, for the message.

    Raises:
        MoleTypeError: No UNet, or no scheduler.
    """
    unet = model if isinstance(model, nn.Module) else getattr(model, "unet", None)
    if not isinstance(unet, nn.Module):
        expected = "a pipeline with a UNet or a transformer, or a UNet"
        raise MoleTypeError(where, expected=expected, got=type(model).__name__)
    scheduler = scheduler if scheduler is not None else getattr(model, "scheduler", None)
    if scheduler is None:
        raise MoleTypeError(
            f"{where}: scheduler", expected="the scheduler whose noise the UNet was trained on", got="none"
        )
    return unet, scheduler


def widen_to_float32(modules: Iterable[nn.Module]) -> None:
    """Cast 16-bit modules to float32, in place: a step of 1e-5 vanishes beside a bfloat16 weight."""
    for module in modules:
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
            module.float()


def gated_layers(handle: Handle) -> list[Gated]:
    """The patched layers of a handle, in its order."""
    return [module for module in handle.layers.values() if isinstance(module, Gated)]
