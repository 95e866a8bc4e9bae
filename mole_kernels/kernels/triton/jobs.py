"""What all jobs of the gradients' launch share: which tile and chunk a job is, and how its sum is settled.

A job is one output tile over one chunk of the tokens. Its sum goes to a slot of its own, and the last job of
a tile to arrive adds the slots up in the order of the tokens and stores the result in the output's dtype. So
there is no fill before, no cast after, no atomic on a number: one launch, and two runs are bit-equal in
any order of the programs. No job waits for another, so the launch cannot deadlock.
"""

import triton
import triton.language as tl


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
