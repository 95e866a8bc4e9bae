"""The recipe's parts: captions held back, a writer of prompts, and questions that real scans answer
rightly.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from mole_kernels.demo import data
from mole_kernels.demo.classifier import load_reader
from mole_kernels.methods.selma.evaluate import ask
from mole_kernels.methods.selma.project import Project
from mole_kernels.methods.selma.prompts import PromptSettings, write_prompts

RECIPE = Path(__file__).parents[2] / "python/recipes/selma/words.py"


@pytest.fixture(scope="module")
def words():
    spec = importlib.util.spec_from_file_location("selma_recipe_words", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_captions_asked_about_are_never_trained_on(words, tmp_path):
    for word in words.SKILL_WORDS:
        prompts = write_prompts(
            Project(tmp_path), words.skill_of(word), words.CaptionWriter(word), PromptSettings(count=40)
        )
        held = words.captions_with(word, held=True)
        assert len(held) >= 32 and not set(held) & {*prompts, *words.skill_of(word).seeds}
        assert all(
            word in caption.split() and not (set(words.SKILL_WORDS) - {word}) & set(caption.split())
            for caption in [*prompts, *held]
        )
    assert not any(set(caption.split()) & set(words.SKILL_WORDS) for caption in words.captions_without())


def test_questions_about_a_scene(words):
    found = words.tree_of("five blank two")
    assert {q.id: q.parents for q in found.questions} == {
        "left": (),
        "left five": ("left",),
        "middle": (),
        "right": (),
        "right two": ("right",),
    }


def test_real_scans_score_and_wrong_ones_do_not(words):
    captions = [caption for word in words.SKILL_WORDS for caption in words.captions_with(word, held=True)[:8]]
    answerer = words.ReaderAnswers(load_reader())
    images = words.scenes_of(captions, data.load_split("held"), torch.Generator().manual_seed(0))

    def mean(said):
        trees = [words.tree_of(caption) for caption in said]
        scores = [
            ask(tree, lambda q, image=image: answerer.answer(image, q.text, q.choices)).score
            for tree, image in zip(trees, images)
        ]
        return sum(scores) / len(scores)

    # the reader is right on 99.5 % of such digits; a caption of other digits gets its places at most
    assert images[0].size == (data.WIDTH, data.HEIGHT) and mean(captions) > 0.97
    others = [
        " ".join(w if w == "blank" else data.WORDS[(data.WORDS.index(w) + 1) % 10] for w in caption.split())
        for caption in captions
    ]
    assert mean(others) < 0.7
