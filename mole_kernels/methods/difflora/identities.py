"""Pictures of identities made by a model: a generator that keeps a face, a filter for those it kept, and
class pictures.

DiffLoRA's people are drawn, not photographed: a pipeline with an image adapter (PhotoMaker, IP-Adapter)
draws each reference face in many settings, and pictures whose face is not the reference's are left out.

Source: DiffLoRA (Wu et al., arXiv 2408.06740) for the stages; PhotoMaker (Li et al., CVPR 2024) and
IP-Adapter (Ye et al., arXiv 2308.06721) for the arguments; DreamBooth (Ruiz et al., CVPR 2023) for prior
preservation.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleStateError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.bank import check_name
from mole_kernels.files.writer import atomic_write
from mole_kernels.methods.difflora.features import ImageEncoder, Picture
from mole_kernels.training.cached import PictureBatches
from mole_kernels.training.captions import METADATA
from mole_kernels.training.data import counted_generator
from mole_kernels.training.pictures import SUFFIXES, decode

# what pipelines call the reference: PhotoMaker's, then IP-Adapter's
ARGUMENTS = ("input_id_images", "ip_adapter_image")
# worded by us
PROMPTS = (
    "a photo of a person",
    "a portrait of a person in soft light",
    "a person at a desk",
    "a person in a park",
    "a person laughing",
    "a person from the side",
    "a person in a winter coat",
    "a person with a book",
)


@dataclass(frozen=True)
class IdentityPictures:
    """How an identity's pictures are drawn.

    Args:
        prompts: One after the other; PhotoMaker wants its trigger word in each ("a photo of a person img").
        each: Pictures of each prompt.
        seed: With an identity's name and the picture's number it gives the picture's own seed.
        argument: What the pipeline calls the reference pictures; None finds it.
        options: Further arguments of the call: num_inference_steps, guidance_scale, …
    """

    prompts: tuple[str, ...] = PROMPTS
    each: int = 4
    seed: int = 0
    argument: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts or self.each < 1:
            raise MoleValueError(
                "IdentityPictures", expected="prompts, at least one picture of each", got=f"{self.each}"
            )


def draw_identities(
    pipe: Any,
    references: Mapping[str, Sequence[Picture | str | Path]],
    out: str | Path,
    settings: IdentityPictures = IdentityPictures(),
    on_picture: Callable[[str, int], None] | None = None,
) -> dict[str, Path]:
    """Pictures of each reference face in many settings: out/NAME/00000.png … and metadata.jsonl; {name:
    folder}.

    Started again, it draws what is missing. A folder is one of `train_identities`' root.

    Args:
        pipe: Any diffusers pipeline that takes a prompt and reference pictures.
        references: Name -> one or more pictures of the face.
        out: Folder of the identities' folders.
        settings: See `IdentityPictures`.
        on_picture: Called as (identity, pictures done).

    Raises:
        MoleTypeError: A pipeline without an argument for pictures.
        MoleValueError: An identity without a picture, or a name that makes no folder.
        MoleFileError: A reference that is no picture.
        MoleStateError: The pipeline returned another number of pictures.
    """
    argument = _argument(pipe, settings.argument)
    for name, pictures in references.items():
        check_name(name)
        if not pictures:
            raise MoleValueError(f"draw_identities, {name!r}", expected="at least one picture", got="none")
    folders = {}
    for name, pictures in references.items():
        shown = [decode(Path(p)) if isinstance(p, str | Path) else p for p in pictures]
        folders[name] = Path(out) / name
        _draw(pipe, name, {argument: shown}, folders[name], settings, on_picture)
    return folders


def draw_class(
    pipe: Any, out: str | Path, prompt: str = "a photo of a person", count: int = 200, **options: Any
) -> Path:
    """Pictures of the class by the base model itself, for prior preservation; draws what is missing.

    Args:
        pipe: A text-to-image pipeline.
        out: Their folder.
        prompt: Of all of them, without the rare token.
        count: How many; DreamBooth takes about 200.
        options: Of the pipeline's call, and `seed`.
    """
    seed = int(options.pop("seed", 0))
    settings = IdentityPictures((prompt,), count, seed, options=options)
    _draw(pipe, "class", {}, Path(out), settings, None)
    return Path(out)


class SameFace:
    """Keeps an identity's pictures whose face is the identity's: cos(face, centre) ≥ threshold.

    The centre is the mean of the reference faces, or without any the face that is nearest to all others
    of the folder. Pictures without a face go.

    Args:
        encoder: A face encoder, such as `InsightFaces`; raises MoleValueError where there is no face.
        threshold: ArcFace calls two pictures of one person above 0.3 to 0.5.
        references: Name -> pictures; () for the folder's own centre.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        threshold: float = 0.4,
        references: Mapping[str, Sequence[Picture]] | None = None,
    ) -> None:
        if not -1 <= threshold <= 1:
            raise MoleValueError("SameFace: threshold", expected="a cosine, -1 to 1", got=threshold)
        self.encoder, self.threshold, self.references = encoder, threshold, dict(references or {})

    def for_folder(self, source: Path) -> Callable[[Picture], str | None]:
        """The filter of one identity's folder.

        Raises:
            MoleFileError: No picture of the identity shows a face.
        """
        pictures = self.references.get(source.name)
        if pictures is None:
            paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            pictures = [image for path in paths if (image := _readable(path)) is not None]
        faces = [face for picture in pictures if (face := self._face(picture)) is not None]
        if not faces:
            raise MoleFileError(
                printable(source, 300), f"none of {len(pictures)} pictures of this identity shows a face"
            )
        stacked = torch.stack(faces)
        if source.name in self.references:
            centre = torch.nn.functional.normalize(stacked.mean(0), dim=0)
        else:
            centre = stacked[int((stacked @ stacked.mT).sum(1).argmax())]

        def accept(picture: Picture) -> str | None:
            face = self._face(picture)
            if face is None:
                return "it shows no face"
            cosine = float(face @ centre)
            if cosine >= self.threshold:
                return None
            return f"its face is another's: cosine {cosine:.2f}, at least {self.threshold:g} is asked for"

        return accept

    def _face(self, picture: Picture) -> Tensor | None:
        try:
            return torch.nn.functional.normalize(self.encoder([picture])[0].float(), dim=0)
        except MoleValueError:
            return None


class PriorBatches:
    """Each batch of an identity with as many class pictures beside it, which count `weight` times as much.

        loss = (L_identity + weight · L_class) ÷ (1 + weight)

    by the mask of the denoising loss, so that every trainer takes it.

    Args:
        own: The identity's batches.
        prior: The class pictures' batches, of the same size of pictures.
        weight: DreamBooth's λ, 1 in its paper.

    Raises:
        MoleValueError: A weight below 0.
    """

    def __init__(self, own: PictureBatches, prior: PictureBatches, weight: float = 1.0) -> None:
        if not 0 <= weight < float("inf"):
            raise MoleValueError("PriorBatches: weight", expected="at least 0", got=weight)
        self.own, self.prior, self.weight, self.null = own, prior, float(weight), own.null

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch 0, 1, …: first the identity's pictures, then the class's."""
        first, other = self.own.batch(number), self.prior.batch(number)
        if first["latents"].shape[1:] != other["latents"].shape[1:]:
            raise MoleStateError(
                "PriorBatches",
                expected=f"class pictures of latents {list(first['latents'].shape[1:])}",
                got=list(other["latents"].shape[1:]),
                hint="PictureFolder(…, buckets=False) for both",
            )
        batch = {key: torch.cat([value, other[key]]) for key, value in first.items()}
        sizes = [len(first["latents"]), len(other["latents"])]
        # as much of the class as of the identity, whatever their numbers
        weights = [1.0] * sizes[0] + [self.weight * sizes[0] / sizes[1]] * sizes[1]
        h, w = batch["latents"].shape[-2:]
        batch["mask"] = torch.tensor(weights)[:, None, None, None].expand(-1, 1, h, w).contiguous()
        return batch

    def describe(self, number: int) -> str:
        """The names of a batch's pictures, for messages."""
        return f"{self.own.describe(number)}; class: {self.prior.describe(number)}"

    def state_dict(self) -> dict[str, Any]:
        """What must be the same when a run resumes."""
        return {"own": self.own.state_dict(), "prior": self.prior.state_dict(), "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """MoleStateError unless the data are those that the run began with."""
        if state.get("weight") != self.weight:
            raise MoleStateError(
                "resume: batches, weight", expected=f"{state.get('weight')} as before", got=self.weight
            )
        self.own.load_state_dict(state["own"])
        self.prior.load_state_dict(state["prior"])


def _argument(pipe: Any, asked: str | None) -> str:
    known = inspect.signature(pipe.__call__).parameters if callable(pipe) else {}
    name = asked or next((name for name in ARGUMENTS if name in known), None)
    if name is None or name not in known:
        raise MoleTypeError(
            "draw_identities: pipe",
            expected=f"a pipeline that takes {asked or ' or '.join(ARGUMENTS)}",
            got=type(pipe).__name__,
            hint="PhotoMaker's pipeline, or load_ip_adapter on one of diffusers'",
        )
    return name


def _draw(
    pipe: Any,
    name: str,
    shown: Mapping[str, Any],
    folder: Path,
    settings: IdentityPictures,
    on_picture: Callable[[str, int], None] | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [prompt for prompt in settings.prompts for _ in range(settings.each)]
    for number, text in enumerate(texts):
        path = folder / f"{number:05d}.png"
        if not path.exists():
            generator = torch.Generator().manual_seed(
                counted_generator(settings.seed, name, number).initial_seed()
            )
            images = pipe(prompt=text, generator=generator, **shown, **settings.options).images
            if len(images) != 1:
                raise MoleStateError(f"draw of {name}", expected="one picture a prompt", got=len(images))
            atomic_write(path, lambda file, image=images[0]: image.save(file, "PNG"))  # type: ignore[misc]
        if on_picture is not None:
            on_picture(name, number + 1)
    rows = [{"file_name": f"{number:05d}.png", "text": text} for number, text in enumerate(texts)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    atomic_write(folder / METADATA, lambda file: file.write(content))  # type: ignore[arg-type, return-value]


def _readable(path: Path) -> Picture | None:
    try:
        return decode(path)
    except MoleFileError:
        return None
