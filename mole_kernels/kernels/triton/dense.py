"""y = x·Wᵀ + b + Σ_e γ_e ⊙ (x·ΔW_eᵀ), ΔW_e = s_e·B_e A_e: the experts as dense layers, for gates that vary by
token.

delta_kernel  every ΔW_e, rounded once to the layer's dtype, and the token gate
dense_kernel  an output tile: the base, then each expert's product in a second accumulator, gated and added in
              float32

Where R_e·(1/K + 1/N) > 1 two factors are more work than their product. ΔW is made in every call and never
kept: a captured graph
that is replayed after an expert changed would not notice.
"""

import triton
import triton.language as tl

from mole_kernels.kernels.triton.base import base_tile, tile_order
from mole_kernels.kernels.triton.common import COUNTS, rows_of, token_gates


@triton.jit
def logits_tile(
    i,
    x,
    token_weight,
    token_bias,
    token_gate,
    T,
    span,
    n_t,
    K,
    E,
    top_k,
    sxb,
    sxt,
    sxk,
    spe,
    spk,
    SOFTMAX: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EP: tl.constexpr,
):
    """The token gate of BM rows -> token_gate [M,E]"""
    _i_b, m_0, o_i, o_b, o_t, m_m = rows_of(i, n_t, span, T, BM)
    o_k, o_e = tl.arange(0, BK), tl.arange(0, EP)
    m_e = o_e < E
    p_x = x + (o_b * sxb + o_t * sxt)[:, None] + o_k[None, :] * sxk
    p_p = token_weight + (o_e[None, :] * spe + o_k[:, None] * spk)
    b_l = tl.zeros((BM, EP), tl.float32)
    for k in range(0, K, BK):
        m_k = (k + o_k < K) | EVEN_K
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_p = tl.load(p_p, mask=m_k[:, None] & m_e[None, :], other=0.0)
        b_l = tl.dot(b_x, b_p, b_l, input_precision=PRECISION)
        p_x += BK * sxk
        p_p += BK * spk
    if BIAS:
        b_l += tl.load(token_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_l = token_gates(b_l, o_e, m_e, E, top_k, SOFTMAX)
    tl.store(token_gate + m_0 * E + (o_i[:, None] * E + o_e[None, :]), b_l, mask=m_m[:, None] & m_e[None, :])


@triton.jit
def delta_tile(
    e,
    i_n,
    i_k,
    down,
    up,
    first,
    scale,
    delta,
    N,
    K,
    sdr,
    sdk,
    sun,
    sur,
    swd,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BZ: tl.constexpr,
):
    """One tile of ΔW_e.  first [E+1]: where each expert's columns begin; delta [E,N,swd]"""
    o_j, o_k, o_z = tl.arange(0, BN), i_k * BK + tl.arange(0, BK), tl.arange(0, BZ)
    n_0 = tl.cast(i_n * BN, tl.int64)
    m_n, m_k = n_0 + o_j < N, o_k < K
    r_1 = tl.load(first + e + 1)
    b_w = tl.zeros((BN, BK), tl.float32)
    for r in range(tl.load(first + e), r_1, BZ):
        o_r = r + o_z
        m_r = o_r < r_1
        b_u = tl.load(
            up + n_0 * sun + (o_j[:, None] * sun + o_r[None, :] * sur),
            mask=m_n[:, None] & m_r[None, :],
            other=0.0,
        )
        b_d = tl.load(
            down + (o_r[:, None].to(tl.int64) * sdr + o_k[None, :] * sdk),
            mask=m_r[:, None] & m_k[None, :],
            other=0.0,
        )
        b_w = tl.dot(b_u, b_d, b_w, input_precision=PRECISION)
    b_w = b_w * tl.load(scale + e).to(tl.float32)
    p_d = delta + (tl.cast(e, tl.int64) * N + n_0) * swd + (o_j[:, None].to(tl.int64) * swd + o_k[None, :])
    tl.store(p_d, b_w.to(delta.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    x,
    down,
    up,
    token_weight,
    token_bias,
    first,
    scale,
    delta,
    token_gate,
    T,
    span,
    n_t,
    N,
    K,
    E,
    top_k,
    sxb,
    sxt,
    sxk,
    sdr,
    sdk,
    sun,
    sur,
    spe,
    spk,
    swd,
    TOKEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PHI_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BZ: tl.constexpr,
    EP: tl.constexpr,
):
    """Row tiles of the token gate (n_t where there is one), then tiles of each ΔW_e.  grid (n_t + E · tiles
    of N × tiles of K,)
    """
    if PDL:
        # the base product may start: the products that follow it wait for this kernel's end
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0)
    if TOKEN:
        if i < n_t:
            logits_tile(
                i,
                x,
                token_weight,
                token_bias,
                token_gate,
                T,
                span,
                n_t,
                K,
                E,
                top_k,
                sxb,
                sxt,
                sxk,
                spe,
                spk,
                SOFTMAX,
                PHI_BIAS,
                EVEN_K,
                PRECISION,
                BM,
                BK,
                EP,
            )
        i -= n_t
    if i >= 0:
        n_k = tl.cdiv(K, BK)
        each = tl.cdiv(N, BN) * n_k
        e, tile = i // each, i % each
        delta_tile(
            e,
            tile // n_k,
            tile % n_k,
            down,
            up,
            first,
            scale,
            delta,
            N,
            K,
            sdr,
            sdk,
            sun,
            sur,
            swd,
            PRECISION,
            BN,
            BK,
            BZ,
        )


@triton.jit
def store_tile(b_y, n_0, m_0, o_i, m_m, bias, y, N, BIAS: tl.constexpr, BN: tl.constexpr):
    """The bias added, and y written."""
    o_j = tl.arange(0, BN)
    m_n = n_0 + o_j < N
    if BIAS:
        b_y += tl.load(bias + n_0 + o_j, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m_0 * N + n_0 + (o_i[:, None] * N + o_j[None, :]),
        b_y.to(y.dtype.element_ty),
        mask=m_m[:, None] & m_n[None, :],
    )


@triton.jit(do_not_specialize=COUNTS)
def dense_kernel(
    x,
    w,
    w2,
    delta,
    delta2,
    bias,
    gate,
    token_gate,
    y,
    T,
    span,
    n_t,
    n_m,
    N,
    K,
    E,
    sxb,
    sxt,
    sxk,
    swn,
    swk,
    swd,
    sgb,
    sgt,
    sge,
    TOKEN: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
):
    """One output tile a program: K·(1+E) in the main loop.  grid (tiles,)

    With TMA delta and delta2 are descriptors of [E·N,K]: past an expert's last row they read the next one's,
    into columns never stored.
    """
    i, i_n = tile_order(tl.program_id(0), n_m, tl.cdiv(N, BN + BX), GROUP)
    n_0 = i_n * (BN + BX)
    _i_b, m_0, o_i, o_b, o_t, m_m = rows_of(i, n_t, span, T, BM)
    b_y, b_2 = base_tile(
        i,
        n_0,
        x,
        w,
        w2,
        T,
        span,
        n_t,
        N,
        K,
        sxb,
        sxt,
        sxk,
        swn,
        swk,
        TMA,
        W_ROWS,
        EVEN_K,
        PRECISION,
        BM,
        BN,
        BX,
        BK,
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    for e in tl.range(0, E, num_stages=1):
        if TMA:
            b_d, b_d2 = base_tile(
                i,
                e * N + n_0,
                x,
                delta,
                delta2,
                T,
                span,
                n_t,
                N,
                K,
                sxb,
                sxt,
                sxk,
                swd,
                1,
                TMA,
                True,
                EVEN_K,
                PRECISION,
                BM,
                BN,
                BX,
                BK,
            )
        else:
            p_e = delta + tl.cast(e, tl.int64) * N * swd
            b_d, b_d2 = base_tile(
                i,
                n_0,
                x,
                p_e,
                p_e,
                T,
                span,
                n_t,
                N,
                K,
                sxb,
                sxt,
                sxk,
                swd,
                1,
                TMA,
                True,
                EVEN_K,
                PRECISION,
                BM,
                BN,
                BX,
                BK,
            )
        b_g = tl.full((BM,), 1.0, tl.float32)
        if GATE:
            b_g = b_g * tl.load(gate + o_b * sgb + o_t * sgt + e * sge, mask=m_m, other=0.0).to(tl.float32)
        if TOKEN:
            b_g = b_g * tl.load(token_gate + m_0 * E + o_i * E + e, mask=m_m, other=0.0)
        b_y += b_g[:, None] * b_d
        if BX:
            b_2 += b_g[:, None] * b_d2
    store_tile(b_y, n_0, m_0, o_i, m_m, bias, y, N, BIAS, BN)
    if BX:
        store_tile(b_2, n_0 + BN, m_0, o_i, m_m, bias, y, N, BIAS, BX)
