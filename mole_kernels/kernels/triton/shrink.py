"""The low-rank half: h = x·Aᵀ with its gates applied, or, with the roles swapped, V = dY·B and what the
gates' gradients need.

Forward tile:   h → (saved), l = sigmoid(x·Φᵀ + φ) → token_gate, z = s·gate·l·h, and its part of the sample
gate's logit.
Backward tile:  V → D_e = Σ_{r∈e} V·h (one part for every column tile), z = γ·V, and its part of dq_e = Σ_t
γ(1−G)·D.

The sample gate needs all tiles of a sample: the last one to arrive adds the parts up, in order, and writes G
(or dq).
"""

import triton
import triton.language as tl

from mole_kernels.kernels.triton.common import COUNTS, column_gates, given_gate, rows_of, set_of, token_gates


@triton.jit
def shrink_tile(
    i,
    i_r,
    x,
    down,
    token_weight,
    token_bias,
    cols,
    scale,
    gate,
    sample_weight,
    assignment,
    sample_gate,
    h,
    z,
    token_gate,
    d,
    parts,
    T,
    span,
    n_t,
    n_r,
    M,
    K,
    R,
    E,
    top_k,
    sxb,
    sxt,
    sxk,
    sds,
    sdr,
    sdk,
    spe,
    spk,
    sgb,
    sgt,
    sge,
    sps,
    BACKWARD: tl.constexpr,
    ASSIGN: tl.constexpr,
    TOKEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    STORE_Z: tl.constexpr,
    NEED_D: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    EP: tl.constexpr,
):
    """One [BM,BR] tile of h (or V) and all that follows from it."""
    i_b, m_0, o_i, o_b, o_t, m_m = rows_of(i, n_t, span, T, BM)
    r_0 = i_r * BR
    o_r, o_k, o_e = r_0 + tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, EP)
    i_s, R_s = set_of(i_b, R, assignment, ASSIGN)
    m_r, m_e, m_d = o_r < R, o_e < E, o_r < R_s
    p_d = (
        down
        + i_s * sds
        + tl.cast(r_0, tl.int64) * sdr
        + (tl.arange(0, BR)[None, :] * sdr + o_k[:, None] * sdk)
    )
    p_p = token_weight + (o_e[None, :] * spe + o_k[:, None] * spk)
    if not TMA:
        p_x = x + (o_b * sxb + o_t * sxt)[:, None] + o_k[None, :] * sxk
    b_h = tl.zeros((BM, BR), tl.float32)
    b_l = tl.zeros((BM, EP), tl.float32)
    for k in range(0, K, BK):
        m_k = (k + o_k < K) | EVEN_K
        if TMA:
            b_x = x.load([i_b * span + (i % n_t) * BM, k])
        else:
            b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
            p_x += BK * sxk
        b_h = tl.dot(
            b_x, tl.load(p_d, mask=m_k[:, None] & m_d[None, :], other=0.0), b_h, input_precision=PRECISION
        )
        p_d += BK * sdk
        if TOKEN and not BACKWARD:
            b_l = tl.dot(
                b_x, tl.load(p_p, mask=m_k[:, None] & m_e[None, :], other=0.0), b_l, input_precision=PRECISION
            )
            p_p += BK * spk
    if TMA:
        # rows of the next sample, which the descriptor does not know to leave out
        b_h = tl.where(m_m[:, None], b_h, 0.0)
    if ASSIGN:
        # a sample without a set: 0 whatever x holds
        b_h = tl.where(R_s > 0, b_h, 0.0)

    o_mr = o_i[:, None] * R + o_r[None, :]
    m_mr = m_m[:, None] & m_r[None, :]
    o_me = o_i[:, None] * E + o_e[None, :]
    h, z, token_gate = h + m_0 * R, z + m_0 * R, token_gate + m_0 * E
    m_me = m_m[:, None] & m_e[None, :]
    o_c = tl.load(cols + o_r, mask=m_r, other=-1)
    b_g = tl.zeros((BM, BR), tl.float32)
    if BACKWARD:
        if NEED_D:
            b_vh = b_h * tl.load(h + o_mr, mask=m_mr, other=0.0).to(tl.float32)
            for e in tl.range(0, E, num_stages=1):
                b_d = tl.sum(tl.where(o_c[None, :] == e, b_vh, 0.0), 1)
                tl.store(d + (tl.cast(i_r, tl.int64) * M + m_0) * E + o_i * E + e, b_d, mask=m_m)
                if POOL:
                    b_q = given_gate(e, o_b, o_t, m_m, scale, gate, sgb, sgt, sge, GATE) * b_d
                    if TOKEN:
                        b_q = b_q * tl.load(token_gate + o_i * E + e, mask=m_m, other=0.0)
                    # rows of a tile are of one sample here
                    b_s = tl.load(sample_gate + i_b * E + e)
                    tl.store(
                        parts + (i * n_r + i_r) * E + e, tl.sum(tl.where(m_m, b_q, 0.0)) * b_s * (1.0 - b_s)
                    )
        if STORE_Z:
            for e in tl.range(
                tl.load(cols + r_0), tl.load(cols + tl.minimum(r_0 + BR, R) - 1) + 1, num_stages=1
            ):
                b_ge = given_gate(e, o_b, o_t, m_m, scale, gate, sgb, sgt, sge, GATE) + tl.zeros(
                    (BM,), tl.float32
                )
                if TOKEN:
                    b_ge = b_ge * tl.load(token_gate + o_i * E + e, mask=m_m, other=0.0)
                if POOL:
                    b_ge = b_ge * tl.load(sample_gate + i_b * E + e)
                b_g = tl.where(o_c[None, :] == e, b_ge[:, None], b_g)
    else:
        if SAVE:
            tl.store(h + o_mr, b_h.to(h.dtype.element_ty), mask=m_mr)
        if TOKEN:
            if BIAS:
                b_l += tl.load(token_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
            b_l = token_gates(b_l, o_e, m_e, E, top_k, SOFTMAX)
            if i_r == 0:
                tl.store(token_gate + o_me, b_l, mask=m_me)
        if POOL:
            b_p = tl.load(sample_weight + i_s * sps + o_r, mask=m_d, other=0.0).to(tl.float32)
            b_q = tl.where(o_c[None, :] == o_e[:, None], (tl.sum(b_h, 0) * b_p)[None, :], 0.0)
            tl.store(parts + (i * n_r + i_r) * E + o_e, tl.sum(b_q, 1), mask=m_e)
        b_g = column_gates(
            b_l, o_c, r_0, R, o_b, o_t, m_m, cols, scale, gate, sgb, sgt, sge, GATE, TOKEN, BM, BR, EP
        )
    if STORE_Z:
        tl.store(z + o_mr, (b_h * b_g).to(z.dtype.element_ty), mask=m_mr)


@triton.jit
def finish_sample(
    i_b,
    parts,
    arrived,
    sample_bias,
    out,
    n_parts,
    T,
    E,
    BACKWARD: tl.constexpr,
    BIAS: tl.constexpr,
    EP: tl.constexpr,
    BP: tl.constexpr,
):
    """Count this tile in; the last one of the sample writes G = sigmoid(Σ parts / T + c), or dq = Σ parts.
    -> was it the last

    parts [B, n_parts, E], arrived [B] int32 (left at 0), out [B,E]
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived + i_b, 1, sem="acq_rel") == n_parts - 1
    if is_last:
        o_e = tl.arange(0, EP)
        b_q = tl.zeros((EP,), tl.float32)
        for j in range(0, n_parts, BP):
            o_j = j + tl.arange(0, BP)
            p_q = parts + (i_b * n_parts + o_j)[:, None] * E + o_e[None, :]
            b_q += tl.sum(
                tl.load(
                    p_q, mask=(o_j < n_parts)[:, None] & (o_e < E)[None, :], other=0.0, cache_modifier=".cg"
                ),
                0,
            )
        if not BACKWARD:
            b_q = b_q / T
            if BIAS:
                b_q += tl.load(sample_bias + o_e, mask=o_e < E, other=0.0).to(tl.float32)
            b_q = tl.sigmoid(b_q)
        tl.store(out + i_b * E + o_e, b_q, mask=o_e < E)
        tl.store(arrived + i_b, 0)
    return is_last


@triton.jit(do_not_specialize=COUNTS)
def shrink_kernel(
    x,
    down,
    token_weight,
    token_bias,
    cols,
    scale,
    gate,
    sample_weight,
    sample_bias,
    assignment,
    sample_gate,
    h,
    z,
    token_gate,
    d,
    parts,
    q,
    arrived,
    T,
    span,
    n_t,
    n_r,
    M,
    K,
    R,
    E,
    top_k,
    sxb,
    sxt,
    sxk,
    sds,
    sdr,
    sdk,
    spe,
    spk,
    sgb,
    sgt,
    sge,
    sps,
    BACKWARD: tl.constexpr,
    ASSIGN: tl.constexpr,
    TOKEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    BIAS: tl.constexpr,
    POOL_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    STORE_Z: tl.constexpr,
    NEED_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    EP: tl.constexpr,
):
    """Every tile of `shrink_tile` as a kernel of its own.  grid (row tiles, column tiles)"""
    i, i_r = tl.program_id(0), tl.program_id(1)
    if PDL:
        # the product that follows may start: it waits for this kernel's end before it reads z
        tl.extra.cuda.gdc_launch_dependents()
    shrink_tile(
        i,
        i_r,
        x,
        down,
        token_weight,
        token_bias,
        cols,
        scale,
        gate,
        sample_weight,
        assignment,
        sample_gate,
        h,
        z,
        token_gate,
        d,
        parts,
        T,
        span,
        n_t,
        n_r,
        M,
        K,
        R,
        E,
        top_k,
        sxb,
        sxt,
        sxk,
        sds,
        sdr,
        sdk,
        spe,
        spk,
        sgb,
        sgt,
        sge,
        sps,
        BACKWARD,
        ASSIGN,
        TOKEN,
        SOFTMAX,
        GATE,
        POOL,
        BIAS,
        SAVE,
        STORE_Z,
        NEED_D,
        False,
        EVEN_K,
        PRECISION,
        BM,
        BR,
        BK,
        EP,
    )
    if POOL:
        finish_sample(i // n_t, parts, arrived, sample_bias, q, n_t * n_r, T, E, BACKWARD, POOL_BIAS, EP, 64)
