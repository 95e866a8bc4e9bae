"""The suite kills faults planted in the kernels' own source: a lost barrier, a relaxed flag, a lost mask, a
wrong stride, a stale gate.
"""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mole_kernels.kernels import triton as kernels
from mole_kernels.kernels.triton import backward as backward_module
from mole_kernels.kernels.triton import launch
from mole_kernels.kernels.triton.backward import Need
from tests.backends.test_backends import assert_gradient
from tests.kernels.interpreter import Bounds, Deadlock, Race, run
from tests.kernels.support import SMALL, forward_of, poisoned
from tests.kernels.test_backward import NAMES, gradients, seed_of
from tests.planting import planted_room
from tests.truth import Case, assert_close_to_truth

ROOM = Path(kernels.__file__).parent
# what lies beyond a tensor may be another tensor of the call, made by another program
WRONG = (Bounds, Race, AssertionError)
BARRIER = "tl.debug_barrier()\n"
# name: (module, text, its replacement, what notices it)
MUTANTS = {
    "no barrier before the row's release": (
        "persistent",
        BARRIER + "            tl.atomic_add(ready + i_y, 1",
        "tl.atomic_add(ready + i_y, 1",
        Race,
    ),
    "a relaxed release": (
        "persistent",
        'ready + i_y, 1, sem="release"',
        'ready + i_y, 1, sem="relaxed"',
        Race,
    ),
    "a relaxed wait": ("persistent", 'ready + i, 0, sem="acquire"', 'ready + i, 0, sem="relaxed"', Race),
    "a wait for one tile too few": ("persistent", 'sem="acquire") < n_w', 'sem="acquire") < n_w - 1', Race),
    "a wait for one half of the rows": ("persistent", "tl.minimum(BM // BH, ", "tl.minimum(1, ", Race),
    "a half counted for another row tile": (
        "persistent",
        "(i % n_th) // (BM // BH)",
        "(i % n_th) % n_t",
        (Race, Deadlock),
    ),
    "flags reset by the first to leave": ("persistent", "== n_p - 1:", "== 0:", Exception),
    "a lost mask of columns": (
        "shrink",
        "mask=m_k[:, None] & m_d[None, :], other=0.0), b_h",
        "mask=m_k[:, None], other=0.0), b_h",
        WRONG,
    ),
    "one set for all samples": ("shrink", "down + i_s * sds", "down + 0 * sds", AssertionError),
    "a sum for a mean": ("shrink", "b_q = b_q / T", "b_q = b_q * 1.0", AssertionError),
    "the sample's last tile not ordered": (
        "shrink",
        'arrived + i_b, 1, sem="acq_rel"',
        'arrived + i_b, 1, sem="relaxed"',
        Race,
    ),
    "a sample gate forgotten": ("expand", "b_z * b_q[None, :]", "b_z * 1.0", AssertionError),
    "up transposed by a stride": (
        "expand",
        "o_j[None, :] * sun",
        "o_j[None, :] * sur",
        (AssertionError, Bounds),
    ),
    "a bias dropped": ("expand", "    if BIAS:\n", "    if BIAS and N < 0:\n", AssertionError),
}
ROUTED = {
    "another k": ("shrink", "E, top_k, SOFTMAX)", "E, top_k + 1, SOFTMAX)", AssertionError),
    "sigmoids for a softmax": ("shrink", "E, top_k, SOFTMAX)", "E, top_k, False)", AssertionError),
    "an assignment not looked up in the shrink": (
        "shrink",
        "assignment, ASSIGN)",
        "assignment, False)",
        AssertionError,
    ),
    "an assignment not looked up in the expand": (
        "expand",
        "assignment, ASSIGN)",
        "assignment, False)",
        AssertionError,
    ),
}
SUMS = {
    "no barrier before the slot's release": ("jobs", BARRIER + "        is_last", "is_last", Race),
    "a slot forgotten": ("jobs", "for j in range(slots):", "for j in range(slots - 1):", AssertionError),
    "the pooled gate's part of dh forgotten": (
        "expert_gradients",
        "b_z + b_c[None, :]",
        "b_z * 1.0",
        AssertionError,
    ),
    "a sample of another set": (
        "expert_gradients",
        "if tl.load(assignment + i_b) == i_s:",
        "if tl.load(assignment + i_b) >= 0:",
        AssertionError,
    ),
}


def mutant(tmp_path, module, old, new):
    """A copy of the kernels with one piece of a module's text replaced; -> the copy of that name."""

    def module_of(name):
        return importlib.import_module(f"{copy}.{name}")

    copy = planted_room(ROOM, kernels.__name__, f"{module}.py", old, new, tmp_path)
    return module_of


def judge_forward(case, way, seeds, tile=SMALL):
    call = case.make(torch.bfloat16)
    for seed in range(seeds):
        with run(seed, resident=3), poisoned():
            b = way(forward_of(call), tile)
        assert_close_to_truth(b.y, call.truth(), torch.bfloat16, 2)
        assert not b.flags.any()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_forward_mutant_is_killed(name, tmp_path, monkeypatch):
    module, old, new, error = MUTANTS[name]
    made = mutant(tmp_path, module, old, new)
    # rows are released one by one only where there is no sample gate
    gate = "local" if module == "persistent" else "both"
    case = Case(T=37, K=40, N=33, ranks=(16, 9), gate=gate, S=2)
    kernel = "persistent_kernel" if module == "persistent" else f"{module}_kernel"
    way = launch.persistent if module == "persistent" else launch.two_pass
    case = case if name == "a bias dropped" else case.alone()
    tile = replace(SMALL, BH=16) if "half" in name else SMALL
    judge_forward(case, way, 2, tile)
    monkeypatch.setattr(launch, kernel, getattr(made(module), kernel))
    with pytest.raises(error):
        judge_forward(case, way, 24, tile)


@pytest.mark.parametrize("name", ROUTED)
def test_a_routed_mutant_is_killed(name, tmp_path, monkeypatch):
    module, old, new, error = ROUTED[name]
    made = mutant(tmp_path, module, old, new)
    case = Case(B=3, S=-3, T=20, ranks=(6, 5, 4), gate="top2+pooled", base=False)
    judge_forward(case, launch.two_pass, 1)
    monkeypatch.setattr(launch, f"{module}_kernel", getattr(made(module), f"{module}_kernel"))
    with pytest.raises(error):
        judge_forward(case, launch.two_pass, 1)


@pytest.mark.parametrize("name", SUMS)
def test_a_backward_mutant_is_killed(name, tmp_path, monkeypatch):
    module, old, new, error = SUMS[name]
    made = mutant(tmp_path, module, old, new)
    many = dict(B=3, S=-2, T=50) if "set" in name else {}
    call = replace(Case(T=150, K=24, N=20, ranks=(6, 5)), **many).make(torch.float32)
    dy = seed_of(call)
    truth, _ = call.truth_grads(dy)

    def judge():
        got, _ = gradients(call, Need(*[n in ("down", "up", "token_weight") for n in NAMES]), dy, resident=3)
        for n in ("down", "up", "token_weight"):
            assert_gradient(got[n], truth[n], torch.float32, truth[n].norm().item(), 4, n)

    judge()
    monkeypatch.setattr(backward_module, "gradients_kernel", made("gradients").gradients_kernel)
    with pytest.raises(error):
        judge()
