"""Two of MoLE's three stages: the UNet (optional in the paper), and the gates alone.

Stage 2, the experts one by one, is `mole_kernels.methods.lora.train_expert`, which other papers share.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from typing_extensions import Unpack

from mole_kernels.errors import MoleStateError
from mole_kernels.layers.linear import Gated
from mole_kernels.methods.lora import (
    Batches,
    NullConditions,
    denoiser_and_loss,
    gated_layers,
    widen_to_float32,
)
from mole_kernels.patching.handle import Handle
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.loop import LossFunction, RunOptions, TrainResult, fit

# components as prose has them
_SPELLED = {"unet": "UNet", "transformer": "transformer"}


def train_unet(
    pipe_or_unet: Any,
    batches: Batches,
    config: TrainConfig,
    *,
    scheduler: Any = None,
    null: NullConditions | None = None,
    loss_fn: LossFunction | None = None,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """Stage 1: train the whole UNet or transformer further, in place; VAE and text encoders are not touched.

    Args:
        pipe_or_unet: As for `train_expert`; the UNet is in float32 (mixed precision is the config's) and
            holds
            no experts.
        batches: As for `train_expert`.
        config: Steps, learning rate, seed and the like.
        scheduler: As for `train_expert`.
        null: As for `train_expert`.
        loss_fn: As for `train_expert`.
        run: run_dir, resume, progress, on_step and trackers of `fit`.

    Returns:
        The losses of all steps, and the speed.

    Raises:
        MoleStateError: The UNet holds experts, and what `fit` raises.
        MoleTypeError: No UNet or scheduler, or a UNet in 16 bits.

    Source: MoLE (Zhu et al., NeurIPS 2024), stage 1; JiePKU/MoLE.
    """
    learner = denoiser_and_loss(pipe_or_unet, scheduler, null, config, "train_unet", loss_fn)
    unet = learner.model
    if any(isinstance(module, Gated) for module in unet.modules()):
        raise MoleStateError(
            "train_unet",
            f"the {_SPELLED[learner.component]} holds experts",
            hint="stage 1 comes before them: handle.remove() first",
        )
    identity = {"method": "mole", "stage": "1"}
    named = dict(unet.named_parameters())
    return fit(unet, named, batches, config, loss_fn=learner.loss, identity=identity, **run)


def train_gates(
    handle: Handle,
    batches: Batches,
    config: TrainConfig,
    *,
    scheduler: Any = None,
    null: NullConditions | None = None,
    loss_fn: LossFunction | None = None,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """Stage 3: train the gates of a patched model alone, in place; experts and base stay bit for bit.

    Gates are trained in float32.

    Args:
        handle: A patch whose gates have parameters: ``patch(…, gates="mole" | "local" | "global")``, or
            ``"constant"`` for the control that does not see the input.
        batches: As for `train_expert`.
        config: Steps, learning rate, seed and the like.
        scheduler: As for `train_expert`.
        null: As for `train_expert`.
        loss_fn: As for `train_expert`.
        run: run_dir, resume, progress, on_step and trackers of `fit`.

    Returns:
        The losses of all steps, and the speed.

    Raises:
        MoleStateError: The patch has no gates with parameters, and what `fit` raises.
        MoleTypeError: No denoiser, or no scheduler.

    Source: MoLE (Zhu et al., NeurIPS 2024), stage 3; JiePKU/MoLE.
    """
    learner = denoiser_and_loss(handle.model, scheduler, null, config, "train_gates", loss_fn)
    gates = [layer.gate for layer in gated_layers(handle) if layer.gate is not None]
    if not handle.gate_parameters():
        hint = 'patch(model, experts, gates="mole") makes gates that can be trained'
        raise MoleStateError("train_gates", "the patch has no gates with parameters", hint=hint)
    widen_to_float32(gates)
    kinds = ", ".join(sorted({repr(gate) for gate in gates}))
    identity = {"method": "mole", "stage": "3", "experts": _describe_experts(handle), "gates": kinds}
    named = handle.gate_parameters()
    return fit(learner.model, named, batches, config, loss_fn=learner.loss, identity=identity, **run)


def _describe_experts(handle: Handle) -> str:
    """Names, ranks, scales and a checksum of the experts' bits: gates trained on other experts are
    other gates.
    """
    checksum, ranks = 0, dict[str, int]()
    for layer in gated_layers(handle):
        for p in (layer.experts.down, layer.experts.up):
            flat = p.detach().cpu().contiguous().flatten()
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
        for name, rank in zip(layer.experts.names, layer.experts.ranks):
            ranks[name] = max(rank, ranks.get(name, 0))
    experts = ", ".join(f"{name} r{ranks[name]} x {scale:g}" for name, scale in handle.scales.items())
    return f"{experts}; crc {checksum:08x}"
