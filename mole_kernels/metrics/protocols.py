"""What papers draw before they measure: prompts, how many pictures of each, and by which metrics."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mole_kernels.errors import MoleValueError, printable

# {} is the subject; worded by us, thirty as in DiffLoRA's protocol: clothes, places, doings, views, styles
PERSON_PROMPTS = (
    "a photo of {}",
    "a portrait of {} in soft light",
    "{} from the side",
    "{} laughing",
    "{} looking surprised",
    "{} with closed eyes",
    "{} wearing a red scarf",
    "{} wearing a white coat",
    "{} in a dark suit",
    "{} with round glasses",
    "{} with a straw hat",
    "{} in a rain jacket",
    "{} at a kitchen table",
    "{} in a library",
    "{} on a snowy road",
    "{} at the beach",
    "{} in front of a castle",
    "{} in a crowded market",
    "{} riding a bicycle",
    "{} playing the violin",
    "{} reading a newspaper",
    "{} baking bread",
    "{} holding a cat",
    "{} running in a park",
    "an oil painting of {}",
    "a pencil drawing of {}",
    "{} as a figure of clay",
    "{} on an old postage stamp",
    "{} in a comic strip",
    "a black and white photo of {}",
)
_PEOPLE = (
    "man men woman women boy boys girl girls person persons people child children kid kids baby babies lady "
    "ladies gentleman gentlemen guy guys male female human humans player players skier skiers surfer "
    "surfers rider riders skateboarder skateboarders chef chefs worker workers teenager teenagers couple "
    "crowd family king queen princess prince warrior actress actor bride groom soldier soldiers"
)
_HUMAN = re.compile(rf"\b({'|'.join(_PEOPLE.split())})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """One picture to draw.

    Args:
        text: Its prompt.
        subject: Whom or what it shows, "" for none; several are joined by +.
        seed: Of its noise.
    """

    text: str
    subject: str
    seed: int


@dataclass(frozen=True)
class Protocol:
    """A paper's way to measure.

    Args:
        name: Under which `PROTOCOLS` has it.
        prompts: With {} for the subject; () where they come from a file.
        subjects: How many subjects the paper has; 0 where there are none.
        each: Pictures of each prompt and subject.
        metrics: What the paper reports, by the names of `mole-kernels evaluate`.
        note: Source, and what is ours.
    """

    name: str
    prompts: tuple[str, ...]
    subjects: int
    each: int
    metrics: tuple[str, ...]
    note: str

    def requests(
        self, subjects: Sequence[str] = (), prompts: Sequence[str] = (), seed: int = 0
    ) -> Iterator[Request]:
        """Every picture of the protocol, in a fixed order.

        Args:
            subjects: How prompts call each; needed where the protocol has subjects.
            prompts: Instead of the protocol's; needed where it has none.
            seed: Picture n of a prompt has seed + n, the same for all subjects.

        Raises:
            MoleValueError: Subjects or prompts that are missing, or a prompt without {} where there are
                subjects.
        """
        texts = tuple(prompts) or self.prompts
        if not texts or bool(subjects) != bool(self.subjects):
            raise MoleValueError(
                f"protocol {self.name}",
                expected=f"{'subjects' if self.subjects else 'no subjects'} and prompts",
                got=f"{len(subjects)} subjects, {len(texts)} prompts",
            )
        if subjects and (lacking := [text for text in texts if "{}" not in text]):
            raise MoleValueError(
                f"protocol {self.name}", expected="prompts with {}", got=printable(lacking[0])
            )
        for subject in subjects or ("",):
            for text in texts:
                for n in range(self.each):
                    yield Request(text.replace("{}", subject), subject, seed + n)


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "difflora",
            PERSON_PROMPTS,
            25,
            1,
            ("clip-t", "clip-i", "dino", "face", "fid"),
            "DiffLoRA (Wu et al.): 25 persons x 30 prompts; the prompts are worded by us",
        ),
        Protocol(
            "mole",
            (),
            0,
            1,
            ("hps", "image-reward"),
            "MoLE (Zhu et al., NeurIPS 2024): prompts about people of COCO captions and DiffusionDB; "
            "human_prompts picks them from a file",
        ),
        Protocol(
            "selma",
            (),
            0,
            1,
            ("pick-score", "image-reward", "hps"),
            "SELMA (Li et al., NeurIPS 2024): DSG's prompts; its DSG and TIFA scores are those of "
            "`mole-kernels selma evaluate`",
        ),
        Protocol(
            "mix-of-show",
            PERSON_PROMPTS[:20],
            1,
            50,
            ("clip-t", "clip-i"),
            "Mix-of-Show (Gu et al., NeurIPS 2023): 20 prompts a concept, 50 pictures each; the prompts are "
            "worded by us",
        ),
        Protocol(
            "composition",
            ("{}",),
            480,
            1,
            ("clip-t", "clip-i", "image-reward"),
            "Multi-LoRA composition (Zhong et al., TMLR 2024): one adapter of each category at a time; "
            "`compositions` lists the sets",
        ),
    )
}


def human_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts that speak of people, as MoLE's test sets: those with a word such as man, girl or
    player.
    """
    return [prompt for prompt in prompts if _HUMAN.search(prompt)]


def compositions(
    adapters: Mapping[str, Sequence[str]], size: int, count: int | None = None, seed: int = 0
) -> list[tuple[str, ...]]:
    """Sets of `size` adapters, each of another category, as character, clothing, style, background and
    object.

    Args:
        adapters: Category -> adapters.
        size: Adapters of a set.
        count: How many sets, drawn without repetition; None for all, in order.
        seed: Of the draw.

    Raises:
        MoleValueError: Fewer categories than a set has, or fewer sets than asked for.
    """
    if not 1 <= size <= len(adapters):
        raise MoleValueError(
            "compositions: size", expected=f"1 to {len(adapters)}, the number of categories", got=size
        )
    every = [
        chosen
        for categories in itertools.combinations(adapters, size)
        for chosen in itertools.product(*(adapters[name] for name in categories))
    ]
    if count is None:
        return every
    if count > len(every):
        raise MoleValueError("compositions: count", expected=f"at most {len(every)}", got=count)
    return random.Random(seed).sample(every, count)
