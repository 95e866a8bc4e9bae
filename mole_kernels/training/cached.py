"""Batches of a picture folder, its latents and text states made once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.training.data import counted_generator
from mole_kernels.training.encode import Encoder, Posterior
from mole_kernels.training.encode_family import FamilyEncoder
from mole_kernels.training.pictures import Picture, PictureFolder
from mole_kernels.training.progress import ProgressLine
from mole_kernels.training.store import Store, bytes_as, check_room

# a shard's header says about this much of each tensor
HEADER_BYTES = 160
# a checkpoint names this many pictures one by one, so that a resume with other data can say which; more only
# as one checksum
NAMED = 4096


@dataclass(frozen=True)
class CacheSize:
    """Bytes that a cache takes on the disk: tensors of all pictures, of all captions, their headers; missing:
    those still to be made.
    """

    latents: int
    texts: int
    headers: int
    missing: int

    @property
    def total(self) -> int:
        return self.latents + self.texts + self.headers


class PictureBatches:
    """Endless batches of one bucket each: which pictures batch n holds depends on (pictures, seed, n) alone.

    Each epoch has every picture once, in its own order; the last batch of a bucket may be smaller. A batch:
    latents
    [B,C,h,w], encoder_hidden_states [B,T,K], and for SDXL text_embeds [B,P] and time_ids [B,6]. Made by
    `picture_batches`.

    Args:
        folder: The pictures.
        stores: The caches of latents and of text encodings.
        null: What a dropped condition becomes, for `DenoisingLoss`.
        keys: What a batch calls each encoding.
        batch_size: Pictures in a batch.
        seed: Of the order.
        size: The cache's size, see `CacheSize`.
    """

    def __init__(
        self,
        folder: PictureFolder,
        stores: tuple[Store, Store],
        null: Mapping[str, Tensor],
        keys: Mapping[str, str],
        batch_size: int,
        seed: int,
        size: CacheSize,
    ) -> None:
        if batch_size < 1:
            raise MoleValueError("PictureBatches: batch_size", expected="at least 1", got=batch_size)
        self.folder, self.null, self.keys, self.batch_size, self.seed, self.size = (
            folder,
            null,
            keys,
            batch_size,
            seed,
            size,
        )
        self._latents, self._texts = stores
        self._groups = [
            [i for i, p in enumerate(folder.pictures) if p.bucket == bucket] for bucket in folder.counts()
        ]
        self.per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch 0, 1, …, each made from the cache when it is asked for."""
        rows = []
        for i in self._pick(number):
            picture = self.folder[i]
            text = self._texts.get(text_id(picture.caption))
            rows.append(self._latents.get(latent_id(picture)) | text)
            if "text_embeds" in text:
                rows[-1]["time_ids"] = self.folder.time_ids(i)
        return {key: torch.stack(_alike([row[key] for row in rows])) for key in rows[0]}

    def describe(self, number: int) -> str:
        """The names of a batch's pictures, for messages."""
        return ", ".join(printable(self.folder[i].name) for i in self._pick(number))

    def signature(self) -> dict[str, list[Any]]:
        """What `BatchStream` compares on resume, beside `state_dict`: sizes differ by bucket, so only the
        text's are said.
        """
        text = self._texts.get(text_id(self.folder[0].caption))
        return {key: [str(value.dtype), list(value.shape)] for key, value in sorted(text.items())}

    def state_dict(self) -> dict[str, Any]:
        """What must be the same when a run resumes; the position is the run's own."""
        return dict(self._about)

    @cached_property
    def _about(self) -> dict[str, Any]:
        marks = {p.name: _mark(p) for p in self.folder.pictures}
        whole = hashlib.blake2b(
            "\n".join(f"{name} {mark}" for name, mark in marks.items()).encode(), digest_size=12
        ).hexdigest()
        about = {"samples": len(marks), "batch_size": self.batch_size, "seed": self.seed, **self.keys}
        return {"about": about, "pictures": marks if len(marks) <= NAMED else {}, "whole": whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """MoleStateError unless the data are those that the run began with; names the first picture that
        differs.
        """
        here = self.state_dict()
        for name in [*state.get("pictures", {}), *(here["pictures"] if state.get("pictures") else ())]:
            before, now = state["pictures"].get(name), here["pictures"].get(name)
            if before != now:
                what = (
                    "is new"
                    if before is None
                    else "is gone"
                    if now is None
                    else "has another content, caption or size"
                )
                hint = "resume with the data the run began with, or begin another run_dir"
                raise MoleStateError(
                    f"resume: batches, {printable(name)}", f"{what} since the run began", hint=hint
                )
        for key in {**state.get("about", {}), **here["about"]}:
            before, now = state.get("about", {}).get(key), here["about"].get(key)
            if before != now:
                raise MoleStateError(
                    f"resume: batches, {key}", expected=f"{before!r} as when the run began", got=repr(now)
                )
        if state.get("whole") != here["whole"]:
            raise MoleStateError(
                "resume: batches", "the pictures or captions are not those that the run began with"
            )

    def _pick(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            cut: list[list[int]] = []
            for g, group in enumerate(self._groups):
                order = torch.randperm(
                    len(group), generator=counted_generator(self.seed, "epoch", epoch, "bucket", g)
                ).tolist()
                cut += [
                    [group[i] for i in order[at : at + self.batch_size]]
                    for at in range(0, len(group), self.batch_size)
                ]
            turn = torch.randperm(len(cut), generator=counted_generator(self.seed, "epoch", epoch)).tolist()
            self._epoch = (epoch, [cut[i] for i in turn])
        return self._epoch[1][place]


def picture_batches(
    pipe: Any,
    folder: PictureFolder,
    batch_size: int,
    *,
    cache: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    posterior: Posterior = "mean",
    encode_batch: int = 8,
    progress: bool = True,
    on_size: Callable[[CacheSize], None] | None = None,
) -> PictureBatches:
    """Encodes every picture and caption once and returns their batches; the pipeline is not needed
    afterwards.

    Under `accelerate launch` every process encodes its share. Raises MoleFileError where the disk has no
    room, before anything is written.

    Args:
        cache: Folder of the cache, None for one in memory. Entries are found again by the bytes of the
            picture, its bucket, the words of the caption, and the weights and settings of what encoded
            them: nothing else makes them stale, a kill loses one shard.
        dtype: Of the kept tensors, None for the pipeline's own.
        posterior: "mean", or one "sample" for each picture, drawn by (seed, picture).
        encode_batch: Pictures encoded at once.
        on_size: Called with the cache's size before anything is encoded.

    Returns:
        The batches, endless.
    """
    from mole_kernels.training.processes import processes

    encoder, state = encoder_of(pipe, posterior), processes()
    wrong = [side for bucket in folder.counts() for side in bucket if side % encoder.factor]
    if wrong:
        raise MoleValueError(
            "picture_batches: bucket sizes", expected=f"multiples of the VAE's {encoder.factor}", got=wrong[0]
        )
    dtype = dtype or encoder.dtype
    null = {key: value.to(dtype) for key, value in encoder.null().items()}
    keys = {
        "vae": encoder.latent_key() + (f"-{seed}" if posterior == "sample" else ""),
        "text": encoder.text_key(),
        "dtype": str(dtype),
    }
    where = None if cache is None else Path(cache)
    share = (0, 1) if where is None else (state.process_index, state.num_processes)
    names = {"latents": keys["vae"], "texts": keys["text"]}
    latents, texts = (
        Store(None if where is None else where / f"{what}-{key}-{str(dtype)[6:]}", share[0])
        for what, key in names.items()
    )
    size = cache_size(folder, encoder, null, dtype, latents, texts)
    if on_size is not None:
        on_size(size)
    if where is not None:
        check_room(where, size.missing)
    _fill_texts(encoder, folder, texts, dtype, share, encode_batch)
    _fill_latents(
        encoder, folder, latents, dtype, share, encode_batch, seed, progress and state.is_main_process
    )
    if where is not None:
        state.wait_for_everyone()
        for store in (latents, texts):
            store.reopen()
    return PictureBatches(folder, (latents, texts), null, keys, batch_size, seed, size)


def cache_size(
    folder: PictureFolder,
    encoder: Encoder,
    null: Mapping[str, Tensor],
    dtype: torch.dtype,
    latents: Store | None,
    texts: Store | None,
) -> CacheSize:
    """The bytes that the cache of a folder takes, known before a picture is encoded; with the stores, how
    many of them are missing.
    """
    channels, f = encoder.channels, encoder.factor
    pictures = {
        latent_id(p): channels * (p.bucket[0] // f) * (p.bucket[1] // f) * dtype.itemsize
        for p in folder.pictures
    }
    captions = {text_id(p.caption) for p in folder.pictures}
    each = bytes_as(null, dtype)
    tensors = len(pictures) + len(captions) * len(null)
    missing = sum(n + HEADER_BYTES for key, n in pictures.items() if latents is None or key not in latents)
    missing += sum(each + HEADER_BYTES * len(null) for key in captions if texts is None or key not in texts)
    return CacheSize(sum(pictures.values()), each * len(captions), HEADER_BYTES * tensors, missing)


def encoder_of(pipe: Any, posterior: Posterior = "mean") -> Encoder:
    """The encoder of a pipeline: of a UNet's, or of a transformer's family."""
    if isinstance(getattr(pipe, "transformer", None), nn.Module):
        return FamilyEncoder(pipe, posterior)
    return Encoder(pipe, posterior)


def _alike(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows of one length: texts [T_i,…] of unlike lengths, and their masks, are filled up with zeros."""
    longest = max((len(row) for row in rows if row.dim()), default=0)
    if all(row.dim() == 0 or len(row) == longest for row in rows):
        return list(rows)
    return [torch.cat([row, row.new_zeros(longest - len(row), *row.shape[1:])]) for row in rows]


def latent_id(picture: Picture) -> str:
    return f"{picture.digest}-{picture.bucket[0]}x{picture.bucket[1]}"


def text_id(caption: str) -> str:
    return hashlib.blake2b(caption.encode(), digest_size=16).hexdigest()


def _mark(picture: Picture) -> str:
    """A short checksum of everything about a picture that training sees."""
    content = f"{latent_id(picture)} {picture.size} {picture.caption}"
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def _fill_texts(
    encoder: Encoder,
    folder: PictureFolder,
    store: Store,
    dtype: torch.dtype,
    share: tuple[int, int],
    at_once: int,
) -> None:
    # shared out before it is looked what is there, which for another process may be more already
    mine = sorted({p.caption for p in folder.pictures})[share[0] :: share[1]]
    captions = [caption for caption in mine if text_id(caption) not in store]
    for at in range(0, len(captions), at_once):
        part = captions[at : at + at_once]
        states = encoder.text(part)
        for i, caption in enumerate(part):
            store.add(text_id(caption), {key: value[i].to(dtype) for key, value in states.items()})
    store.flush()


def _fill_latents(
    encoder: Encoder,
    folder: PictureFolder,
    store: Store,
    dtype: torch.dtype,
    share: tuple[int, int],
    at_once: int,
    seed: int,
    show: bool,
) -> None:
    first = {latent_id(p): i for i, p in reversed(list(enumerate(folder.pictures)))}
    mine = sorted(first.values())[share[0] :: share[1]]
    todo = _by_bucket(folder, [i for i in mine if latent_id(folder[i]) not in store], at_once)
    done, total = 0, sum(len(part) for part in todo)
    with ProgressLine("encoding", total, 0, 0, show and total > 0) as line:
        for part in todo:
            pixels = torch.stack([_pixels(folder, i) for i in part])
            generators = [counted_generator(seed, "posterior", latent_id(folder[i])) for i in part]
            latents = encoder.latents(pixels, generators).to(dtype)
            for i, latent in zip(part, latents):
                if not torch.isfinite(latent).all():
                    raise MoleFileError(
                        printable(folder[i].name),
                        "its latent is not finite",
                        hint="does the VAE overflow in this dtype?",
                    )
                store.add(latent_id(folder[i]), {"latents": latent})
            done += len(part)
            line.update(done, samples=done)
    store.flush()


def _pixels(folder: PictureFolder, i: int) -> Tensor:
    try:
        return folder.pixels(i)
    except FileNotFoundError as error:
        raise MoleFileError(printable(folder[i].name), "is gone since the folder was read") from error


def _by_bucket(folder: PictureFolder, todo: Sequence[int], at_once: int) -> list[list[int]]:
    """Groups of one bucket and at most so many pictures."""
    groups: dict[Any, list[int]] = {}
    for i in todo:
        groups.setdefault(folder[i].bucket, []).append(i)
    return [group[at : at + at_once] for group in groups.values() for at in range(0, len(group), at_once)]
