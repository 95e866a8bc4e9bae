"""Training: the autoencoder on flat LoRAs, then denoiser, mixed features and small encoders together on its
latents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mole_kernels.errors import MoleShapeError, MoleStateError, MoleValueError
from mole_kernels.methods.difflora.autoencoder import LoRAAutoencoder, weight_preserved_loss
from mole_kernels.methods.difflora.diffusion import noise_schedule, x0_loss
from mole_kernels.methods.difflora.predictor import KINDS, Predictor
from mole_kernels.methods.difflora.shards import LoRADataset
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import counted_generator
from mole_kernels.training.loop import RunOptions, TrainResult, fit


class _Rounds:
    """Endless batches: which rows batch n holds depends on (seed, n) alone; every round has each row once, in
    its own order.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, mark: str) -> None:
        if batch_size < 1:
            raise MoleValueError("batches: batch_size", expected="at least 1", got=batch_size)
        self.rows, self.batch_size, self.seed, self.mark = rows, min(batch_size, rows), seed, mark

    def pick(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.rows // self.batch_size)
        order = torch.randperm(self.rows, generator=counted_generator(self.seed, "epoch", epoch)).tolist()
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "batch_size": self.batch_size, "seed": self.seed, "data": self.mark}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """MoleStateError unless the data are those that the run began with."""
        for key, here in self.state_dict().items():
            if state.get(key) != here:
                raise MoleStateError(
                    f"resume: batches, {key}",
                    expected=f"{state.get(key)!r} as when the run began",
                    got=repr(here),
                )


class VectorBatches(_Rounds):
    """{"vectors": [B,length]} of a data set, read when asked for, or of a tensor."""

    def __init__(self, data: LoRADataset | Tensor, batch_size: int, seed: int = 0) -> None:
        self.data = data
        mark = (
            f"{len(data)} of {data.manifest.length}: {_mark(data.parts())}"
            if isinstance(data, LoRADataset)
            else _mark([data])
        )
        super().__init__(len(data), batch_size, seed, mark)

    def batch(self, number: int) -> dict[str, Tensor]:
        rows = self.pick(number)
        if isinstance(self.data, Tensor):
            return {"vectors": self.data[rows]}
        return {"vectors": self.data.vectors([self.data.names[i] for i in rows])}


class PersonBatches(_Rounds):
    """{"latents": [B,C,L], "face": [B,n,…], "image": [B,n,…]}: people, and of each n of their pictures, drawn
    anew by (seed, batch).

    Args:
        references: Of each person, as `Predictor.prepare` makes them; counts may differ.
        most: N is drawn in 1…most; a person with fewer pictures has some of them twice.
    """

    def __init__(
        self,
        latents: Tensor,
        references: Sequence[Mapping[str, Tensor]],
        batch_size: int,
        *,
        most: int = 4,
        seed: int = 0,
    ) -> None:
        if len(latents) != len(references):
            raise MoleShapeError(
                "PersonBatches", expected=f"references of {len(latents)} people", got=len(references)
            )
        if most < 1 or any(len(person["face"]) < 1 for person in references):
            raise MoleValueError("PersonBatches", expected="at least one picture of each person", got="none")
        self.latents, self.references, self.most = latents, list(references), most
        marks = [latents, *(person[kind] for person in self.references for kind in KINDS)]
        super().__init__(len(latents), batch_size, seed, f"{most}; {_mark(marks)}")

    def batch(self, number: int) -> dict[str, Tensor]:
        rows = self.pick(number)
        generator = counted_generator(self.seed, "references", number)
        n = int(torch.randint(1, self.most + 1, (), generator=generator))
        rows_by_kind: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for row in rows:
            have = len(self.references[row]["face"])
            order = torch.cat(
                [torch.randperm(have, generator=generator) for _ in range(math.ceil(n / have))]
            )[:n]
            for kind in KINDS:
                rows_by_kind[kind].append(self.references[row][kind][order])
        return {"latents": self.latents[rows]} | {
            kind: torch.stack(parts) for kind, parts in rows_by_kind.items()
        }

    def signature(self) -> dict[str, list[Any]]:
        """For a resume: n differs by batch, so it is left out."""
        about = {
            kind: [str(self.references[0][kind].dtype), list(self.references[0][kind].shape[1:])]
            for kind in KINDS
        }
        return about | {"latents": [str(self.latents.dtype), list(self.latents.shape[1:])]}


def train_autoencoder(
    autoencoder: LoRAAutoencoder,
    data: LoRADataset | Tensor,
    config: TrainConfig,
    *,
    batch_size: int = 16,
    strength: float = 1.0,
    power: float = 1.0,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """min Σ weight_preserved_loss(decode(encode(w + noise) + noise), w), in place.  data: a `LoRADataset`, or
    vectors [n,length]

    The mean vector is taken from the data before the first step. Raises MoleShapeError for vectors of another
    length.

    Args:
        strength: λ of the loss.
        power: p of the loss.
        run: run_dir, resume, progress, on_step and trackers of `fit`.
    """
    if not len(data):
        raise MoleValueError("train_autoencoder", expected="at least one vector", got="none")
    length = data.manifest.length if isinstance(data, LoRADataset) else data.shape[-1]
    if length != autoencoder.config.length:
        raise MoleShapeError(
            "train_autoencoder", expected=f"vectors [n,{autoencoder.config.length}]", got=f"[n,{length}]"
        )
    total = sum((part.double().sum(0) for part in _parts(data)), torch.zeros(length, dtype=torch.float64))
    autoencoder.set_mean((total / len(data))[None].float())
    task = _AutoencoderTask(autoencoder, strength, power)
    batches = VectorBatches(data, batch_size, config.seed)
    identity = {
        "method": "difflora",
        "part": "autoencoder",
        "loss": f"{strength:g}, {power:g}",
        "shape": str(autoencoder.config.to_dict()),
    }
    return fit(
        task, dict(task.named_parameters()), batches, config, loss_fn=_own_loss, identity=identity, **run
    )


def train_predictor(
    predictor: Predictor,
    data: LoRADataset | Tensor,
    references: Sequence[Mapping[str, Tensor]],
    config: TrainConfig,
    *,
    batch_size: int = 64,
    most: int = 4,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """min E‖denoiser(z_t, t, mixed(pictures)) − z_0‖²: denoiser, mixed features and small encoders, in place;
    the autoencoder stays.

    Args:
        data: The vectors, in the order of `references`.
        references: Of each person, as `Predictor.prepare` makes them; 1…most of them, drawn anew, are
            shown in each step.
        config: cond_dropout is the probability of no person, for guidance.
    """
    with torch.no_grad():
        z = torch.cat([predictor.autoencoder.encode(part.to(predictor.latent_mean)) for part in _parts(data)])
    predictor.set_latent_scale(z)
    latents = ((z - predictor.latent_mean) / predictor.latent_std).cpu()
    batches = PersonBatches(latents, references, batch_size, most=most, seed=config.seed)
    task = _PredictorTask(predictor, config.cond_dropout)
    shape = f"{predictor.denoiser.config.to_dict()}, {predictor.dims}"
    identity = {
        "method": "difflora",
        "part": "predictor",
        "shape": shape,
        "timesteps": str(predictor.timesteps),
    }
    frozen = {id(p) for p in predictor.autoencoder.parameters()}
    trained = {name: p for name, p in task.named_parameters() if id(p) not in frozen}
    result = fit(task, trained, batches, config, loss_fn=_own_loss, identity=identity, **run)
    # the parts that trained are on accelerate's device
    predictor.to(predictor.denoiser.null.device)
    return result


def _own_loss(model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    # through forward, which is what accelerate wraps
    return model(batch, generator)


class _AutoencoderTask(nn.Module):
    def __init__(self, autoencoder: LoRAAutoencoder, strength: float, power: float) -> None:
        super().__init__()
        self.autoencoder, self.strength, self.power = autoencoder, strength, power

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        vectors = batch["vectors"]
        return weight_preserved_loss(self.autoencoder(vectors, generator), vectors, self.strength, self.power)


class _PredictorTask(nn.Module):
    """The predictor's trained parts alone: a submodule that takes no part would keep several processes
    waiting for its gradients.
    """

    def __init__(self, predictor: Predictor, drop: float) -> None:
        super().__init__()
        self.denoiser, self.features, self.own = predictor.denoiser, predictor.features, predictor.own
        self.drop, self.scheduler = drop, noise_schedule(steps=predictor.timesteps)
        # in a list, so that it is no submodule
        self._whole = [predictor]

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        condition = self._whole[0].condition({kind: batch[kind] for kind in KINDS})
        return x0_loss(self.denoiser, self.scheduler, batch["latents"], condition, generator, self.drop)


def _parts(data: LoRADataset | Tensor) -> Iterator[Tensor]:
    return data.parts() if isinstance(data, LoRADataset) else iter(data.split(64))


def _mark(tensors: Any) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
