"""Faults in the Triton kernels' own source, in the interpreter: those of tests/kernels/test_mutants.py by
fault, and those it lacks.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from mole_kernels.kernels import triton as kernels
from mole_kernels.kernels.triton import backward as backward_module
from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.backward import Need
from tests.backends.test_backends import assert_gradient
from tests.kernels import test_mutants as there
from tests.kernels.interpreter import run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.kernels.test_backward import NAMES, gradients, seed_of
from tests.mutation.faults import Planted
from tests.planting import planted_room
from tests.truth import Case, assert_close_to_truth

ROOM = "mole_kernels/kernels/triton"
SHRINK, EXPAND, GRADIENTS = f"{ROOM}/shrink.py", f"{ROOM}/expand.py", f"{ROOM}/gradients.py"
EXPERT_GRADIENTS = f"{ROOM}/expert_gradients.py"
STORE_Z, STORE_Y = "(b_h * b_g).to(z.dtype.element_ty)", "tl.store(p_y, b_y.to(y.dtype.element_ty)"
TOKEN = "b_l = token_gates(b_l, o_e, m_e, E, top_k, SOFTMAX)\n"
UP = "(o_j[None, :] * sun + o_r[:, None] * sur)"
FP8 = "((b_g.to(tl.int32, bitcast=True) + 0x80000) & -0x100000).to(tl.float32, bitcast=True)"
FIRST_ROW = TOKEN + (
    "            o_row = tl.arange(0, BM)[:, None]\n"
    "            b_l = tl.where(o_row == 0, tl.sum(tl.where(o_row == 1, b_l, 0.0), 0)[None, :], b_l)\n"
)

MUTANTS = [
    Planted("scale", SHRINK, STORE_Z, "(b_h * b_g * 1.05).to(z.dtype.element_ty)"),
    Planted(
        "swapped",
        SHRINK,
        "b_g = column_gates(b_l, o_c,",
        "b_g = column_gates(b_l, tl.where(o_c < 0, o_c, E - 1 - o_c),",
    ),
    Planted("tail", SHRINK, "for k in range(0, K, BK):", "for k in range(0, K - K % BK, BK):"),
    Planted("row", SHRINK, TOKEN, FIRST_ROW),
    Planted(
        "zero",
        EXPAND,
        STORE_Y,
        "tl.store(p_y, tl.where((o_i[:, None] == 3) & (n_0 + o_j[None, :] == 5) & (i == 0), 0.0, b_y).to(y.dtype.element_ty)",
    ),
    Planted("fp8", SHRINK, STORE_Z, f"(b_h * {FP8}).to(z.dtype.element_ty)"),
    Planted("neighbour", EXPAND, "b_q = tl.load(q + i_b * E + o_c,", "b_q = tl.load(q + o_c,"),
    Planted("mixed", EXPAND, UP, "(o_j[None, :] * sun + ((o_r + R // 2) % R)[:, None] * sur)"),
    Planted(
        "sixteen",
        SHRINK,
        "    o_mr = o_i[:, None] * R",
        "    b_h = b_h.to(tl.float16).to(tl.float32)\n    o_mr = o_i[:, None] * R",
    ),
    Planted("nan", SHRINK, STORE_Z, "tl.where(b_h == b_h, b_h * b_g, 0.0).to(z.dtype.element_ty)"),
    Planted(
        "saved",
        EXPERT_GRADIENTS,
        "b_z = (tl.load(h + m_0 * R + o_i",
        "b_z = (tl.load(h + m_0 % T * R + o_i",
        backward=True,
    ),
    Planted(
        "logit",
        GRADIENTS,
        "n_r, M, K, E, sxb, sxt, sxk, sgb, sgt, sge, SOFTMAX,",
        "n_r, M, K, E, sxb, sxt, sxk, sgb, sgt, sge, True,",
        backward=True,
    ),
]
# fault -> names of tests/kernels/test_mutants.py, where they are planted and killed
ELSEWHERE = {
    "stale": ("the sample's last tile not ordered",),
    "stride": ("one set for all samples",),
    "bias": ("a bias dropped",),
    "transposed": ("up transposed by a stride",),
    "mask": ("a lost mask of columns",),
    "mean": ("a sum for a mean",),
    "forgotten": ("a sample gate forgotten",),
    "top_k": ("another k", "sigmoids for a softmax"),
    "assigned": (
        "an assignment not looked up in the shrink",
        "an assignment not looked up in the expand",
        "a sample of another set",
    ),
    "pooled": ("the pooled gate's part of dh forgotten",),
    "parts": ("a wait for one half of the rows", "a half counted for another row tile", "a slot forgotten"),
    "flag": (
        "a relaxed release",
        "a relaxed wait",
        "a wait for one tile too few",
        "flags reset by the first to leave",
    ),
    "barrier": ("no barrier before the row's release", "no barrier before the slot's release"),
}
NAMED = {**there.MUTANTS, **there.ROUTED, **there.SUMS}


def kernel_of(m: Planted, module: str, kernel: str, folder: Path) -> Any:
    """The kernel of a copy of the kernels with the fault: Triton reads a kernel's source from its file."""
    room = Path(kernels.__file__).parent
    copy = planted_room(room, kernels.__name__, Path(m.file).name, m.old, m.new, folder)
    return getattr(importlib.import_module(f"{copy}.{module}"), kernel)


def judge(fault: str) -> None:
    """The rules of tests/kernels on a case that the fault can show in; raises AssertionError where they
    notice it.
    """
    if fault == "nan":
        return judge_nan()
    dtype = torch.float32 if fault == "sixteen" else torch.bfloat16
    # one element in a thousand may be small by chance: of few it shows
    for T, N in ((37, 33), (5, 8)):
        call = Case(T=T, K=40, N=N, ranks=(8, 8), gate="both", S=2, base=False).make(dtype)
        with run(0, resident=3), poisoned():
            y = launch.two_pass(forward_of(call), SMALL).y
        assert_close_to_truth(y, call.truth(), dtype, 2)


def judge_nan() -> None:
    call = Case(T=20, ranks=(3, 5), gate="none", base=False).make(torch.float32)
    call.experts.down[0, 2, 3] = float("nan")
    with run(), poisoned():
        y = launch.two_pass(forward_of(call), SMALL).y
    assert y.isnan().all()


def judge_backward(fault: str) -> None:
    call = Case(T=33, K=24, N=20, ranks=(6, 5)).make(torch.float32)
    dy, name = seed_of(call), "token_weight" if fault == "logit" else "up"
    truth, _ = call.truth_grads(dy)
    got, _ = gradients(call, Need(*[n == name for n in NAMES]), dy, resident=3)
    assert_gradient(got[name], truth[name], torch.float32, truth[name].norm().item(), 4, name)


def run_planted(m: Planted | None, folder: Path, backward: bool) -> None:
    """`judge` with the fault in place; None: without any."""
    holder, module = (backward_module, "gradients") if backward else (launch, "")
    if m is None:
        return judge_backward("up") if backward else judge("scale")
    module = module or Path(m.file).stem
    kernel = f"{module}_kernel"
    usual = getattr(holder, kernel)
    setattr(holder, kernel, kernel_of(m, module, kernel, folder))
    try:
        judge_backward(m.fault) if m.backward else judge(m.fault)
    finally:
        setattr(holder, kernel, usual)
