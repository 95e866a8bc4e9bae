"""Files of skills, questions and prompts: JSON, JSON lines and CSV."""

from __future__ import annotations

from mole_kernels.errors import MoleError
from mole_kernels.methods.selma.project import read_lines
from mole_kernels.methods.selma.questions import load_dsg, load_tifa
from mole_kernels.methods.selma.skills import load_skills
from tests.fuzz.meeting import file_of

JSON = True


def check(data: bytes) -> None:
    path = file_of(data, "any.json")
    for load in (load_skills, load_tifa, load_dsg):
        try:
            load(path)
        except MoleError:
            continue
    assert all(isinstance(row, dict) for row in read_lines(path))
