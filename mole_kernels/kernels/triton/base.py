"""The base product of one output tile, and the order in which tiles run."""

import triton
import triton.language as tl

from mole_kernels.kernels.triton.common import rows_of


@triton.jit
def tile_order(tile, n_m, n_n, GROUP: tl.constexpr):
    """tile -> (row tile, column tile), GROUP rows at a time, so that neighbours in time share columns of W in
    L2.
    """
    width = GROUP * n_n
    first = (tile // width) * GROUP
    height = tl.minimum(n_m - first, GROUP)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def base_tile(
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
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
):
    """x·Wᵀ of one tile that begins at column n_0 -> [BM,BN] and [BM,BX] float32, the columns beside them
    (nothing where BX is 0).

    With TMA x, w and w2 are descriptors (w2: w in blocks of BX); W_ROWS: w's rows are outputs (forward), else
    inputs.
    """
    i_b, _m_0, _o_i, o_b, o_t, m_m = rows_of(i, n_t, span, T, BM)
    o_j, o_k, o_x = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BX if BX else 16)
    b_y = tl.zeros((BM, BN), tl.float32)
    b_2 = tl.zeros((BM, BX if BX else 16), tl.float32)
    if TMA:
        for k in range(0, K, BK):
            b_x = x.load([i_b * span + (i % n_t) * BM, k])
            if W_ROWS:
                b_w = w.load([n_0, k]).T
            else:
                b_w = w.load([k, n_0])
            b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
            if BX:
                if W_ROWS:
                    b_w2 = w2.load([n_0 + BN, k]).T
                else:
                    b_w2 = w2.load([k, n_0 + BN])
                b_2 = tl.dot(b_x, b_w2, b_2, input_precision=PRECISION)
    else:
        p_x = x + (o_b * sxb + o_t * sxt)[:, None] + o_k[None, :] * sxk
        p_w = w + tl.cast(n_0, tl.int64) * swn + (o_j[None, :] * swn + o_k[:, None] * swk)
        p_w2 = w + tl.cast(n_0 + BN, tl.int64) * swn + (o_x[None, :] * swn + o_k[:, None] * swk)
        m_n, m_x = n_0 + o_j < N, n_0 + BN + o_x < N
        for k in range(0, K, BK):
            m_k = (k + o_k < K) | EVEN_K
            b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
            if BX:
                b_2 = tl.dot(
                    b_x,
                    tl.load(p_w2, mask=m_k[:, None] & m_x[None, :], other=0.0),
                    b_2,
                    input_precision=PRECISION,
                )
                p_w2 += BK * swk
            p_x += BK * sxk
            p_w += BK * swk
    return b_y, b_2
