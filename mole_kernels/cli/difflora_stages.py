"""What `mole-kernels difflora` does. Everything that can be wrong is looked at before a model is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from mole_kernels.cli.models import skeleton
from mole_kernels.cli.screen import done
from mole_kernels.cli.selma_stages import read_pipeline
from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.io import save_expert
from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
from mole_kernels.methods.difflora.dataset import (
    HasFace,
    IdentityTraining,
    LoRADataset,
    MinimumSize,
    PictureFilter,
    identity_folders,
    pack_shards,
    pictures_of,
    train_identities,
)
from mole_kernels.methods.difflora.features import (
    ClipImages,
    ImageEncoder,
    InsightFaces,
    Picture,
    SmallImages,
)
from mole_kernels.methods.difflora.generate import Sampling, generate_experts
from mole_kernels.methods.difflora.predictor import Predictor
from mole_kernels.methods.difflora.store import (
    load_autoencoder,
    load_predictor,
    save_autoencoder,
    save_predictor,
)
from mole_kernels.methods.difflora.train import train_autoencoder, train_predictor
from mole_kernels.methods.selma.train import size_multiple
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import SUFFIXES
from mole_kernels.training.processes import processes

Given = Mapping[str, Any]
RUN = ".run"


def make_data(given: Given) -> None:
    """Pictures into shards."""
    asked = _plain(given)
    # named before a model is loaded
    identity_folders(asked["root"])
    faces = [HasFace(InsightFaces(asked["faces"]))] if asked["faces"] else []
    accept = _All(MinimumSize(asked["minimum"]), *faces)
    wide = "float32" if processes().device.type == "cpu" else "bfloat16"
    pipe = read_pipeline(asked["model"], asked["dtype"] or wide)
    config = TrainConfig(steps=asked["steps"], lr=asked["lr"], seed=asked["seed"])
    training = IdentityTraining(
        config,
        asked["rank"],
        float(asked["rank"]) if asked["alpha"] is None else asked["alpha"],
        asked["batch"],
        asked["resolution"],
        size_multiple(pipe),
        tuple(asked["target"] or IdentityTraining.targets),
        caption=asked["caption"],
        per_shard=asked["per_shard"],
    )
    files = train_identities(pipe, asked["root"], asked["work"], training, accept=accept)
    found = pack_shards(asked["work"], list(files))
    _say(found.folder, f"{len(found)} LoRAs of {found.manifest.length:,} numbers each")


def teach_autoencoder(given: Given) -> None:
    """Flat LoRAs into an autoencoder."""
    asked, found = _plain(given), LoRADataset(given["work"] / "shards")
    try:
        channels = tuple(int(n) for n in asked["channels"].split(","))
    except ValueError:
        expected = "whole numbers with commas, as in 128,256,128,64"
        raise MoleValueError("--channels", expected=expected, got=printable(asked["channels"])) from None
    shape = AutoencoderConfig(
        found.manifest.length, channels, asked["factor"], asked["kernel"], asked["latent_channels"]
    )
    torch.manual_seed(asked["seed"])
    autoencoder = LoRAAutoencoder(shape)
    # clipping at 0.5, betas and decay are those of a co-author's earlier code
    config = TrainConfig(**_common(asked), grad_clip=0.5, betas=(0.86, 0.999), weight_decay=2e-6)
    more = {"strength": asked["strength"], "power": asked["power"], "batch_size": asked["batch"]}
    result = train_autoencoder(
        autoencoder, found, config, **more, run_dir=_run_dir(asked["out"]), resume=asked["resume"]
    )
    if processes().is_main_process:
        save_autoencoder(asked["out"], autoencoder.cpu(), found.manifest, {"steps": str(result.steps)})
    _say(
        asked["out"],
        f"an autoencoder of ratio {shape.ratio:.0f}, {result.steps} steps, late loss {_late(result.losses):.3g}",
    )


def teach(given: Given) -> None:
    """Pictures and latents into a model."""
    asked, found = _plain(given), LoRADataset(given["work"] / "shards")
    autoencoder, manifest = load_autoencoder(asked["autoencoder"])
    if manifest != found.manifest:
        raise MoleFileError(
            printable(asked["autoencoder"], 300),
            expected="the layout of the data set's vectors",
            got="that of another set",
            hint="mole-kernels difflora train-autoencoder on this data set",
        )
    torch.manual_seed(asked["seed"])
    encoders = {kind: make_encoder(kind, asked[kind]) for kind in ("face", "image")}
    shape = {key: asked[key] for key in ("dim", "depth", "width", "heads", "patch")}
    predictor = Predictor.new(manifest, autoencoder, encoders, **shape)
    references = [
        predictor.prepare(pictures_of(asked["work"], name), f"pictures of {printable(name)}")
        for name in found.names
    ]
    config = TrainConfig(**_common(asked), cond_dropout=asked["drop"])
    more = {"batch_size": asked["batch"], "most": asked["most"]}
    result = train_predictor(
        predictor, found, references, config, **more, run_dir=_run_dir(asked["out"]), resume=asked["resume"]
    )
    if processes().is_main_process:
        save_predictor(asked["out"], predictor.cpu(), {"steps": str(result.steps)})
    _say(
        asked["out"],
        f"a model of {len(found)} people, {result.steps} steps, late loss {_late(result.losses):.3g}",
    )


def predict(given: Given) -> None:
    """Pictures into a LoRA file."""
    asked = _plain(given)
    pictures = _pictures(asked["pictures"])
    encoders = {kind: make_encoder(kind, asked[kind]) for kind in ("face", "image") if asked[kind]}
    predictor = load_predictor(asked["model_folder"], **encoders)
    began = time.perf_counter()
    sampling = Sampling(asked["sampling_steps"], asked["guidance"], asked["seed"], asked["sampler"])
    bank = generate_experts(predictor, {"person": pictures}, base=_base(asked["model"]), sampling=sampling)
    expert = bank.experts["person"]
    save_expert(expert, asked["out"], asked["to"])
    seconds = time.perf_counter() - began
    ranks = ", ".join(map(str, sorted(expert.ranks())))
    done(
        str(asked["out"]),
        f"{len(expert.layers)} layers of rank {ranks} from {len(pictures)} pictures in {seconds:.2f} s",
    )


class _All:
    def __init__(self, *filters: PictureFilter) -> None:
        self.filters = filters

    def __call__(self, picture: Picture) -> str | None:
        return next((why for accept in self.filters if (why := accept(picture)) is not None), None)


def make_encoder(kind: str, said: str) -> ImageEncoder:
    """small, small:SIZE, clip:FOLDER or insightface:FOLDER."""
    name, _, rest = said.partition(":")
    if name == "small" and (not rest or (rest.isdecimal() and int(rest) >= 8)):
        return SmallImages(size=int(rest or 32))
    if name == "clip" and rest:
        return ClipImages(rest, device=processes().device)
    if name == "insightface" and rest:
        return InsightFaces(rest)
    expected = "small, small:SIZE (at least 8), clip:FOLDER or insightface:FOLDER"
    raise MoleValueError(f"--{kind}", expected=expected, got=printable(said))


def _base(name: str | None) -> Any:
    """The modules of the base, without its weights where they are not needed."""
    if name == "demo":
        return read_pipeline(name, None)
    return None if name is None else skeleton(name)


def _pictures(given: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in given:
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        if not inside:
            raise MoleFileError(printable(path, 300), f"holds no picture ({', '.join(SUFFIXES)})")
        found += inside
    return found


def _common(asked: Given) -> dict[str, Any]:
    return {key: asked[key] for key in ("steps", "lr", "seed", "schedule", "checkpoint_every")}


def _run_dir(out: Path) -> Path:
    """Of checkpoints, beside what is written in the end."""
    return out.with_name(out.name + RUN)


def _late(losses: Sequence[float]) -> float:
    return sum(losses[-50:]) / max(1, len(losses[-50:]))


def _plain(given: Given) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in given.items()}


def _say(path: Path, what: str) -> None:
    if processes().is_main_process:
        done(str(path), what)
