"""Stage 1: from three seeds to a stated number of prompts, each modelled on three that are there and unlike
all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.methods.selma.generators import TextGenerator, UnusableAnswer
from mole_kernels.methods.selma.project import Project, checked, read_lines, write_lines
from mole_kernels.methods.selma.prompt_text import parse_prompts, request_text
from mole_kernels.methods.selma.similarity import LIMIT, SimilarityFilter
from mole_kernels.methods.selma.skills import Skill
from mole_kernels.training.data import counted_generator

REQUESTS = "requests.jsonl"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class PromptSettings:
    """How many prompts, and how they are asked for. Defaults of the first four: the paper's code.

    Args:
        count: Prompts to accept besides the seeds, exactly.
        shown: Prompts shown in each request, drawn from seeds and accepted ones.
        more: Prompts asked for in each request.
        limit: ROUGE-L F1 above which a prompt is turned away.
        seed: Decides which are shown, and the seeds handed to the generator.
        attempts: How often one request is tried before the stage stops.
        wait: Seconds before the second attempt; doubled each time, up to a minute.
        patience: Requests in a row that bring nothing new before the stage stops.
    """

    count: int = 1000
    shown: int = 3
    more: int = 20
    limit: float = LIMIT
    seed: int = 0
    attempts: int = 6
    wait: float = 1.0
    patience: int = 20

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("shown", 1), ("more", 1), ("attempts", 1), ("patience", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise MoleValueError(
                    f"PromptSettings: {name}", expected=f"an integer of at least {least}", got=repr(value)
                )
        if not self.wait >= 0:
            raise MoleValueError("PromptSettings: wait", expected="seconds", got=repr(self.wait))


# may change between a run and its resume without a prompt already accepted being another
_FREE = ("count", "attempts", "wait", "patience", "generator")


def write_prompts(
    project: Project,
    skill: Skill,
    generator: TextGenerator,
    settings: PromptSettings = PromptSettings(),
    *,
    on_request: Callable[[int, int], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Exactly `settings.count` prompts of a skill, kept in the project's folder after each request; a restart
    goes on from there.

    Args:
        on_request: Called as (prompts accepted, requests made).

    Raises:
        MoleStateError: The generator fails `attempts` times over or nothing new comes of `patience`
            requests; what was accepted before is kept.
    """
    path, requests = project.folder(skill.name) / REQUESTS, kept_requests(project, skill.name)
    accepted = [text for row in requests for text in row["accepted"]]
    if len(accepted) > settings.count:
        hint = "ask for at least as many, or take the skill's files away"
        raise MoleStateError(
            f"prompts of {skill.name}",
            expected=f"at most {settings.count} kept",
            got=len(accepted),
            hint=hint,
        )
    project.add_skills([skill])
    project.settle("prompts", skill.name, asdict(settings) | {"generator": generator.name}, _FREE)
    likeness = SimilarityFilter([*skill.seeds, *accepted], settings.limit)
    barren = 0
    while len(accepted) < settings.count:
        row = _ask(skill, generator, settings, accepted, requests, sleep)
        _sort(row, likeness, settings.count - len(accepted))
        requests.append(row)
        accepted += row["accepted"]
        write_lines(path, requests)
        if on_request is not None:
            on_request(len(accepted), len(requests))
        barren = 0 if row["accepted"] else barren + 1
        if barren >= settings.patience and len(accepted) < settings.count:
            what = (
                f"{barren} requests in a row brought nothing new; {len(accepted)} of "
                f"{settings.count} prompts are there"
            )
            hint = "they are kept: go on with a better writer, or ask for fewer"
            raise MoleStateError(f"prompts of {skill.name}", what, hint=hint)
    _finish(project, skill, requests, accepted)
    return accepted


def kept_requests(project: Project, skill: str) -> Rows:
    """The requests made so far, with what came of each; [] before the first."""
    path = project.folder(skill) / REQUESTS
    rows = []
    for number, row in enumerate(read_lines(path), 1):
        rows.append(checked(row, path, number, by=str, accepted=list, rejected=list, spare=list))
        if not all(isinstance(text, str) for text in row["accepted"]):
            where = f"{printable(path, 300)}, line {number}, accepted"
            raise MoleFileError(where, expected="prompts", got=printable(row["accepted"]))
    return rows


def _ask(
    skill: Skill,
    generator: TextGenerator,
    settings: PromptSettings,
    accepted: list[str],
    before: Rows,
    sleep: Callable[[float], None],
) -> dict[str, Any]:
    """One request, tried until an answer holds prompts: {"by", "shown", "found", "attempts"}."""
    number = len(before)
    # a file that takes over from another writer begins at its first line
    own = sum(row["by"] == generator.name for row in before)
    pool = [*skill.seeds, *accepted]
    shown = random.Random(f"{settings.seed}/{skill.name}/{number}").sample(
        pool, min(settings.shown, len(pool))
    )
    request = request_text(skill, shown, settings.more)
    for attempt in range(settings.attempts):
        last = attempt == settings.attempts - 1
        seed = counted_generator(settings.seed, "prompts", skill.name, number, attempt).initial_seed() % 2**31
        try:
            prompts = parse_prompts(generator.write(request, own, seed), start=len(shown) + 1)
            if prompts:
                return {"by": generator.name, "shown": shown, "found": prompts, "attempts": attempt + 1}
            raise UnusableAnswer(generator.name, "the answer holds no list of prompts")
        except UnusableAnswer as error:
            if last:
                hint = f"the {len(accepted)} prompts accepted so far are kept; run the same again to go on"
                where, times = f"prompts of {skill.name}, request {number + 1}", settings.attempts
                raise MoleStateError(
                    where, f"no usable answer in {times} attempts; the last: {error}", hint=hint
                ) from error
            sleep(max(error.wait, min(60.0, settings.wait * 2**attempt)))
    raise AssertionError("unreachable: attempts is at least 1")


def _sort(row: dict[str, Any], likeness: SimilarityFilter, wanted: int) -> None:
    """Puts what was found under "accepted", "rejected" (with what it is too like) or, once there are enough,
    "spare".
    """
    row |= {"accepted": [], "rejected": [], "spare": []}
    for text in row.pop("found"):
        clash = likeness.clash(text)
        if clash is not None:
            row["rejected"].append({"prompt": text, "like": clash.other, "rouge_l": round(clash.f1, 4)})
        elif len(row["accepted"]) == wanted:
            row["spare"].append(text)
        else:
            likeness.add(text)
            row["accepted"].append(text)


def _finish(project: Project, skill: Skill, requests: Rows, accepted: list[str]) -> None:
    # written last and whole: a folder with prompts.jsonl has all of its prompts
    write_lines(project.prompts_file(skill.name), ({"prompt": text} for text in accepted))
    figures = {"prompts": len(accepted), "requests": len(requests)} | {
        key: sum(len(row[key]) for row in requests) for key in ("rejected", "spare")
    }
    if project.noted("prompts", skill.name) != figures:
        project.note("prompts", skill.name, figures)
