"""How faithful pictures are to their prompts: DSG's score with its parent rule, TIFA's accuracy, by any model
that answers questions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Protocol

from mole_kernels.methods.selma.joining import join
from mole_kernels.methods.selma.project import checked, read_lines, write_lines
from mole_kernels.methods.selma.questions import Question, Tree, oddities
from mole_kernels.training.pictures import decode

if TYPE_CHECKING:
    from PIL.Image import Image

# answers are put on the disk after so many pictures
KEEP_EVERY = 20
# (answer, choices) -> the choice it means
Nearest = Callable[[str, Sequence[str]], str]
# how ids of DSG-1k begin -> what its paper calls the set
_SOURCES = {
    "tifa": "tifa",
    "stanford": "paragraph",
    "localized": "paragraph",
    "countbench": "count",
    "vrd": "relation",
    "diffusion": "real user",
    "midjourney": "real user",
    "posescript": "pose",
    "whoops": "defying",
    "drawtext": "text",
}


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
        score: Mean over pictures of the mean over each one's questions: what DSG's and TIFA's papers report.
        accuracy: Share of all questions that score: what SELMA's code prints for DSG.
        spread: Standard deviation over pictures of the means that `score` is the mean of; 0 for one picture.
        categories: Share of questions by category.
        details: The same by finer category, as SELMA's code lists it.
        sources: Mean over pictures by the set that DSG took the prompt from; for its ids alone.
        pictures: Number of pictures.
        questions: Number of questions.
        ruled_out: Questions that count 0 since a parent was answered wrongly.
        unclear: Answers that are none of the choices, counted as wrong.
        oddities: What the question file has of unknown, own and later parents.
        unasked: Pictures of the folder about which there are no questions.
    """

    score: float
    accuracy: float
    spread: float = 0.0
    categories: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    sources: dict[str, float] = field(default_factory=dict)
    pictures: int = 0
    questions: int = 0
    ruled_out: int = 0
    unclear: int = 0
    oddities: dict[str, int] = field(default_factory=dict)
    unasked: int = 0


def ask(tree: Tree, put: Callable[[Question], str], nearest: Nearest | None = None) -> Answers:
    """Puts a picture's questions; below one that is answered wrongly all count 0 and are not put.

    Args:
        tree: The questions.
        put: Answers one of them.
        nearest: Which of the choices an answer means that is none of them, as TIFA's code asks a sentence
            encoder; None counts such an answer as wrong.
    """
    answers: dict[str, str] = {}
    scores: dict[str, int] = {}
    by_id = {question.id: question for question in tree.questions}

    def right(question: Question) -> int:
        """Whether the answer is right, whatever the parents' are."""
        if question.id not in answers:
            answers[question.id] = _choice(put(question), question, nearest)
        return int(answers[question.id] == normal(question.answer))

    for question in tree.questions:
        # a parent that comes later has no score yet, and DSG's code takes its answer
        parents = [scores[p] if p in scores else right(by_id[p]) for p in question.parents]
        scores[question.id] = 0 if 0 in parents else right(question)
    ruled_out = {q.id for q in tree.questions if any(scores[p] == 0 for p in q.parents) and scores[q.id] == 0}
    asked = {key: answer for key, answer in answers.items() if key not in ruled_out}
    return Answers(tree, asked, scores)


def summarise(answers: Sequence[Answers], unasked: int = 0) -> Summary:
    """Figures over pictures.

    Args:
        answers: Of each picture.
        unasked: Pictures without questions, for the record.
    """
    by_category: dict[str, list[int]] = {}
    by_detail: dict[str, list[int]] = {}
    by_source: dict[str, list[float]] = {}
    unclear = 0
    for picture in answers:
        if source := prompt_set(picture.tree.id):
            by_source.setdefault(source, []).append(picture.score)
        for question in picture.tree.questions:
            score = picture.scores[question.id]
            by_category.setdefault(question.category, []).append(score)
            by_detail.setdefault(question.detail, []).append(score)
            choices = {normal(choice) for choice in question.choices}
            unclear += (
                bool(choices)
                and question.id in picture.answers
                and picture.answers[question.id] not in choices
            )
    every = [score for scores in by_category.values() for score in scores]
    means = [picture.score for picture in answers]
    return Summary(
        score=fmean(means),
        accuracy=fmean(every),
        spread=stdev(means) if len(means) > 1 else 0.0,
        categories=_means(by_category),
        details=_means(by_detail),
        sources=_means(by_source),
        pictures=len(answers),
        questions=len(every),
        ruled_out=len(every) - sum(len(picture.answers) for picture in answers),
        unclear=unclear,
        oddities=oddities(picture.tree for picture in answers),
        unasked=unasked,
    )


def prompt_set(item: str) -> str:
    """The set that an item of DSG-1k comes from, by its id; "" for another id."""
    return next((source for beginning, source in _SOURCES.items() if item.startswith(beginning)), "")


def score_pictures(
    folder: Path,
    trees: Sequence[Tree],
    answerer: Answerer,
    *,
    answers_file: Path | None = None,
    nearest: Nearest | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> tuple[Summary, list[Answers]]:
    """Asks about every picture of a folder that has questions.

    Args:
        folder: Pictures; `join` says how they find their questions.
        trees: Questions by prompt.
        answerer: Who answers.
        answers_file: .jsonl where answers are kept, and read from when an evaluation goes on.
        nearest: See `ask`.
        on_picture: Called as (pictures done, pictures in all).

    Raises:
        MoleKeyError: A prompt without a picture, or without metadata.jsonl a picture without a prompt.
    """
    pictures, unasked = join(folder, trees)
    answer_file = _AnswerFile(answers_file, answerer.name)
    answers: list[Answers] = []
    try:
        for path, tree in pictures:
            answers.append(_ask_about(path, tree, answerer, answer_file, nearest))
            if len(answers) % KEEP_EVERY == 0:
                answer_file.write()
            if on_picture is not None:
                on_picture(len(answers), len(pictures))
    finally:
        answer_file.write()
    return summarise(answers, unasked), answers


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


def _choice(answer: str, question: Question, nearest: Nearest | None) -> str:
    """What an answer means, in normal form."""
    meant = closest(answer, question.choices)
    if nearest is None or not question.choices or meant in {normal(choice) for choice in question.choices}:
        return meant
    return normal(nearest(answer, question.choices))


def _means(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: fmean(values) for name, values in sorted(groups.items()) if name}


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


def _ask_about(
    path: Path, tree: Tree, answerer: Answerer, answer_file: _AnswerFile, nearest: Nearest | None
) -> Answers:
    opened: list[Any] = []

    def put(question: Question) -> str:
        def look() -> str:
            # a picture all of whose answers are kept is not opened
            if not opened:
                opened.append(decode(path))
            return answerer.answer(opened[0], question.text, question.choices)

        return answer_file.get(path.name, question, look)

    return ask(tree, put, nearest)
