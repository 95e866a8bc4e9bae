"""One expert: its two factors on one layer, and all the layers of one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError, printable

if TYPE_CHECKING:
    from mole_kernels.experts.families.family import AdapterFamily

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
)


def flatten(path: str) -> str:
    """A path with every dot as an underscore: the name under which dotted and kohya's flat spellings meet."""
    return path.replace(".", "_")


DENOISERS = frozenset({None, "unet", "transformer", "prior"})


def is_denoiser(component: str | None) -> bool:
    """Whether a component's name, or that a file names none, means the pipeline's (first) denoiser."""
    return component in DENOISERS


def canonical_path(path: str) -> str:
    """The text that two paths of one model share exactly where they mean one layer.

    Dots and underscores are alike, the denoiser is one component under each of its names, and text encoders
    hold `text_model` or do not.

    Args:
        path: A layer's path as a file spells it, with or without its component.

    Returns:
        A name to compare and to key by, not a path to walk.
    """
    component, rest = split_component(path)
    if is_denoiser(component):
        return flatten(rest)
    return f"{component}:{flatten(rest).removeprefix('text_model_')}"


def split_component(path: str) -> tuple[str | None, str]:
    """A path's component and the rest: ("unet", "down_blocks.0…"), or (None, path) where it names none.

    Args:
        path: A layer's dotted path.
    """
    head, dot, rest = path.partition(".")
    return (head, rest) if dot and head in COMPONENTS else (None, path)


def cast(
    where: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None = None
) -> Tensor:
    """`tensor.to(device, dtype)`, refused where a finite value would become Inf or NaN (float16 ends at
    65,504).

    Args:
        where: What the tensor is, for messages.
        tensor: Any floating tensor.
        dtype: The dtype of the result; None keeps the tensor's.
        device: The device of the result; None keeps the tensor's.

    Raises:
        MoleValueError: A value that `dtype` cannot hold.
    """
    new = tensor.to(device=device, dtype=dtype)
    if (
        dtype is not None
        and tensor.numel()
        and not tensor.is_meta
        and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    ):
        low, high = torch.aminmax(tensor.detach())
        largest = max(-low.item(), high.item())
        if largest > torch.finfo(dtype).max:
            raise MoleValueError(
                where,
                f"its largest value {largest:g} overflows in {dtype} (largest {torch.finfo(dtype).max:g})",
                hint="use bfloat16 or float32",
            )
    return new


@dataclass(frozen=True, eq=False)
class LowRank:
    """One expert on one layer: ΔW = scale · up · down.

    Attributes:
        down: [R,K]; of a k×k convolution [R, K·k·k], so that ΔW reshapes to its weight [N,K,k,k].
        up: [N,R].
        scale: The file's own scale (`experts.scales`), without any adapter weight.
        conv: False for a linear layer, True for a 1×1 convolution (files hold [R,K,1,1] and [N,R,1,1]),
            (height, width) of a larger kernel.

    Raises:
        MoleShapeError: Factors that are no matrices of one rank.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    conv: bool | tuple[int, int] = False

    def __post_init__(self) -> None:
        if (
            self.down.dim() != 2
            or self.up.dim() != 2
            or self.down.shape[0] != self.up.shape[1]
            or self.down.shape[0] < 1
        ):
            raise MoleShapeError(
                "LowRank",
                expected="down [R,K] and up [N,R] of one rank R >= 1",
                got=f"down {list(self.down.shape)}, up {list(self.up.shape)}",
                hint="up-projections are stored [N,R], down-projections [R,K]",
            )

    def __repr__(self) -> str:
        size = f"{self.out_features}x{self.in_features}"
        return f"LowRank({size}, rank {self.rank}, scale {self.scale:g}, {self.up.dtype})"

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the convolution's kernel; (1, 1) for a linear layer too."""
        return (1, 1) if isinstance(self.conv, bool) else self.conv

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def in_features(self) -> int:
        """K, of a k×k convolution K·k·k."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.up.shape[0]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW [N,K] in full.

        Args:
            dtype: What the product is computed and returned in.
        """
        return self.scale * (self.up.to(dtype) @ self.down.to(dtype))

    def norm(self, dtype: torch.dtype = torch.float64) -> float:
        """‖ΔW‖ (Frobenius) as |scale| · √Σ(AAᵀ ⊙ BᵀB): products [R,R] only, ΔW is never formed.

        Args:
            dtype: What the products are computed in.
        """
        down, up = self.down.detach().to(dtype), self.up.detach().to(dtype)
        squared = ((down @ down.T).double() * (up.T @ up).double()).sum().item()
        return abs(self.scale) * max(squared, 0.0) ** 0.5

    def to(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        where: str = "LowRank.to",
    ) -> LowRank:
        """A copy in another dtype or on another device.

        Args:
            dtype: As `Tensor.to`'s; None keeps the factors'.
            device: As `Tensor.to`'s; None keeps the factors'.
            where: What the factors are, for messages.

        Raises:
            MoleValueError: A value that `dtype` cannot hold (float16 ends at 65,504).
        """
        return LowRank(
            cast(f"{where}, A (down)", self.down, dtype, device),
            cast(f"{where}, B (up)", self.up, dtype, device),
            self.scale,
            self.conv,
        )


@dataclass(frozen=True, eq=False)
class Expert:
    """All layers of one expert, by module path.

    Attributes:
        layers: Path -> LowRank. A path begins with its component ("unet.", "text_encoder.", "transformer.")
            where the file says so. A flat name that could not be cut into dots stays flat: compare by
            `canonical_path`.
        dialect: How the file spelled it: "diffusers", "kohya", "mix_of_show", "native", "memory".
        source: The file, for messages.
        metadata: The file's own metadata, text as it came: escape before printing.
        strength: A phrase that says where the file keeps its scales; "" where that is unknown.
        families: Path -> an expert whose ΔW depends on the base (DoRA, OFT, IA³ …), or that changes a bias or
            a norm.

    Raises:
        MoleKeyError: Two spellings of one layer.
    """

    layers: Mapping[str, LowRank]
    dialect: str = "memory"
    source: str = "memory"
    metadata: Mapping[str, str] = field(default_factory=dict)
    strength: str = ""
    families: Mapping[str, AdapterFamily] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for path in (*self.layers, *self.families):
            other = seen.setdefault(canonical_path(path), path)
            if other != path:
                raise MoleKeyError(
                    printable(self.source),
                    f"one layer is named twice: {printable(other)} and {printable(path)}",
                    hint="keep one spelling of each layer in the file",
                )

    def check_low_rank(self, where: str) -> None:
        """Refuse an expert that is not A and B alone, where nothing else can be done.

        Args:
            where: What is being done, for messages.

        Raises:
            MoleTypeError: Some layers need the base's weight, or change a bias or a norm.
        """
        if self.families:
            kinds = ", ".join(sorted({family.kind for family in self.families.values()}))
            raise MoleTypeError(
                f"{where}, {printable(self.source)}",
                expected="layers that are A and B",
                got=f"{len(self.families)} layers of {kinds}, which depend on the base or change more than W",
                hint="mole_kernels.patch computes them beside the base",
            )

    def ranks(self) -> set[int]:
        """Every R among the layers."""
        return {layer.rank for layer in self.layers.values()}

    def scales(self) -> set[float]:
        """Every scale among the layers."""
        return {layer.scale for layer in self.layers.values()}

    def components(self) -> set[str | None]:
        """Every component among the paths; None for paths that name none."""
        return {split_component(path)[0] for path in self.layers}

    def norm(self) -> float:
        """‖ΔW‖ over all layers together."""
        return sum(layer.norm() ** 2 for layer in self.layers.values()) ** 0.5
