"""Questions about pictures: DSG's trees and TIFA's lists, read from their authors' file formats."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        detail: A finer category (DSG's category_detailed); "" for none.
    """

    id: str
    text: str
    answer: str = YES
    choices: tuple[str, ...] = (YES, NO)
    parents: tuple[str, ...] = ()
    category: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Tree:
    """A prompt's questions.

    Args:
        prompt: The prompt.
        questions: Parents are put before children; with `in_order` as they come.
        id: What names the item in its file, and its picture; "" for none.
        in_order: The rule of DSG's code, for files with oddities: a parent that is no question is no parent,
            and a child that comes before its parent is judged by the parent's answer alone, not by what
            rules the parent out. Else a parent that is not there and a ring are refused.
        oddities: What of that kind there is, counted: "unknown parent", "later parent", "own parent".

    Raises:
        MoleValueError: No questions, ids that repeat, and without `in_order` unknown parents or a ring.
    """

    prompt: str
    questions: tuple[Question, ...]
    id: str = ""
    in_order: bool = False
    oddities: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"questions of {printable(self.prompt)!r}"
        by_id = {question.id: question for question in self.questions}
        if not by_id:
            raise MoleValueError(where, expected="at least one question", got="none")
        if len(by_id) != len(self.questions):
            raise MoleValueError(
                where, expected="ids that differ", got=printable([question.id for question in self.questions])
            )
        if self.in_order:
            self._count_oddities(list(by_id))
            return
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

    def _count_oddities(self, ids: Sequence[str]) -> None:
        """Drop parents that are no other question; count them, and those that come later."""
        oddities, questions = Counter[str](), []
        for at, question in enumerate(self.questions):
            parents = []
            for parent in question.parents:
                if parent not in ids:
                    oddities["unknown parent"] += 1
                elif parent == question.id:
                    oddities["own parent"] += 1
                else:
                    oddities["later parent"] += ids.index(parent) > at
                    parents.append(parent)
            questions.append(replace(question, parents=tuple(parents)))
        object.__setattr__(self, "questions", tuple(questions))
        object.__setattr__(self, "oddities", {name: count for name, count in oddities.items() if count})


def load_dsg(path: str | Path, *, strict: bool = False) -> list[Tree]:
    """DSG's table: a CSV with item_id, text, proposition_id, dependency, question_natural_language and, if
    there, category_broad and category_detailed.

    Source: Cho et al., ICLR 2024; its file of 1,060 items has unknown parents ("right"), questions that
    depend on themselves or on later ones, and lists such as "0,4".

    Args:
        path: The file.
        strict: Refuse such oddities, instead of going by the rule of DSG's code and counting them.

    Raises:
        MoleFileError: Not such a file; names the line.
        MoleValueError: Questions of one item with the same id, and oddities with `strict`.
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
            detail=(row.get("category_detailed") or "").strip(),
        )
        prompt, questions = items.setdefault(row["item_id"].strip(), (row["text"].strip(), []))
        if prompt != row["text"].strip():
            raise MoleFileError(at, f"item {printable(row['item_id'])} has two texts")
        questions.append(question)
    return _trees(path, items, in_order=not strict)


def load_tifa(path: str | Path) -> list[Tree]:
    """TIFA's list: JSON [{"caption", "question", "answer", "choices", …}, …], without dependencies.

    Entries with one "id", or of one caption where there is none, belong to one picture; "element_type" is the
    category, if there.
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
        key = str(row["id"]) if "id" in row else "\0" + row["caption"]
        caption, questions = items.setdefault(key, (row["caption"], []))
        if caption != row["caption"]:
            raise MoleFileError(f"{where}, entry {number}", f"id {printable(key)} has two captions")
        category = str(row.get("element_type") or "")
        questions.append(
            Question(str(len(questions)), row["question"], row["answer"], tuple(row["choices"]), (), category)
        )
    return _trees(path, items)


def oddities(trees: Iterable[Tree]) -> dict[str, int]:
    """What a question file has of unknown, own and later parents, over all its items."""
    total = Counter[str]()
    for tree in trees:
        total.update(tree.oddities)
    return dict(total)


def load_questions(path: str | Path, *, strict: bool = False) -> list[Tree]:
    """DSG's CSV (see `load_dsg` for `strict`) or TIFA's JSON, by the file's ending."""
    return load_tifa(path) if str(path).endswith(".json") else load_dsg(path, strict=strict)


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


def _trees(
    path: str | Path, items: Mapping[str, tuple[str, list[Question]]], in_order: bool = False
) -> list[Tree]:
    trees = [
        Tree(prompt, tuple(questions), "" if key.startswith("\0") else key, in_order)
        for key, (prompt, questions) in items.items()
    ]
    if not trees:
        raise MoleFileError(printable(path, 300), expected="at least one question", got="none")
    return trees
