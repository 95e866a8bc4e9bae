"""The demo's work in pieces that run in processes of their own; each piece loads the base, does one thing and
returns plain data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from mole_kernels.demo import data, evaluate, stages
from mole_kernels.demo.classifier import load_reader
from mole_kernels.demo.model import ASSETS, Pipeline, load_pipeline
from mole_kernels.patching.apply import patch

if TYPE_CHECKING:
    from mole_kernels.experts.bank import ExpertBank
    from mole_kernels.io import GateFile
    from mole_kernels.patching.handle import Handle

CONSTANTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
GATED = {"constant": "learned constant", "local": "local", "global": "global", "mole": "both"}
# fixed before any picture was drawn, so that none is picked by its looks
SHOWN_CAPTIONS = (
    "three blank seven",
    "zero one two",
    "five six nine",
    "eight two blank",
    "blank four blank",
    "nine three six",
    "six zero four",
)
MAP_TIME = 300
# whose pictures are drawn and read; the other kinds of gates are compared by their losses
DRAWN = ("base", "low expert", "high expert", "sum", "learned constant", "both")


@dataclass(frozen=True)
class DemoJob:
    """What every piece needs to know."""

    seed: int
    folder: Path
    plan: stages.DigitTraining
    assets: Path = ASSETS
    held_out: int = 64
    captions: int = 48
    steps: int = 20
    pictures: bool = False


def bank_of(job: DemoJob) -> ExpertBank:
    """The two experts that `expert_task` wrote for this seed."""
    from mole_kernels.experts.bank import ExpertBank
    from mole_kernels.io import load_expert

    return ExpertBank({name: load_expert(expert_path(job, name)) for name in data.HALVES})


def expert_path(job: DemoJob, name: str) -> Path:
    return job.folder / f"seed{job.seed}_{name}.safetensors"


def mixture_path(job: DemoJob) -> Path:
    return job.folder / f"seed{job.seed}_mixture.safetensors"


def expert_task(job: DemoJob, half: int) -> dict[str, Any]:
    """Stage 2 for one half: trains the expert and writes its file."""
    from mole_kernels.io import save_expert

    begun = time.time()
    pipe = load_pipeline(job.assets)
    expert, losses = stages.train_digit_expert(pipe, half, job.plan, job.seed)
    save_expert(expert, expert_path(job, data.HALVES[half]))
    return {
        "seconds": {f"expert {data.HALVES[half]}": time.time() - begun},
        "training": {data.HALVES[half]: stages.ends(losses)},
    }


def base_task(job: DemoJob) -> dict[str, Any]:
    """The base alone: its losses, and its digits read back."""
    begun, pipe = time.time(), load_pipeline(job.assets)
    held = evaluate.make_held_out(pipe, job.held_out)
    return _measure(job, pipe, held, "base") | {"seconds": {"base": time.time() - begun}}


def plain_task(job: DemoJob, bank: ExpertBank | None = None) -> dict[str, Any]:
    """The experts without gates: each alone, their sum, and constants."""
    begun, pipe = time.time(), load_pipeline(job.assets)
    held, low, high = evaluate.make_held_out(pipe, job.held_out), *data.HALVES
    out: dict[str, Any] = {}
    with patch(pipe, bank or bank_of(job)) as handle:
        for name, scales in {"low expert": (1.0, 0.0), "high expert": (0.0, 1.0), "sum": (1.0, 1.0)}.items():
            handle.set_scales({low: scales[0], high: scales[1]})
            add_tables(out, _measure(job, pipe, held, name))
        for constant in CONSTANTS:
            handle.set_scales({low: constant, high: constant})
            add_tables(out, _losses(pipe, held, f"constant {constant}"))
    return add_tables(out, {"seconds": {"plain": time.time() - begun}})


def gates_task(job: DemoJob, kind: str) -> dict[str, Any]:
    """Stage 3 with one kind of gates, then everything that is measured on the result."""
    begun, pipe = time.time(), load_pipeline(job.assets)
    torch.manual_seed(1000 * job.seed + 7)
    with patch(pipe, bank_of(job), gates=kind) as handle:
        losses = stages.train_digit_gates(
            pipe, handle, kind, stages.sharp_scenes(job.plan, job.seed), job.plan, job.seed
        )
        if kind == "mole":
            handle.save(mixture_path(job))
        out = measure_gated(job, pipe, handle, GATED[kind])
        if kind == "constant":
            out["constants"] = _constants(handle)
    return out | {
        "seconds": {GATED[kind]: time.time() - begun},
        "training": {GATED[kind]: stages.ends(losses)},
    }


def shipped_task(job: DemoJob, bank: ExpertBank, gates: GateFile) -> dict[str, Any]:
    """The shipped experts with their shipped gates."""
    begun, pipe = time.time(), load_pipeline(job.assets)
    with patch(pipe, bank, gates=gates) as handle:
        out = measure_gated(job, pipe, handle, "both")
    return out | {"seconds": {"both": time.time() - begun}}


def measure_gated(job: DemoJob, pipe: Pipeline, handle: Handle, variant: str) -> dict[str, Any]:
    """Losses, reading and, where there are token gates, how well they find their cards."""
    held = evaluate.make_held_out(pipe, job.held_out)
    out = _measure(job, pipe, held, variant)
    if variant in ("local", "both"):
        maps = evaluate.collect_maps(pipe, handle, held)
        out["gates"] = {variant: evaluate.gate_auc(maps, held.boxes)}
        if job.pictures and variant in DRAWN:
            out["maps"] = {variant: _maps_of(pipe, handle, out["pictures"][variant])}
    return out


def _measure(job: DemoJob, pipe: Pipeline, held: evaluate.HeldOut, variant: str) -> dict[str, Any]:
    out = _losses(pipe, held, variant)
    if variant not in DRAWN:
        return out
    # one list of captions for all variants and seeds; the noise differs by seed
    labels = data.draw_labels(job.captions, Generator().manual_seed(4242))
    captions = [data.caption_of(row) for row in labels.tolist()]
    pixels = evaluate.generate_pictures(pipe, captions, 100 + job.seed, job.steps)
    out["reading"] = {variant: evaluate.read_back(load_reader(job.assets), pixels, captions)}
    if job.pictures:
        out["pictures"] = {variant: evaluate.generate_pictures(pipe, SHOWN_CAPTIONS, job.seed, job.steps)}
    return out


def _losses(pipe: Pipeline, held: evaluate.HeldOut, variant: str) -> dict[str, Any]:
    losses = evaluate.scene_losses(pipe, held)
    per_scene = losses[:, 0] / held.regions[:, 0].sum((1, 2))
    return {
        "loss": {variant: evaluate.region_loss(losses, held)},
        "scene_loss": {variant: per_scene.tolist()},
    }


@torch.no_grad()
def _maps_of(pipe: Pipeline, handle: Handle, pixels: Tensor) -> Tensor:
    """The mean gate map [B,E,6,18] on the shown pictures, noised to MAP_TIME."""
    latents = evaluate.encode_pictures(pipe, pixels)
    t = torch.full((len(latents),), MAP_TIME)
    noise = torch.randn(latents.shape, generator=Generator().manual_seed(3))
    pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, evaluate.encode_captions(pipe, SHOWN_CAPTIONS))
    gates = {
        path: layer_gates.token
        for path, layer_gates in handle.gate_maps().items()
        if layer_gates.token is not None
    }
    return evaluate.mean_map(evaluate.picture_maps(gates))


def _constants(handle: Handle) -> dict[str, float]:
    """Mean of each expert's learned constants over the layers."""
    constants = [
        layer_gates.given.reshape(-1).float()
        for layer_gates in handle.gate_maps().values()
        if layer_gates.given is not None
    ]
    return dict(zip(handle.names, torch.stack(constants).mean(0).tolist(), strict=True))


def add_tables(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Put the tables of `more` into those of `into`, one level deep."""
    for key, table in more.items():
        into.setdefault(key, {}).update(table)
    return into
