"""The gradients of gates and scales as jobs of one launch: dΦ = dlogitᵀx, dφ, ds, dc, dp and dgate."""

# a compile-time condition stays a statement of its own: the compiler drops what it excludes
import triton
import triton.language as tl

from mole_kernels.kernels.triton.common import given_gates, logit_gradient
from mole_kernels.kernels.triton.jobs import job_of, rows_at, settle


@triton.jit
def token_weight_job(
    job,
    n_tiles,
    x,
    d,
    token_gate,
    sample_gate,
    scale,
    gate,
    dtoken_weight,
    partial,
    counters,
    T,
    span,
    CH,
    n_c,
    n_g,
    n_r,
    M,
    K,
    E,
    sxb,
    sxt,
    sxk,
    sgb,
    sgt,
    sge,
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    EP: tl.constexpr,
):
    """An [EP,BC] tile of dΦ = dlogitᵀx.  dtoken_weight [E,K]"""
    tile, slot, slots, i_g, i_c = job_of(job, n_tiles, n_c, n_g, 1, False)
    o_e, o_k = tl.arange(0, EP), tile * BC + tl.arange(0, BC)
    m_e, m_k = o_e < E, o_k < K
    end = tl.minimum(span, (i_c + 1) * CH)
    b_s = tl.zeros((EP, BC), tl.float32)
    for t in range(i_c * CH, end, BT):
        m_0, o_i, o_b, o_t, m_m = rows_at(i_g, t, end, span, T, BT)
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
            BT,
            EP,
        )
        p_x = x + (o_b * sxb + o_t * sxt)[:, None] + o_k[None, :] * sxk
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_s = tl.dot(tl.trans(b_t.to(b_x.dtype)), b_x, b_s, input_precision=PRECISION)
    p_slot = (
        partial + tl.cast(tile, tl.int64) * slots * EP * BC + o_e[:, None] * BC + tl.arange(0, BC)[None, :]
    )
    b_s, is_last = settle(b_s, p_slot, EP * BC, slot, slots, counters + tile)
    if is_last:
        tl.store(
            dtoken_weight + o_e[:, None] * K + o_k[None, :],
            b_s.to(dtoken_weight.dtype.element_ty),
            mask=m_e[:, None] & m_k[None, :],
        )


@triton.jit
def gate_terms(
    m_0,
    o_i,
    o_b,
    o_e,
    m_me,
    d,
    token_gate,
    sample_gate,
    M,
    E,
    n_r,
    TOKEN: tl.constexpr,
    POOL: tl.constexpr,
    BT: tl.constexpr,
    EP: tl.constexpr,
):
    """l·G·D of one step's rows -> [BT,EP], 0 outside."""
    o_me = o_i[:, None] * E + o_e[None, :]
    b_d = tl.zeros((BT, EP), tl.float32)
    for j in range(n_r):
        b_d += tl.load(d + (tl.cast(j, tl.int64) * M + m_0) * E + o_me, mask=m_me, other=0.0)
    if TOKEN:
        b_d = b_d * tl.load(token_gate + m_0 * E + o_me, mask=m_me, other=0.0)
    if POOL:
        b_d = b_d * tl.load(sample_gate + o_b[:, None] * E + o_e[None, :], mask=m_me, other=0.0)
    return b_d


@triton.jit
def gate_job(
    job,
    d,
    token_gate,
    sample_gate,
    scale,
    gate,
    q,
    dtoken_bias,
    dscale,
    dsample_bias,
    partial,
    counters,
    T,
    span,
    CH,
    n_c,
    n_g,
    n_r,
    B,
    M,
    E,
    sgb,
    sgt,
    sge,
    TOKEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    BT: tl.constexpr,
    EP: tl.constexpr,
):
    """dφ = Σ dlogit, ds = Σ gate·l·G·D, dc = Σ_b dq: E numbers each.  Two slots of EP numbers a job."""
    _, slot, slots, i_g, i_c = job_of(job, 1, n_c, n_g, 1, False)
    o_e = tl.arange(0, EP)
    m_e = o_e < E
    end = tl.minimum(span, (i_c + 1) * CH)
    b_f, b_s = tl.zeros((EP,), tl.float32), tl.zeros((EP,), tl.float32)
    for t in range(i_c * CH, end, BT):
        m_0, o_i, o_b, o_t, m_m = rows_at(i_g, t, end, span, T, BT)
        m_me = m_m[:, None] & m_e[None, :]
        if TOKEN:
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
                BT,
                EP,
            )
            b_f += tl.sum(b_t, 0)
        b_d = gate_terms(m_0, o_i, o_b, o_e, m_me, d, token_gate, sample_gate, M, E, n_r, TOKEN, POOL, BT, EP)
        b_s += tl.sum(b_d * given_gates(o_e, m_e, o_b, o_t, m_m, scale, gate, sgb, sgt, sge, GATE, False), 0)
    # both sums side by side, so that one arrival settles both
    o_2 = tl.arange(0, 2)[:, None] * EP + o_e[None, :]
    b_2 = tl.where(tl.arange(0, 2)[:, None] == 0, b_f[None, :], b_s[None, :])
    b_2, is_last = settle(b_2, partial + o_2, 2 * EP, slot, slots, counters)
    if is_last:
        if TOKEN:
            tl.store(
                dtoken_bias + o_e, tl.sum(tl.where(tl.arange(0, 2)[:, None] == 0, b_2, 0.0), 0), mask=m_e
            )
        tl.store(dscale + o_e, tl.sum(tl.where(tl.arange(0, 2)[:, None] == 1, b_2, 0.0), 0), mask=m_e)
        if POOL:
            b_q = tl.zeros((EP,), tl.float32)
            for i_b in range(B):
                b_q += tl.load(q + i_b * E + o_e, mask=m_e, other=0.0)
            tl.store(dsample_bias + o_e, b_q, mask=m_e)


@triton.jit
def given_job(
    job,
    n_given,
    n_c,
    d,
    token_gate,
    sample_gate,
    scale,
    dgate,
    partial,
    counters,
    T,
    CG,
    n_r,
    B,
    M,
    E,
    TOKEN: tl.constexpr,
    POOL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BT: tl.constexpr,
    EP: tl.constexpr,
):
    """dgate = s·l·G·D, summed over what the gate is the same for.  dgate [n_given, T or 1, E], n_given 1 or B

    A job is one of the gate's samples (1: it goes through all of the batch) and one of n_c chunks of CG
    tokens.
    """
    i_b, i_c = job // n_c, job % n_c
    o_e, o_i = tl.arange(0, EP), tl.arange(0, BT)
    m_e = o_e < E
    b_sc = tl.load(scale + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_t = tl.zeros((BT, EP), tl.float32)
    end = tl.minimum(T, (i_c + 1) * CG)
    for b in range(i_b, tl.where(n_given == 1, B, i_b + 1)):
        # BY_TOKEN: CG is BT, one step
        for t in range(i_c * CG, end, BT):
            m_me = (t + o_i < end)[:, None] & m_e[None, :]
            o_b = tl.full((BT,), 0, tl.int64) + b
            b_t += gate_terms(
                tl.cast(b, tl.int64) * T + t,
                o_i,
                o_b,
                o_e,
                m_me,
                d,
                token_gate,
                sample_gate,
                M,
                E,
                n_r,
                TOKEN,
                POOL,
                BT,
                EP,
            )
    b_t = b_t * b_sc[None, :]
    if BY_TOKEN:
        o_t = i_c * CG + o_i
        p_g = dgate + (tl.cast(i_b, tl.int64) * T + o_t)[:, None] * E + o_e[None, :]
        tl.store(p_g, b_t.to(dgate.dtype.element_ty), mask=(o_t < end)[:, None] & m_e[None, :])
    else:
        b_s, is_last = settle(
            tl.sum(b_t, 0), partial + tl.cast(i_b, tl.int64) * n_c * EP + o_e, EP, i_c, n_c, counters + i_b
        )
        if is_last:
            tl.store(dgate + i_b * E + o_e, b_s.to(dgate.dtype.element_ty), mask=m_e)


@triton.jit
def sample_weight_job(
    job,
    n_tiles,
    h,
    cols,
    assignment,
    q,
    dsample_weight,
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
    E,
    S_MANY: tl.constexpr,
    ASSIGN: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """dp_r = Σ_b dq_e[b]·mean_t h[b,t,r].  dsample_weight [S,R] float32"""
    tile, slot, slots, i_g, i_c = job_of(job, n_tiles, n_c, n_g, S, S_MANY)
    n_r = tl.cdiv(R, BR)
    o_r = (tile % n_r) * BR + tl.arange(0, BR)
    m_r = o_r < R
    o_c = tl.load(cols + o_r, mask=m_r, other=0)
    # the one group, or with an assignment every sample
    first, past = i_g, i_g + 1
    if ASSIGN:
        first, past = 0, B
    b_p = tl.zeros((BR,), tl.float32)
    for i_b in range(first, past):
        end = tl.minimum(span, (i_c + 1) * CH)
        if ASSIGN:
            end = tl.where(tl.load(assignment + i_b) == tile // n_r, end, 0)
        b_s = tl.zeros((BR,), tl.float32)
        for t in range(i_c * CH, end, BT):
            m_0, o_i, _, _, m_m = rows_at(i_b, t, end, span, T, BT)
            b_h = tl.load(
                h + m_0 * R + o_i[:, None] * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0
            )
            b_s += tl.sum(b_h.to(tl.float32), 0)
        b_p += b_s * tl.load(q + i_b * E + o_c, mask=m_r, other=0.0) / T
    p_slot = partial + tl.cast(tile, tl.int64) * slots * BR + tl.arange(0, BR)
    b_p, is_last = settle(b_p, p_slot, BR, slot, slots, counters + tile)
    if is_last:
        tl.store(dsample_weight + (tile // n_r) * R + o_r, b_p, mask=m_r)
