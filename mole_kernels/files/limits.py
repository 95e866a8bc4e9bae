"""What a safetensors file may hold here; wider than any published LoRA, narrower than what takes a machine
down.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from mole_kernels.errors import MoleFileError, printable

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 20_000
MAX_DIMS = 4
MAX_KEY = 512
MAX_METADATA = 65_536

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# dtypes of settings, such as an alpha, never of weights: of at most MAX_SETTING values under a key that ends
# so
SETTINGS = ("alpha", "rank", "scalar", "reshape_weight", "ranknum", "bias_indices", "bias_size")
INTEGERS: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_SETTING = 16
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_key(key: str, where: str) -> None:
    """Refuse a tensor's key that is not 1 to 512 printable characters.

    Args:
        key: The key.
        where: The file, for messages.

    Raises:
        MoleFileError: Another key.
    """
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise MoleFileError(
            where,
            f"bad tensor key '{printable(key)}'",
            expected=f"1 to {MAX_KEY} printable characters",
            got=len(key),
        )


def check_json_size(text: bytes, where: str) -> None:
    """Refuse a header with too many strings, brackets or numbers before anything is built from it."""
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = bare.count(b'"')
    strings = 5 * MAX_TENSORS + 2 * MAX_METADATA
    if quotes <= 2 * strings:
        structure = b"".join(bare.split(b'"')[::2])
        if (
            structure.count(b"{") <= MAX_TENSORS + 2
            and structure.count(b"[") <= 2 * MAX_TENSORS
            and structure.count(b",") <= 2 * strings
        ):
            return
    raise MoleFileError(
        where,
        expected=f"at most {MAX_TENSORS:,} tensors",
        got=f"a header of {len(text):,} bytes that names more",
    )


def finite(value: object, dtype: torch.dtype = torch.float64) -> bool:
    """Whether this is a number that `dtype` holds: no bool, no NaN, no Inf, no integer of four hundred
    digits.

    Args:
        value: Anything.
        dtype: A floating dtype.
    """
    largest = torch.finfo(dtype).max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def parse_json(text: bytes | str, where: str, what: str = "the header") -> Any:
    """JSON from an untrusted source: UTF-8, no key twice, no depth that ends the interpreter, no NaN.

    Args:
        text: The JSON.
        where: The file, for messages.
        what: What the text is, for messages.

    Raises:
        MoleFileError: Text that is none of this.
    """

    hint = "is this a safetensors file?" if what == "the header" else ""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(items)
        if len(fields) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise MoleFileError(
                where,
                f"the key '{printable(twice)}' occurs twice",
                hint="one name may stand for one thing only",
            )
        return fields

    def constant(name: str) -> Any:
        raise MoleFileError(where, f"{name} is not JSON")

    try:
        return json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        raise MoleFileError(where, f"{what} is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise MoleFileError(where, f"{what} is nested too deep") from None
    except MoleFileError:
        raise
    except ValueError as error:
        raise MoleFileError(where, f"{what} is not JSON ({printable(error)})", hint=hint) from None
