"""Questions about pictures: DSG's trees and TIFA's lists, read from their authors' file formats."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.files.text import read_json_file, read_text

YES, NO = "yes", "no"


@dataclass(frozen=True)
class Question:
    """One question about the picture of one prompt.

    Args:
        id: Unique among the questions of its prompt.
        text: As it is put.
        answer: What is right; "yes" throughout in DSG.
        choices: What may be answered; () leaves it open.
        parents: Ids of questions that must be answered rightly for this one to count (DSG).
        category: What figures are grouped by.
    """

    id: str
    text: str
    answer: str = YES
    choices: tuple[str, ...] = (YES, NO)
    parents: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True)
class Tree:
    """A prompt's questions, parents before children; a question that is there twice, an unknown parent or a
    ring is refused.
    """

    prompt: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        where = f"questions of {printable(self.prompt)!r}"
        by_id = {question.id: question for question in self.questions}
        if not by_id:
            raise MoleValueError(where, expected="at least one question", got="none")
        if len(by_id) != len(self.questions):
            raise MoleValueError(
                where, expected="ids that differ", got=printable([question.id for question in self.questions])
            )
        for question in self.questions:
            if lost := [parent for parent in question.parents if parent not in by_id]:
                raise MoleValueError(
                    f"{where}, {printable(question.id)}", expected="parents among them", got=printable(lost)
                )
        try:
            order = list(
                TopologicalSorter(
                    {question.id: question.parents for question in self.questions}
                ).static_order()
            )
        except CycleError as error:
            raise MoleValueError(
                where, "some depend on one another in a ring", got=printable(error.args[1])
            ) from None
        object.__setattr__(self, "questions", tuple(by_id[question_id] for question_id in order))


def load_dsg(path: str | Path) -> list[Tree]:
    """DSG's table: a CSV with item_id, text, proposition_id, dependency, question_natural_language and, if
    there, category_broad.

    dependency  ids joined by commas; 0 or nothing means no parent
    """
    needed = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")
    items: dict[str, tuple[str, list[Question]]] = {}
    for number, row in enumerate(_rows(path, needed), 2):
        at = f"{printable(path, 300)}, line {number}"
        if any(row[key] is None for key in needed) or not row["question_natural_language"].strip():
            raise MoleFileError(at, expected=f"values for {', '.join(needed)}", got="fewer")
        parents = tuple(
            part.strip() for part in row["dependency"].split(",") if part.strip() not in ("", "0")
        )
        question = Question(
            row["proposition_id"].strip(),
            row["question_natural_language"].strip(),
            parents=parents,
            category=(row.get("category_broad") or "").strip(),
        )
        prompt, questions = items.setdefault(row["item_id"], (row["text"].strip(), []))
        if prompt != row["text"].strip():
            raise MoleFileError(at, f"item {printable(row['item_id'])} has two texts")
        questions.append(question)
    return _trees(path, items.values())


def load_tifa(path: str | Path) -> list[Tree]:
    """TIFA's list: JSON [{"caption", "question", "answer", "choices", and, if there, "element_type"}, …]; no
    dependencies.
    """
    where = printable(path, 300)
    rows: Any = read_json_file(path)
    if not isinstance(rows, list):
        raise MoleFileError(where, expected="a JSON list", got=type(rows).__name__)
    items: dict[str, tuple[str, list[Question]]] = {}
    for number, row in enumerate(rows):
        if not _is_tifa(row):
            raise MoleFileError(
                f"{where}, entry {number}", expected="caption, question, answer, choices", got=printable(row)
            )
        _, questions = items.setdefault(row["caption"], (row["caption"], []))
        category = str(row.get("element_type") or "")
        questions.append(
            Question(str(len(questions)), row["question"], row["answer"], tuple(row["choices"]), (), category)
        )
    return _trees(path, items.values())


def load_questions(path: str | Path) -> list[Tree]:
    """DSG's CSV or TIFA's JSON, by the file's ending."""
    return load_tifa(path) if str(path).endswith(".json") else load_dsg(path)


def tree(prompt: str, questions: Mapping[str, str], dependencies: Mapping[str, Sequence[str]] = {}) -> Tree:
    """A DSG tree of {id: question} and {id: parents}."""
    return Tree(
        prompt,
        tuple(
            Question(key, text, parents=tuple(dependencies.get(key, ()))) for key, text in questions.items()
        ),
    )


def _rows(path: str | Path, needed: Sequence[str]) -> list[dict[str, str]]:
    where = printable(path, 300)
    try:
        reader = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""))
        if lacking := [key for key in needed if key not in (reader.fieldnames or ())]:
            raise MoleFileError(
                where, expected=f"columns {', '.join(needed)}", got=f"none called {', '.join(lacking)}"
            )
        return list(reader)
    except csv.Error as error:
        raise MoleFileError(where, f"cannot be read as CSV ({printable(error)})") from error


def _is_tifa(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) and row[key] for key in ("caption", "question", "answer"))
        and isinstance(row.get("choices"), list)
        and all(isinstance(choice, str) for choice in row["choices"])
    )


def _trees(path: str | Path, items: Iterable[tuple[str, list[Question]]]) -> list[Tree]:
    trees = [Tree(prompt, tuple(questions)) for prompt, questions in items]
    if not trees:
        raise MoleFileError(printable(path, 300), expected="at least one question", got="none")
    return trees
