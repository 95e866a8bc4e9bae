"""What SELMA's parts are on the demo's digits: who writes prompts, who answers questions, and pictures of
real scans.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from PIL import Image
from torch import Generator

from mole_kernels.demo import data
from mole_kernels.demo.classifier import Reader, read
from mole_kernels.demo.pictures import to_image
from mole_kernels.methods.selma.questions import Tree, tree
from mole_kernels.methods.selma.skills import Skill

# what the base reads worst, measured on 300 digits: five 4 %, zero 13 %, three 25 %; the rest 54 % to 100 %
SKILL_WORDS = ("zero", "three", "five")
PLACES = ("left", "middle", "right")
VOCABULARY = (*data.WORDS, data.BLANK)


@lru_cache
def _captions() -> tuple[str, ...]:
    """Every caption of three words, in an order that no seed changes."""
    every = [" ".join(words) for words in product(VOCABULARY, repeat=len(PLACES))]
    random.Random(0).shuffle(every)
    return tuple(every)


def captions_with(word: str, held: bool) -> list[str]:
    """Captions with this digit and no other skill's; a quarter is held back from training."""
    strangers = set(SKILL_WORDS) - {word}
    mine = [
        caption for caption in _captions() if word in caption.split() and not strangers & set(caption.split())
    ]
    cut = len(mine) // 4
    return mine[:cut] if held else mine[cut:]


def captions_without() -> list[str]:
    """Captions of the other digits alone."""
    return [
        c for c in _captions() if not set(SKILL_WORDS) & set(c.split()) and set(c.split()) != {data.BLANK}
    ]


def skill_of(word: str) -> Skill:
    """The skill of one digit, with three seeds."""
    one, two, three = captions_with(word, held=False)[:3]
    return Skill(word, (one, two, three), f"three words, with {word} among them")


class CaptionWriter:
    """A `TextGenerator` without a language model: answers with random captions of the skill, repeats
    included.
    """

    def __init__(self, word: str) -> None:
        self.word, self.name = word, f"captions with {word}"

    def write(self, request: str, number: int, seed: int) -> str:
        lines = random.Random(seed).choices(captions_with(self.word, held=False), k=20)
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 4))


def tree_of(caption: str) -> Tree:
    """DSG's questions about a scene: is there a digit in a place, and below it, is it the right one; a blank
    must be blank.
    """
    questions: dict[str, str] = {}
    dependencies: dict[str, list[str]] = {}
    for place, word in zip(PLACES, caption.split(), strict=True):
        if word == data.BLANK:
            questions[place] = f"Is the {place} place empty?"
            continue
        questions[place] = f"Is there a digit in the {place} place?"
        questions[f"{place} {word}"] = f"Is the digit in the {place} place a {word}?"
        dependencies[f"{place} {word}"] = [place]
    return tree(caption, questions, dependencies)


class ReaderAnswers:
    """An `Answerer`: the demo's reader of digits (99.5 % right on real scans) in place of a model that
    answers any question.
    """

    name = "the demo's reader"

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def answer(self, image: Image.Image, question: str, choices: Sequence[str]) -> str:
        flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = flat.view(1, data.HEIGHT, data.WIDTH, 3).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        seen = read(self.reader, pixels)[0].tolist()
        digit = seen[next(i for i, place in enumerate(PLACES) if f"the {place} place" in question)]
        if "empty" in question:
            return "yes" if digit < 0 else "no"
        if "Is there a digit" in question:
            return "no" if digit < 0 else "yes"
        return "yes" if digit >= 0 and question.endswith(f" {data.WORDS[digit]}?") else "no"


def scenes_of(captions: Sequence[str], digits: data.Digits, generator: Generator) -> list[Image.Image]:
    """A sharp scene of real scans for each caption."""
    n = len(captions)
    labels = torch.tensor([data.labels_of(caption) for caption in captions]).flatten()
    side = torch.rand(len(labels), generator=generator) * 3.0 + 17.0
    pixels, boxes = data.draw_cards(digits, labels, generator, 0.0, 0.0, side)
    ground = (
        data.backgrounds(n, data.HEIGHT, data.WIDTH, generator)
        .unflatten(-1, (data.SLOTS, data.SLOT))
        .movedim(3, 1)
        .flatten(0, 1)
    )
    slots = torch.where(boxes.amax(1, keepdim=True) > 0, pixels, ground)
    scenes = slots.unflatten(0, (n, data.SLOTS)).movedim(1, 3).flatten(3) * 2 - 1
    return [to_image(scene, zoom=1) for scene in scenes]
