"""Attention of every place of a picture to the texts of the regions that cover it, in one launch and without
a copy of Q.

A program holds BM queries of one head and walks over the regions; those that cover none of its places cost it
one look at their shares.
Within a region the softmax is online over blocks of BL text tokens. The output is written once.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "L", "S", "H"])
def regional_attention_fwd_kernel(
    q,
    k,
    v,
    shares,
    lengths,
    o,
    T,
    L,
    S,
    H,
    D,
    qk_scale,
    sqb,
    sqh,
    sqt,
    skb,
    sks,
    skh,
    skl,
    svb,
    svs,
    svh,
    svl,
    swb,
    sws,
    sob,
    soh,
    sot,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """o = Σ_s shares_s ⊙ softmax(q k_sᵀ · qk_scale) v_s.  grid (tiles of T, B·H); BD holds a head's D

    q, o [B,H,T,D]   k, v [B,S,H,L,D]   shares [B,S,T] float32   lengths [B,S] int32: text tokens that count
                     (LENGTHS)
    the last stride of q, k, v, o and of shares is 1
    """
    i_t, i_b, i_h = (
        tl.program_id(0),
        (tl.program_id(1) // H).to(tl.int64),
        (tl.program_id(1) % H).to(tl.int64),
    )
    o_t, o_d, o_l = i_t * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BL)
    m_t, m_d = o_t < T, o_d < D
    b_q = tl.load(
        q + i_b * sqb + i_h * sqh + o_t[:, None].to(tl.int64) * sqt + o_d[None, :],
        mask=m_t[:, None] & m_d[None, :],
        other=0.0,
    )
    b_o = tl.zeros((BM, BD), tl.float32)
    for i_s in range(S):
        b_w = tl.load(shares + i_b * swb + i_s * sws + o_t, mask=m_t, other=0.0)
        # NaN too is a share: it must reach the output
        if tl.sum((b_w != 0.0).to(tl.int32)) > 0:
            n_l = L
            if LENGTHS:
                n_l = tl.load(lengths + i_b * S + i_s)
            p_k = k + i_b * skb + tl.cast(i_s, tl.int64) * sks + i_h * skh
            p_v = v + i_b * svb + tl.cast(i_s, tl.int64) * svs + i_h * svh
            b_m = tl.full((BM,), float("-inf"), tl.float32)
            b_z = tl.zeros((BM,), tl.float32)
            b_a = tl.zeros((BM, BD), tl.float32)
            for l in range(0, n_l, BL):
                m_l = l + o_l < n_l
                b_k = tl.load(
                    p_k + (l + o_l[None, :]) * skl + o_d[:, None], mask=m_l[None, :] & m_d[:, None], other=0.0
                )
                b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * qk_scale
                b_s = tl.where(m_l[None, :], b_s, float("-inf"))
                b_n = tl.maximum(b_m, tl.max(b_s, 1))
                b_p = tl.exp(b_s - b_n[:, None])
                b_c = tl.exp(b_m - b_n)
                b_z = b_z * b_c + tl.sum(b_p, 1)
                b_v = tl.load(
                    p_v + (l + o_l[:, None]) * svl + o_d[None, :], mask=m_l[:, None] & m_d[None, :], other=0.0
                )
                b_a = b_a * b_c[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
                b_m = b_n
            b_o += tl.where((b_w != 0.0)[:, None], (b_w / b_z)[:, None] * b_a, 0.0)
    p_o = o + i_b * sob + i_h * soh + o_t[:, None].to(tl.int64) * sot + o_d[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


def tile_for(D: int) -> dict[str, int]:
    """BM, BL, BD and warps for heads D wide: what holds in registers on every architecture, as compiled
    (`make aot`).
    """
    BD = max(16, triton.next_power_of_2(D))
    BM, BL, warps = (64, 64, 4) if BD <= 64 else (32, 64, 4) if BD <= 128 else (32, 32, 8)
    return {"BM": BM, "BL": BL, "BD": BD, "warps": warps}


def launch(q, k, v, shares, lengths, scale, **tile):
    """o [B,H,T,D] in q's dtype; see the kernel. q, k, v and shares with a last stride of 1; `tile` overrides
    `tile_for`.
    """
    import torch

    B, H, T, D = q.shape
    S, L = k.shape[1], k.shape[3]
    o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    if not o.numel():
        return o
    tf32 = q.dtype == torch.float32 and q.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    t = tile_for(D) | tile
    # float32 tiles are twice as wide
    BL = max(16, t["BL"] // (2 if q.element_size() == 4 else 1))
    regional_attention_fwd_kernel[(triton.cdiv(T, t["BM"]), B * H)](
        q,
        k,
        v,
        shares,
        lengths,
        o,
        T,
        L,
        S,
        H,
        D,
        scale,
        *q.stride()[:3],
        *k.stride()[:4],
        *v.stride()[:4],
        *shares.stride()[:2],
        *o.stride()[:3],
        LENGTHS=lengths is not None,
        PRECISION="tf32" if tf32 else "ieee",
        BM=t["BM"],
        BL=BL,
        BD=t["BD"],
        num_warps=t["warps"],
        num_stages=2,
    )
    return o
