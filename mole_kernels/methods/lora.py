"""What several papers share in training: one LoRA on a frozen UNet, by the denoising loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mole_kernels.errors import MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank, Init
from mole_kernels.experts.lowrank import Expert
from mole_kernels.layers.linear import Gated
from mole_kernels.modules.scan import mole_targets, sizes
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import counted_generator
from mole_kernels.training.loop import RunOptions, fit
from mole_kernels.training.loss import DenoisingLoss

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
    **run: Unpack[RunOptions],
) -> Expert:
    """Train one LoRA: y = W x + (alpha/rank)·B A x on every target layer, A and B alone.

    Factors are trained and returned in float32; the model is bit for bit as before at the end. Fresh
    weights are
    those of `ExpertBank.new` by `init`, drawn from `config.seed` and `name`.

    Args:
        pipe_or_unet: A diffusers pipeline with a UNet, or the UNet itself; then `scheduler` is needed.
        batches: Dicts of latents [B,4,h,w], encoder_hidden_states [B,T,K] and what else `DenoisingLoss`
            takes;
            see `BatchStream` for what may yield them.
        name: Name of the expert in its file and in the checkpoints.
        rank: Rank R of A [R,K] and B [N,R].
        alpha: The scale is alpha/rank; None means scale 1.
        config: Steps, learning rate, seed and the like.
        scheduler: The scheduler whose noise the UNet was trained on; None takes the pipeline's.
        null: What a dropped condition becomes, see `DenoisingLoss`; needed where `config.cond_dropout` > 0.
        targets: Layers by path; None takes those of MoLE (`mole_targets`).
        init: How A is drawn, "kaiming" or "gaussian"; B is zero.
        run: run_dir, resume, progress, on_step and trackers of `fit`.

    Returns:
        The trained expert, its paths below ``unet.``, with steps and late loss as metadata.

    Raises:
        MoleTypeError: No UNet, or no scheduler.
        MoleValueError: No layer to adapt.
        MoleStateError: What `fit` raises.

    Source: stage 2 of MoLE (Zhu et al., NeurIPS 2024, section 3.3; JiePKU/MoLE), and LoRA (Hu et al., ICLR
    2022).
    """
    unet, scheduler = unet_and_scheduler(pipe_or_unet, scheduler, "train_expert")
    loss_fn = DenoisingLoss(scheduler, null, config.cond_dropout, config.snr_gamma)
    layers = mole_targets(unet) if targets is None else targets
    if not layers:
        hint = "pass targets=, the layers to adapt"
        raise MoleValueError("train_expert: targets", "the model has no Transformer2DModel layers", hint=hint)
    generator = counted_generator(config.seed, "expert", name)
    fresh = ExpertBank.new(
        {path: sizes(m) for path, m in layers.items()}, [name], rank, alpha, generator=generator, init=init
    )
    identity = {"method": "mole", "stage": "2", "expert": name, "rank": str(rank), "alpha": str(alpha)}
    with patch(unet, fresh) as handle:
        widen_to_float32(layer.experts for layer in gated_layers(handle))
        result = fit(
            unet, handle.expert_parameters(), batches, config, loss_fn=loss_fn, identity=identity, **run
        )
        trained = handle.bank().experts[name]
    metadata = identity | {"steps": str(result.steps), "loss": f"{result.late_loss():.6g}"}
    layers_of_unet = {f"unet.{path}": factors.to(device="cpu") for path, factors in trained.layers.items()}
    return Expert(layers_of_unet, dialect="memory", source=f"trained expert {name}", metadata=metadata)


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
        raise MoleTypeError(where, expected="a pipeline with a UNet, or a UNet", got=type(model).__name__)
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
