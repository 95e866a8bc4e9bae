"""Faults in the compiled CPU operator: all of them in one library, each behind a switch, so that one
compilation serves them all.

FAULT stands for "this fault is switched on".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mole_kernels.backends import cpu
from tests.mutation.faults import Planted
from tests.native import scratch
from tests.planting import replaced

KERNELS, FORWARD, BACKWARD = "csrc/cpu/kernels.cpp", "csrc/cpu/forward.cpp", "csrc/cpu/backward.cpp"
CALL, CALL_H, TILE = "csrc/cpu/call.cpp", "csrc/cpu/call.h", "csrc/cpu/microkernel.h"
COARSE = "if (FAULT) { int power; const double part = __builtin_frexp(double(gamma), &power); gamma = W(__builtin_ldexp(__builtin_rint(part * 16), power - 4)); }\n"
SIXTEEN = """if (!last) return;
           for (int64_t i = 0; FAULT && k.wide_size == 4 && i < rows * c.R; ++i) {
             int power;
             float& v = reinterpret_cast<float*>(line)[i];
             v = std::frexp(v, &power), v = std::ldexp(std::nearbyint(v * 2048), power - 11);
           }"""
STALE = """static double kept[64];
      const auto stale = [](int64_t i, double v) { return kept[i % 64] ? kept[i % 64] : (kept[i % 64] = v); };
      out[b * c.E + e] = W(FAULT ? stale(b * c.E + e, 1 / (1 + std::exp(-logit))) : 1 / (1 + std::exp(-logit)));"""
ZERO = "if (FAULT) std::fill_n(static_cast<char*>(data(y)) + y.numel() / 2 * k.element_size, y.numel() ? k.element_size : 0, char(0));\n"
GAMMA, EXPERT = "W gamma = scale[e];", "const int64_t from = g.starts[e], n ="
UP = "const { return {static_cast<const char*>(data(up)), k.element_size, S == 1 "

MUTANTS = [
    Planted("scale", KERNELS, GAMMA, "W gamma = FAULT ? scale[e] * W(1.05) : scale[e];"),
    Planted(
        "swapped",
        KERNELS,
        "token[i * g.experts + e]",
        "token[i * g.experts + (FAULT ? (e + 1) % g.experts : e)]",
    ),
    Planted(
        "tail",
        TILE,
        "for (int64_t p = 0; p < k; ++p) {",
        "for (int64_t p = 0; p < k - (FAULT ? 1 : 0); ++p) {",
    ),
    Planted("row", KERNELS, "token[i * g.experts", "token[(FAULT && i == 0 && rows > 1 ? 1 : i) * g.experts"),
    Planted("zero", FORWARD, "  return {y, h, token, sample};", ZERO + "  return {y, h, token, sample};"),
    Planted("stale", FORWARD, "out[b * c.E + e] = W(1 / (1 + std::exp(-logit)));", STALE),
    Planted("stride", CALL_H, f"Sets up_r() {UP}?", f"Sets up_r() {UP}|| FAULT ?"),
    Planted(
        "bias",
        FORWARD,
        "weight.stride(0)), bias, c.B, c.T)",
        "weight.stride(0)), FAULT ? Maybe() : bias, c.B, c.T)",
    ),
    Planted("fp8", KERNELS, EXPERT, COARSE + EXPERT),
    Planted(
        "transposed",
        CALL_H,
        "up.stride(2), up.stride(1)};",
        "FAULT ? N : up.stride(2), FAULT ? 1 : up.stride(1)};",
    ),
    Planted(
        "neighbour", CALL_H, "sample ? sample + b * E", "sample ? sample + (FAULT ? (b + 1) % B : b) * E"
    ),
    Planted("mask", KERNELS, "given[i * g.gate_row", "given[(FAULT && i > 0 ? i - 1 : i) * g.gate_row"),
    Planted(
        "mixed",
        KERNELS,
        "*in = h + i * h_row + from,",
        "*in = h + i * h_row + (FAULT && g.starts[1] * g.experts == g.starts[g.experts] ? g.starts[(e + 1) % g.experts] : from),",
    ),
    Planted("sixteen", FORWARD, "if (!last) return;", SIXTEEN),
    Planted(
        "mean",
        FORWARD,
        "logit / std::max<int64_t>(c.T, 1)",
        "logit / (FAULT ? int64_t(1) : std::max<int64_t>(c.T, 1))",
    ),
    Planted("forgotten", KERNELS, "if (sample) gamma", "if (sample && !FAULT) gamma"),
    Planted("top_k", FORWARD, "data(offset), c.top_k);", "data(offset), c.top_k + (FAULT ? 1 : 0));"),
    Planted(
        "assigned",
        CALL,
        "set_of[b] = from[b * step];",
        "set_of[b] = FAULT && from[b * step] < 0 ? 0 : from[b * step];",
    ),
    Planted("nan", KERNELS, EXPERT, "if (FAULT && gamma != gamma) gamma = 0;\n" + EXPERT),
    Planted(
        "saved",
        BACKWARD,
        "data(h)) + row(b, t)",
        "data(h)) + row(FAULT ? (b + 1) % c.B : b, t)",
        backward=True,
    ),
    Planted("logit", BACKWARD, "= W(gamma * (1 - l))", "= W(FAULT ? gamma : gamma * (1 - l))", backward=True),
    Planted(
        "pooled",
        BACKWARD,
        "c.sample_weight ? add.data()",
        "c.sample_weight && !FAULT ? add.data()",
        backward=True,
    ),
    Planted("parts", FORWARD, "i < blocks; ++i) sum", "i < blocks - (FAULT && blocks > 1 ? 1 : 0); ++i) sum"),
]
SWITCH = {
    "csrc/cpu/kernels.h": ("namespace mole {\n", "namespace mole {\n\nextern int planted;\n"),
    "csrc/cpu/dispatch.cpp": (
        "namespace mole {\n\nnamespace base",
        "namespace mole {\n\nint planted = 0;\n\nnamespace base",
    ),
}


def sources() -> dict[str, str]:
    """The changed files: every fault behind its switch, and an operator library of another name that turns
    the switch.
    """
    texts = {path: (scratch.ROOT / path).read_text() for path in {m.file for m in MUTANTS} | set(SWITCH)}
    for path, (old, new) in SWITCH.items():
        texts[path] = replaced(texts[path], old, new, path)
    for number, m in enumerate(MUTANTS, 1):
        new = m.new.replace("FAULT", f"(planted == {number})")
        texts[m.file] = replaced(texts[m.file], m.old, new, f"{m.fault}: {m.file}")
    path = "csrc/bindings.cpp"
    text = re.sub(
        r"(STABLE_TORCH_LIBRARY\w*\()mole_cpu,", r"\1mole_planted,", (scratch.ROOT / path).read_text()
    )
    text = text.replace(
        'm.def("instruction_set() -> str");',
        'm.def("instruction_set() -> str");\n  m.def("plant(int fault) -> int");',
    )
    text = text.replace(
        "\n}  // namespace\n",
        "\nint64_t plant(int64_t fault) { return planted = int(fault); }\n}  // namespace\n",
        1,
    )
    text = text.replace(
        'm.impl("instruction_set"', 'm.impl("plant", TORCH_BOX(&mole::plant)); m.impl("instruction_set"'
    )
    return {**texts, path: text}


def load() -> None:
    """Compiles where nothing is kept, and loads torch.ops.mole_planted."""
    torch.ops.load_library(str(scratch.library("planted", sources(), "-O1")))


@contextmanager
def planted_in(m: Planted | None) -> Iterator[None]:
    """The cpu backend computes by the library with the faults; None: with all switched off."""
    ops, usual = torch.ops.mole_planted, cpu._operators
    ops.plant(0 if m is None else MUTANTS.index(m) + 1)
    cpu._operators = lambda: (ops.forward.default, ops.backward.default)
    try:
        yield
    finally:
        cpu._operators = usual
        ops.plant(0)
