"""Regional cross-attention: what it is, two ways to compute it, and the door that checks and chooses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mole_kernels.backends.triton import why_not_device, why_not_triton
from mole_kernels.errors import MoleBackendError, MoleShapeError, MoleTypeError, MoleValueError

OP = "regional_attention"
BACKENDS = ("triton", "gathered", "reference")


def regional_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, shares: Tensor, lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """o = Σ_s shares_s ⊙ softmax(q k_sᵀ · scale) v_s.

    q [B,H,T,D]   k, v [B,S,H,L,D]   shares [B,S,T]   lengths [B,S]: how many of the L tokens count   scale:
                  1/√D by default
    """
    logits = torch.einsum("bhtd,bshld->bshtl", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if lengths is not None:
        counts = torch.arange(k.shape[3], device=q.device) < lengths[..., None]
        logits = logits.masked_fill(~counts[:, :, None, None], -torch.inf)
    mixed = torch.einsum("bshtl,bshld->bshtd", torch.softmax(logits, -1), v)
    # a region's answer counts only where it covers, whatever it is elsewhere
    w = shares[:, :, None, :, None].to(mixed.dtype)
    return torch.where(w != 0, w * mixed, 0).sum(1)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, shares: Tensor, lengths: Tensor | None, scale: float | None
) -> Tensor:
    """One plain attention call for each region, over the places it covers; places that several cover are
    computed for each.
    """
    B = q.shape[0]
    together = B == 1 or shares.stride(0) == 0 or bool((shares == shares[:1]).all())
    # [B,T,H,D] is how the projections lay it out: a place's queries are then one run of memory
    places = q.transpose(1, 2)
    parts = [
        _of_one_layout(places[b], k[b], v[b], shares[b.start], None if lengths is None else lengths[b], scale)
        for b in ([slice(0, B)] if together else [slice(b, b + 1) for b in range(B)])
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)


def _of_one_layout(
    q: Tensor, k: Tensor, v: Tensor, shares: Tensor, lengths: Tensor | None, scale: float | None
) -> Tensor:
    """The samples q [B,T,H,D] that have the same shares [S,T] -> [B,T,H,D]."""
    S, T = shares.shape
    # where no places overlap every place is written once, and nothing has to be added up
    once = bool(((shares == 0) | (shares == 1)).all()) and bool((shares.sum(0) == 1).all())
    out = q.new_empty(q.shape) if once else q.new_zeros(q.shape)
    for s in range(S):
        rows = shares[s].nonzero()[:, 0]
        if not len(rows):
            continue
        whole = len(rows) == T
        mask = None
        if lengths is not None:
            mask = (torch.arange(k.shape[3], device=q.device) < lengths[:, s, None])[:, None, None]
        asked = (q if whole else q.index_select(1, rows)).transpose(1, 2)
        mixed = _attention(asked, k[:, s], v[:, s], mask, scale).transpose(1, 2)
        if once:
            out = mixed if whole else out.index_copy_(1, rows, mixed)
        else:
            out.index_add_(1, rows, mixed * shares[s, rows, None, None].to(mixed.dtype))
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(q kᵀ · scale) v.  q [B,H,T,D]   k, v [B,H,L,D]   mask [B,1,1,L] bool -> [B,H,T,D]"""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Attention.apply(q, k, v, mask, scale)  # type: ignore[no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


class _Attention(torch.autograd.Function):
    """torch's fused attention, whose own backward cannot be differentiated, with a gradient that can.

    With `create_graph=True` the gradient is that of the formula in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in (q, k, v)]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], mask, scale=scale)
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.leaves, ctx.out = scale, leaves, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            wanted = [t for t, wants in zip(ctx.leaves, need) if wants]
            grads = iter(torch.autograd.grad(ctx.out, wanted, d_out, retain_graph=True))
        else:
            q, k, v, mask = ctx.saved_tensors
            # views, so that an operand that was computed from another one counts by itself
            views = [t.view_as(t) for t in (q, k, v)]
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(views[0], views[1], views[2], mask, scale=ctx.scale)
            wanted = [t for t, wants in zip(views, need) if wants]
            grads = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True))
        return (*(next(grads) if wants else None for wants in need), None, None)


def reason_against_kernel(q: Tensor) -> str | None:
    """Why the Triton kernel does not take these queries, or None."""
    if q.device.type != "cuda":
        return f"computes on CUDA devices only, q is on {q.device.type}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {q.dtype}"
    if q.shape[-1] > 256:
        return f"takes heads up to 256 wide, these are {q.shape[-1]}"
    return why_not_triton() or why_not_device()


def regional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shares: Tensor,
    lengths: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """o = Σ_s shares_s ⊙ softmax(q k_sᵀ · scale) v_s: each place attends to the texts of the regions that
    cover it.

    q        [B,H,T,D]    queries of T places
    k, v     [B,S,H,L,D]  keys and values of S texts (the global prompt among them)
    shares   [B,S,T] float32  how much each text counts at each place; a text with share 0 costs nothing there
    lengths  [B,S] int64 or int32  the first so many tokens of a text count, at least 1; all by default
    backend  "auto"; "triton": one launch, no copy of q, sampling only; "gathered": torch's attention over
             each region's places,
             differentiable; "reference"
    Returns [B,H,T,D] in q's dtype. Raises MoleShapeError, MoleTypeError, MoleValueError, MoleBackendError.
    Source: Mix-of-Show (Gu et al., NeurIPS 2023), regionally controllable sampling; shares of 1/n where n
    regions overlap are its code's.
    """
    _check(q, k, v, shares, lengths, backend)
    inference = not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, shares)))
    reason = reason_against_kernel(q) if inference else "has no backward"
    if backend == "triton" and reason is not None:
        raise MoleBackendError(
            f"{OP}: backend 'triton'", f"refuses: {reason}", hint="backend='auto' takes the best that fits"
        )
    if backend == "triton" or (backend == "auto" and reason is None):
        from mole_kernels.kernels.triton.regional import launch

        counted = None if lengths is None else lengths.to(torch.int32).contiguous()
        q, k, v, shares = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, shares.float()))
        return launch(q, k, v, shares, counted, q.shape[-1] ** -0.5 if scale is None else scale)
    if backend == "reference":
        wide = torch.promote_types(q.dtype, torch.float32)
        return regional_attention_ref(q.to(wide), k.to(wide), v.to(wide), shares, lengths, scale).to(q.dtype)
    return _gathered(q, k, v, shares, lengths, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, shares: Tensor, lengths: Tensor | None, backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise MoleValueError("backend", expected=f"'auto' or one of {', '.join(BACKENDS)}", got=repr(backend))
    if q.dim() != 4 or not q.is_floating_point():
        raise MoleShapeError(
            OP, expected="q [B,H,T,D] of a floating dtype", got=f"{tuple(q.shape)} {q.dtype}"
        )
    B, H, T, D = q.shape
    if (
        k.dim() != 5
        or k.shape[0] != B
        or k.shape[2] != H
        or k.shape[4] != D
        or not k.shape[1]
        or not k.shape[3]
    ):
        raise MoleShapeError(OP, expected=f"k [B,S,H,L,D] = [{B}, S, {H}, L, {D}]", got=tuple(k.shape))
    if v.shape != k.shape:
        raise MoleShapeError(OP, expected=f"v of k's shape {tuple(k.shape)}", got=tuple(v.shape))
    if shares.shape != (B, k.shape[1], T) or not shares.is_floating_point():
        raise MoleShapeError(
            OP,
            expected=f"shares [B,S,T] = [{B}, {k.shape[1]}, {T}], floating",
            got=f"{tuple(shares.shape)} {shares.dtype}",
        )
    for name, tensor in (("k", k), ("v", v), ("shares", shares), ("lengths", lengths)):
        if tensor is not None and tensor.device != q.device:
            raise MoleTypeError(OP, expected=f"{name} on q's device {q.device}", got=str(tensor.device))
    if not (q.dtype == k.dtype == v.dtype):
        raise MoleTypeError(
            OP, expected=f"q, k and v of one dtype, q has {q.dtype}", got=f"{k.dtype} and {v.dtype}"
        )
    if lengths is not None and (
        lengths.shape != (B, k.shape[1]) or lengths.dtype not in (torch.int64, torch.int32)
    ):
        raise MoleShapeError(
            OP,
            expected=f"lengths [B,S] = [{B}, {k.shape[1]}], integers",
            got=f"{tuple(lengths.shape)} {lengths.dtype}",
        )
    if (
        lengths is not None
        and lengths.device.type == "cpu"
        and bool(((lengths < 1) | (lengths > k.shape[3])).any())
    ):
        raise MoleValueError(OP, expected=f"lengths between 1 and L = {k.shape[3]}", got=lengths.tolist())
