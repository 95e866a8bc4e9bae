"""y = z Bᵀ + x Wᵀ + b in one launch, the accumulator started from z Bᵀ.  z [M,R], up [N,R], x [M,K], w [N,K],
y [M,N]
"""

import triton
import triton.language as tl


@triton.jit
def fused_kernel(
    x,
    w,
    z,
    up,
    bias,
    y,
    M,
    K,
    N,
    R,
    sxm,
    swn,
    sun,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """One [BM,BN] tile a program, eight row tiles at a time so that neighbours share columns of w."""
    n_m, n_n, tile = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.program_id(0)
    first = (tile // (8 * n_n)) * 8
    height = tl.minimum(n_m - first, 8)
    i_m, i_n = first + (tile % (8 * n_n)) % height, (tile % (8 * n_n)) // height
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    rows, columns = o_m.to(tl.int64)[:, None], o_n.to(tl.int64)[None, :]
    b_y = tl.zeros((BM, BN), tl.float32)
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < R
        b_z = tl.load(z + rows * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_u = tl.load(up + columns * sun + o_r[:, None], mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_y = tl.dot(b_z, b_u, b_y, input_precision="ieee")
    o_k = tl.arange(0, BK)
    p_x, p_w = x + rows * sxm + o_k[None, :], w + columns * swn + o_k[:, None]
    for k in range(0, K, BK):
        m_k = (k + o_k < K) | EVEN_K
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
        p_x += BK
        p_w += BK
    if BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows * N + columns, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
