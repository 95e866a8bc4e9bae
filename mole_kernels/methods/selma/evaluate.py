"""How faithful pictures are to their prompts: DSG's score with its parent rule, TIFA's accuracy, by any model
that answers questions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from mole_kernels.errors import MoleFileError, MoleKeyError, printable
from mole_kernels.methods.selma.pictures import METADATA
from mole_kernels.methods.selma.project import checked, read_lines, write_lines
from mole_kernels.methods.selma.questions import Question, Tree
from mole_kernels.training.pictures import decode

if TYPE_CHECKING:
    from PIL.Image import Image

# answers are put on the disk after so many pictures
KEEP_EVERY = 20


class Answerer(Protocol):
    """Answers questions about pictures.

    Attributes:
        name: What an answers file records, so that answers of two models are not mixed.
        answer: In words; with `choices` it should be one of them, and what is none of them counts as
            wrong.
    """

    name: str

    def answer(self, image: Image, question: str, choices: Sequence[str]) -> str: ...


@dataclass(frozen=True)
class Answers:
    """What came of one picture's questions, by question id.

    Args:
        answers: The answers, in normal form; a question that its parents rule out is not put.
        scores: 1 where the answer is right, 0 where it is wrong or where a parent, or a parent's
            parent, was answered wrongly.
    """

    tree: Tree
    answers: dict[str, str]
    scores: dict[str, int]

    @property
    def score(self) -> float:
        """The mean over the questions."""
        return fmean(self.scores.values())


@dataclass(frozen=True)
class Summary:
    """Figures over pictures.

    Args:
        score: Mean over pictures of the mean over each one's questions (what DSG and TIFA report).
        accuracy: Share of all questions that score.
        categories: The same share by category.
        pictures: Number of pictures.
        questions: Number of questions.
        ruled_out: Questions not put, since a parent was answered wrongly.
        unclear: Answers that are none of the choices, counted as wrong.
    """

    score: float
    accuracy: float
    categories: dict[str, float] = field(default_factory=dict)
    pictures: int = 0
    questions: int = 0
    ruled_out: int = 0
    unclear: int = 0


def ask(tree: Tree, put: Callable[[Question], str]) -> Answers:
    """Puts a picture's questions, parents first; below one that is answered wrongly all count 0 and are not
    put.
    """
    answers: dict[str, str] = {}
    scores: dict[str, int] = {}
    for question in tree.questions:
        if any(scores[parent] == 0 for parent in question.parents):
            scores[question.id] = 0
            continue
        answers[question.id] = closest(put(question), question.choices)
        scores[question.id] = int(answers[question.id] == normal(question.answer))
    return Answers(tree, answers, scores)


def summarise(answers: Sequence[Answers]) -> Summary:
    """Figures over the pictures of `found`."""
    marks: dict[str, list[int]] = {}
    unclear = 0
    for picture in answers:
        for question in picture.tree.questions:
            marks.setdefault(question.category, []).append(picture.scores[question.id])
            choices = {normal(choice) for choice in question.choices}
            unclear += (
                bool(choices)
                and question.id in picture.answers
                and picture.answers[question.id] not in choices
            )
    every = [mark for category in marks.values() for mark in category]
    return Summary(
        score=fmean(picture.score for picture in answers),
        accuracy=fmean(every),
        categories={name: fmean(values) for name, values in sorted(marks.items()) if name},
        pictures=len(answers),
        questions=len(every),
        ruled_out=len(every) - sum(len(picture.answers) for picture in answers),
        unclear=unclear,
    )


def score_pictures(
    folder: Path,
    trees: Sequence[Tree],
    answerer: Answerer,
    *,
    answers_file: Path | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> tuple[Summary, list[Answers]]:
    """Asks about every picture of a folder with metadata.jsonl whose text has a tree; a tree without a
    picture is a MoleKeyError.

    Args:
        answers_file: .jsonl where answers are kept, and read from when an evaluation goes on.
        on_picture: Called as (pictures done, pictures in all).
    """
    by_prompt: dict[str, list[Tree]] = {}
    for tree in trees:
        by_prompt.setdefault(tree.prompt, []).append(tree)
    pictures = [
        (folder / row["file_name"], tree)
        for row in _metadata(folder)
        for tree in by_prompt.get(row["text"], ())
    ]
    if lost := sorted(set(by_prompt) - {tree.prompt for _, tree in pictures}):
        hint = "make them first: mole-kernels selma draw"
        raise MoleKeyError(
            f"{printable(folder, 300)}",
            f"{len(lost)} of {len(by_prompt)} prompts have no picture: {printable(lost)}",
            hint=hint,
        )
    answer_file = _AnswerFile(answers_file, answerer.name)
    answers: list[Answers] = []
    try:
        for path, tree in pictures:
            answers.append(_ask_about(path, tree, answerer, answer_file))
            if len(answers) % KEEP_EVERY == 0:
                answer_file.write()
            if on_picture is not None:
                on_picture(len(answers), len(pictures))
    finally:
        answer_file.write()
    return summarise(answers), answers


def normal(text: str) -> str:
    """Small letters, one space between words, no punctuation at the ends, no article in front."""
    plain = " ".join(text.lower().split()).strip(" .,;:!?\"'")
    return re.sub(r"^(?:a|an|the) (?=\w)", "", plain)


def closest(answer: str, choices: Sequence[str]) -> str:
    """The answer in normal form, or the only choice that it begins with ("Yes, there is one." is yes)."""
    plain = normal(answer)
    forms = {normal(choice) for choice in choices}
    if plain in forms:
        return plain
    begun = [form for form in forms if re.match(rf"{re.escape(form)}\b", plain)]
    return begun[0] if len(begun) == 1 else plain


class _AnswerFile:
    """Answers by (picture, question), kept in a file."""

    def __init__(self, path: Path | None, name: str) -> None:
        self.path, self.name, self._new = path, name, 0
        saved = [] if path is None else read_lines(path)
        rows = [
            checked(row, Path(str(path)), n, file_name=str, question=str, answer=str)
            for n, row in enumerate(saved, 1)
        ]
        self.rows = {(row["file_name"], row["question"]): row for row in rows if row.get("by") == name}

    def get(self, file_name: str, question: Question, put: Callable[[], str]) -> str:
        key = (file_name, question.text)
        if key not in self.rows:
            self.rows[key] = {
                "file_name": file_name,
                "question": question.text,
                "answer": put(),
                "by": self.name,
            }
            self._new += 1
        return self.rows[key]["answer"]

    def write(self) -> None:
        if self.path is not None and self._new:
            write_lines(self.path, self.rows.values())
            self._new = 0


def _ask_about(path: Path, tree: Tree, answerer: Answerer, answer_file: _AnswerFile) -> Answers:
    opened: list[Any] = []

    def put(question: Question) -> str:
        def look() -> str:
            # a picture all of whose answers are kept is not opened
            if not opened:
                opened.append(decode(path))
            return answerer.answer(opened[0], question.text, question.choices)

        return answer_file.get(path.name, question, look)

    return ask(tree, put)


def _metadata(folder: Path) -> Iterator[Mapping[str, Any]]:
    rows = read_lines(folder / METADATA)
    if not rows:
        raise MoleFileError(
            printable(folder, 300), expected=f"a folder of pictures with {METADATA}", got="none"
        )
    for number, row in enumerate(rows, 1):
        name = Path(checked(row, folder / METADATA, number, file_name=str, text=str)["file_name"])
        if name.is_absolute() or ".." in name.parts:
            where = f"{printable(folder / METADATA, 300)}, line {number}"
            raise MoleFileError(where, expected="a file in the folder", got=printable(row["file_name"]))
        yield row
