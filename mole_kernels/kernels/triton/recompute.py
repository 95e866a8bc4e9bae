"""One launch without a hand-over: every output tile makes the h of its own rows beside its base product.

Costs R/BN of the base product more than the others, so it is for small R on small layers. h stays in
registers; where it is to be
saved, the first column tile writes it. A sample gate needs all rows of a sample, so there is none here.
"""

# a compile-time condition stays a statement of its own: the compiler drops what it excludes
# ruff: noqa: SIM102
import triton
import triton.language as tl

from mole_kernels.kernels.triton.base import tile_order
from mole_kernels.kernels.triton.common import COUNTS, column_gates, rows_of, set_of, token_gates


@triton.jit(do_not_specialize=COUNTS)
def recompute_kernel(
    x,
    w,
    down,
    up,
    token_weight,
    token_bias,
    bias,
    cols,
    scale,
    gate,
    assignment,
    h,
    token_gate,
    y,
    T,
    span,
    n_t,
    n_m,
    M,
    N,
    K,
    R,
    E,
    top_k,
    sxb,
    sxt,
    sxk,
    swn,
    swk,
    sds,
    sdr,
    sdk,
    sus,
    sun,
    sur,
    spe,
    spk,
    sgb,
    sgt,
    sge,
    ASSIGN: tl.constexpr,
    TOKEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    PHI_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    EP: tl.constexpr,
):
    """grid (tiles,); BR holds all R columns."""
    i, i_n = tile_order(tl.program_id(0), n_m, tl.cdiv(N, BN), GROUP)
    i_b, m_0, o_i, o_b, o_t, m_m = rows_of(i, n_t, span, T, BM)
    o_j, o_k, o_r, o_e = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BR), tl.arange(0, EP)
    i_s, R_s = set_of(i_b, R, assignment, ASSIGN)
    m_n, m_r, m_e, m_d = i_n * BN + o_j < N, o_r < R, o_e < E, o_r < R_s
    p_d = down + i_s * sds + (o_r[None, :] * sdr + o_k[:, None] * sdk)
    p_p = token_weight + (o_e[None, :] * spe + o_k[:, None] * spk)
    if not TMA:
        p_x = x + (o_b * sxb + o_t * sxt)[:, None] + o_k[None, :] * sxk
        p_w = w + tl.cast(i_n * BN, tl.int64) * swn + (o_j[None, :] * swn + o_k[:, None] * swk)
    b_y = tl.zeros((BM, BN), tl.float32)
    b_h = tl.zeros((BM, BR), tl.float32)
    b_l = tl.zeros((BM, EP), tl.float32)
    for k in range(0, K, BK):
        m_k = (k + o_k < K) | EVEN_K
        if TMA:
            b_x = x.load([i_b * span + (i % n_t) * BM, k])
            if W_ROWS:
                b_w = w.load([i_n * BN, k]).T
            else:
                b_w = w.load([k, i_n * BN])
        else:
            b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
            p_x += BK * sxk
            p_w += BK * swk
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
        b_h = tl.dot(
            b_x, tl.load(p_d, mask=m_k[:, None] & m_d[None, :], other=0.0), b_h, input_precision=PRECISION
        )
        p_d += BK * sdk
        if TOKEN:
            b_l = tl.dot(
                b_x, tl.load(p_p, mask=m_k[:, None] & m_e[None, :], other=0.0), b_l, input_precision=PRECISION
            )
            p_p += BK * spk
    if ASSIGN:
        # a sample without a set: 0 whatever x holds
        b_h = tl.where(R_s > 0, b_h, 0.0)
    m_mr = m_m[:, None] & m_r[None, :]
    if SAVE:
        if i_n == 0:
            tl.store(h + m_0 * R + (o_i[:, None] * R + o_r[None, :]), b_h.to(h.dtype.element_ty), mask=m_mr)
    if TOKEN:
        if PHI_BIAS:
            b_l += tl.load(token_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
        b_l = token_gates(b_l, o_e, m_e, E, top_k, SOFTMAX)
        if i_n == 0:
            tl.store(
                token_gate + m_0 * E + (o_i[:, None] * E + o_e[None, :]),
                b_l,
                mask=m_m[:, None] & m_e[None, :],
            )
    o_c = tl.load(cols + o_r, mask=m_r, other=-1)
    b_g = column_gates(
        b_l, o_c, 0, R, o_b, o_t, m_m, cols, scale, gate, sgb, sgt, sge, GATE, TOKEN, BM, BR, EP
    )
    p_u = up + i_s * sus + tl.cast(i_n * BN, tl.int64) * sun + (o_j[None, :] * sun + o_r[:, None] * sur)
    b_u = tl.load(p_u, mask=m_d[:, None] & m_n[None, :], other=0.0)
    b_z = tl.where(m_d[None, :], b_h * b_g, 0.0) if ASSIGN else b_h * b_g
    b_y = tl.dot(b_z.to(b_u.dtype), b_u, b_y, input_precision=PRECISION)
    if BIAS:
        b_y += tl.load(bias + i_n * BN + o_j, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + m_0 * N + i_n * BN + (o_i[:, None] * N + o_j[None, :])
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
