"""The problems every backend must get right: awkward sizes, ranks, layouts and gates; see `truth.Case`."""

from tests.truth import Case

GATE_KINDS = [
    Case(gate=g)
    for g in ("none", "local", "pooled", "both", "constant", "mask", "onehot", "mask+both", "onehot+local")
]
SIZES = [
    Case(T=0),
    Case(T=1),
    Case(T=17, K=63, N=65),
    Case(T=127, K=1, N=8),
    Case(T=129, K=8, N=1),
    Case(T=154, K=320, N=65),
    Case(B=1, T=15, K=2049, N=63),
    Case(B=3, T=77, K=65, N=320),
    Case(B=0),
    Case(B=1, T=1, K=1, N=1, ranks=(1,)),
]
RANKS = [
    Case(ranks=(1,)),
    Case(ranks=(3,)),
    Case(ranks=(4,), gate="local"),
    Case(ranks=(1, 3)),
    Case(ranks=(16, 24, 8)),
    Case(ranks=(64, 96), K=128),
    Case(ranks=(256, 128), T=33, K=320, N=320),
    Case(ranks=(512,), T=17, K=65, N=63),
    Case(ranks=(2,) * 7),
    Case(ranks=(1, 2, 3, 4) * 16, T=9),
]
SETS = [
    Case(S=2),
    Case(S=2, gate="none"),
    Case(B=3, S=3, ranks=(3, 5), gate="mask+pooled"),
    Case(B=3, S=3, T=1, K=65),
    Case(S=2, T=0),
]
LAYOUTS = [
    Case(layout=name, gate=gate) for name in ("transposed", "sliced", "stride0") for gate in ("both", "none")
]
LAYOUTS += [Case(layout="transposed", S=2), Case(bias=False), Case(bias=False, gate="none")]
ROUTED = [
    Case(gate="softmax", ranks=(8, 3, 16)),
    Case(gate="softmax+pooled", T=154, K=320),
    Case(gate="top1", ranks=(4,) * 7),
    Case(gate="top2+mask", ranks=(1, 2, 3, 4) * 16, T=17),
    Case(gate="softmax", ranks=(5,)),
    Case(gate="top2+pooled", ranks=(2, 3, 4), S=2),
]
INDEXED = [
    Case(B=5, S=-3),
    Case(B=4, S=-2, gate="none", ranks=(3,)),
    Case(B=3, S=-7, gate="mask+pooled", T=33, K=65),
    Case(B=2, S=-1, gate="softmax", ranks=(4, 4, 4)),
    Case(B=4, S=-3, T=0),
    Case(B=5, S=-4, T=1, ranks=(16, 24), gate="onehot+local"),
]
CASES = GATE_KINDS + SIZES + RANKS + SETS + LAYOUTS + ROUTED + INDEXED
