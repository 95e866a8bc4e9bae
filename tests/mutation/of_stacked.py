"""Faults in the stacked backend, plain torch."""

from tests.mutation.faults import Planted

FILE, SETS = "mole_kernels/backends/stacked.py", "mole_kernels/backends/sets.py"
GAMMA_TOKEN, GAMMA_SAMPLE = "gamma = gamma * token_gate\n", "gamma * sample_gate[:, None]\n"
LAST = "    absent = x.new_empty(0, dtype=dtype)\n    return Outputs("
DECIDED = "return torch.sigmoid(logit if sample_bias is None else logit + sample_bias.to(dtype))"

MUTANTS = [
    Planted(
        "scale", FILE, "gamma = scale.to(dtype)[None, None]", "gamma = 1.05 * scale.to(dtype)[None, None]"
    ),
    Planted("swapped", FILE, GAMMA_TOKEN, "gamma = gamma * token_gate.roll(1, -1)\n"),
    Planted(
        "tail",
        FILE,
        "    h, logits = _shrink(x, down, gates.token_weight)",
        "    cut = None if gates.token_weight is None else gates.token_weight[:, :-1]\n"
        "    h, logits = _shrink(x[..., :-1], down[..., :-1], cut)",
    ),
    Planted(
        "row",
        FILE,
        GAMMA_TOKEN,
        "gamma = gamma * torch.where(torch.arange(token_gate.shape[1])[:, None] == 0, token_gate.roll(1, 1), token_gate)\n",
    ),
    Planted("zero", FILE, LAST, "    y.view(-1)[y.numel() // 2 : y.numel() // 2 + 1] = 0\n" + LAST),
    Planted(
        "stale",
        FILE,
        DECIDED,
        "_sample_gate.kept = getattr(_sample_gate, 'kept', {})\n    "
        + DECIDED.replace("return ", "return _sample_gate.kept.setdefault((h.shape, h.dtype), ")
        + ")",
    ),
    Planted("stride", FILE, "    _add_product(y, z, up)", "    _add_product(y, z, up[:1])"),
    Planted(
        "bias", FILE, "y = F.linear(x, weight, bias).contiguous()", "y = F.linear(x, weight).contiguous()"
    ),
    Planted("fp8", FILE, GAMMA_TOKEN, "gamma = gamma * token_gate.to(torch.float8_e4m3fn).to(dtype)\n"),
    Planted(
        "transposed",
        FILE,
        "    _add_product(y, z, up)",
        "    _add_product(y, z, up.reshape(up.shape[0], up.shape[2], up.shape[1]).mT)",
    ),
    Planted("neighbour", FILE, GAMMA_SAMPLE, "gamma * sample_gate.roll(1, 0)[:, None]\n"),
    Planted(
        "mask",
        FILE,
        "        gamma = gamma * gate.to(dtype)",
        "        gamma = gamma * gate.to(dtype).roll(1, 1)",
    ),
    Planted("mixed", FILE, "    _add_product(y, z, up)", "    _add_product(y, z, up.roll(ranks[0], -1))"),
    Planted(
        "sixteen",
        FILE,
        "    token_gate = sample_gate = None\n    h, logits = _shrink(x, down, gates.token_weight)",
        "    token_gate = sample_gate = None\n    h, logits = _shrink(x, down, gates.token_weight)\n    h = h.half().to(h.dtype)",
    ),
    Planted(
        "mean", FILE, "mean = h.sum(1, dtype=dtype) / max(h.shape[1], 1)", "mean = h.sum(1, dtype=dtype)"
    ),
    Planted("forgotten", FILE, "return gamma if sample_gate is None else " + GAMMA_SAMPLE, "return gamma\n"),
    Planted(
        "top_k",
        FILE,
        "softmax_of_largest(logits, gates.top_k)",
        "softmax_of_largest(logits, gates.top_k + 1)",
    ),
    Planted(
        "assigned",
        SETS,
        "assignment >= 0).view(-1, *[1] * (sets.dim()",
        "assignment >= -1).view(-1, *[1] * (sets.dim()",
    ),
    Planted("nan", FILE, "    z = (h * widen(", "    z = (h.nan_to_num() * widen("),
    Planted(
        "saved",
        FILE,
        "up=_reduce_product(dy, (h * wide)",
        "up=_reduce_product(dy, (h.roll(1, 0) * wide)",
        backward=True,
    ),
    Planted(
        "logit",
        FILE,
        "dlogit = through - token * (through.sum(-1, keepdim=True) if gates.top_k else through)",
        "dlogit = through",
        backward=True,
    ),
    Planted(
        "pooled",
        FILE,
        "dh = dh + (wide_dq * gates.sample_weight.to(dtype) / T)[:, None]",
        "pass",
        backward=True,
    ),
]
