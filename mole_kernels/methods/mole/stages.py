"""The three stages: the UNet (optional in the paper), experts one by one, then their gates alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank, Init
from mole_kernels.experts.lowrank import Expert
from mole_kernels.layers.linear import Gated
from mole_kernels.modules.scan import mole_targets, sizes
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import counted_generator
from mole_kernels.training.loop import RunOptions, TrainResult, fit
from mole_kernels.training.loss import DenoisingLoss

Batches = Iterable[Mapping[str, Tensor]]
Null = Mapping[str, Tensor] | Tensor


def train_unet(
    pipe_or_unet: Any,
    batches: Batches,
    config: TrainConfig,
    *,
    scheduler: Any = None,
    null: Null | None = None,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """Stage 1: the whole UNet is trained further, in place; VAE and text encoders are not touched.

    The arguments are those of `train_expert`. The UNet must be in float32 (mixed precision is the config's)
    and hold no experts.
    """
    unet, scheduler = _denoiser(pipe_or_unet, scheduler, "train_unet")
    if any(isinstance(module, Gated) for module in unet.modules()):
        raise MoleStateError(
            "train_unet", "the UNet holds experts", hint="stage 1 comes before them: handle.remove() first"
        )
    loss_fn = DenoisingLoss(scheduler, null, config.cond_dropout, config.snr_gamma)
    identity = {"method": "mole", "stage": "1"}
    return fit(
        unet, dict(unet.named_parameters()), batches, config, loss_fn=loss_fn, identity=identity, **run
    )


def train_expert(
    pipe_or_unet: Any,
    batches: Batches,
    *,
    name: str,
    rank: int,
    alpha: float | None = None,
    config: TrainConfig,
    scheduler: Any = None,
    null: Null | None = None,
    targets: Mapping[str, nn.Module] | None = None,
    init: Init = "kaiming",
    **run: Unpack[RunOptions],
) -> Expert:
    """Stage 2: W x + (alpha/rank)·B A x on every layer of `mole_targets`, only A and B trained; the model is
    as before at the end.

    pipe_or_unet  a diffusers pipeline with a UNet, or the UNet (then `scheduler` must be given: the noise is
                  made by its alphas)
    batches       dicts of latents [B,4,h,w], encoder_hidden_states [B,T,K] and what else `DenoisingLoss`
                  takes
    alpha         None means scale 1
    null          what a dropped condition becomes, see `DenoisingLoss`; needed where config.cond_dropout > 0
    targets       other layers than the paper's, by path
    run           run_dir, resume, progress, on_step, trackers: as in `fit`
    Fresh weights are those of `ExpertBank.new` by `init`, drawn from config.seed. Factors are trained and
    returned in float32.
    """
    unet, scheduler = _denoiser(pipe_or_unet, scheduler, "train_expert")
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
        _widen(layer.experts for layer in _gated(handle))
        result = fit(
            unet, handle.expert_parameters(), batches, config, loss_fn=loss_fn, identity=identity, **run
        )
        trained = handle.bank().experts[name]
    metadata = identity | {"steps": str(result.steps), "loss": f"{_late_mean(result.losses):.6g}"}
    layers_of_unet = {f"unet.{path}": factors.to(device="cpu") for path, factors in trained.layers.items()}
    return Expert(layers_of_unet, dialect="memory", source=f"trained expert {name}", metadata=metadata)


def train_gates(
    handle: Handle,
    batches: Batches,
    config: TrainConfig,
    *,
    scheduler: Any = None,
    null: Null | None = None,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """Stage 3: only the gates of a patched model are trained, in place; experts and base stay bit for bit.

    Any gate with parameters will do: patch(…, gates="mole" | "local" | "global"), or "constant" for the
    control that sees no
    input. Gates are trained in float32. The arguments are those of `train_expert`.
    """
    unet, scheduler = _denoiser(handle.model, scheduler, "train_gates")
    gates = [layer.gate for layer in _gated(handle) if layer.gate is not None]
    if not handle.gate_parameters():
        hint = 'patch(model, experts, gates="mole") makes gates that can be trained'
        raise MoleStateError("train_gates", "the patch has no gates with parameters", hint=hint)
    loss_fn = DenoisingLoss(scheduler, null, config.cond_dropout, config.snr_gamma)
    _widen(gates)
    kinds = ", ".join(sorted({repr(gate) for gate in gates}))
    identity = {"method": "mole", "stage": "3", "experts": _fingerprint(handle), "gates": kinds}
    return fit(unet, handle.gate_parameters(), batches, config, loss_fn=loss_fn, identity=identity, **run)


def _denoiser(model: Any, scheduler: Any, where: str) -> tuple[nn.Module, Any]:
    """(unet, scheduler) of a pipeline, or of a UNet and the scheduler given with it."""
    unet = model if isinstance(model, nn.Module) else getattr(model, "unet", None)
    if not isinstance(unet, nn.Module):
        raise MoleTypeError(where, expected="a pipeline with a UNet, or a UNet", got=type(model).__name__)
    scheduler = scheduler if scheduler is not None else getattr(model, "scheduler", None)
    if scheduler is None:
        raise MoleTypeError(
            f"{where}: scheduler", expected="the scheduler whose noise the UNet was trained on", got="none"
        )
    return unet, scheduler


def _widen(modules: Iterable[nn.Module]) -> None:
    """16-bit tensors to float32, in place: a step of 1e-5 vanishes beside a bfloat16 weight."""
    for module in modules:
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
            module.float()


def _gated(handle: Handle) -> list[Gated]:
    return [module for module in handle.layers.values() if isinstance(module, Gated)]


def _fingerprint(handle: Handle) -> str:
    """Names, ranks, weights and a checksum of the experts' bits: gates trained against other experts are
    other gates.
    """
    checksum, ranks = 0, dict[str, int]()
    for layer in _gated(handle):
        for p in (layer.experts.down, layer.experts.up):
            checksum = zlib.crc32(
                p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, checksum
            )
        for name, rank in zip(layer.experts.names, layer.experts.ranks):
            ranks[name] = max(rank, ranks.get(name, 0))
    return (
        ", ".join(f"{name} r{ranks[name]} x {weight:g}" for name, weight in handle.scales.items())
        + f"; crc {checksum:08x}"
    )


def _late_mean(losses: list[float]) -> float:
    late = losses[-50:]
    return sum(late) / len(late) if late else float("nan")
