"""Batches of a concept's pictures, varied and encoded anew at every step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.methods.mix_of_show.augment import Augmentation
from mole_kernels.methods.mix_of_show.tokens import concept_tokens, new_embeddings, text_encoders
from mole_kernels.training.data import counted_generator
from mole_kernels.training.encode import Encoder
from mole_kernels.training.pictures import SUFFIXES, PictureFolder, decode, picture_errors

PLACE = "<TOK>"


@dataclass(frozen=True)
class ConceptPicture:
    """One picture.

    Args:
        path: Its file.
        caption: With the concept's tokens, or <TOK> where they go.
        mask: File of its mask, white where the concept is.
    """

    path: Path
    caption: str
    mask: Path | None = None


def pictures_of_folder(folder: PictureFolder, masks: Path | None = None) -> list[ConceptPicture]:
    """The pictures of a folder; masks are called as their pictures, up to the ending."""
    return [
        ConceptPicture(
            folder.root / picture.name,
            picture.caption,
            None if masks is None else mask_of(masks, Path(picture.name)),
        )
        for picture in folder.pictures
    ]


def mask_of(masks: Path, name: Path) -> Path:
    """The mask of a picture; MoleFileError where there is none."""
    stem = name.with_suffix("")
    files = sorted(p for p in (masks / stem.parent).glob("*") if p.stem == stem.name and _is_picture(p))
    if not files:
        raise MoleFileError(
            printable(masks, 300), expected=f"a mask for {printable(name.as_posix())}", got="none"
        )
    return files[0]


class AugmentedConcept:
    """Endless batches for `train_edlora`; which pictures batch n holds, and how they are varied, depends on
    (pictures, seed, n) alone.

    A batch: latents [B,C,h,w], a fresh sample of the VAE's posterior; ids of the captions by text encoder;
    image_mask [B,1,h,w] and, with masks, mask [B,1,h,w], averaged over each latent; time_ids [B,6] for SDXL.

    Args:
        pipe: The pipeline that is trained; its VAE encodes at every step.
        pictures: The pictures, all with masks or none.
        tokens: As for `train_edlora`.
        batch_size: Pictures of a batch.
        augmentation: What varies.
        seed: Of all of it.

    Raises:
        MoleValueError: No pictures, masks for some, a caption without the concept or too long for the
            tokenizer, a size that the VAE cannot halve.
        MoleFileError: A picture or mask that cannot be read, or a mask of another size.
    """

    def __init__(
        self,
        pipe: Any,
        pictures: Sequence[ConceptPicture],
        tokens: Mapping[str, str],
        batch_size: int,
        augmentation: Augmentation,
        *,
        seed: int = 0,
    ) -> None:
        if not pictures or batch_size < 1:
            raise MoleValueError(
                "AugmentedConcept", expected="pictures and a batch size", got=f"{len(pictures)}, {batch_size}"
            )
        if len({picture.mask is None for picture in pictures}) > 1:
            raise MoleValueError(
                "AugmentedConcept", expected="masks for all pictures or for none", got="some"
            )
        self.pictures = [_told(picture, tokens) for picture in pictures]
        self.has_masks = pictures[0].mask is not None
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self._encoder = Encoder(pipe, "sample")
        if augmentation.size % self._encoder.factor:
            raise MoleValueError(
                "AugmentedConcept: size",
                expected=f"a multiple of the VAE's {self._encoder.factor}",
                got=augmentation.size,
            )
        self._images = [self._read(picture) for picture in self.pictures]
        start = new_embeddings(pipe, tokens, torch.Generator().manual_seed(0))
        # the ids will mean the same when training adds the tokens in the same order again
        with concept_tokens(pipe, start) as known:
            self._tokens = known
            self._tokenizers = {name: own for name, (_, own) in text_encoders(pipe).items()}
        self._check_captions(tokens)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch 0, 1, …"""
        pixels, masks, there, captions, sizes, generators = [], [], [], [], [], []
        for k, i in enumerate(self._pick(number)):
            rng = random.Random(f"{self.seed}/{number}/{k}")
            image, mask = self._images[i]
            own, own_mask, own_there = self.augmentation.place(image, mask, rng)
            pixels.append(own)
            there.append(own_there)
            if own_mask is not None:
                masks.append(own_mask)
            captions.append(self.augmentation.caption(self.pictures[i].caption, rng))
            sizes.append(image.size[::-1])
            generators.append(counted_generator(self.seed, "posterior", number, k))
        latents = self._encoder.latents(torch.stack(pixels), generators)
        shape = latents.shape[-2:]
        batch = {"latents": latents, "image_mask": _shrunk(there, shape)} | self._ids(captions)
        if masks:
            batch["mask"] = _shrunk(masks, shape)
        if len(self._tokenizers) > 1:
            side = self.augmentation.size
            batch["time_ids"] = torch.tensor([[*size, 0, 0, side, side] for size in sizes]).float()
        return batch

    def describe(self, number: int) -> str:
        """The names of a batch's pictures, for messages."""
        return ", ".join(printable(self.pictures[i].path.name) for i in self._pick(number))

    def state_dict(self) -> dict[str, Any]:
        """What must be the same when a run resumes; the position is the run's own."""
        digest = hashlib.blake2b(digest_size=12)
        for picture, (image, mask) in zip(self.pictures, self._images):
            digest.update(f"{picture.path.name} {picture.caption} {image.size} ".encode() + image.tobytes())
            digest.update(b"" if mask is None else mask.tobytes())
        return {
            "pictures": digest.hexdigest(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "augmentation": repr(asdict(self.augmentation)),
            "vae": self._encoder.latent_key(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """MoleStateError unless the data are those that the run began with."""
        for key, here in self.state_dict().items():
            if state.get(key) != here:
                raise MoleStateError(
                    f"resume: batches, {key}",
                    expected=f"{state.get(key)!r} as when the run began",
                    got=repr(here),
                )

    def _pick(self, number: int) -> list[int]:
        """Pictures go round in an order of their own in each round."""
        picked = []
        for at in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, place = divmod(at, len(self.pictures))
            order = torch.randperm(len(self.pictures), generator=counted_generator(self.seed, "epoch", epoch))
            picked.append(int(order[place]))
        return picked

    def _ids(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{ids_NAME: [B,L,T]}"""
        variants = [variant for caption in captions for variant in self._tokens.expand(caption)]
        ids = {}
        for name, tokenizer in self._tokenizers.items():
            length = tokenizer.model_max_length
            rows = tokenizer(variants, padding="max_length", truncation=True, max_length=length)["input_ids"]
            ids[f"ids_{name}"] = torch.tensor(rows).unflatten(0, (len(captions), self._tokens.layers))
        return ids

    def _check_captions(self, tokens: Mapping[str, str]) -> None:
        templates = self.augmentation.templates or ("{}",)
        for picture in self.pictures:
            ids = self._ids([template.replace("{}", picture.caption) for template in templates])
            for name, own in ids.items():
                component = name.removeprefix("ids_")
                for token in tokens:
                    there = (own[:, 0] == self._tokens.ids[token][component][0]).any(1)
                    if not bool(there.all()):
                        template = templates[int((~there).int().argmax())]
                        raise MoleValueError(
                            f"caption of {printable(picture.path.name)}",
                            f"the tokenizer cuts {printable(token)} off in '{printable(template)}'",
                            hint="shorten the caption or the template",
                        )

    def _read(self, picture: ConceptPicture) -> tuple[Any, Any]:
        from PIL import Image

        image = decode(picture.path)
        if picture.mask is None:
            return image, None
        with picture_errors(picture.mask), Image.open(picture.mask) as opened:
            mask = opened.convert("L")
        # masks are often saved at another scale; of another shape they are another picture's
        aside = abs(mask.width * image.height - mask.height * image.width)
        if aside > max(image.size) * max(mask.size) / 50:
            raise MoleFileError(
                printable(picture.mask, 300),
                expected=f"the proportions {image.width}:{image.height} of its picture",
                got=f"{mask.width}:{mask.height}",
            )
        return image, mask.resize(image.size, Image.Resampling.BOX)


def _told(picture: ConceptPicture, tokens: Mapping[str, str]) -> ConceptPicture:
    """The picture with the tokens in its caption."""
    caption = picture.caption.replace(PLACE, " ".join(tokens))
    if lacking := [token for token in tokens if token not in caption]:
        raise MoleValueError(
            f"caption of {printable(picture.path.name)}",
            expected=f"{PLACE} or {' '.join(tokens)}",
            got=f"none of {', '.join(lacking)}",
        )
    return ConceptPicture(picture.path, caption, picture.mask)


def _shrunk(masks: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """[B,1,h,w]: the mean over each latent's pixels."""
    return F.interpolate(torch.stack(list(masks))[:, None], tuple(size), mode="area")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
