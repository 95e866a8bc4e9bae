"""Everything that is a sum over tokens, in one grouped launch: dA = dhᵀx, dΦ = dlogitᵀx, dB = dYᵀ(γ ⊙ h), dφ,
ds, dc, dp and dgate.

A job is one output tile over one chunk of the tokens. Its sum goes to a slot of its own, and the last job of
a tile to arrive adds
the slots up in the order of the tokens and stores the result in the output's dtype. So there is no fill
before, no cast after, no
atomic on a number: one launch, and two runs are bit-equal, whatever the order of the programs. Nobody waits
for anybody.

Chunks: a group (all tokens, or one sample) is cut into n_c chunks of CH tokens. Where each sample has its own
experts, an output
tile belongs to one sample and has n_c chunks; where they share one set, it has those of all groups. Where an
assignment names the
sets, a tile belongs to a set, and each of its n_c jobs goes through that chunk of every sample that took the
set, in order.
"""

# a compile-time condition stays a statement of its own: the compiler drops what it excludes
# ruff: noqa: SIM102
import triton
import triton.language as tl

from mole_kernels.kernels.triton.common import COUNTS, given_gates, logit_gradient, set_of

JOBS = [
    *COUNTS,
    "B",
    "S",
    "CH",
    "n_c",
    "n_g",
    "n_down",
    "n_up",
    "n_phi",
    "n_pool",
    "n_given",
    "n_given_c",
    "CG",
    "o_up",
    "o_phi",
    "o_gate",
    "o_pool",
    "o_given",
]


@triton.jit
def job_of(job, n_tiles, n_c, n_g, S, S_MANY: tl.constexpr):
    """job -> (tile, slot, slots, group, chunk); tiles run over the S sets first where there are many, and the
    group is the set.
    """
    tile, rest = job % n_tiles, job // n_tiles
    if S_MANY:
        i_g = tile // (n_tiles // S)
        slots = n_c
    else:
        i_g = rest // n_c
        slots = n_c * n_g
    return tile, rest, slots, i_g, rest % n_c


@triton.jit
def rows_at(i_g, t, end, span, T, BT: tl.constexpr):
    """Rows of one step -> first row m_0 int64, rows from there [BT], samples, tokens [BT] int64, mask
    [BT].
    """
    o_i = tl.arange(0, BT)
    o_m = i_g * span + t + o_i
    return (
        tl.cast(i_g, tl.int64) * span + t,
        o_i,
        (o_m // T).to(tl.int64),
        (o_m % T).to(tl.int64),
        t + o_i < end,
    )


@triton.jit
def settle(b_s, p_slot, size, slot, slots, counter):
    """Store this job's sum; -> the sum over all slots and True in the last job to arrive, else anything and
    False.

    p_slot: pointers of b_s's shape to slot 0 of the tile; the slots are `size` apart; the counter is left at
    0
    """
    is_last = slots == 1
    if slots > 1:
        tl.store(p_slot + tl.cast(slot, tl.int64) * size, b_s)
        tl.debug_barrier()
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == slots - 1
        if is_last:
            b_s = b_s * 0.0
            for j in range(slots):
                b_s += tl.load(p_slot + tl.cast(j, tl.int64) * size, cache_modifier=".cg")
            tl.store(counter, 0)
    return b_s, is_last


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


@triton.jit
def phi_job(
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
def pool_job(
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


@triton.jit(do_not_specialize=JOBS)
def gradients_kernel(
    dy,
    x,
    cols,
    scale,
    gate,
    sample_weight,
    assignment,
    h,
    z,
    token_gate,
    sample_gate,
    d,
    q,
    ddown,
    dup,
    dtoken_weight,
    dtoken_bias,
    dscale,
    dsample_weight,
    dsample_bias,
    dgate,
    partial,
    counters,
    n_down,
    n_up,
    n_phi,
    n_pool,
    n_given,
    n_given_c,
    CG,
    o_up,
    o_phi,
    o_gate,
    o_pool,
    o_given,
    B,
    T,
    span,
    CH,
    n_c,
    n_g,
    n_r,
    S,
    M,
    N,
    K,
    R,
    E,
    syb,
    syt,
    syn,
    sxb,
    sxt,
    sxk,
    sgb,
    sgt,
    sge,
    sps,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    PHI: tl.constexpr,
    GATES: tl.constexpr,
    DPOOL: tl.constexpr,
    GIVEN: tl.constexpr,
    S_MANY: tl.constexpr,
    ASSIGN: tl.constexpr,
    TOKEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    EP: tl.constexpr,
):
    """All jobs of one backward.  n_* output tiles of a kind, o_* where its slots begin; in the order down up
    token_weight sample_weight gate given
    """
    job = tl.program_id(0)
    every = n_c * n_g
    per_tile = n_c if S_MANY else every
    c_up, c_phi, c_pool = n_down, n_down + n_up, n_down + n_up + n_phi
    c_gate = c_pool + n_pool
    if DOWN:
        if job < n_down * per_tile:
            down_job(
                job,
                n_down,
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
                S_MANY,
                ASSIGN,
                POOL,
                PRECISION,
                BT,
                BC,
                BR,
            )
    job -= n_down * per_tile
    if UP:
        if (job >= 0) & (job < n_up * per_tile):
            up_job(
                job,
                n_up,
                dy,
                h,
                cols,
                scale,
                gate,
                assignment,
                token_gate,
                sample_gate,
                dup,
                partial + o_up,
                counters + c_up,
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
                S_MANY,
                ASSIGN,
                TOKEN,
                GATE,
                POOL,
                PRECISION,
                BT,
                BC,
                BR,
            )
    job -= n_up * per_tile
    if PHI:
        if (job >= 0) & (job < n_phi * every):
            phi_job(
                job,
                n_phi,
                x,
                d,
                token_gate,
                sample_gate,
                scale,
                gate,
                dtoken_weight,
                partial + o_phi,
                counters + c_phi,
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
                SOFTMAX,
                GATE,
                POOL,
                PRECISION,
                BT,
                BC,
                EP,
            )
    job -= n_phi * every
    if DPOOL:
        if (job >= 0) & (job < n_pool * per_tile):
            pool_job(
                job,
                n_pool,
                h,
                cols,
                assignment,
                q,
                dsample_weight,
                partial + o_pool,
                counters + c_pool,
                T,
                span,
                CH,
                n_c,
                n_g,
                B,
                S,
                R,
                E,
                S_MANY,
                ASSIGN,
                BT,
                BR,
            )
    job -= n_pool * per_tile
    if GATES:
        if (job >= 0) & (job < every):
            gate_job(
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
                partial + o_gate,
                counters + c_gate,
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
                TOKEN,
                SOFTMAX,
                GATE,
                POOL,
                BT,
                EP,
            )
        job -= every
    if GIVEN:
        if job >= 0:
            given_job(
                job,
                n_given,
                n_given_c,
                d,
                token_gate,
                sample_gate,
                scale,
                dgate,
                partial + o_given,
                counters + c_gate + 1,
                T,
                CG,
                n_r,
                B,
                M,
                E,
                TOKEN,
                POOL,
                BY_TOKEN,
                BT,
                EP,
            )
