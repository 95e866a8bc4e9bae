"""Several experts, in order and by name, before they are packed onto layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.format import experts_from_tensors, tensors_of_experts
from mole_kernels.experts.lowrank import Expert, LowRank, canonical_path, flatten
from mole_kernels.experts.scales import Convention, scale_of
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save

if TYPE_CHECKING:
    import os

    from mole_kernels.experts.layer import LayerExperts


Init = Literal["kaiming", "gaussian"]


class ExpertBank:
    """Experts by name; their order is the order of the gates' rows, so it is the order given, never a guess.

    Args:
        experts: Name -> Expert. Names are shown, saved and used as module keys: not empty, printable, without
            dots.

    Raises:
        MoleTypeError: A value that is no Expert, a name that is no str.
        MoleValueError: No experts, or a name that cannot be used.

    Example:
        >>> bank = ExpertBank({"face": load_expert("face.safetensors")})
    """

    def __init__(self, experts: Mapping[str, Expert]) -> None:
        if not experts:
            raise MoleValueError("ExpertBank", expected="at least one expert", got="none")
        for name, expert in experts.items():
            check_name(name)
            if not isinstance(expert, Expert):
                raise MoleTypeError(
                    f"ExpertBank, expert {name!r}",
                    expected="an Expert",
                    got=type(expert).__name__,
                    hint="read a file with mole_kernels.io.load_expert",
                )
        self.experts: dict[str, Expert] = dict(experts)
        # identity of a layer -> the spelling with the most dots among the experts: only that one can be
        # walked in a model
        self._spelling: dict[str, str] = {}
        self._by_layer: dict[str, dict[str, LowRank]] = {}
        for name, expert in self.experts.items():
            for path, layer in expert.layers.items():
                layer_id = canonical_path(path)
                known = self._spelling.setdefault(layer_id, path)
                if path.count(".") > known.count("."):
                    self._spelling[layer_id] = path
                self._by_layer.setdefault(layer_id, {})[name] = layer

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return tuple(self.experts)

    def __len__(self) -> int:
        return len(self.experts)

    def __repr__(self) -> str:
        return f"ExpertBank({', '.join(self.names)}; {len(self._spelling)} layers)"

    def paths(self) -> list[str]:
        """Every layer that at least one expert touches, in order of first mention."""
        return list(self._spelling.values())

    def layer(self, path: str) -> dict[str, LowRank]:
        """The experts that touch a layer, by name in bank order; {} where none does.

        Args:
            path: Any spelling of the layer's path.
        """
        layers = self._by_layer.get(canonical_path(path))
        if layers is None:
            # a path that is flat as a whole, its component included
            same = (known for known, spelling in self._spelling.items() if flatten(spelling) == flatten(path))
            layers = self._by_layer.get(next(same, ""), {})
        return dict(layers)

    def pack(
        self, path: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LayerExperts:
        """The packed module of one layer; an expert that lacks the layer has no rows in it.

        Args:
            path: Any spelling of the layer's path.
            dtype: The dtype of the factors; None keeps the first expert's.
            device: Their device; None keeps the first expert's.

        Raises:
            MoleKeyError: No expert has the layer.
            MoleShapeError: Experts of different [N,K].
            MoleValueError: A value that `dtype` cannot hold.
        """
        from mole_kernels.experts.layer import LayerExperts

        for name, expert in self.experts.items():
            expert.check_low_rank(f"ExpertBank.pack, {name!r}")
        layers = self.layer(path)
        if not layers:
            raise MoleKeyError(
                "ExpertBank.pack",
                f"no expert has the layer {printable(path)}",
                hint="ExpertBank.paths() lists the layers",
            )
        dims = {(layer.out_features, layer.in_features) for layer in layers.values()}
        if len(dims) > 1:
            got = ", ".join(
                f"{name} {layer.out_features}x{layer.in_features}" for name, layer in layers.items()
            )
            raise MoleShapeError(
                f"ExpertBank.pack, layer {printable(path)}", expected="experts of one size [N,K]", got=got
            )
        layers = {
            name: layer.to(dtype, device, where=f"expert {name!r}, {printable(path)}")
            for name, layer in layers.items()
        }
        return LayerExperts.from_factors(layers, dtype=dtype, device=device)

    @classmethod
    def new(
        cls,
        shapes: Mapping[str, tuple[int, int]],
        names: Sequence[str],
        rank: int | Mapping[str, int],
        alpha: float | Mapping[str, float] | None = None,
        *,
        convention: Convention = "kohya",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        init: Init = "kaiming",
    ) -> ExpertBank:
        """Fresh experts with B = 0, so that ΔW = 0.

        Args:
            shapes: Path -> (N, K) of the layers.
            names: The experts, in order.
            rank: R of all experts, or by name.
            alpha: Of all experts, or by name; None means scale 1.
            convention: How alpha becomes the scale.
            dtype: Of the factors.
            generator: Random numbers for A.
            init: A ~ "kaiming", uniform(a=√5) (MoLE's code), or "gaussian", N(0, 1/R²) (PEFT's, SELMA's).

        Raises:
            MoleValueError: An unknown `init` or convention, names that repeat, a rank below 1.
        """
        if init not in get_args(Init):
            raise MoleValueError(
                "ExpertBank.new, init", expected=f"one of {', '.join(get_args(Init))}", got=repr(init)
            )
        if len(set(names)) != len(names):
            raise MoleValueError("ExpertBank.new", expected="names that differ", got=list(names))
        experts = {}
        for name in names:
            r = rank if isinstance(rank, int) else rank[name]
            scale = scale_of(convention, alpha[name] if isinstance(alpha, Mapping) else alpha, r)
            layers = {path: _fresh(n, k, r, scale, dtype, generator, init) for path, (n, k) in shapes.items()}
            experts[name] = Expert(layers, dialect="memory", source=f"new expert {name}")
        return cls(experts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all experts to one safetensors file, exactly and atomically; `io.save_bank` adds gates.

        Args:
            path: The file.

        Raises:
            MoleFileError: The file could not be written.
        """
        tensors, metadata = tensors_of_experts(self.experts)
        atomic_save(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertBank:
        """Read the experts of a file that `save` wrote; `io.load_bank` also reads its gates.

        Args:
            path: The file.

        Raises:
            MoleFileError: Not a file of ours, or broken.
            MoleKeyError: Tensors that the metadata do not name.
        """
        tensors, metadata = read_tensors(path)
        return cls(experts_from_tensors(tensors, metadata, str(path))[0])


def check_name(name: str) -> None:
    """Refuse a name that cannot be a module key, a metadata entry and a word on the screen.

    Args:
        name: An expert's name.

    Raises:
        MoleTypeError: No str.
        MoleValueError: Empty, over 128 characters, unprintable, or with a dot.
    """
    if not isinstance(name, str):
        raise MoleTypeError("expert name", expected="a str", got=type(name).__name__)
    if not name or not name.isprintable() or "." in name or len(name) > 128:
        raise MoleValueError(
            "expert name",
            expected="1 to 128 printable characters without a dot",
            got=repr(printable(name)),
            hint="for example face_v2",
        )


def _fresh(
    n: int, k: int, rank: int, scale: float, dtype: torch.dtype, generator: torch.Generator | None, init: Init
) -> LowRank:
    down = torch.empty(rank, k, dtype=torch.float32)
    if init == "gaussian":
        torch.nn.init.normal_(down, std=1 / rank, generator=generator)
    else:
        torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return LowRank(down.to(dtype), torch.zeros(n, rank, dtype=dtype), scale)
