"""A folder of captioned pictures, checked before anything is trained on it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, MoleWarning, printable
from mole_kernels.training.buckets import Size, cover, make_buckets, nearest
from mole_kernels.training.captions import read_beside, read_captions

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OnBad = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Picture:
    """One picture: name relative to the folder, caption, size as stored, the bucket it is trained at, and a
    hash of the file's bytes.
    """

    name: str
    caption: str
    size: Size
    bucket: Size
    digest: str


class PictureFolder:
    """The pictures below `root` that have captions, in the order of their names, whatever the file system's
    order is.

    Args:
        root: A caption is the line of a metadata.jsonl (file_name, text), else the .txt beside the
            picture.
        resolution: Side of the pictures in pixels, or (height, width).
        buckets: True: the aspect ratios of `make_buckets(resolution)`; False: all at `resolution`; or
            the (h, w) themselves. True means False where resolution is a pair. A picture is scaled
            until it covers its bucket, then cut at the centre.
        on_bad: What happens with pictures that cannot be read or have no caption: "refuse" raises
            MoleFileError that names them, "skip" leaves them out with one MoleWarning; `skipped` says
            which and why.
        multiple: Sizes are multiples of this.
        column: Of metadata.jsonl that holds the caption.
        workers: Threads that read and decode.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        resolution: int | Size = 512,
        *,
        buckets: bool | Sequence[Size] = True,
        on_bad: OnBad = "refuse",
        multiple: int = 64,
        column: str = "text",
        workers: int = 2,
    ) -> None:
        self.root = Path(root)
        if on_bad not in ("refuse", "skip"):
            raise MoleValueError("PictureFolder: on_bad", expected="'refuse' or 'skip'", got=repr(on_bad))
        self.buckets = _sizes(resolution, buckets, multiple)
        self.pictures, self.skipped = self._scan(column, workers)
        self._report(on_bad)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Picture:
        return self.pictures[i]

    def pixels(self, i: int) -> Tensor:
        """Picture i scaled and cut to its bucket: [3,h,w] float32 in -1..1."""
        from PIL.Image import Resampling

        picture = self.pictures[i]
        image = decode(self.root / picture.name)
        (h, w), (top, left) = cover(picture.size, picture.bucket)
        image = image.resize((w, h), Resampling.LANCZOS).crop(
            (left, top, left + picture.bucket[1], top + picture.bucket[0])
        )
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return flat.view(*picture.bucket, 3).permute(2, 0, 1).float() / 127.5 - 1.0

    def time_ids(self, i: int) -> Tensor:
        """SDXL's size conditions [6]: stored height and width, top and left of the cut, height and width of
        the bucket.
        """
        picture = self.pictures[i]
        return torch.tensor(
            [*picture.size, *cover(picture.size, picture.bucket)[1], *picture.bucket], dtype=torch.float32
        )

    def counts(self) -> dict[Size, int]:
        """bucket -> number of its pictures."""
        return dict(sorted(Counter(p.bucket for p in self.pictures).items()))

    def _scan(self, column: str, workers: int) -> tuple[list[Picture], dict[str, str]]:
        if not self.root.is_dir():
            raise MoleFileError(printable(self.root, 300), expected="a folder of pictures", got="no folder")
        captions, bad = read_captions(self.root, column)
        names = sorted(
            p.relative_to(self.root).as_posix()
            for p in self.root.rglob("*")
            if p.suffix.lower() in SUFFIXES and p.is_file()
        )
        with ThreadPoolExecutor(max(1, workers)) as pool:
            looked = list(pool.map(lambda name: self._look(name, captions.get(name)), names))
        good = []
        for name, picture in zip(names, looked):
            if isinstance(picture, Picture):
                good.append(picture)
            else:
                bad[name] = picture
        return good, bad

    def _look(self, name: str, caption: str | None) -> Picture | str:
        """The picture, or what is wrong with it."""
        path = self.root / name
        try:
            caption = read_beside(path) if caption is None else caption
        except MoleFileError as error:
            return f"its .txt cannot be read as text ({error.problem})"
        if not caption:
            return "has no caption" if caption is None else "has an empty caption"
        try:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            width, height = decode(path).size
        except MoleFileError as error:
            return error.problem
        except OSError as error:
            return f"cannot be read ({error.strerror or type(error).__name__})"
        return Picture(name, caption, (height, width), nearest((height, width), self.buckets), digest)

    def _report(self, on_bad: OnBad) -> None:
        where = printable(self.root, 300)
        if self.skipped:
            named = [f"{printable(name)} {what}" for name, what in self.skipped.items()]
            text = "; ".join(named[:8]) + (f"; and {len(named) - 8} more" if len(named) > 8 else "")
            if on_bad == "refuse":
                hint = "mend or remove them, or leave them out with on_bad='skip'"
                raise MoleFileError(
                    where, f"{len(named)} of its entries cannot be trained on: {text}", hint=hint
                )
            warnings.warn(f"{where}: {len(named)} entries left out: {text}", MoleWarning, stacklevel=3)
        if not self.pictures:
            hint = (
                f"pictures end in {', '.join(SUFFIXES)}; captions stand in metadata.jsonl or in a "
                ".txt beside each"
            )
            raise MoleFileError(where, "holds no picture with a caption", hint=hint)
        if len(self.pictures) > 1 and len({p.caption for p in self.pictures}) == 1:
            text = (
                f"{where}: all {len(self.pictures)} pictures have one and the same caption, so "
                "nothing can be told apart by it"
            )
            warnings.warn(text, MoleWarning, stacklevel=3)


def _sizes(resolution: int | Size, buckets: bool | Sequence[Size], multiple: int) -> tuple[Size, ...]:
    if isinstance(buckets, bool):
        if buckets and isinstance(resolution, int):
            return make_buckets(resolution, multiple)
        sizes: tuple[Size, ...] = (
            (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1]),
        )
    else:
        sizes = tuple(sorted({(h, w) for h, w in buckets}))
    wrong = [size for size in sizes if min(size) < 1 or any(side % multiple for side in size)]
    if wrong or not sizes:
        hint = "multiple= is the VAE's factor times what the UNet halves by"
        raise MoleValueError(
            "PictureFolder: sizes", expected=f"multiples of {multiple}", got=wrong or "none", hint=hint
        )
    return sizes


@contextmanager
def picture_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Turn what PIL raises for a file that is broken, or too large, into Mole errors.

    Args:
        path: The file, for the message.
        hint: What to do about it.

    Raises:
        MoleFileError: The file is no picture that can be read.
        MoleStateError: There is no memory to decode it.
    """
    from PIL import Image

    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MoleFileError(
            printable(path, 300), f"is no picture that can be read ({type(error).__name__})", hint=hint
        ) from error
    except MemoryError as error:
        raise MoleStateError(printable(path, 300), "no memory to decode it") from error


def decode(path: Path) -> Image:
    """The picture upright in RGB; what is transparent becomes white.

    Raises:
        MoleFileError: The file is no picture that can be read.
    """
    from PIL import Image, ImageOps

    with picture_errors(path), Image.open(path) as opened:
        # PIL itself refuses at twice this size only
        if Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(ground, image)
        return image.convert("RGB")
