"""The compiled CPU backend: what only it can get wrong. The cases that every backend must pass are in
test_backends.py.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mole_kernels import extension
from mole_kernels.backends import cpu
from mole_kernels.errors import MoleBackendError
from mole_kernels.functional import gated_lora_linear
from mole_kernels.operands import Gates
from tests.truth import Case, assert_close_to_truth

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(
    extension.reason_against_library() is not None, reason=str(extension.reason_against_library())
)

# run by each instruction set in a process of its own, for it is chosen once: sizes at the edges of tiles,
# panels and blocks of k
EVERY_INSTRUCTION_SET = """
import sys
import torch
from mole_kernels.backends import cpu, reference
from mole_kernels.operands import Saved
from tests.truth import ALL, Case, assert_close_to_truth
torch.set_num_threads(1)
cpu._operators()
if torch.ops.mole_cpu.instruction_set() != sys.argv[1]:
    sys.exit(77)
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
CASES = [Case(), Case(T=97, K=65, N=67, ranks=(5, 28), gate="mask+both"), Case(T=100, K=1283, N=130, ranks=(64, 3), S=2),
         Case(T=70, K=33, N=70, layout="transposed"), Case(T=33, K=32, N=16, ranks=(1,) * 5, gate="local"),
         Case(T=130, K=31, N=64, layout="sliced")]
for case in CASES:
    for dtype in LIMIT:
        call = case.make(dtype)
        got = cpu.forward(call.operands())
        if dtype != torch.float64:
            assert_close_to_truth(got[0], call.truth(), dtype, 3, f"{case} {dtype}")
        truth = reference.forward(call.double().operands())
        dy = torch.randn(got.y.shape, dtype=torch.float64).to(dtype)
        grads = cpu.backward(call.operands(), Saved(*got[1:]), dy, ALL)
        right = reference.backward(call.double().operands(), Saved(*truth[1:]), dy.double(), ALL)
        # sums over tokens that cancel have no small relative error: they are in test_backends.py, against their terms
        for name, a, b in list(zip(("y", "h"), got, truth)) + list(zip(("dx", "ddown", "dup"), grads, right)):
            assert a.shape == b.shape, (name, a.shape, b.shape)
            error = ((a.double() - b).norm() / b.norm()).item()
            assert error <= LIMIT[dtype], (str(case), dtype, name, error)
        if dtype == torch.float64:
            for i, (a, b) in enumerate(zip(grads, right)):
                assert b.numel() == 0 or a.numel() == 0 or torch.allclose(a, b, rtol=1e-9, atol=1e-11), (str(case), i)
"""


@needs_library
@pytest.mark.parametrize("name", ("base", "avx2", "avx512", "avx512bf16"))
def test_every_instruction_set(name):
    env = {**os.environ, "MOLE_INSTRUCTION_SET": name, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EVERY_INSTRUCTION_SET, name]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip(f"this CPU or this build has no {name}")
    assert run.returncode == 0, run.stderr[-2000:]


def run(call, save=False):
    return cpu.forward(call.operands(save))


@needs_library
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nan_of_the_next_row_stays_there(dtype):
    """bfloat16 is multiplied in pairs: with an odd K the last one must not read its neighbour's first
    element.
    """
    call = Case(T=131, K=65, N=70, ranks=(3, 5), gate="local").make(dtype)
    call.x[:, 1::2, 0] = float("nan")
    y = run(call)[0]
    assert not y[:, 0::2].isnan().any() and y[:, 1::2].isnan().all()


@needs_library
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_element_is_written(dtype):
    """Memory that held NaN before shows nowhere, at sizes that leave partial tiles."""
    call = Case(T=101, K=66, N=71, ranks=(7, 6)).make(dtype)
    truth = call.truth()
    for _ in range(4):
        poison = [
            torch.full((2, 101, n), float("nan"), dtype=d)
            for n in (71, 13, 2)
            for d in (dtype, torch.float32)
        ]
        del poison
        assert_close_to_truth(run(call)[0], truth, dtype, 3)


@needs_library
def test_two_runs_are_bit_equal():
    call = Case(T=154, K=320, N=200, ranks=(16, 24)).make(torch.bfloat16)
    first, second = run(call, True), run(call, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_library
def test_any_number_of_threads():
    call = Case(B=1, T=500, K=70, N=130, ranks=(16, 24)).make(torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert_close_to_truth(run(call)[0], call.truth(), torch.float32, 1, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_memory_beside_y_is_that_of_h(dtype):
    """No [B,T,N] temporary: torch allocates y, wide h and what is of the size of gates; packed panels are
    bounded by L2.
    """
    case = Case(B=2, T=1024, K=320, N=640, ranks=(16, 16))
    call = case.make(dtype)
    run(call)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run(call)
    allocated = sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)
    M, y = case.B * case.T, case.B * case.T * case.N * torch.empty((), dtype=dtype).element_size()
    assert y <= allocated <= y + 4 * M * (case.R + case.E) + 64 * 1024


@needs_library
def test_offsets_past_two_to_the_31():
    """Rows 2³¹ + 8 elements apart; the pages between are never touched."""
    stride = 2**31 + 8
    try:
        far = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this machine does not hand out 8 GiB of untouched memory")
    x = far.as_strided((1, 3, 64), (0, stride, 1))
    call = Case(B=1, T=3, K=64).make(torch.bfloat16)
    x.copy_(call.x)
    y = run(replace(call, x=x)).y
    assert torch.equal(y, run(call)[0])


@needs_library
def test_wrong_shapes_are_refused_before_memory_is_read():
    call = Case().make(torch.float32)
    e, bare = call.experts, replace(call, gates=Gates())
    for up in (e.up[:, :-1], e.up[..., :-1], e.up.double(), e.up[0]):
        with pytest.raises(RuntimeError, match=r"mole_cpu: expected up \[1,48,16\] float32 on cpu, got \["):
            run(replace(bare, experts=e._replace(up=up)))
    with pytest.raises(RuntimeError, match="expected ranks that add up to the rows of down, 16, got 15"):
        run(replace(bare, experts=e._replace(ranks=(8, 7))))
    with pytest.raises(RuntimeError, match=r"mole_cpu: expected token_weight \[2,64\]"):
        run(replace(call, gates=Gates(token_weight=call.gates.token_weight[:, :-1])))


def test_reasons():
    problem = Case().problem(torch.float32)
    assert "on cuda" in cpu.reason_against(replace(problem, device="cuda"))
    assert "float8" in cpu.reason_against(replace(problem, dtype=torch.float8_e4m3fn))


def test_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("MOLE_NO_EXTENSION", "1")
    monkeypatch.setattr("mole_kernels.functional._KNOWN", {})
    assert extension.reason_against_library() == "MOLE_NO_EXTENSION is set"
    call = Case().make(torch.float32)
    with pytest.raises(MoleBackendError, match="MOLE_NO_EXTENSION"):
        gated_lora_linear(call.x, call.weight, call.bias, call.experts, call.gates, backend="cpu")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "libmole_kernels.so")
    monkeypatch.setattr(extension, "REPORT", tmp_path / "libmole_kernels.json")
    extension._load.cache_clear()
    yield tmp_path
    extension._load.cache_clear()


def test_a_library_that_was_not_built_says_why(elsewhere):
    (elsewhere / "libmole_kernels.json").write_text(
        '{"built": false, "reason": "no C++ compiler was found when it was installed"}'
    )
    assert (
        "no C++ compiler was found" in extension.reason_against_library()
        and "--no-build-isolation" in extension.reason_against_library()
    )
    assert extension.describe()["usable"] is False


def test_a_library_that_does_not_load_says_why(elsewhere):
    (elsewhere / "libmole_kernels.so").write_bytes(b"not a library")
    assert "does not load with torch" in extension.reason_against_library()
