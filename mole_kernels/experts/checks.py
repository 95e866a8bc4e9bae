"""Check factors and alphas of untrusted files before they become a LowRank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.lazy import LazyLayers
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.limits import DTYPE_NAMES, finite


def checked_lowrank(
    where: str, down: Tensor, up: Tensor, scale: float = 1.0, conv: bool | tuple[int, int] = False
) -> LowRank:
    """A LowRank of factors as a file holds them.

    Args:
        where: File and layer, for messages.
        down: A [R,K], of a convolution [R,K,kh,kw].
        up: B [N,R], of a convolution [N,R,1,1].
        scale: The layer's scale.
        conv: What the layer is where A's shape does not tell.

    Raises:
        MoleTypeError: A dtype that factors do not have.
        MoleShapeError: No two matrices of one rank.
        MoleValueError: NaN or Inf.
    """
    for half, name in ((down, "A (down)"), (up, "B (up)")):
        if half.dtype not in DTYPE_NAMES:
            raise MoleTypeError(
                f"{where}, {name}", expected=f"dtype {', '.join(DTYPE_NAMES.values())}", got=half.dtype
            )
    if down.dim() == 4 and tuple(down.shape[2:]) != (1, 1):
        conv = (down.shape[2], down.shape[3])
        down = down.flatten(1)
    conv = conv or down.dim() == 4 or up.dim() == 4
    down, up = _matrix(f"{where}, A (down)", down), _matrix(f"{where}, B (up)", up)
    if min(down.shape[0], up.shape[1]) < 1:
        raise MoleShapeError(
            where, expected="a rank of at least 1", got=f"A {list(down.shape)}, B {list(up.shape)}"
        )
    if down.shape[0] != up.shape[1]:
        raise MoleShapeError(
            where,
            expected="A [R,K] and B [N,R] of one rank",
            got=f"A {list(down.shape)}, B {list(up.shape)}",
            hint="is one of them transposed?",
        )
    if down.shape[1] < 1 or up.shape[0] < 1:
        raise MoleShapeError(
            where,
            expected="at least one input and one output",
            got=f"A {list(down.shape)}, B {list(up.shape)}",
        )
    check_finite(f"{where}, A (down)", down)
    check_finite(f"{where}, B (up)", up)
    return LowRank(down, up, scale, conv)


def check_finite(
    where: str, tensor: Tensor, hint: str = "the file was written by a run that diverged"
) -> None:
    """Refuse NaN and Inf, and say how many there are.

    Args:
        where: What the tensor is, for messages.
        tensor: Any floating tensor; one on meta passes.
        hint: What the reader of the message should know.

    Raises:
        MoleValueError: A value that is not finite.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return
    wide = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    # one pass and no temporary: min and max carry NaN and Inf out
    low, high = torch.aminmax(wide)
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        nan, inf = int(wide.isnan().sum()), int(wide.isinf().sum())
        raise MoleValueError(
            where,
            f"{nan} NaN and {inf} Inf among {tensor.numel():,} values",
            hint=hint,
        )


def check_values(where: str, expert: Expert) -> None:
    """Refuse NaN and Inf in an expert in memory, as in one from a file; layers that are read later are
    checked then.

    Raises:
        MoleValueError: A factor or a scale that is not finite.
    """
    if isinstance(expert.layers, LazyLayers):
        return
    for path, layer in expert.layers.items():
        at = f"{where}, {printable(path)}"
        check_finite(f"{at}, A (down)", layer.down, "its values came from a run that diverged")
        check_finite(f"{at}, B (up)", layer.up, "its values came from a run that diverged")
        if not finite(layer.scale):
            raise MoleValueError(f"{at}, scale", expected="a finite number", got=printable(layer.scale, 40))


def checked_alpha(where: str, alpha: Tensor | float) -> float:
    """The finite number that an alpha must be.

    Args:
        where: File and key, for messages.
        alpha: A number, or a tensor with one value of any integer or floating dtype.

    Raises:
        MoleShapeError: Several values.
        MoleTypeError: No number.
        MoleValueError: NaN or Inf.
    """
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise MoleShapeError(where, expected="a scalar alpha", got=f"shape {list(alpha.shape)}")
        if alpha.dtype == torch.bool or alpha.is_complex():
            raise MoleTypeError(where, expected="an integer or floating alpha of dtype", got=alpha.dtype)
        alpha = alpha.detach().float().item() if alpha.element_size() == 1 else alpha.item()
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise MoleTypeError(where, expected="a number as alpha", got=type(alpha).__name__)
    if not finite(alpha):
        raise MoleValueError(where, expected="a finite alpha", got=printable(alpha, 40))
    return float(alpha)


def _matrix(where: str, tensor: Tensor) -> Tensor:
    if tensor.dim() == 4 and tuple(tensor.shape[2:]) == (1, 1):
        return tensor.reshape(tensor.shape[:2])
    if tensor.dim() == 4:
        raise MoleShapeError(
            where,
            expected="a matrix or a 1x1 convolution: the kernel is A's",
            got=f"a {tensor.shape[2]}x{tensor.shape[3]} convolution, {list(tensor.shape)}",
        )
    if tensor.dim() != 2:
        raise MoleShapeError(where, expected="a matrix", got=f"shape {list(tensor.shape)}")
    return tensor
