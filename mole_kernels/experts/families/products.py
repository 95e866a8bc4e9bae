"""Families whose ΔW is a product of factors, as the LoRA of the same ΔW: LoHa, LoKr, a full difference.

Each function takes a layer's parts by the words of `io.dialects.parts` and gives A [R,K…], B [N,R] and the
rank that alpha is divided by, 0 where alpha has no say. K of a convolution keeps its dimensions [R,C,kh,kw].
Products are computed in float32 (float64 for float64), whatever the file's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mole_kernels.errors import MoleShapeError


def loha_as_lora(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b), a Hadamard product; with cores t1, t2 each half is Tucker's.

    It is exactly the LoRA of rank r1·r2 whose A and B are the Khatri–Rao products of the halves' factors:
    A[(i,j)] = w1_b[i] ⊙ w2_b[j], B[:,(i,j)] = w1_a[:,i] ⊙ w2_a[:,j]. Where the layer's smaller side is less
    than r1·r2, and with cores, ΔW itself is a factor. s = alpha/r.

    Args:
        parts: w1_a [N,r], w1_b [r,K], w2_a, w2_b alike; with cores t1, t2 [r,r,kh,kw]: w1_a [r,N], w1_b
            [r,C].

    Returns:
        A, B and r.

    Raises:
        MoleShapeError: Halves of different shapes, or factors that do not fit.

    Source: Hyeon-Woo et al., FedPara, ICLR 2022; LyCORIS `functional/loha.py`; PEFT `tuners/loha`.
    """
    cores = [parts.get("t1"), parts.get("t2")]
    if (cores[0] is None) != (cores[1] is None):
        raise MoleShapeError("LoHa", expected="a core for both halves or for neither", got="t1 or t2 alone")
    halves = []
    for n, core in enumerate(cores, 1):
        left, right = _wide(parts[f"w{n}_a"]), _wide(parts[f"w{n}_b"])
        _shape("LoHa", f"w{n}_b", right, None, None)
        r = right.shape[0]
        if core is None:
            _shape("LoHa", f"w{n}_a", left, None, r)
        else:
            _shape("LoHa", f"w{n}_a", left, r, None)
            _shape("LoHa", f"t{n}", core, r, r, None, None)
        halves.append((left, right, None if core is None else _wide(core)))
    (a1, b1, t1), (a2, b2, t2) = halves
    if t1 is not None and t2 is not None:
        whole = [torch.einsum("ijhw,ip,jq->pqhw", t, a, b) for a, b, t in ((a1, b1, t1), (a2, b2, t2))]
        if whole[0].shape != whole[1].shape:
            raise MoleShapeError("LoHa", expected="halves of one shape", got=[list(w.shape) for w in whole])
        return *_dense(whole[0] * whole[1]), b1.shape[0]
    if a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1]:
        raise MoleShapeError(
            "LoHa",
            expected="halves of one shape",
            got=f"{[a1.shape[0], b1.shape[1]]} and {[a2.shape[0], b2.shape[1]]}",
        )
    if b1.shape[0] * b2.shape[0] > min(a1.shape[0], b1.shape[1]):
        return *_dense((a1 @ b1) * (a2 @ b2)), b1.shape[0]
    down = (b1[:, None] * b2[None]).flatten(0, 1)
    up = (a1[:, :, None] * a2[:, None]).flatten(1)
    return down, up, b1.shape[0]


def lokr_as_lora(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """ΔW = s · w1 ⊗ w2, a Kronecker product of two small matrices, each whole or factored.

    With w2 = w2_a w2_b of rank r it is the LoRA of rank b·r: A = 1_b ⊗ w2_b, B = w1 ⊗ w2_a (or of rank a·r
    with w1 in A, where a < b). Where that is more than the layer's smaller side, ΔW itself is a factor.
    s = alpha/r where a half is factored, else 1.

    Args:
        parts: w1 [a,b] or w1_a [a,r], w1_b [r,b]; w2 [c,d…] or w2_a [c,r], w2_b [r,d…]; t2 [r,r,kh,kw] with
            w2_a [r,c], w2_b [r,d].

    Returns:
        A, B and r; 0 where neither half is factored.

    Raises:
        MoleShapeError: Factors that do not fit.

    Source: Yeh et al., LyCORIS, ICLR 2024; LyCORIS `modules/lokr.py`; PEFT `tuners/lokr`.
    """
    rank = 0
    if "w1" in parts:
        w1 = _wide(parts["w1"])
        _shape("LoKr", "w1", w1, None, None)
    else:
        left, right = _wide(parts["w1_a"]), _wide(parts["w1_b"])
        _shape("LoKr", "w1_a", left, None, right.shape[0])
        w1, rank = left @ right, right.shape[0]
    if "w2" in parts:
        return *_dense(_kron(w1, _wide(parts["w2"]))), rank
    left, right = _wide(parts["w2_a"]), _wide(parts["w2_b"])
    rank = right.shape[0]
    if "t2" in parts:
        _shape("LoKr", "t2", parts["t2"], None, rank, None, None)
        _shape("LoKr", "w2_a", left, parts["t2"].shape[0], None)
        w2 = torch.einsum("ijhw,ip,jq->pqhw", _wide(parts["t2"]), left, right.flatten(1))
        return *_dense(_kron(w1, w2)), rank
    _shape("LoKr", "w2_a", left.flatten(1), None, rank)
    left = left.flatten(1)
    (a, b), (c, _), cols = w1.shape, left.shape, right.flatten(1).shape[1]
    if min(a, b) * rank > min(a * c, b * cols):
        return *_dense(_kron(w1, (left @ right.flatten(1)).unflatten(1, right.shape[1:]))), rank
    if b <= a:
        down, up = _kron(torch.eye(b, dtype=w1.dtype), right), torch.kron(w1, left)
    else:
        down, up = _kron(w1, right), torch.kron(torch.eye(a, dtype=w1.dtype), left)
    return down, up, rank


def full_as_lora(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """ΔW = diff, a difference of the whole weight, beside the identity as its other factor.

    Args:
        parts: diff [N,K], or [N,C,kh,kw] of a convolution.

    Returns:
        A, B and 0: alpha has no say.

    Raises:
        MoleShapeError: A difference that is neither a matrix nor a convolution's filters.

    Source: LyCORIS `modules/full.py`; `.diff` of ComfyUI and of step-distillation files.
    """
    diff = _wide(parts["diff"])
    if diff.dim() not in (2, 4) or 0 in diff.shape:
        raise MoleShapeError("a full difference", expected="diff [N,K] or [N,C,kh,kw]", got=list(diff.shape))
    return *_dense(diff), 0


def _dense(delta: Tensor) -> tuple[Tensor, Tensor]:
    """ΔW [N,K…] as A and B of the smaller of its two ranks, one of them the identity."""
    N, K = delta.shape[0], delta[0].numel()
    if N <= K or (delta.dim() == 4 and delta.shape[2:].numel() > 1):
        up = torch.eye(N, dtype=delta.dtype, device=delta.device)
        return delta.contiguous(), up[..., None, None] if delta.dim() == 4 else up
    down = torch.eye(K, dtype=delta.dtype, device=delta.device)
    return (down[..., None, None] if delta.dim() == 4 else down), delta.contiguous()


def _kron(w1: Tensor, w2: Tensor) -> Tensor:
    """w1 [a,b] ⊗ w2 [c,d…] -> [a·c,b·d…], places of a convolution's kernel kept apart."""
    out = torch.einsum("ab,cd...->acbd...", w1, w2)
    return out.flatten(0, 1).flatten(1, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float64 else tensor.float()


def _shape(kind: str, name: str, tensor: Tensor, *sizes: int | None) -> None:
    if (
        tensor.dim() != len(sizes)
        or 0 in tensor.shape
        or any(size is not None and size != got for size, got in zip(sizes, tensor.shape))
    ):
        raise MoleShapeError(
            kind,
            expected=f"{name} [{', '.join('·' if s is None else str(s) for s in sizes)}]",
            got=list(tensor.shape),
        )
