"""A LoRA as one flat vector, and back, bit for bit: which tensor lies where, and by which power of two it is
scaled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mole_kernels.errors import (
    MoleFileError,
    MoleKeyError,
    MoleShapeError,
    MoleTypeError,
    MoleValueError,
    printable,
)
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.limits import finite, parse_json
from mole_kernels.modules.names import Names, few
from mole_kernels.modules.scan import scan, sizes

VERSION = 1
# what float32, the vector's dtype, holds without a rounding
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class VectorEntry:
    """One tensor: vector[offset : offset + size] = tensor · 2^exponent, flattened row by row."""

    name: str
    shape: tuple[int, ...]
    offset: int
    dtype: str
    exponent: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The layout of a vector [length] float32 that holds a LoRA's tensors in a fixed order.

    Args:
        entries: In order, without gaps.
        scales: Layer path -> the convention's scale (alpha/r) of an `Expert`; no part of the vector,
            the same for every identity.
        conv: Layers whose factors are those of a 1x1 convolution.
    """

    entries: tuple[VectorEntry, ...]
    scales: Mapping[str, float]
    conv: tuple[str, ...] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Manifest:
        """The layout of any tensors by name, in the mapping's order: mixed ranks, convolutions of any kernel,
        any of three dtypes.
        """
        entries, offset = [], 0
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise MoleTypeError(
                    f"manifest, {name}", expected=f"one of {', '.join(_BY_NAME)}", got=str(tensor.dtype)
                )
            entries.append(VectorEntry(name, tuple(tensor.shape), offset, DTYPES[tensor.dtype]))
            offset += tensor.numel()
        if not offset:
            raise MoleValueError("manifest", expected="at least one value", got="none")
        return cls(tuple(entries), {})

    @classmethod
    def of_expert(cls, expert: Expert) -> Manifest:
        """The layout of an expert: of every layer `<path>.down` and `<path>.up`, in the file's order."""
        if larger := [path for path, factor in expert.layers.items() if factor.kernel != (1, 1)]:
            raise MoleValueError(
                f"expert ({expert.source})",
                expected="linear layers and 1x1 convolutions",
                got=f"a larger convolution, {larger[0]}",
            )
        layout = cls.of(tensors_of(expert))
        scales = {path: factor.scale for path, factor in expert.layers.items()}
        return cls(
            layout.entries, scales, tuple(path for path, factor in expert.layers.items() if factor.conv)
        )

    @property
    def length(self) -> int:
        last = self.entries[-1]
        return last.offset + last.size

    def fit(self, many: Iterable[Mapping[str, Tensor]]) -> Manifest:
        """The same layout with each tensor scaled so that its largest value over `many` lies in [0.5, 1).

        Powers of two, so that scaling there and back loses nothing (down to float32's smallest normal
        number).
        """
        largest = dict.fromkeys((entry.name for entry in self.entries), 0.0)
        for tensors in many:
            self._check(tensors)
            for name in largest:
                largest[name] = max(
                    largest[name], tensors[name].detach().abs().max().item() if tensors[name].numel() else 0.0
                )
        entries = []
        for entry in self.entries:
            top = largest[entry.name]
            # top = mantissa · 2^power with the mantissa in [0.5, 1)
            power = math.frexp(top)[1] if top else 0
            entries.append(
                VectorEntry(entry.name, entry.shape, entry.offset, entry.dtype, max(-100, min(100, -power)))
            )
        return Manifest(tuple(entries), self.scales, self.conv)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[length] float32. Raises MoleKeyError or MoleShapeError, the tensor named, where they are not those
        of the layout.
        """
        self._check(tensors)
        vector = torch.empty(self.length)
        for entry in self.entries:
            flat = tensors[entry.name].detach().reshape(-1).to("cpu", torch.float32)
            vector[entry.offset : entry.offset + entry.size] = torch.ldexp(flat, torch.tensor(entry.exponent))
        return vector

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors, in their shapes and dtypes. Raises MoleValueError where a value is not finite."""
        if vector.shape != (self.length,):
            raise MoleShapeError("manifest", expected=f"a vector [{self.length}]", got=tuple(vector.shape))
        if not bool(torch.isfinite(vector).all()):
            at = int((~torch.isfinite(vector)).nonzero()[0])
            entry = next(e for e in self.entries if at < e.offset + e.size)
            raise MoleValueError(
                "manifest", expected="finite values", got=f"{vector[at].item()} in {entry.name}"
            )
        out = {}
        for entry in self.entries:
            part = vector[entry.offset : entry.offset + entry.size].detach().float()
            # over the exponent first, so that no value passes through a smaller dtype twice
            out[entry.name] = (
                torch.ldexp(part, torch.tensor(-entry.exponent))
                .to(_BY_NAME[entry.dtype])
                .reshape(entry.shape)
            )
        return out

    def flatten_expert(self, expert: Expert) -> Tensor:
        """[length] float32 of an expert. Raises MoleValueError where its scales are others: the vector holds
        factors alone.
        """
        for path, scale in self.scales.items():
            factor = expert.layers.get(path)
            if factor is not None and factor.scale != scale:
                raise MoleValueError(
                    f"expert ({expert.source}), layer {path}",
                    expected=f"the layout's scale {scale:g}",
                    got=f"{factor.scale:g}",
                    hint="train every identity with one rank and one alpha",
                )
        return self.flatten(tensors_of(expert))

    def expert(self, vector: Tensor, source: str = "difflora") -> Expert:
        """The expert that a vector [length] holds."""
        tensors = self.unflatten(vector)
        layers = {
            path: LowRank(tensors[f"{path}.down"], tensors[f"{path}.up"], scale, conv=path in self.conv)
            for path, scale in self.scales.items()
        }
        return Expert(layers, dialect="memory", source=source)

    def check_base(self, model: object) -> None:
        """Raises MoleShapeError or MoleKeyError, the layers named, where this layout's experts do not fit
        `model`.
        """
        scanned = scan(model)
        names, layers = Names(scanned), {**scanned.layers, **scanned.patched}
        absent, wrong = [], []
        shapes = {entry.name: entry.shape for entry in self.entries}
        for path in self.scales:
            at = names.find(path)
            if at is None or at not in layers:
                absent.append(path)
                continue
            N, K = sizes(layers[at])
            have = (shapes[f"{path}.up"][0], shapes[f"{path}.down"][1])
            if have != (N, K):
                wrong.append(f"{path} is {N}x{K} there and {have[0]}x{have[1]} here")
        where = f"manifest, {type(model).__name__}"
        if absent:
            raise MoleKeyError(
                where, f"{len(absent)} of its {len(self.scales)} layers are not in the model: {few(absent)}"
            )
        if wrong:
            raise MoleShapeError(
                where,
                f"{len(wrong)} layers have other sizes: {few(wrong)}",
                hint="the model was trained for another base",
            )

    def to_json(self) -> str:
        return json.dumps(
            {
                "version": VERSION,
                "entries": [asdict(e) for e in self.entries],
                "scales": dict(self.scales),
                "conv": self.conv,
            }
        )

    @classmethod
    def from_json(cls, text: str, where: str = "manifest") -> Manifest:
        """Raises MoleFileError for text that is none, or of a newer version."""
        held = parse_json(text, where, "the layout")
        try:
            version = held["version"]
            entries = tuple(
                VectorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in held["entries"]
            )
            layout = cls(entries, dict(held["scales"]), tuple(held["conv"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoleFileError(where, f"no layout of a LoRA vector: {printable(error)}") from error
        if version != VERSION:
            raise MoleFileError(
                where,
                expected=f"version {VERSION}",
                got=printable(version),
                hint="made by a newer mole_kernels",
            )
        layout._check_entries(where)
        layout._check_layers(where)
        return layout

    def _check_entries(self, where: str) -> None:
        """Entries of a stranger: named once, of known dtypes, each at the end of the one before, with a value
        among them.
        """
        offset, names = 0, set()
        for entry in self.entries:
            # bool is an int too, and a size of more than an exabyte is none
            whole = all(type(n) is int and 0 <= n < 2**60 for n in (*entry.shape, entry.offset))
            plain = isinstance(entry.name, str) and entry.name not in names and entry.dtype in list(_BY_NAME)
            if not (plain and type(entry.exponent) is int and abs(entry.exponent) < 1000):
                raise MoleFileError(
                    where, expected="names, dtypes and exponents of tensors", got=printable(entry, 200)
                )
            names.add(entry.name)
            if not whole or entry.offset != offset:
                raise MoleFileError(
                    where, f"{printable(entry.name)}: its place does not follow the one before"
                )
            offset += entry.size
        if not 0 < offset < 2**60:
            raise MoleFileError(
                where,
                expected="at least one value",
                got="none" if not offset else "more than any machine holds",
            )

    def _check_layers(self, where: str) -> None:
        """Every layer that has a scale has both factors, [R,K] and [N,R]."""
        shapes = {entry.name: entry.shape for entry in self.entries}
        for path, scale in self.scales.items():
            down, up = shapes.get(f"{path}.down", ()), shapes.get(f"{path}.up", ())
            if not finite(scale) or len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
                got = f"scale {printable(scale, 40)}, {list(down)} and {list(up)}"
                raise MoleFileError(
                    where, expected=f"a scale and factors [R,K] and [N,R] of {printable(path)}", got=got
                )
        if not all(isinstance(path, str) and path in self.scales for path in self.conv):
            raise MoleFileError(where, expected="convolutions among the layers", got=printable(self.conv))

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        known = {entry.name for entry in self.entries}
        absent, extra = [n for n in known if n not in tensors], [n for n in tensors if n not in known]
        if absent or extra:
            what = [f"lacks {few(sorted(absent))}"] * bool(absent) + [f"has {few(sorted(extra))} too"] * bool(
                extra
            )
            raise MoleKeyError(
                "manifest",
                expected=f"the {len(known)} tensors of the layout",
                got=f"a LoRA that {' and '.join(what)}",
            )
        for entry in self.entries:
            got = tensors[entry.name]
            if tuple(got.shape) != entry.shape or DTYPES.get(got.dtype) != entry.dtype:
                raise MoleShapeError(
                    f"manifest, {entry.name}",
                    expected=f"{list(entry.shape)} {entry.dtype}",
                    got=f"{list(got.shape)} {str(got.dtype)[6:]}",
                )


def tensors_of(expert: Expert) -> dict[str, Tensor]:
    """`<path>.down` [R,K] and `<path>.up` [N,R] of every layer."""
    return {
        f"{path}.{part}": getattr(factor, part)
        for path, factor in expert.layers.items()
        for part in ("down", "up")
    }
