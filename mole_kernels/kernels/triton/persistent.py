"""Base, low-rank part and gates in one launch: tiles of h first, then tiles of y, handed over by flags.

Why it cannot hang, however few of its programs run at a time and whatever else runs on the GPU:
1. Tiles of h are handed out by a ticket counter. A program asks for its next ticket only when the last tile
   is finished, and
   making a tile of h waits for nobody.
2. A program goes on to tiles of y only when its ticket is past the last tile of h. By then every tile of h
   has been taken, by
   programs that are running (they took a ticket), and by 1 each of those finishes.
3. A program waits in one place only, between a tile's base product and its low-rank part, and only for tiles
   of h. By 2 they come.
No program waits for a tile of y, and none for a program that has not started: no assumption on how many are
resident.

The ticket past the end is also the program's place in the second phase. Programs that made no h leave the
first phase first, get
the low places, and so the ragged last wave of y; those that made h are spared it.

A tile of h may have half the rows of a tile of y: where each program makes at most one, that is half as long
a wait for the first wave.

flags [2 + B + ready] int32, zero before and after: ticket, done, arrived (one for each sample), ready (one
for each row tile, or for
each sample when there is a sample gate). The last program to leave sets them back to zero: no fill before a
launch, and a captured
graph can be replayed. Two launches that may overlap must not share flags (`workspace.py`).
"""

import triton
import triton.language as tl

from mole_kernels.kernels.triton.base import base_tile, tile_order
from mole_kernels.kernels.triton.common import COUNTS
from mole_kernels.kernels.triton.expand import expand_tile
from mole_kernels.kernels.triton.shrink import finish_sample, shrink_tile


@triton.jit(do_not_specialize=COUNTS)
def persistent_kernel(
    x,
    x2,
    w,
    w2,
    down,
    up,
    token_weight,
    token_bias,
    bias,
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
    y,
    flags,
    T,
    span,
    n_t,
    n_th,
    n_m,
    n_r,
    n_b,
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
    sps,
    BACKWARD: tl.constexpr,
    ASSIGN: tl.constexpr,
    TOKEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GATE: tl.constexpr,
    POOL: tl.constexpr,
    BIAS: tl.constexpr,
    PHI_BIAS: tl.constexpr,
    POOL_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    NEED_D: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BZ: tl.constexpr,
    EP: tl.constexpr,
):
    """grid (programs,): any number is right, as many as the GPU holds at once is fast.

    A group's rows are n_t tiles of y, BM each, and n_th tiles of h, BH each; x2: x in blocks of BH, where it
    is a descriptor
    """
    n_h, n_n = (n_m // n_t) * n_th * n_r, tl.cdiv(N, BN + BX)
    arrived, ready = flags + 2, flags + 2 + n_b
    t = tl.atomic_add(flags, 1, sem="relaxed")
    while t < n_h:
        i, i_r = t // n_r, t % n_r
        shrink_tile(
            i,
            i_r,
            x2,
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
            n_th,
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
            PHI_BIAS,
            SAVE,
            True,
            NEED_D,
            TMA,
            EVEN_K,
            PRECISION,
            BH,
            BR,
            BK,
            EP,
        )
        if POOL:
            i_b = i // n_th
            if finish_sample(
                i_b, parts, arrived, sample_bias, q, n_th * n_r, T, E, BACKWARD, POOL_BIAS, EP, 64
            ):
                # all of a program's stores before the one thread that releases them
                tl.debug_barrier()
                tl.atomic_add(ready + i_b, 1, sem="release")
        else:
            i_y = i
            if BH < BM:
                i_y = (i // n_th) * n_t + (i % n_th) // (BM // BH)
            tl.debug_barrier()
            tl.atomic_add(ready + i_y, 1, sem="release")
        t = tl.atomic_add(flags, 1, sem="relaxed")

    n_p = tl.num_programs(0)
    for tile in tl.range(t - n_h, n_m * n_n, n_p, disable_licm=True):
        i, i_n = tile_order(tile, n_m, n_n, GROUP)
        n_0 = i_n * (BN + BX)
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
        if POOL:
            while tl.atomic_add(ready + i // n_t, 0, sem="acquire") == 0:
                pass
        else:
            n_w = n_r
            if BH < BM:
                # the last tile of a group may have fewer rows than it could
                n_w = n_r * tl.minimum(BM // BH, n_th - (i % n_t) * (BM // BH))
            while tl.atomic_add(ready + i, 0, sem="acquire") < n_w:
                pass
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

    tl.debug_barrier()
    if tl.atomic_add(flags + 1, 1, sem="acq_rel") == n_p - 1:
        n_flags = 2 + n_b + tl.where(POOL, n_b, n_m)
        for j in range(0, n_flags, 128):
            o_f = j + tl.arange(0, 128)
            tl.store(flags + o_f, tl.zeros((128,), tl.int32), mask=o_f < n_flags)
