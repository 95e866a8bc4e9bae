"""What each way of computing a call can do: from sizes and kinds of gate alone, so that it can be asked
without Triton.
"""

from __future__ import annotations

# launches of a forward: ours and torch's
LAUNCHES = {"persistent": 1, "two_pass": 2, "recompute": 1, "added": 3, "merge": 2, "dense": 2}
BACKWARD_WAYS = ("persistent", "two_pass")
RECOMPUTE_LIMIT = 32


def reason_against_shapes(
    way: str,
    R: int,
    *,
    token: bool,
    sample: bool,
    mask: bool,
    save: bool,
    backward: bool = False,
    own: bool = False,
) -> str | None:
    """Why `way` cannot compute a call, or None.

    token, sample  it has such a gate; mask  its given gate varies by token; save  h is to be kept
    own  samples have experts of their own
    """
    if backward:
        return None if way in BACKWARD_WAYS else "has no backward"
    if way == "recompute" and sample:
        return "the sample gate needs every token of a sample before the first output"
    if way == "recompute" and R > RECOMPUTE_LIMIT:
        return f"R = {R} > {RECOMPUTE_LIMIT}: every output tile would make too much of h"
    if way == "merge" and (token or sample):
        return "the gates depend on x"
    if way == "merge" and mask:
        return "the gate varies by token"
    if way == "merge" and save:
        return "h is to be saved, and merging makes none"
    if way == "dense" and own:
        return "samples have their own experts: each set would need its own ΔW"
    if way == "dense" and sample:
        return "the sample gate is made of h, and a product with ΔW makes none"
    if way == "dense" and save:
        return "h is to be saved, and a product with ΔW makes none"
    return None
