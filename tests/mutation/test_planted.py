"""The suite notices every planted fault, in every backend. The table of them is docs/kernels/mutants.md;
CUDA's run in `make mutants`.
"""

from pathlib import Path

import pytest
import torch

from tests.cuda.mutants import MUTANTS as IN_CUDA
from tests.mutation import of_cpu, of_cuda, of_reference, of_stacked, of_triton, suite
from tests.mutation.faults import ABSENT, BACKENDS, FAULTS
from tests.mutation.plant import changed, planted_in
from tests.native import scratch

TABLE = Path(__file__).resolve().parents[2] / "docs/kernels/mutants.md"
# those that every suite for this operator must kill; the rules must see them in sixteen bits too, where
# errors are a thousand times larger
FIRST_TEN = tuple(FAULTS)[:10]
BF16 = (torch.bfloat16,)


@pytest.fixture(scope="module")
def library():
    reason = scratch.why_not()
    if reason is not None:
        pytest.skip(reason)
    of_cpu.load()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("m", of_reference.MUTANTS, ids=str)
def test_in_the_formula(m):
    with planted_in(m):
        assert (
            suite.noticed(("reference",) if m.backward else ("stacked", "reference", "cpu"), m.backward)
            is not None
        )


@pytest.mark.parametrize("m", of_stacked.MUTANTS, ids=str)
def test_in_stacked(m):
    with planted_in(m):
        assert suite.noticed(("stacked",), m.backward) is not None


@pytest.mark.parametrize("m", of_cpu.MUTANTS, ids=str)
def test_in_the_cpu_operator(m, library):
    with of_cpu.planted_in(m):
        assert suite.noticed(("cpu",), m.backward) is not None


def test_the_library_with_the_faults_is_right_while_they_are_off(library):
    with of_cpu.planted_in(None):
        assert suite.noticed(("cpu",), False, (torch.float32,)) is None


@pytest.mark.parametrize("m", of_triton.MUTANTS, ids=str)
def test_in_triton(m, tmp_path):
    with pytest.raises(AssertionError):
        of_triton.run_planted(m, tmp_path, m.backward)


@pytest.mark.parametrize("backward", (False, True))
def test_the_triton_kernels_are_right_without_a_fault(backward, tmp_path):
    of_triton.run_planted(None, tmp_path, backward)
    if not backward:
        of_triton.judge("sixteen")
        of_triton.judge("nan")
    else:
        of_triton.judge_backward("logit")


@pytest.mark.parametrize("fault", FIRST_TEN)
def test_in_bfloat16_alone(fault, library):
    (stacked,) = [m for m in of_stacked.MUTANTS if m.fault == fault]
    with planted_in(stacked):
        assert suite.noticed(("stacked",), False, BF16) is not None
    (compiled,) = [m for m in of_cpu.MUTANTS if m.fault == fault]
    with of_cpu.planted_in(compiled):
        assert suite.noticed(("cpu",), False, BF16) is not None


def test_every_fault_has_its_place_in_every_backend_or_a_reason():
    rooms = {
        "reference": of_reference,
        "stacked": of_stacked,
        "cpu": of_cpu,
        "triton": of_triton,
        "cuda": of_cuda,
    }
    for backend in BACKENDS:
        planted = (
            set(of_cuda.FAULT_OF.values()) if backend == "cuda" else {m.fault for m in rooms[backend].MUTANTS}
        )
        here = planted | set(getattr(rooms[backend], "ELSEWHERE", {}))
        absent = {fault for fault, where in ABSENT if where == backend}
        assert here | absent == set(FAULTS) and not here & absent, (
            backend,
            set(FAULTS) - here - absent,
            here & absent,
        )
    assert {name for names in of_triton.ELSEWHERE.values() for name in names} <= set(of_triton.NAMED)
    assert {name for names in of_cuda.ELSEWHERE.values() for name in names} <= {m.name for m in IN_CUDA}
    for m in of_reference.MUTANTS + of_stacked.MUTANTS + of_triton.MUTANTS:
        changed(m)


def test_the_table_is_the_one_of_these_faults():
    text = TABLE.read_text()
    assert "SURVIVED" not in text
    for words in FAULTS.values():
        assert text.count(f"\n| {words} |") == 1, f"{words}: run `make mutants`"
