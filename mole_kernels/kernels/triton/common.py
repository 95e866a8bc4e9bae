"""Device functions that several kernels share: which rows a tile has, and its gates.

Names inside kernels: i_ index of a tile, o_ offsets, m_ mask, p_ pointers, b_ a block's values; shapes in
comments.
Row tiles: `span` rows belong together (M where the batch is one long list of tokens, T where tiles must not
straddle samples)
and are cut into n_t tiles of BM; row m = i_b·span + position, sample = m // T, token = m % T.
"""

import triton
import triton.language as tl

# sizes that decide nothing about how memory is accessed: a kernel is not compiled anew when one of them is 1
# or a multiple of 16
COUNTS = ["T", "span", "n_t", "n_th", "n_m", "n_r", "n_b", "M", "E", "sgb", "sgt", "sge", "sps", "top_k"]


@triton.jit
def rows_of(i, n_t, span, T, BM: tl.constexpr):
    """Row tile i -> group i_b, first row m_0 int64, rows from there o_i [BM], samples and tokens o_b, o_t
    [BM] int64, mask [BM].

    Offsets are 64 bits wide from the start of a tensor to the start of a tile and 32 within a tile, which
    saves registers; the division
    is done in 32 bits (M is below 2³¹).
    """
    i_b, o_i = i // n_t, tl.arange(0, BM)
    o_p = (i % n_t) * BM + o_i
    o_m = i_b * span + o_p
    m_0 = tl.cast(i_b, tl.int64) * span + (i % n_t) * BM
    return i_b, m_0, o_i, (o_m // T).to(tl.int64), (o_m % T).to(tl.int64), o_p < span


@triton.jit
def set_of(i_b, R, assignment, ASSIGN: tl.constexpr):
    """Sample (or group) -> its set of experts int64, and that set's columns: R, or 0 where it takes none.
    assignment [B] int64
    """
    i_s, R_s = tl.cast(i_b, tl.int64), R
    if ASSIGN:
        i_s = tl.load(assignment + i_b)
        R_s = tl.where(i_s < 0, 0, R)
        i_s = tl.maximum(i_s, 0)
    return i_s, R_s


@triton.jit
def token_gates(b_l, o_e, m_e, E, top_k, SOFTMAX: tl.constexpr):
    """Logits [BM,EP] -> sigmoids, or the softmax over each row's top_k largest and 0 elsewhere.

    Of equal logits the first counts as the larger; a NaN makes its row NaN.
    """
    if SOFTMAX:
        b_l = tl.where(m_e[None, :], b_l, float("-inf"))
        if top_k < E:
            # an expert's place: how many logits are larger, or equal and earlier; a NaN's is the first
            b_n = tl.zeros(b_l.shape, tl.int32)
            for e in tl.range(0, E, num_stages=1):
                b_e = tl.sum(tl.where(o_e[None, :] == e, b_l, 0.0), 1)[:, None]
                b_n += tl.where((b_e > b_l) | ((b_e == b_l) & (e < o_e)[None, :]), 1, 0)
            b_l = tl.where(b_n < top_k, b_l, float("-inf"))
        b_l = tl.exp(b_l - tl.max(b_l, 1)[:, None])
        b_l = b_l / tl.sum(b_l, 1)[:, None]
    else:
        b_l = tl.sigmoid(b_l)
    return b_l


@triton.jit
def given_gate(e, o_b, o_t, m_m, scale, gate, sgb, sgt, sge, GATE: tl.constexpr):
    """s_e · gate[b,t,e] -> [BM] (a scalar without a given gate)."""
    b_g = tl.load(scale + e).to(tl.float32)
    if GATE:
        b_g = b_g * tl.load(gate + o_b * sgb + o_t * sgt + e * sge, mask=m_m, other=0.0).to(tl.float32)
    return b_g


@triton.jit
def given_gates(o_e, m_e, o_b, o_t, m_m, scale, gate, sgb, sgt, sge, GATE: tl.constexpr, SCALE: tl.constexpr):
    """s_e · gate[b,t,e] (without s where SCALE is off) -> [BM,EP], 0 outside."""
    m_me = m_m[:, None] & m_e[None, :]
    b_g = tl.where(m_me, 1.0, 0.0)
    if SCALE:
        b_g = b_g * tl.load(scale + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    if GATE:
        p_g = gate + (o_b * sgb + o_t * sgt)[:, None] + o_e[None, :] * sge
        b_g = b_g * tl.load(p_g, mask=m_me, other=0.0).to(tl.float32)
    return b_g


@triton.jit
def column_gates(
    b_l,
    o_c,
    r_0,
    R,
    o_b,
    o_t,
    m_m,
    cols,
    scale,
    gate,
    sgb,
    sgt,
    sge,
    GATE: tl.constexpr,
    TOKEN: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    EP: tl.constexpr,
):
    """s·gate·l of each column's expert -> [BM,BR], 0 on padding.  b_l [BM,EP] token gate, o_c [BR] expert of
    column (−1: padding)
    """
    b_g = tl.zeros((BM, BR), tl.float32)
    if GATE or TOKEN:
        # columns are in order of experts: only those between the first and the last are in this tile
        for e in range(tl.load(cols + r_0), tl.load(cols + tl.minimum(r_0 + BR, R) - 1) + 1):
            b_e = given_gate(e, o_b, o_t, m_m, scale, gate, sgb, sgt, sge, GATE)
            if TOKEN:
                b_e = b_e * tl.sum(tl.where(tl.arange(0, EP)[None, :] == e, b_l, 0.0), 1)
            b_g = tl.where(o_c[None, :] == e, b_e[:, None], b_g)
    else:
        b_g += tl.load(scale + o_c, mask=o_c >= 0, other=0.0).to(tl.float32)[None, :]
    return b_g


@triton.jit
def logit_gradient(
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
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    BM: tl.constexpr,
    EP: tl.constexpr,
):
    """dlogit = γ(1−l)·D, of a softmax γD − l·Σ_f γ_f D_f -> [BM,EP].  d [n_r,M,E] parts of D, token_gate
    [M,E], sample_gate [B,E]
    """
    m_me = m_m[:, None] & m_e[None, :]
    o_me = o_i[:, None] * E + o_e[None, :]
    b_d = tl.zeros((BM, EP), tl.float32)
    for j in range(n_r):
        b_d += tl.load(
            d + (tl.cast(j, tl.int64) * M + m_0) * E + o_me, mask=m_me, other=0.0, cache_modifier=".cg"
        )
    b_l = tl.load(token_gate + m_0 * E + o_me, mask=m_me, other=0.0)
    b_g = given_gates(o_e, m_e, o_b, o_t, m_m, scale, gate, sgb, sgt, sge, GATE, True) * b_l
    if POOL:
        b_g = b_g * tl.load(sample_gate + o_b[:, None] * E + o_e[None, :], mask=m_me, other=0.0)
    b_g = tl.where(m_me, b_g * b_d, 0.0)
    return b_g - b_l * (tl.sum(b_g, 1)[:, None] if SOFTMAX else b_g)
