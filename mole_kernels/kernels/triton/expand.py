"""The wide half: y = x·Wᵀ + z·Bᵀ + b in one accumulator, over K and then over R; with the roles swapped, dX =
dY·W + dh·A + dlogit·Φ.

The sample gate enters here, where z is read: forward z ⊙ G, backward z + dq·p/T (every token of a sample gets
the same vector).
"""

import triton
import triton.language as tl

from mole_kernels.kernels.triton.base import base_tile, tile_order
from mole_kernels.kernels.triton.common import COUNTS, logit_gradient, rows_of, set_of


@triton.jit
def expand_tile(
    b_y,
    i,
    n_0,
    z,
    up,
    token_weight,
    bias,
    cols,
    scale,
    gate,
    sample_weight,
    assignment,
    q,
    token_gate,
    sample_gate,
    d,
    y,
    T,
    span,
    n_t,
    n_r,
    M,
    N,
    R,
    E,
    sus,
    sun,
    sur,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BZ: tl.constexpr,
    EP: tl.constexpr,
):
    """Add the low-rank part and the bias to the base tile at column n_0 and store it.  q [B,E]: G forward, dq
    backward; y [M,N]
    """
    i_b, m_0, o_i, o_b, o_t, m_m = rows_of(i, n_t, span, T, BM)
    o_j = tl.arange(0, BN)
    o_n = n_0 + o_j
    m_n = o_n < N
    # a sample without a set of experts has no columns: the base, to the bit
    i_s, R_s = set_of(i_b, R, assignment, ASSIGN)
    for r in range(0, R_s, BZ):
        o_r = r + tl.arange(0, BZ)
        m_r = o_r < R
        p_u = up + i_s * sus + tl.cast(n_0, tl.int64) * sun + (o_j[None, :] * sun + o_r[:, None] * sur)
        b_u = tl.load(p_u, mask=m_r[:, None] & m_n[None, :], other=0.0)
        # past the first-level cache: another program wrote z, maybe a moment ago
        b_z = tl.load(
            z + m_0 * R + (o_i[:, None] * R + o_r[None, :]),
            mask=m_m[:, None] & m_r[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        if POOL:
            o_c = tl.load(cols + o_r, mask=m_r, other=0)
            b_q = tl.load(q + i_b * E + o_c, mask=m_r, other=0.0, cache_modifier=".cg")
            if BACKWARD:
                b_c = b_q * tl.load(sample_weight + i_s * sps + o_r, mask=m_r, other=0.0).to(tl.float32) / T
                b_z = (b_z + b_c[None, :]).to(up.dtype.element_ty)
            else:
                b_z = (b_z * b_q[None, :]).to(up.dtype.element_ty)
        b_y = tl.dot(b_z, b_u, b_y, input_precision=PRECISION)
    if BACKWARD and TOKEN:
        o_e = tl.arange(0, EP)
        m_e = o_e < E
        b_t = logit_gradient(
            o_e,
            m_e,
            m_0,
            o_i,
            o_b,
            o_t,
            m_m,
            d,
            token_gate,
            sample_gate,
            scale,
            gate,
            sgb,
            sgt,
            sge,
            M,
            E,
            n_r,
            SOFTMAX,
            GATE,
            POOL,
            BM,
            EP,
        )
        p_p = token_weight + (o_e[:, None] * spe + o_n[None, :] * spk)
        b_p = tl.load(p_p, mask=m_e[:, None] & m_n[None, :], other=0.0)
        b_y = tl.dot(b_t.to(b_p.dtype), b_p, b_y, input_precision=PRECISION)
    if BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + m_0 * N + n_0 + (o_i[:, None] * N + o_j[None, :])
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=COUNTS)
def expand_kernel(
    x,
    w,
    w2,
    z,
    up,
    token_weight,
    bias,
    cols,
    scale,
    gate,
    sample_weight,
    assignment,
    q,
    token_gate,
    sample_gate,
    d,
    y,
    T,
    span,
    n_t,
    n_m,
    n_r,
    M,
    N,
    K,
    R,
    E,
    sxb,
    sxt,
    sxk,
    swn,
    swk,
    sus,
    sun,
    sur,
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
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
    BZ: tl.constexpr,
    EP: tl.constexpr,
):
    """One output tile a program: base over K, then the low-rank part that `shrink_kernel` left in z.  grid
    (tiles,)

    ADD: the base is in y already (a library's product, or a quantised layer's); only the low-rank part is
    added (BX is 0).
    """
    i, i_n = tile_order(tl.program_id(0), n_m, tl.cdiv(N, BN + BX), GROUP)
    n_0 = i_n * (BN + BX)
    if ADD:
        _i_b, m_0, o_i, _o_b, _o_t, m_m = rows_of(i, n_t, span, T, BM)
        o_j = tl.arange(0, BN)
        p_y = y + m_0 * N + n_0 + (o_i[:, None] * N + o_j[None, :])
        b_y = tl.load(p_y, mask=m_m[:, None] & (n_0 + o_j < N)[None, :], other=0.0).to(tl.float32)
    else:
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
    expand_tile(
        b_y,
        i,
        n_0,
        z,
        up,
        token_weight,
        bias,
        cols,
        scale,
        gate,
        sample_weight,
        assignment,
        q,
        token_gate,
        sample_gate,
        d,
        y,
        T,
        span,
        n_t,
        n_r,
        M,
        N,
        R,
        E,
        sus,
        sun,
        sur,
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
        PRECISION,
        BM,
        BN,
        BZ,
        EP,
    )
    if BX:
        expand_tile(
            b_2,
            i,
            n_0 + BN,
            z,
            up,
            token_weight,
            bias,
            cols,
            scale,
            gate,
            sample_weight,
            assignment,
            q,
            token_gate,
            sample_gate,
            d,
            y,
            T,
            span,
            n_t,
            n_r,
            M,
            N,
            R,
            E,
            sus,
            sun,
            sur,
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
            PRECISION,
            BM,
            BX,
            BZ,
            EP,
        )
