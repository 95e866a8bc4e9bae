"""Faults in the Hopper kernels' sources, in the emulator: those of tests/cuda/mutants.py by fault, and those
it lacks (`make mutants`).
"""

from __future__ import annotations

from tests.cuda.mutants import CLUSTER, PERSISTENT, RECOMPUTE, Mutant

# fault -> names of tests/cuda/mutants.py
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "swapped": ("the next expert's gate",),
    "tail": ("K's tail is lost",),
    "row": ("another row's gate",),
    "stale": ("the sample gate is not awaited",),
    "neighbour": ("the first sample's gate for all",),
    "mask": ("z's padding is not zero", "too few bytes expected"),
    "forgotten": ("the sample gate is left out of z",),
    "transposed": ("W's sixteen rows are found as if it lay the other way",),
    "saved": ("the saved gate of another row",),
    "logit": ("a sigmoid's derivative for a softmax",),
    "parts": (
        "a share of the pooled logits too few is awaited",
        "the slice of another CTA",
        "D of one slice alone",
    ),
    "flag": (
        "tiles of h are not awaited",
        "one tile of h too few is awaited",
        "a tile of h is announced by a relaxed counter",
        "a tile of h is announced before all of it is stored",
        "the counters are not put back",
    ),
    "barrier": (
        "the producer does not wait for a free stage",
        "wrong parity of a stage",
        "a stage is given back before it was read",
        "no proxy fence before y's store",
        "z is not awaited",
        "no cluster barrier at the end",
    ),
}
GAMMA, STAGED = (
    "    mine[row * pitch + e] = g;\n",
    "pack2<T>(acc[i] + low_of<T>(b), acc[i + 1] + high_of<T>(b))",
)
# three bits of a gate's mantissa: the others are cut off
COARSE = "    { uint32_t bits; __builtin_memcpy(&bits, &g, 4); bits = (bits + 0x80000u) & 0xfff00000u; __builtin_memcpy(&g, &bits, 4); }\n"
SET, SETS = "  return p.sets > 1 ? group : 0;\n", "sets=2 b=2 t=70 k=72 n=136"
PLANTED = [
    ("scale", "gates.h", GAMMA, "    mine[row * pitch + e] = g * 1.05f;\n", RECOMPUTE),
    (
        "zero",
        "pipeline.h",
        STAGED,
        "pack2<T>(n == 8 && row == 3 ? 0.0f : acc[i] + low_of<T>(b), acc[i + 1] + high_of<T>(b))",
        RECOMPUTE,
    ),
    ("stride", "pipeline.h", SET, "  return 0;\n", f"way=persistent {SETS}"),
    ("bias", "pipeline.h", "p.bias && n < p.N", "p.bias && n < 0", RECOMPUTE),
    ("fp8", "gates.h", GAMMA, COARSE + GAMMA, RECOMPUTE),
    ("mean", "gates.h", "sum / float(p.T) +", "sum +", CLUSTER + " pooled=1"),
    ("top_k", "gates.h", "if (before < p.top_k)", "if (before <= p.top_k)", CLUSTER + " topk=1 ranks=8,3,5"),
    (
        "assigned",
        "pipeline.h",
        "  if (p.assignment) return int(p.assignment[group]);\n",
        "",
        PERSISTENT + " assigned=1 sets=3",
    ),
    (
        "mixed",
        "pipeline.h",
        "wgmma_advance(up, kk * RIGHT_STEP<BACK>)",
        "wgmma_advance(up, (kk ^ 1) * RIGHT_STEP<BACK>)",
        CLUSTER + " ranks=16,16",
    ),
    (
        "sixteen",
        "gates.h",
        "column < p.slice ? h[i] * g0 : 0.0f",
        "column < p.slice ? to_float(from_float<bf16>(h[i])) * g0 : 0.0f",
        RECOMPUTE,
    ),
]
MUTANTS = [
    Mutant(f"planted: {fault}", file, old, new, arguments, 2) for fault, file, old, new, arguments in PLANTED
]
FAULT_OF = {f"planted: {fault}": fault for fault, *_ in PLANTED}
