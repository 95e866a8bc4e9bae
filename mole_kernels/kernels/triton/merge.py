"""W_b = W + Σ_e γ_e[b]·B_e A_e for every sample (or once), for a plain product to follow.

Only where the gates do not vary by token. The cost hardly depends on the number of tokens, so it wins for
large R on narrow layers.
The sum is rounded to the layer's dtype, as merged weights always are: ΔW loses what it has below W's last
bit.
"""

import triton
import triton.language as tl

from mole_kernels.kernels.triton.common import set_of


@triton.jit
def merge_kernel(
    w,
    down,
    up,
    cols,
    scale,
    gate,
    assignment,
    merged,
    N,
    K,
    R,
    swn,
    swk,
    sds,
    sdr,
    sdk,
    sus,
    sun,
    sur,
    sgb,
    sge,
    ASSIGN: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BZ: tl.constexpr,
):
    """merged [G,N,K].  grid (tiles of N × tiles of K, G)"""
    n_k = tl.cdiv(K, BK)
    i_n, i_k, i_b = tl.program_id(0) // n_k, tl.program_id(0) % n_k, tl.cast(tl.program_id(1), tl.int64)
    o_j, o_k, o_z = tl.arange(0, BN), i_k * BK + tl.arange(0, BK), tl.arange(0, BZ)
    m_n, m_k = i_n * BN + o_j < N, o_k < K
    n_0 = tl.cast(i_n * BN, tl.int64)
    m_nk = m_n[:, None] & m_k[None, :]
    b_w = tl.load(
        w + n_0 * swn + o_j[:, None] * swn + o_k[None, :].to(tl.int64) * swk, mask=m_nk, other=0.0
    ).to(tl.float32)
    i_s, R_s = set_of(i_b, R, assignment, ASSIGN)
    for r in range(0, R_s, BZ):
        o_r = r + o_z
        m_r = o_r < R
        o_c = tl.load(cols + o_r, mask=m_r, other=0)
        b_g = tl.load(scale + o_c, mask=m_r, other=0.0).to(tl.float32)
        if GATE:
            b_g = b_g * tl.load(gate + i_b * sgb + o_c * sge, mask=m_r, other=0.0).to(tl.float32)
        p_u = up + i_s * sus + n_0 * sun + (o_j[:, None] * sun + o_r[None, :] * sur)
        b_u = tl.load(p_u, mask=m_n[:, None] & m_r[None, :], other=0.0)
        p_d = down + i_s * sds + (o_r[:, None].to(tl.int64) * sdr + o_k[None, :] * sdk)
        b_d = tl.load(p_d, mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_w = tl.dot((b_u.to(tl.float32) * b_g[None, :]).to(b_u.dtype), b_d, b_w, input_precision=PRECISION)
    p_m = merged + (i_b * N + n_0) * K + (o_j[:, None].to(tl.int64) * K + o_k[None, :])
    tl.store(p_m, b_w.to(merged.dtype.element_ty), mask=m_nk)
