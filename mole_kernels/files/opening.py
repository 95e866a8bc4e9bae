"""Open untrusted files: regular ones only, inside a given folder only, every failure in words."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

from mole_kernels.errors import MoleFileError, MoleTypeError, printable

PathLike = str | os.PathLike[str]
CONVERTER = (
    "mole-kernels convert FILE --out OUT.safetensors --to diffusers reads pickles of plain tensors safely: "
    "Mix-of-Show's .pth, and LoRA files with a name for each tensor"
)
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
# first bytes -> what the file is, and what to do
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version ",
        "is a Git LFS pointer: the file itself was not downloaded",
        "git lfs pull, or download the file from the repository's page",
    ),
    (
        b"<!DOCTYP",
        "is a web page that was saved under this name",
        "download the file itself; it may need a login",
    ),
    (
        b"<!doctyp",
        "is a web page that was saved under this name",
        "download the file itself; it may need a login",
    ),
    (
        b"<html",
        "is a web page that was saved under this name",
        "download the file itself; it may need a login",
    ),
    (b"GGUF", "is a GGUF file", "only safetensors are read; the tool that wrote it may export them"),
    (b"\x1f\x8b", "is a gzip archive", "unpack it"),
    (b"Rar!", "is a RAR archive", "unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive", "unpack it"),
    (b"\x89PNG", "is a picture", ""),
    (b"\xff\xd8\xff", "is a picture", ""),
)


def open_regular(path: PathLike, *, root: PathLike | None = None, pickles: bool = False) -> FileIO:
    """Open a regular, readable file; a FIFO never blocks, and a device is never touched.

    Args:
        path: The file.
        root: When given, the file must lie inside this folder, links followed; links of the hub's cache may
            lead to the same repository's blobs.
        pickles: Take suffixes of pickles too.

    Raises:
        MoleFileError: No such file, unreadable, not regular, outside `root`, or a pickle by its name.
        MoleTypeError: Not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise MoleTypeError("file", expected="a path", got=type(path).__name__)
    name = os.fsdecode(path)
    where = printable(name, 300)
    if name.lower().endswith(PICKLES) and not pickles:
        raise MoleFileError(where, "pickle-based files can run code and are not read", hint=CONVERTER)
    try:
        if root is not None:
            name = _inside(name, root, where)
        mode = os.stat(name).st_mode
        if stat.S_ISREG(mode):
            handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            mode = os.fstat(handle).st_mode
            if stat.S_ISREG(mode):
                return FileIO(handle, "rb")
            os.close(handle)
    # it is a ValueError too
    except MoleFileError:
        raise
    except FileNotFoundError:
        raise MoleFileError(where, _missing(name), hint=_hint_for_missing(name)) from None
    except (OSError, ValueError) as error:
        raise MoleFileError(where, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    folder = stat.S_ISDIR(mode)
    raise MoleFileError(
        where, expected="a regular file", got="a folder" if folder else "a FIFO, socket or device"
    )


@contextmanager
def words_for_read_errors(where: str) -> Iterator[None]:
    """Turn an OSError while a file is read into a MoleFileError that names the file.

    Args:
        where: The file, for messages.

    Raises:
        MoleFileError: The disk, the network share or the system failed.
    """
    try:
        yield
    except OSError as error:
        raise MoleFileError(
            where,
            f"reading failed ({error.strerror or type(error).__name__})",
            hint="the disk, the network share or the link to it may be gone; nothing was changed",
        ) from error


def refuse_other_formats(prefix: bytes, where: str) -> None:
    """Refuse by its first eight bytes what is something else, in words.

    Raises:
        MoleFileError: A pickle or zip, a Git LFS pointer, a web page, an archive.
    """
    # a safetensors length below 16 MB has zeros in its last five bytes, a pickle does not
    pickle = len(prefix) > 1 and prefix[0] == 0x80 and prefix[1] <= 5 and prefix[3:] != bytes(5)
    if pickle or prefix.startswith(b"PK\x03\x04"):
        raise MoleFileError(
            where, "is a pickle or a zip, whatever its name says; it is not read", hint=CONVERTER
        )
    for beginning, what, hint in _BEGINNINGS:
        if prefix.startswith(beginning):
            raise MoleFileError(where, what, hint=hint)


def _inside(name: str, root: PathLike, where: str) -> str:
    folder = os.path.realpath(root)
    real = os.path.realpath(os.path.join(os.path.abspath(os.fsdecode(root)), name))
    if not any(os.path.commonpath([allowed, real]) == allowed for allowed in (folder, *_blobs(root))):
        raise MoleFileError(
            where,
            f"lies outside the folder {printable(folder, 300)}",
            hint="links and .. may not leave the folder",
        )
    return real


def _blobs(root: PathLike) -> Iterator[str]:
    """The folder of a hub cache's blobs, where `root` is one of its snapshots:
    <repository>/snapshots/<revision>/…
    """
    parts = os.path.abspath(os.fsdecode(root)).split(os.sep)
    for i in range(len(parts) - 2, 0, -1):
        if parts[i] == "snapshots":
            blobs = os.sep.join([*parts[:i], "blobs"])
            if os.path.isdir(blobs) and not os.path.islink(blobs):
                yield os.path.realpath(blobs)
            return


def _missing(name: str) -> str:
    return "is a link to a file that is not there" if os.path.islink(name) else "there is no such file"


def _hint_for_missing(name: str) -> str:
    return "the download of it may have stopped: download it again" if os.path.islink(name) else ""
