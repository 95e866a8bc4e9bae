"""The gradients of the experts: dA = dhᵀx and dB = dYᵀ(γ ⊙ h), as jobs of the gradients' launch."""

# a compile-time condition stays a statement of its own: the compiler drops what it excludes
import triton
import triton.language as tl

from mole_kernels.kernels.triton.common import set_of
from mole_kernels.kernels.triton.jobs import job_of, rows_at, settle


@triton.jit
def down_sum(
    b_s,
    i_g,
    i_c,
    o_r,
    o_k,
    x,
    z,
    cols,
    sample_weight,
    q,
    assignment,
    T,
    span,
    CH,
    R,
    K,
    E,
    sxb,
    sxt,
    sxk,
    sps,
    ASSIGN: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """b_s [BR,BC] + dhᵀx over chunk i_c of group i_g, dh = z (+ dq·p/T)."""
    m_r, m_k = o_r < R, o_k < K
    b_c = tl.zeros((BR,), tl.float32)
    if POOL:
        i_s, _ = set_of(i_g, R, assignment, ASSIGN)
        o_c = tl.load(cols + o_r, mask=m_r, other=0)
        b_p = tl.load(sample_weight + i_s * sps + o_r, mask=m_r, other=0.0).to(tl.float32)
        b_c = tl.load(q + i_g * E + o_c, mask=m_r, other=0.0) * b_p / T
    end = tl.minimum(span, (i_c + 1) * CH)
    for t in range(i_c * CH, end, BT):
        m_0, o_i, o_b, o_t, m_m = rows_at(i_g, t, end, span, T, BT)
        b_z = tl.load(
            z + m_0 * R + o_i[:, None] * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0
        )
        if POOL:
            b_z = b_z + b_c[None, :]
        p_x = x + (o_b * sxb + o_t * sxt)[:, None] + o_k[None, :] * sxk
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_s = tl.dot(tl.trans(b_z.to(b_x.dtype)), b_x, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def down_job(
    job,
    n_tiles,
    x,
    z,
    cols,
    sample_weight,
    assignment,
    q,
    ddown,
    partial,
    counters,
    T,
    span,
    CH,
    n_c,
    n_g,
    B,
    S,
    R,
    K,
    E,
    sxb,
    sxt,
    sxk,
    sps,
    S_MANY: tl.constexpr,
    ASSIGN: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """A [BR,BC] tile of dA = dhᵀx.  ddown [S,R,K]"""
    tile, slot, slots, i_g, i_c = job_of(job, n_tiles, n_c, n_g, S, S_MANY)
    n_k = tl.cdiv(K, BC)
    i_s = tile // (n_k * tl.cdiv(R, BR))
    o_r = (tile // n_k) % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
    o_k = (tile % n_k) * BC + tl.arange(0, BC)
    b_s = tl.zeros((BR, BC), tl.float32)
    if ASSIGN:
        for i_b in range(B):
            if tl.load(assignment + i_b) == i_s:
                b_s = down_sum(
                    b_s,
                    i_b,
                    i_c,
                    o_r,
                    o_k,
                    x,
                    z,
                    cols,
                    sample_weight,
                    q,
                    assignment,
                    T,
                    span,
                    CH,
                    R,
                    K,
                    E,
                    sxb,
                    sxt,
                    sxk,
                    sps,
                    ASSIGN,
                    POOL,
                    PRECISION,
                    BT,
                    BR,
                )
    else:
        b_s = down_sum(
            b_s,
            i_g,
            i_c,
            o_r,
            o_k,
            x,
            z,
            cols,
            sample_weight,
            q,
            assignment,
            T,
            span,
            CH,
            R,
            K,
            E,
            sxb,
            sxt,
            sxk,
            sps,
            ASSIGN,
            POOL,
            PRECISION,
            BT,
            BR,
        )
    o_s = tl.arange(0, BR)[:, None] * BC + tl.arange(0, BC)[None, :]
    p_slot = partial + tl.cast(tile, tl.int64) * slots * BR * BC + o_s
    b_s, is_last = settle(b_s, p_slot, BR * BC, slot, slots, counters + tile)
    if is_last:
        p_d = ddown + (tl.cast(i_s, tl.int64) * R + o_r)[:, None] * K + o_k[None, :]
        tl.store(p_d, b_s.to(ddown.dtype.element_ty), mask=(o_r < R)[:, None] & (o_k < K)[None, :])


@triton.jit
def up_sum(
    b_s,
    i_g,
    i_c,
    o_r,
    o_n,
    dy,
    h,
    cols,
    scale,
    gate,
    token_gate,
    sample_gate,
    T,
    span,
    CH,
    R,
    N,
    E,
    syb,
    syt,
    syn,
    sgb,
    sgt,
    sge,
    TOKEN: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
):
    """b_s [BC,BR] + dYᵀ(γ ⊙ h) over chunk i_c of group i_g."""
    m_r, m_n = o_r < R, o_n < N
    o_c = tl.load(cols + o_r, mask=m_r, other=0)
    b_sc = tl.load(scale + o_c, mask=m_r, other=0.0).to(tl.float32)
    end = tl.minimum(span, (i_c + 1) * CH)
    for t in range(i_c * CH, end, BT):
        m_0, o_i, o_b, o_t, m_m = rows_at(i_g, t, end, span, T, BT)
        m_mr = m_m[:, None] & m_r[None, :]
        b_z = (
            tl.load(h + m_0 * R + o_i[:, None] * R + o_r[None, :], mask=m_mr, other=0.0).to(tl.float32)
            * b_sc[None, :]
        )
        if GATE:
            p_g = gate + (o_b * sgb + o_t * sgt)[:, None] + o_c[None, :] * sge
            b_z = b_z * tl.load(p_g, mask=m_mr, other=0.0).to(tl.float32)
        if TOKEN:
            b_z = b_z * tl.load(token_gate + m_0 * E + o_i[:, None] * E + o_c[None, :], mask=m_mr, other=0.0)
        if POOL:
            b_z = b_z * tl.load(sample_gate + o_b[:, None] * E + o_c[None, :], mask=m_mr, other=0.0)
        p_y = dy + (o_b * syb + o_t * syt)[:, None] + o_n[None, :] * syn
        b_y = tl.load(p_y, mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_s = tl.dot(tl.trans(b_y), b_z.to(b_y.dtype), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def up_job(
    job,
    n_tiles,
    dy,
    h,
    cols,
    scale,
    gate,
    assignment,
    token_gate,
    sample_gate,
    dup,
    partial,
    counters,
    T,
    span,
    CH,
    n_c,
    n_g,
    B,
    S,
    R,
    N,
    E,
    syb,
    syt,
    syn,
    sgb,
    sgt,
    sge,
    S_MANY: tl.constexpr,
    ASSIGN: tl.constexpr,
    TOKEN: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """A [BC,BR] tile of dB = dYᵀ(γ ⊙ h).  dup [S,N,R]"""
    tile, slot, slots, i_g, i_c = job_of(job, n_tiles, n_c, n_g, S, S_MANY)
    n_n = tl.cdiv(N, BC)
    i_s = tile // (n_n * tl.cdiv(R, BR))
    o_r = (tile // n_n) % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
    o_n = (tile % n_n) * BC + tl.arange(0, BC)
    b_s = tl.zeros((BC, BR), tl.float32)
    if ASSIGN:
        for i_b in range(B):
            if tl.load(assignment + i_b) == i_s:
                b_s = up_sum(
                    b_s,
                    i_b,
                    i_c,
                    o_r,
                    o_n,
                    dy,
                    h,
                    cols,
                    scale,
                    gate,
                    token_gate,
                    sample_gate,
                    T,
                    span,
                    CH,
                    R,
                    N,
                    E,
                    syb,
                    syt,
                    syn,
                    sgb,
                    sgt,
                    sge,
                    TOKEN,
                    GATE,
                    POOL,
                    PRECISION,
                    BT,
                )
    else:
        b_s = up_sum(
            b_s,
            i_g,
            i_c,
            o_r,
            o_n,
            dy,
            h,
            cols,
            scale,
            gate,
            token_gate,
            sample_gate,
            T,
            span,
            CH,
            R,
            N,
            E,
            syb,
            syt,
            syn,
            sgb,
            sgt,
            sge,
            TOKEN,
            GATE,
            POOL,
            PRECISION,
            BT,
        )
    o_s = tl.arange(0, BC)[:, None] * BR + tl.arange(0, BR)[None, :]
    p_slot = partial + tl.cast(tile, tl.int64) * slots * BR * BC + o_s
    b_s, is_last = settle(b_s, p_slot, BR * BC, slot, slots, counters + tile)
    if is_last:
        p_d = dup + (tl.cast(i_s, tl.int64) * N + o_n)[:, None] * R + o_r[None, :]
        tl.store(p_d, b_s.to(dup.dtype.element_ty), mask=(o_n < N)[:, None] & (o_r < R)[None, :])
