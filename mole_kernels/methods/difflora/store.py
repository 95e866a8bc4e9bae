"""A trained model as a folder: `model.json` says all but the weights and names their file; it is replaced
last.

Whatever happens while it is written, a reader finds the old model or the new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import (
    MoleError,
    MoleFileError,
    MoleKeyError,
    MoleShapeError,
    MoleValueError,
    printable,
)
from mole_kernels.files.reader import read_header, read_tensors
from mole_kernels.files.text import read_json_file
from mole_kernels.files.writer import atomic_save, write_json
from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
from mole_kernels.methods.difflora.denoiser import DenoiserConfig, LoRADenoiser
from mole_kernels.methods.difflora.features import ImageEncoder, MixedImageFeatures, SmallImages
from mole_kernels.methods.difflora.manifest import Manifest
from mole_kernels.methods.difflora.predictor import KINDS, Predictor, check_encoder
from mole_kernels.modules.names import few

FORMAT = "mole-kernels-difflora-1"
ABOUT = "model.json"


def save_autoencoder(
    folder: str | Path,
    autoencoder: LoRAAutoencoder,
    manifest: Manifest,
    about: Mapping[str, str] | None = None,
) -> None:
    """An autoencoder and the layout of its vectors. about: what else is to be known, by name."""
    record = {"kind": "autoencoder", "autoencoder": autoencoder.config.to_dict(), **_common(manifest, about)}
    _save(Path(folder), record, autoencoder)


def load_autoencoder(folder: str | Path) -> tuple[LoRAAutoencoder, Manifest]:
    """Raises MoleFileError, MoleKeyError or MoleShapeError for a folder that holds no such model whole."""
    record, where = _read(Path(folder), ("autoencoder", "predictor"))
    prefix = "autoencoder." if record["kind"] == "predictor" else ""
    path = Path(folder) / record["weights"]
    autoencoder = _build(
        where, lambda: LoRAAutoencoder(AutoencoderConfig(**record["autoencoder"])), path, prefix
    )
    _load(path, record, autoencoder, prefix)
    return autoencoder.eval(), _manifest(record, where)


def save_predictor(folder: str | Path, predictor: Predictor, about: Mapping[str, str] | None = None) -> None:
    """A whole model. Encoders that do not train are not in it: `load_predictor` is given them again."""
    features = predictor.features
    encoders: dict[str, Any] = {}
    for kind in KINDS:
        if kind in predictor.own:
            encoders[kind] = {"small": small_settings(predictor.own[kind])}
        else:
            encoders[kind] = {"given": type(predictor.given[kind]).__name__}
    record = {
        "kind": "predictor",
        "autoencoder": predictor.autoencoder.config.to_dict(),
        "features": {
            "face_dim": features.face_dim,
            "image_dim": features.image_dim,
            "dim": features.dim,
            "hidden": features.gate[1].out_features,
        },
        "denoiser": predictor.denoiser.config.to_dict(),
        "encoders": encoders,
        "timesteps": predictor.timesteps,
        **_common(predictor.manifest, about),
    }
    _save(Path(folder), record, predictor)


def load_predictor(
    folder: str | Path, *, face: ImageEncoder | None = None, image: ImageEncoder | None = None
) -> Predictor:
    """The model of a folder, in eval mode.

    Args:
        folder: What `save_predictor` wrote.
        face: The frozen face encoder that the model was trained with, where it is not part of it.
        image: The same for the image encoder.

    Returns:
        The predictor.

    Raises:
        MoleFileError, MoleKeyError, MoleShapeError: The folder does not hold such a model whole.
        MoleValueError: An encoder is missing.
        MoleShapeError: An encoder of another width.
    """
    record, where = _read(Path(folder), ("predictor",))
    frozen = {"face": face, "image": image}

    def build() -> Predictor:
        features = MixedImageFeatures(**record["features"])
        dims = {"face": features.face_dim, "image": features.image_dim}
        encoders: dict[str, ImageEncoder] = {}
        for kind in KINDS:
            saved, other = record["encoders"][kind], frozen[kind]
            if "small" in saved:
                encoders[kind] = SmallImages(**saved["small"])
            elif other is None:
                raise MoleValueError(
                    where,
                    expected=f"{kind}=, the {printable(saved['given'])} it was trained with",
                    got="none",
                )
            else:
                check_encoder(kind, other, dims[kind])
                encoders[kind] = other
        autoencoder = LoRAAutoencoder(AutoencoderConfig(**record["autoencoder"]))
        denoiser = LoRADenoiser(DenoiserConfig(**record["denoiser"]))
        return Predictor(
            _manifest(record, where), autoencoder, features, denoiser, encoders, int(record["timesteps"])
        )

    path = Path(folder) / record["weights"]
    predictor = _build(where, build, path)
    _load(path, record, predictor)
    return predictor.eval()


def small_settings(encoder: nn.Module) -> dict[str, int]:
    """What makes another `SmallImages` of the same shape."""
    assert isinstance(encoder, SmallImages)
    first = encoder.body[0]
    assert isinstance(first, nn.Conv2d)
    return {"dim": encoder.dim, "channels": first.out_channels, "size": encoder.size}


def read_record(path: Path, form: str, expected: str) -> dict[str, Any]:
    """A JSON object whose "format" is `form`; MoleFileError else."""
    if not path.exists():
        raise MoleFileError(printable(path.parent, 300), expected=expected, got=f"no {path.name}")
    record = read_json_file(path)
    if not isinstance(record, dict) or record.get("format") != form:
        got = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise MoleFileError(
            printable(path, 300),
            expected=f"format {form}",
            got=printable(got),
            hint="made by another mole_kernels?",
        )
    return record


def _common(manifest: Manifest, about: Mapping[str, str] | None) -> dict[str, Any]:
    return {"manifest": json.loads(manifest.to_json()), "about": dict(about or {})}


def _save(folder: Path, record: dict[str, Any], module: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    digest = _digest(tensors)
    name = f"weights-{digest[:12]}.safetensors"
    atomic_save(tensors, folder / name, {"format": FORMAT})
    write_json(folder / ABOUT, {"format": FORMAT, **record, "weights": name, "digest": digest})
    for old in folder.glob("weights-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def _read(folder: Path, kinds: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    record, where = (
        read_record(folder / ABOUT, FORMAT, "a folder with a trained DiffLoRA model"),
        printable(folder / ABOUT, 300),
    )
    if record.get("kind") not in kinds:
        raise MoleFileError(
            where, expected=f"a model of kind {' or '.join(kinds)}", got=printable(record.get("kind"))
        )
    name = record.get("weights")
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise MoleFileError(where, expected="its weights beside it", got=printable(name))
    return record, where


def _load(path: Path, record: Mapping[str, Any], module: nn.Module, prefix: str = "") -> None:
    """Every tensor and no other, in its shape and dtype; the module is as before where anything differs."""
    tensors, _ = read_tensors(path)
    where = printable(path, 300)
    if _digest(tensors) != record.get("digest"):
        raise MoleFileError(where, "these are not the weights that model.json was written with")
    held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    _check_fit(where, held, module)
    module.load_state_dict(held)


def _check_fit(where: str, held: Mapping[str, Any], module: nn.Module) -> None:
    """MoleKeyError or MoleShapeError unless `held`, anything with shape and dtype by name, is what the
    module's tensors are.
    """
    wanted = module.state_dict()
    absent, extra = [n for n in wanted if n not in held], [n for n in held if n not in wanted]
    if absent or extra:
        what = [f"lacks {few(sorted(absent))}"] * bool(absent) + [f"has {few(sorted(extra))} too"] * bool(
            extra
        )
        raise MoleKeyError(
            where, expected=f"the {len(wanted)} tensors of the model", got=f"a file that {' and '.join(what)}"
        )
    for name, tensor in wanted.items():
        if held[name].shape != tensor.shape or held[name].dtype != tensor.dtype:
            got = f"{list(held[name].shape)} {held[name].dtype}"
            raise MoleShapeError(f"{where}, {name}", expected=f"{list(tensor.shape)} {tensor.dtype}", got=got)


def _build(where: str, make: Callable[[], Any], weights: Path, prefix: str = "") -> Any:
    """What `make` makes; the settings of a file that make nothing are the file's fault.

    A stranger's sizes are first met on meta, where they cost nothing, and must be those of the weights beside
    them.
    """
    entries = {
        name.removeprefix(prefix): e
        for name, e in read_header(weights).entries.items()
        if name.startswith(prefix)
    }
    try:
        with torch.device("meta"):
            _check_fit(printable(weights, 300), entries, make())
        # fresh weights are drawn and thrown away: the caller's random state is not theirs to move
        with torch.random.fork_rng(devices=[]):
            return make()
    except MoleError:
        raise
    # what torch's layers raise for sizes that make none
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise MoleFileError(
            where, f"its settings make no model ({type(error).__name__}: {printable(error, 200)})"
        ) from error


def _manifest(record: Mapping[str, Any], where: str) -> Manifest:
    return Manifest.from_json(json.dumps(record.get("manifest")), where)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_plain(config: Any) -> dict[str, Any]:
    """A dataclass as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
