"""What `mole-kernels difflora` does. Everything that can be wrong is looked at before a model is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mole_kernels.cli.difflora import (
    DiffLoRAAutoencoderArgs,
    DiffLoRADataArgs,
    DiffLoRAGenerateArgs,
    DiffLoRAPredictorArgs,
)
from mole_kernels.cli.models import skeleton
from mole_kernels.cli.place import ready_file, ready_folder
from mole_kernels.cli.screen import done
from mole_kernels.cli.selma_stages import read_pipeline
from mole_kernels.cli.training import late_loss, resolution_of
from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.io import save_expert
from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
from mole_kernels.methods.difflora.dataset import (
    HasFace,
    IdentityFilter,
    IdentityTraining,
    MinimumSize,
    PictureFilter,
    identity_folders,
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
from mole_kernels.methods.difflora.identities import SameFace
from mole_kernels.methods.difflora.predictor import Predictor
from mole_kernels.methods.difflora.shards import LoRADataset, pack_shards
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

RUN = ".run"
# the options that are settings of `TrainConfig` under the same names
LOOP = ("steps", "lr", "seed", "schedule", "checkpoint_every")


def make_data(asked: DiffLoRADataArgs) -> None:
    """Pictures into shards."""
    # checked before a model is loaded
    identity_folders(asked.root)
    ready_folder(asked.out)
    side = resolution_of(asked.resolution)
    if not isinstance(side, int):
        raise MoleValueError("--resolution", expected="one side in pixels", got=printable(asked.resolution))
    if asked.same_face is not None and asked.face_models is None:
        raise MoleValueError("--same-face", expected="--face-models with it", got="none")
    accept = _filters(asked)
    wide = "float32" if processes().device.type == "cpu" else "bfloat16"
    pipe = read_pipeline(asked.model, asked.dtype or wide)
    rank = asked.rank or 4
    training = IdentityTraining(
        TrainConfig(**_given(asked, "steps", "lr", "seed")),
        rank,
        float(rank) if asked.alpha is None else asked.alpha,
        asked.batch_size,
        side,
        size_multiple(pipe),
        tuple(asked.target_module or IdentityTraining.targets),
        caption=asked.caption,
        token=asked.rare_token,
        prior=1.0 if asked.class_pictures is not None else 0.0,
        per_shard=asked.per_shard,
    )
    files = train_identities(
        pipe, asked.root, asked.out, training, accept=accept, class_pictures=asked.class_pictures
    )
    shards = pack_shards(asked.out, list(files))
    _say(shards.folder, f"{len(shards)} LoRAs of {shards.manifest.length:,} numbers each")


def run_autoencoder(asked: DiffLoRAAutoencoderArgs) -> None:
    """Flat LoRAs into an autoencoder."""
    shards = LoRADataset(asked.work / "shards")
    ready_folder(asked.out.parent)
    try:
        channels = tuple(int(n) for n in asked.channels.split(","))
    except ValueError:
        expected = "whole numbers with commas, as in 128,256,128,64"
        raise MoleValueError("--channels", expected=expected, got=printable(asked.channels)) from None
    shape = AutoencoderConfig(
        shards.manifest.length, channels, asked.factor, asked.kernel, asked.latent_channels
    )
    torch.manual_seed(asked.seed)
    autoencoder = LoRAAutoencoder(shape)
    # clipping at 0.5, betas and decay are those of a co-author's earlier code
    config = TrainConfig(**_given(asked, *LOOP), grad_clip=0.5, betas=(0.86, 0.999), weight_decay=2e-6)
    result = train_autoencoder(
        autoencoder,
        shards,
        config,
        strength=asked.error_weight,
        power=asked.error_power,
        batch_size=asked.batch_size,
        run_dir=_run_dir(asked.out),
        resume=asked.resume,
    )
    if processes().is_main_process:
        save_autoencoder(asked.out, autoencoder.cpu(), shards.manifest, {"steps": str(result.steps)})
    late = late_loss(result.losses)
    _say(asked.out, f"an autoencoder of ratio {shape.ratio:.0f}, {result.steps} steps, late loss {late:.3g}")


def run_predictor(asked: DiffLoRAPredictorArgs) -> None:
    """Pictures and latents into a model."""
    shards = LoRADataset(asked.work / "shards")
    ready_folder(asked.out.parent)
    autoencoder, manifest = load_autoencoder(asked.autoencoder)
    if manifest != shards.manifest:
        raise MoleFileError(
            printable(asked.autoencoder, 300),
            expected="the layout of the data set's vectors",
            got="that of another set",
            hint="mole-kernels train difflora autoencoder on this data set",
        )
    torch.manual_seed(asked.seed)
    encoders = {
        "face": make_encoder("face", asked.face_encoder),
        "image": make_encoder("image", asked.image_encoder),
    }
    shape = _given(asked, "dim", "depth", "width", "heads", "patch")
    predictor = Predictor.new(manifest, autoencoder, encoders, **shape)
    references = [
        predictor.prepare(pictures_of(asked.work, name), f"pictures of {printable(name)}")
        for name in shards.names
    ]
    config = TrainConfig(**_given(asked, *LOOP, "cond_dropout"))
    result = train_predictor(
        predictor,
        shards,
        references,
        config,
        batch_size=asked.batch_size,
        most=asked.max_pictures,
        run_dir=_run_dir(asked.out),
        resume=asked.resume,
    )
    if processes().is_main_process:
        save_predictor(asked.out, predictor.cpu(), {"steps": str(result.steps)})
    late = late_loss(result.losses)
    _say(asked.out, f"a model of {len(shards)} people, {result.steps} steps, late loss {late:.3g}")


def generate_file(asked: DiffLoRAGenerateArgs) -> None:
    """Pictures into a LoRA file."""
    pictures = _pictures(asked.pictures)
    ready_file(asked.out)
    texts = {"face": asked.face_encoder, "image": asked.image_encoder}
    encoders = {kind: make_encoder(kind, text) for kind, text in texts.items() if text}
    predictor = load_predictor(asked.predictor, **encoders)
    began = time.perf_counter()
    sampling = Sampling(asked.sampling_steps, asked.guidance or 1.0, asked.seed, asked.sampler)
    bank = generate_experts(predictor, {"person": pictures}, base=_base(asked.model), sampling=sampling)
    expert = bank.experts["person"]
    save_expert(expert, asked.out, asked.to)
    seconds = time.perf_counter() - began
    ranks = ", ".join(map(str, sorted(expert.ranks())))
    layers = f"{len(expert.layers)} layers of rank {ranks}"
    done(str(asked.out), f"{layers} from {len(pictures)} pictures in {seconds:.2f} s")


def _filters(asked: DiffLoRADataArgs) -> PictureFilter | IdentityFilter:
    """What pictures must be: large enough, and with face models show a face, or the identity's."""
    size = MinimumSize(asked.min_side)
    if asked.face_models is None:
        return size
    encoder = InsightFaces(asked.face_models)
    if asked.same_face is None:
        return _All(size, HasFace(encoder))
    return _SameFaceToo(size, SameFace(encoder, asked.same_face))


class _SameFaceToo:
    def __init__(self, first: PictureFilter, faces: SameFace) -> None:
        self.first, self.faces = first, faces

    def for_folder(self, source: Path) -> PictureFilter:
        return _All(self.first, self.faces.for_folder(source))


class _All:
    def __init__(self, *filters: Callable[[Picture], str | None]) -> None:
        self.filters = filters

    def __call__(self, picture: Picture) -> str | None:
        return next((why for accept in self.filters if (why := accept(picture)) is not None), None)


def make_encoder(kind: str, text: str) -> ImageEncoder:
    """small, small:SIZE, clip:FOLDER or insightface:FOLDER.

    Raises:
        MoleValueError: The text is none of these.
    """
    name, _, rest = text.partition(":")
    if name == "small" and (not rest or (rest.isdecimal() and int(rest) >= 8)):
        return SmallImages(size=int(rest or 32))
    if name == "clip" and rest:
        return ClipImages(rest, device=processes().device)
    if name == "insightface" and rest:
        return InsightFaces(rest)
    expected = "small, small:SIZE (at least 8), clip:FOLDER or insightface:FOLDER"
    raise MoleValueError(f"--{kind}-encoder", expected=expected, got=printable(text))


def _base(name: str | None) -> Any:
    """The modules of the base, without its weights where they are not needed."""
    if name == "demo":
        return read_pipeline(name, None)
    return None if name is None else skeleton(name)


def _pictures(paths: Sequence[Path]) -> list[Path]:
    pictures: list[Path] = []
    for path in paths:
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        if not inside:
            raise MoleFileError(printable(path, 300), f"holds no picture ({', '.join(SUFFIXES)})")
        pictures += inside
    return pictures


def _given(asked: object, *names: str) -> dict[str, Any]:
    """These options by name, but for those that were left to the library."""
    return {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}


def _run_dir(out: Path) -> Path:
    """Folder of checkpoints, beside what is written in the end."""
    return out.with_name(out.name + RUN)


def _say(path: Path, what: str) -> None:
    if processes().is_main_process:
        done(str(path), what)
