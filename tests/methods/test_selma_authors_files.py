"""DSG's and TIFA's files as their authors wrote them, with their irregularities; pictures under their names."""

from __future__ import annotations

import csv
import json
import random

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleStateError, MoleValueError
from mole_kernels.methods.selma.choices import SentenceChoice
from mole_kernels.methods.selma.evaluate import ask, prompt_set, score_pictures, summarise
from mole_kernels.methods.selma.project import write_lines
from mole_kernels.methods.selma.prompt_text import request_text
from mole_kernels.methods.selma.questions import Question, Tree, load_dsg, load_tifa, oddities
from mole_kernels.methods.selma.skills import SKILLS, Skill

HEAD = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)


def authors_rows(items: int, seed: int):
    """Rows as DSG-1k has them: every item a tree, some with a stranger, a loop, a later parent or "0,4"."""
    rng, rows = random.Random(seed), []
    for item in range(items):
        name = rng.choice(("whoops", "localized_narratives", "tifa160", "diffusiondb", "posescript"))
        count = rng.randint(1, 12)
        for number in range(1, count + 1):
            parents = {rng.randrange(number)} if rng.random() < 0.8 else {0}
            dependency = ",".join(map(str, sorted(parents)))
            odd = rng.random()
            if odd < 0.02:
                dependency = "right"
            elif odd < 0.04:
                dependency = str(number)
            elif odd < 0.08 and number < count:
                dependency = f"{number + 1}, {dependency}"
            elif odd < 0.1:
                dependency = f"0,{max(parents)}"
            elif odd < 0.12:
                dependency = str(count + 7)
            rows.append(
                (
                    f"{name}_{item}",
                    f"text, of {item}",
                    "words, ",
                    number,
                    dependency,
                    rng.choice(("entity", "attribute", "relation")),
                    rng.choice(("whole", "color", "spatial")),
                    "a - b (c, d)",
                    f"Is it {number}?",
                )
            )
    return rows


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEAD, *rows])


def by_the_papers_words(rows, answers):
    """All questions are put; then, in the file's order, one whose parent among the questions stands at 0
    becomes 0.
    """
    scores = {row[3]: float(answers[row[3]] == "yes") for row in rows}
    for row in rows:
        for word in str(row[4]).split(","):
            parent = int(word) if word.strip().isdigit() else None
            if scores.get(parent) == 0:
                scores[row[3]] = 0.0
    return scores


@pytest.mark.parametrize("seed", range(3))
def test_every_item_of_an_irregular_file_is_scored_as_the_papers_code_scores_it(tmp_path, seed):
    rows = authors_rows(1060, seed)
    write_csv(tmp_path / "dsg.csv", rows)
    trees = load_dsg(tmp_path / "dsg.csv")
    assert len(trees) == 1060 and sum(len(tree.questions) for tree in trees) == len(rows)
    found = oddities(trees)
    assert set(found) == {"unknown parent", "own parent", "later parent"} and min(found.values()) > 20
    by_item: dict[str, list] = {}
    for row in rows:
        by_item.setdefault(row[0], []).append(row)
    rng, answers, wanted, in_all = random.Random(seed), [], [], []
    for tree in trees:
        own = by_item[tree.id]
        said = {row[3]: rng.choice(("yes", "yes", "no")) for row in own}
        scores = by_the_papers_words(own, said)
        answers.append(ask(tree, lambda question, said=said: said[int(question.id)]))
        assert answers[-1].scores == {str(key): int(value) for key, value in scores.items()}
        wanted.append(sum(scores.values()) / len(scores))
        in_all += scores.values()
    summary = summarise(answers)
    assert summary.score == pytest.approx(sum(wanted) / 1060)
    assert summary.accuracy == pytest.approx(sum(in_all) / len(in_all))
    assert set(summary.sources) == {"defying", "paragraph", "tifa", "real user", "pose"}
    assert set(summary.details) == {"whole", "color", "spatial"} and summary.oddities == found


def test_strict_reading_names_strangers_and_rings(tmp_path):
    for dependency, match in (("right", "parents among them"), ("1", "ring")):
        write_csv(
            tmp_path / "dsg.csv", [("a_1", "a cat", "", 1, dependency, "entity", "whole", "", "A cat?")]
        )
        assert len(load_dsg(tmp_path / "dsg.csv")) == 1
        with pytest.raises(MoleValueError, match=match):
            load_dsg(tmp_path / "dsg.csv", strict=True)


def test_a_ring_is_judged_in_the_files_order():
    ring = Tree("x", (Question("1", "a", parents=("2",)), Question("2", "b", parents=("1",))), in_order=True)
    assert ring.oddities == {"later parent": 1}
    # 2 says no: 1 falls with it, and 2 counts 0 by itself
    assert ask(ring, lambda q: "no" if q.id == "2" else "yes").scores == {"1": 0, "2": 0}
    assert ask(ring, lambda q: "yes").scores == {"1": 1, "2": 1}
    # 1 says no: 2 answers yes, and falls since 1 stands at 0
    assert ask(ring, lambda q: "no" if q.id == "1" else "yes").scores == {"1": 0, "2": 0}


def test_sets_are_known_by_the_ids_of_dsg():
    ids = (
        "tifa160_3",
        "stanford_paragraph_2",
        "countbench_1",
        "vrd_9",
        "midjourney_4",
        "drawtext_creative_8",
    )
    assert [prompt_set(item) for item in ids] == [
        "tifa",
        "paragraph",
        "count",
        "relation",
        "real user",
        "text",
    ]
    assert prompt_set("mine_3") == "" == prompt_set("")


class Reader:
    """Answers yes where the picture is red, and keeps what it has seen."""

    name = "reader"

    def __init__(self):
        self.seen = []

    def answer(self, image, question, choices):
        self.seen.append(image.size)
        return "yes" if image.convert("RGB").getpixel((0, 0))[0] > 128 else "no"


def picture(path, red, size=(8, 8)):
    Image.new("RGB", size, (255 if red else 0, 0, 0)).save(path)


def two_items(tmp_path):
    rows = [
        (f"whoops_{i}", text, "", 1, "0", "entity", "whole", "", "Is it red?")
        for i, text in enumerate(["the same text", "the same text", "another"])
    ]
    write_csv(tmp_path / "dsg.csv", rows)
    return load_dsg(tmp_path / "dsg.csv")


def test_pictures_are_found_by_the_authors_names(tmp_path):
    trees, folder = two_items(tmp_path), tmp_path / "pictures"
    folder.mkdir()
    for i, red in enumerate([True, False, True]):
        picture(folder / f"whoops_{i}.jpg", red)
    summary, answers = score_pictures(folder, trees, Reader())
    assert {a.tree.id: a.score for a in answers} == {"whoops_0": 1, "whoops_1": 0, "whoops_2": 1}
    assert summary.score == pytest.approx(2 / 3) and summary.sources == {"defying": pytest.approx(2 / 3)}
    picture(folder / "stray.png", True)
    with pytest.raises(MoleKeyError, match=r"1 pictures have no questions.*stray\.png"):
        score_pictures(folder, trees, Reader())
    (folder / "stray.png").unlink()
    (folder / "whoops_1.jpg").unlink()
    with pytest.raises(MoleKeyError, match=r"1 of 3 prompts have no picture.*whoops_1"):
        score_pictures(folder, trees, Reader())
    picture(folder / "whoops_0.png", True)
    with pytest.raises(MoleFileError, match="second picture of whoops_0"):
        score_pictures(folder, trees, Reader())


def test_metadata_joins_by_id_then_by_text(tmp_path):
    trees, folder = two_items(tmp_path), tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, (text, more) in enumerate(
        [("the same text", {"id": "whoops_1"}), ("the same text", {}), ("another", {}), ("none's", {})]
    ):
        picture(folder / f"{i:06d}.png", i == 0)
        rows.append({"file_name": f"{i:06d}.png", "text": text} | more)
    write_lines(folder / "metadata.jsonl", rows)
    summary, answers = score_pictures(folder, trees, Reader())
    # the second row's text is that of two items, one of which has a picture of its own
    assert {a.tree.id: a.score for a in answers} == {"whoops_1": 1, "whoops_0": 0, "whoops_2": 0}
    assert summary.unasked == 1


def encoder():
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pale", "green", "black", "yellow", "dark"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    return BertModel(config), BertTokenizer(vocab={word: k for k, word in enumerate(words)})


def test_the_nearest_choice_by_a_sentence_encoder(tmp_path):
    model, tokenizer = encoder()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    nearest = SentenceChoice.load(str(tmp_path), device="cpu")
    choices = ["black", "green", "yellow", "dark green"]
    vectors = []
    with torch.no_grad():
        for text in ["pale green", *choices]:
            states = model.eval()(**tokenizer(text, return_tensors="pt"))[0][0]
            vectors.append(states.mean(0) / states.mean(0).norm())
    cosines = [float(vectors[0] @ other) for other in vectors[1:]]
    assert nearest("pale green", choices) == choices[cosines.index(max(cosines))]
    torch.testing.assert_close(nearest.embed(["pale green", "black"])[0], vectors[0], atol=1e-5, rtol=1e-5)
    tree = Tree("x", (Question("0", "colour?", "green", tuple(choices)),))
    meant = nearest("pale green", choices)
    assert ask(tree, lambda q: "pale green", nearest).answers == {"0": meant}
    assert ask(tree, lambda q: "pale green").answers == {"0": "pale green"}
    # what is a choice stays what it is
    assert ask(tree, lambda q: "Green.", nearest).scores == {"0": 1}
    with pytest.raises(MoleFileError, match="no sentence encoder"):
        SentenceChoice.load(str(tmp_path / "nothing"))


def test_tifas_entries_are_joined_by_id(tmp_path):
    entry = {
        "id": "coco_1",
        "caption": "a dog",
        "question": "what animal?",
        "choices": ["cat", "dog"],
        "answer": "dog",
        "answer_type": "animal",
        "element_type": "animal/human",
        "element": "dog",
        "coco_val_id": "391895",
    }
    other = entry | {"id": "coco_2", "question": "is there a dog?", "choices": ["yes", "no"], "answer": "yes"}
    path = tmp_path / "tifa.json"
    path.write_text(
        json.dumps([entry, other, entry | {"question": "how many?", "answer": "1", "choices": ["1"]}])
    )
    first, second = load_tifa(path)
    assert (first.id, len(first.questions), second.id, len(second.questions)) == ("coco_1", 2, "coco_2", 1)
    summary = summarise([ask(first, lambda q: q.answer), ask(second, lambda q: "no")])
    assert summary.score == 0.5 and summary.spread == pytest.approx(0.5**0.5) and summary.accuracy == 2 / 3
    path.write_text(json.dumps([entry, entry | {"caption": "a cat"}]))
    with pytest.raises(MoleFileError, match="two captions"):
        load_tifa(path)


def test_requests_carry_the_skills_rules():
    for name, skill in SKILLS.items():
        text = request_text(skill, skill.seeds, 20)
        assert all(f"\n- {rule}" in text for rule in skill.rules)
        words = 30 if name in ("countbench", "coco", "whoops") else 50
        assert f"fewer than {words} words" in text
    assert "larger than three" in request_text(SKILLS["countbench"], ["a", "b", "c"], 5)
    plain = Skill("mine", ("a b", "c d", "e f"))
    assert "- " not in request_text(plain, plain.seeds, 5)
    for wrong in ("a rule", [""], [3]):
        with pytest.raises(MoleValueError, match="rules"):
            Skill("mine", ("a b", "c d", "e f"), rules=wrong)


def test_an_unknown_step_is_named(tmp_path):
    from mole_kernels.methods.selma.merging import expert_at
    from mole_kernels.methods.selma.project import Project

    (tmp_path / "low/run/step-00000002").mkdir(parents=True)
    with pytest.raises(MoleStateError, match=r"expected one of 2, got 3000"):
        expert_at(Project(tmp_path), "low", 3000)
