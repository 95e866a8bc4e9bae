"""The operator in Triton: `common` device functions, `shrink` and `expand` tiles, and the kernels made of
them.

two_pass     h by one kernel, base and expand by a second: the safe baseline
persistent   both in one launch, h tiles first, handed over by flags
recompute    every output tile makes its own h (small ranks)
merge        W + B·diag(s g)·A per sample, then a plain product
dense        every ΔW, then a product over K·(1+E) gated per token
gradients    dA, dB, dΦ and the gates' sums in one grouped launch
plan         a call seen before, launched again with little Python

Importing this package's modules imports Triton.
"""
