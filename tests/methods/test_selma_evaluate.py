"""DSG's parent rule, TIFA's accuracy, the files they come in, and who answers."""

import json

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleValueError
from mole_kernels.methods.selma.evaluate import ask, closest, normal, score_pictures, summarise
from mole_kernels.methods.selma.project import read_lines, write_lines
from mole_kernels.methods.selma.questions import Question, Tree, load_dsg, load_questions, load_tifa, tree
from mole_kernels.methods.selma.vqa import TransformersVQA

# a motorcycle that is blue and stands beside a dog with a hat; 5 hangs on 3 and 4, 6 on 5
DSG = tree(
    "a blue motorcycle beside a dog in a hat",
    {"1": "motorcycle?", "2": "blue?", "3": "dog?", "4": "hat?", "5": "dog wears hat?", "6": "hat too big?"},
    {"2": ["1"], "5": ["3", "4"], "6": ["5"]},
)
CASES = {
    "all right": ({}, [1, 1, 1, 1, 1, 1]),
    "a leaf": ({"2": "no"}, [1, 0, 1, 1, 1, 1]),
    "a parent rules out its child": ({"1": "no"}, [0, 0, 1, 1, 1, 1]),
    "one of two parents is enough": ({"4": "no"}, [1, 1, 1, 0, 0, 0]),
    "a grandparent rules out, whatever lies between": (
        {"3": "no", "5": "yes", "6": "yes"},
        [1, 1, 0, 1, 0, 0],
    ),
    "what is neither yes nor no is wrong": ({"1": "perhaps"}, [0, 0, 1, 1, 1, 1]),
    "nothing": (dict.fromkeys("123456", "no"), [0, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("said, scores", CASES.values(), ids=CASES)
def test_the_parent_rule(said, scores):
    found = ask(DSG, lambda question: said.get(question.id, "yes"))
    assert [found.scores[k] for k in "123456"] == scores and found.score == sum(scores) / 6


def test_children_before_parents_in_the_file_change_nothing():
    backwards = Tree(DSG.prompt, tuple(reversed(DSG.questions)))
    assert (
        ask(backwards, lambda q: "no" if q.id == "3" else "yes").scores
        == ask(DSG, lambda q: "no" if q.id == "3" else "yes").scores
    )


def test_questions_that_are_ruled_out_are_not_put():
    put = []
    ask(DSG, lambda question: put.append(question.id) or "no")
    assert sorted(put) == ["1", "3", "4"]


def test_figures_over_pictures():
    one = Tree(
        "one", (Question("1", "?", category="object"), Question("2", "?", parents=("1",), category="colour"))
    )
    two = Tree("two", (Question("1", "?", "three", ("two", "three"), category="count"),))
    found = [ask(one, lambda q: "no"), ask(two, lambda q: "Three."), ask(two, lambda q: "seven")]
    summary = summarise(found)
    # per picture 0, 1, 0; over questions 1 of 4
    assert summary.score == pytest.approx(1 / 3) and summary.accuracy == 0.25
    assert summary.categories == {"colour": 0.0, "count": 0.5, "object": 0.0}
    assert (summary.pictures, summary.questions, summary.ruled_out, summary.unclear) == (3, 4, 1, 1)


@pytest.mark.parametrize(
    "said, choices, means",
    [
        ("Yes, there is one.", ("yes", "no"), "yes"),
        ("  NO!", ("yes", "no"), "no"),
        ("nothing", ("yes", "no"), "nothing"),
        ("yesterday", ("yes", "no"), "yesterday"),
        ("the red  bus", ("red bus", "red"), "red bus"),
        ("A Cat", (), "cat"),
        ("red bus stop", ("red", "red bus"), "red bus stop"),
        ("two", ("two", "two dogs"), "two"),
        ("c++", ("c++", "c"), "c++"),
    ],
)
def test_what_an_answer_means(said, choices, means):
    assert closest(said, choices) == means


def test_trees_that_are_none():
    for questions, message in (
        ((), "at least one"),
        ((Question("1", "?"), Question("1", "!")), "ids that differ"),
        ((Question("1", "?", parents=("9",)),), "parents among them"),
        ((Question("1", "?", parents=("2",)), Question("2", "?", parents=("1",))), "in a ring"),
        ((Question("1", "?", parents=("1",)),), "in a ring"),
    ):
        with pytest.raises(MoleValueError, match=message):
            Tree("a prompt", questions)


def test_dsg_and_tifa_files(tmp_path):
    path = tmp_path / "dsg.csv"
    head = "item_id,text,category_broad,proposition_id,dependency,question_natural_language\n"
    path.write_text(
        head
        + 'a,"two cats, one hat",entity,1,0,Are there cats?\na,"two cats, one hat",other,2,"1, 3",Is it on?\n'
        'a,"two cats, one hat",entity,3,,Is there a hat?\nb,a dog,entity,1,0,Is there a dog?\n'
    )
    cats, dog = load_questions(path)
    assert (cats.prompt, dog.prompt) == ("two cats, one hat", "a dog") and (cats.id, dog.id) == ("a", "b")
    assert [q.id for q in cats.questions] == ["1", "2", "3"] and cats.oddities == {"later parent": 1}
    assert (
        cats.questions[1].parents == ("1", "3")
        and cats.questions[1].category == "other"
        and dog.questions[0].parents == ()
    )
    tifa = tmp_path / "tifa.json"
    entry = {
        "caption": "a dog",
        "question": "what animal?",
        "answer": "dog",
        "choices": ["cat", "dog"],
        "element_type": "animal",
    }
    tifa.write_text(
        json.dumps(
            [entry, entry | {"question": "is there a dog?", "answer": "yes", "choices": ["yes", "no"]}]
        )
    )
    (one,) = load_questions(tifa)
    assert [(q.text, q.answer, q.choices) for q in one.questions] == [
        ("what animal?", "dog", ("cat", "dog")),
        ("is there a dog?", "yes", ("yes", "no")),
    ]
    for content in (
        "",
        "item_id,text\n1,2\n",
        head,
        head + "a,b\n",
        head + "a,b,c,1,0,\n",
        head + "a,x,c,1,0,q?\na,y,c,2,0,q?\n",
    ):
        path.write_text(content)
        with pytest.raises(MoleFileError, match=r"dsg\.csv"):
            load_dsg(path)
    for content in (
        "",
        "{}",
        "[]",
        "[1]",
        json.dumps([entry | {"choices": "yes"}]),
        json.dumps([entry | {"answer": ""}]),
    ):
        tifa.write_text(content)
        with pytest.raises(MoleFileError, match=r"tifa\.json"):
            load_tifa(tifa)


class Colours:
    """Answers by a picture's first pixel, so that wrong pictures are seen."""

    name = "colours"

    def __init__(self, stop_at=99):
        self.asked, self.stop_at = 0, stop_at

    def answer(self, image, question, choices):
        if self.asked == self.stop_at:
            raise KeyboardInterrupt
        self.asked += 1
        red, green, _ = image.getpixel((0, 0))
        return "yes" if ("red" in question) == (red > green) else "no"


@pytest.fixture
def pictures(tmp_path):
    for k, colour in enumerate([(255, 0, 0), (0, 255, 0), (255, 0, 0)]):
        Image.new("RGB", (2, 2), colour).save(tmp_path / f"{k:06d}.png")
    rows = [
        {"file_name": f"{k:06d}.png", "text": text} for k, text in enumerate(["red", "green", "green thing"])
    ]
    write_lines(tmp_path / "metadata.jsonl", rows)
    return tmp_path


TREES = [
    tree("red", {"1": "is it red?"}),
    tree("green thing", {"1": "is it green?", "2": "a thing?"}, {"2": ["1"]}),
]


def test_an_evaluation_goes_on_with_the_answers_it_has(pictures):
    file = pictures / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_pictures(pictures, TREES, Colours(stop_at=1), answers_file=file)
    assert len(read_lines(file)) == 1
    again = Colours()
    summary, found = score_pictures(pictures, TREES, again, answers_file=file)
    assert (
        again.asked == 1
        and summary.score == 0.5
        and [one.score for one in found] == [1.0, 0.0]
        and summary.ruled_out == 1
    )
    done = Colours()
    assert score_pictures(pictures, TREES, done, answers_file=file)[0] == summary and done.asked == 0
    other = Colours()
    other.name = "another"
    score_pictures(pictures, TREES, other, answers_file=file)
    assert other.asked == 2


def test_what_an_evaluation_refuses(pictures):
    with pytest.raises(MoleKeyError, match=r"1 of 2 prompts have no picture: \['blue'\]"):
        score_pictures(pictures, [TREES[0], tree("blue", {"1": "?"})], Colours())
    (pictures / "000000.png").write_bytes(b"broken")
    with pytest.raises(MoleFileError, match=r"000000\.png"):
        score_pictures(pictures, TREES[:1], Colours())
    write_lines(pictures / "metadata.jsonl", [{"file_name": "../secret.png", "text": "red"}])
    with pytest.raises(MoleFileError, match="line 1"):
        score_pictures(pictures, TREES[:1], Colours())
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(MoleFileError, match=r"metadata\.jsonl"):
        score_pictures(pictures, TREES[:1], Colours())


def tokenizer():
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "?", "yes", "no"]
    return BertTokenizer(vocab={word: k for k, word in enumerate(words)}), len(words)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 16,
}


def vilt():
    from transformers import ViltConfig, ViltForQuestionAnswering, ViltImageProcessorPil, ViltProcessor

    words, size = tokenizer()
    torch.manual_seed(0)
    labels = dict(enumerate(["yes", "red", "no"]))
    config = ViltConfig(
        **SMALL,
        vocab_size=size,
        max_position_embeddings=40,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    images = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=16)
    return ViltForQuestionAnswering(config), ViltProcessor(image_processor=images, tokenizer=words)


def test_a_model_that_classifies_answers(tmp_path):
    model, processor = vilt()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = TransformersVQA.load(str(tmp_path), device="cpu")
    assert loaded.name.startswith("ViltForQuestionAnswering")
    image = Image.new("RGB", (40, 32), (255, 0, 0))
    for answerer in (TransformersVQA(model, processor), loaded):
        with torch.no_grad():
            logits = (
                answerer.model(**processor(images=image, text="is it red ?", return_tensors="pt"))
                .logits[0]
                .tolist()
            )
        assert answerer.answer(image, "is it red ?", ("no", "yes")) == (
            "yes" if logits[0] > logits[2] else "no"
        )
        assert answerer.answer(image, "is it red ?", ("no",)) == "no"
        assert (
            answerer.answer(image, "is it red ?", ())
            == ["yes", "red", "no"][max(range(3), key=logits.__getitem__)]
        )
        assert answerer.answer(image, "is it red ? " * 40, ("blue",)) in ("yes", "red", "no")
    with pytest.raises(MoleFileError, match="no question answering model"):
        TransformersVQA.load(str(tmp_path / "none"))


def test_a_model_that_writes_answers():
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor

    words, size = tokenizer()
    torch.manual_seed(0)
    text = {
        "vocab_size": size,
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=SMALL, projection_dim=16))
    processor = BlipProcessor(
        image_processor=BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer=words
    )
    said = TransformersVQA(model, processor).answer(Image.new("RGB", (32, 32)), "is it red ?", ("yes", "no"))
    assert isinstance(said, str) and set(normal(said).split()) <= {"is", "it", "red", "?", "yes", "no"}
