"""The skills a SELMA run teaches: a name, three seed prompts, and a hint of what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_kernels.errors import MoleFileError, MoleValueError, printable
from mole_kernels.files.text import read_json_file

SEEDS = 3


@dataclass(frozen=True)
class Skill:
    """One skill.

    Args:
        name: A folder's name: small letters, digits, '-' and '_'.
        seeds: Three prompts that show it; every later prompt is modelled on them or on prompts accepted
            before.
        about: One phrase put into each request, "" for none.
        rules: Sentences put into each request: what a prompt must and must not be.
    """

    name: str
    seeds: tuple[str, ...]
    about: str = ""
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (
            isinstance(self.name, str) and 0 < len(self.name) <= 64 and all(c in _LETTERS for c in self.name)
        ):
            raise MoleValueError(
                "Skill: name", expected="1 to 64 of a-z, 0-9, '-', '_'", got=repr(printable(self.name))
            )
        object.__setattr__(self, "seeds", tuple(self.seeds) if isinstance(self.seeds, (list, tuple)) else ())
        if len(self.seeds) != SEEDS or not all(isinstance(seed, str) and seed.strip() for seed in self.seeds):
            raise MoleValueError(
                f"skill {self.name}: seeds",
                expected=f"{SEEDS} prompts, none empty",
                got=printable(self.seeds),
            )
        rules = tuple(self.rules) if isinstance(self.rules, (list, tuple)) else (None,)
        if not all(isinstance(rule, str) and rule.strip() for rule in rules):
            raise MoleValueError(
                f"skill {self.name}: rules", expected="sentences, none empty", got=printable(self.rules)
            )
        object.__setattr__(self, "rules", rules)
        if len(set(self.seeds)) != SEEDS:
            raise MoleValueError(
                f"skill {self.name}: seeds",
                expected=f"{SEEDS} prompts that differ",
                got=printable(self.seeds),
            )


_LETTERS = set("abcdefghijklmnopqrstuvwxyz0123456789-_")

# what the requests of the paper's code ask for, worded by us: what is tested, everyday things, length, style,
# and by skill the counts, the contradiction, the paragraph and the detail
_TESTS = (
    "Each prompt tests one ability of a picture generator: where things are, how many, animals, people, "
    "objects, places, actions, colours, other attributes, food, materials or shapes."
)
_EVERYDAY = "Name many different things that one often meets in daily life."
_STYLES = "Word the prompts in different styles."


def _shorter(words: int) -> str:
    return f"Each prompt has fewer than {words} words."


# the skills are those of the paper's code, named for the sets its seeds came from; these seeds are worded by
# us
SKILLS: Mapping[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill(
            "localized_narratives",
            (
                "In the front there is a wooden table with a blue jug and two glasses on it, and "
                "behind it a window with white curtains.",
                "A boy in a green shirt rides a scooter along a path, on the left there are trees and "
                "at the back some parked cars.",
                "We see a plate with rice and vegetables, beside it a fork lies on a folded napkin and "
                "a hand holds a cup.",
            ),
            "long descriptions that say what is where in the picture",
            (
                _TESTS,
                _EVERYDAY,
                _shorter(50),
                "Word them in different styles, all like captions of a paragraph.",
            ),
        ),
        Skill(
            "countbench",
            (
                "Four red lanterns hanging in a row above a shop door",
                "A set of seven brass keys on a ring",
                "Two owls on one branch",
            ),
            "a stated number of things",
            (
                "Each prompt tests whether a picture generator can count.",
                "No count is larger than three.",
                _EVERYDAY,
                _shorter(30),
                _STYLES,
            ),
        ),
        Skill(
            "diffusiondb",
            (
                "portrait of an old lighthouse keeper, oil on canvas, warm rim light, fine brush strokes",
                "floating market at dawn, isometric, soft fog, pastel palette, highly detailed",
                "a fox made of autumn leaves, studio photograph, shallow depth of field",
            ),
            "a subject followed by words of style, light and medium",
            (_TESTS, _EVERYDAY, _shorter(50), "Word them in different styles, all with much detail."),
        ),
        Skill(
            "coco",
            (
                "A woman waits at a bus stop holding a yellow umbrella.",
                "Two dogs sleep on a sofa next to a laptop.",
                "A slice of pizza on a paper plate beside a can of soda.",
            ),
            "plain captions of everyday scenes",
            (_TESTS, _EVERYDAY, _shorter(30), _STYLES),
        ),
        Skill(
            "whoops",
            (
                "A penguin sunbathing on a dune in the Sahara",
                "A candle that burns under water in a fish tank",
                "A medieval knight checking his phone at a bus stop",
            ),
            "scenes that contradict what one knows of the world",
            (
                _TESTS,
                "Name many different things of daily life, put together as common sense forbids.",
                _shorter(30),
                _STYLES,
            ),
        ),
        Skill(
            "midjourney",
            (
                "a city built on the back of a giant turtle, golden hour, cinematic, wide angle",
                "minimalist poster of a whale swimming through clouds, two colours",
                "cross-section of a tree house, technical drawing, ink and watercolour",
            ),
            "imaginative scenes with words of composition and style",
            (_TESTS, _EVERYDAY, _shorter(50), "Word them in different styles, all with much detail."),
        ),
    )
}


def load_skills(path: str | Path) -> dict[str, Skill]:
    """Skills of a JSON file {name: {"seeds": [three prompts], "about": "…", "rules": ["…"]}}, in its
    order; about and rules may be missing.
    """
    where = printable(path, 300)
    table: Any = read_json_file(path)
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(entry, dict) for entry in table.values())
    ):
        raise MoleFileError(
            where, expected='{name: {"seeds": [three prompts], "about": "…"}}', got=printable(table)
        )
    return {
        name: Skill(name, entry.get("seeds", ()), str(entry.get("about", "")), entry.get("rules", ()))
        for name, entry in table.items()
    }
