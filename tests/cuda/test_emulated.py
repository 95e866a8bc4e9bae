"""The Hopper kernels in the emulator: a case of each; `make emulate` runs many more, over many schedules, and
all planted faults.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python/tools"))

import emulate  # noqa: E402

from tests.cuda.mutants import MUTANTS, kill  # noqa: E402
from tests.planting import replaced  # noqa: E402

try:
    emulate.compiler()
except emulate.BuildError as e:
    pytestmark = pytest.mark.skip(reason=str(e))


@pytest.mark.parametrize(
    "program", [p for p in emulate.PROGRAMS if p.name.startswith("sm90_")], ids=lambda p: p.name
)
def test_a_case_of_each(program):
    for case in program.quick:
        outcome = emulate.run(emulate.build(program.source), [*case.split(), "seed=1"])
        assert outcome.ok, outcome.output


def test_every_planted_fault_still_has_its_place():
    for mutant in MUTANTS:
        text = (ROOT / "csrc/cuda/sm90" / mutant.file).read_text()
        replaced(text, mutant.old, mutant.new, mutant.name)
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) > 45


def test_a_planted_fault_is_noticed():
    missing_fence = next(m for m in MUTANTS if m.name == "no proxy fence before y's store")
    outcome = kill(missing_fence)
    assert outcome is not None and "[proxy]" in outcome.output
