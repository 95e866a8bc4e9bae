"""Every bad input of docs/robustness.md: error class, words, and a model that is bit for bit as before."""

from __future__ import annotations

import pytest

from tests.robustness import silence, table
from tests.robustness.cases import Case, Ground


@pytest.fixture(autouse=True)
def one_fault_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    # whatever code hides in a file would leave its mark here
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", table.CASES, ids=str)
def test_bad_input(case: Case, tmp_path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "files"
    folder.mkdir()
    with monkeypatch.context() as patches:
        outcome = case.run(Ground(folder, patches))
    assert [path.name for path in tmp_path.iterdir()] == ["files"], "code of a file ran"
    assert outcome
    if case in table.shown():
        told = table.row(case, outcome) in table.written()
        assert told, (
            f"docs/robustness.md says something else than {outcome!r}; make robustness writes it anew"
        )


def test_every_number_has_a_test():
    assert {case.number for case in table.CASES} == set(table.NUMBERS)
    assert len({case.id for case in table.CASES}) == len(table.CASES)


def test_what_the_table_refers_to_exists():
    assert [node for case in table.CASES for node in case.deeper if not table.exists(node)] == []


def test_kinds_of_silent_faults_are_in_the_page_and_their_tests_exist():
    assert len(silence.KINDS) == 16
    assert [t for kind in silence.KINDS for t in kind.tests if not table.exists(f"tests/{t}")] == []
    assert set(silence.rows()) <= set(table.written()), "make robustness writes it anew"


def test_the_table_has_one_row_for_each_number():
    rows = [line.split("|")[1].strip() for line in table.written() if line.startswith("| ")]
    assert [number for number in rows if number[-1:].isdigit()] == list(table.NUMBERS)
