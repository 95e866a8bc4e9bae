"""Faults in the formula itself, which the truth shares: the other backends disagree, or a test that states a
result by hand.

Those of the backward lie in the reference backend alone: its gradients are written out, the truth's are
autograd's.
"""

from tests.mutation.faults import Planted

FORMULA, BACKEND, SETS = (
    "mole_kernels/reference.py",
    "mole_kernels/backends/reference.py",
    "mole_kernels/backends/sets.py",
)
SHRINK, EXPAND = "h = x @ experts.down[:, span].mT", "(h @ experts.up[:, :, span].mT)"
LOCAL, GIVEN, POOLED = (
    "o = o * token[..., e : e + 1]",
    "o = o * gates.gate[..., e : e + 1]",
    "o = o * sample[:, None]",
)
DECIDED = (
    "return torch.sigmoid(logit if gates.sample_bias is None else logit + gates.sample_bias[e].to(h.dtype))"
)

MUTANTS = [
    Planted("scale", FORMULA, "o = experts.scale[e].to(x.dtype)", "o = 1.05 * experts.scale[e].to(x.dtype)"),
    Planted("swapped", FORMULA, LOCAL, "o = o * token.roll(1, -1)[..., e : e + 1]"),
    Planted("tail", FORMULA, SHRINK, "h = x[..., :-1] @ experts.down[:, span, :-1].mT"),
    Planted(
        "row",
        FORMULA,
        LOCAL,
        "o = o * torch.where(torch.arange(x.shape[1])[:, None] == 0, token.roll(1, 1), token)[..., e : e + 1]",
    ),
    Planted(
        "zero",
        FORMULA,
        "    return y, token, ",
        "    y = y * (torch.arange(y.numel()).view(y.shape) != y.numel() // 2)\n    return y, token, ",
    ),
    Planted(
        "stale",
        FORMULA,
        DECIDED,
        "sample_gate_ref.kept = getattr(sample_gate_ref, 'kept', {})\n    "
        + DECIDED.replace("return ", "return sample_gate_ref.kept.setdefault((h.shape, h.dtype, e), ")
        + ")",
    ),
    Planted("stride", FORMULA, SHRINK, "h = x @ experts.down[:1, span].mT"),
    Planted("bias", FORMULA, "y = F.linear(x, weight, bias)", "y = F.linear(x, weight)"),
    Planted("fp8", FORMULA, LOCAL, "o = o * token[..., e : e + 1].to(torch.float8_e4m3fn).to(x.dtype)"),
    Planted("transposed", FORMULA, EXPAND, "(h @ experts.up[:, :, span].reshape(-1, rank, y.shape[-1]))"),
    Planted("neighbour", FORMULA, POOLED, "o = o * sample.roll(1, 0)[:, None]"),
    Planted("mask", FORMULA, GIVEN, "o = o * gates.gate.roll(1, 1)[..., e : e + 1]"),
    Planted("mixed", FORMULA, EXPAND, "(h @ experts.up.roll(rank, -1)[:, :, span].mT)"),
    Planted("sixteen", FORMULA, SHRINK, "h = (x @ experts.down[:, span].mT).half().to(x.dtype)"),
    Planted("mean", FORMULA, "h.mean(1) if", "h.sum(1) if"),
    Planted("forgotten", FORMULA, POOLED, "pass"),
    Planted("top_k", FORMULA, "order[..., :k]", "order[..., : k + 1]"),
    Planted("assigned", FORMULA, "experts.assignment >= 0", "experts.assignment >= -1"),
    Planted("nan", FORMULA, "y = y + o", "y = y + o.nan_to_num()"),
    Planted(
        "saved",
        BACKEND,
        "up[:, :, span], h[..., span]",
        "up[:, :, span], h.roll(1, 0)[..., span]",
        backward=True,
    ),
    Planted(
        "logit",
        BACKEND,
        "dlogit = through - token * (through.sum(-1, keepdim=True) if gates.top_k else through)",
        "dlogit = through",
        backward=True,
    ),
    Planted(
        "pooled",
        BACKEND,
        "dh = dh + (dq[:, None] * gates.sample_weight[:, span])[:, None] / max(T, 1)",
        "pass",
        backward=True,
    ),
]
