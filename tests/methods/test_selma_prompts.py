"""Stage 1: what is too like, what an answer holds, exact counts, and a restart that repeats nothing."""

import json
import os
from dataclasses import replace

import pytest
import torch

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError
from mole_kernels.methods.selma import project as project_room
from mole_kernels.methods.selma.generators import FileText, TransformersText, UnusableAnswer
from mole_kernels.methods.selma.project import Project, read_lines
from mole_kernels.methods.selma.prompt_text import clean_prompt, parse_prompts, request_text
from mole_kernels.methods.selma.prompts import PromptSettings, write_prompts
from mole_kernels.methods.selma.similarity import SimilarityFilter
from mole_kernels.methods.selma.skills import SKILLS, Skill, load_skills

SKILL = Skill("colours", ("a red ball", "a blue cup", "a green hat"), "things of one colour")
SMALL = PromptSettings(count=10, more=4, wait=0.0, attempts=3, patience=5)


class Writer:
    """Numbered answers made of unlike words; `spoil` may replace an answer."""

    name = "writer"

    def __init__(self, spoil=None):
        self.spoil, self.asked, self.seeds = spoil or {}, [], []

    def write(self, request, number, seed):
        self.asked.append((number, request))
        self.seeds.append(seed)
        answer = self.spoil.get(len(self.asked) - 1)
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None:
            return answer
        return "\n".join(f"{4 + i}. word{number}x{i} only{number}x{i}" for i in range(4))


# -- likeness
# -------------------------------------------------------------------------------------------------------------------------


def test_a_duplicate_is_rejected_and_a_disjoint_prompt_kept():
    known = SimilarityFilter(["A dog sleeps on a sofa", "two owls"])
    assert known.clash("a dog sleeps, on a SOFA!") == ("A dog sleeps on a sofa", 1.0)
    assert known.clash("three kites over water") is None


def test_the_limit_itself_is_kept_though_rouge_score_rounds_above_it():
    from rouge_score.rouge_scorer import RougeScorer

    assert RougeScorer(["rougeL"]).score("a b c d e", "a b c d f")["rougeL"].fmeasure > 0.8
    assert SimilarityFilter(["a b c d e"]).clash("a b c d f") is None
    # 2·5/(6+6) = 0.833; 2·4/(4+5) = 0.889
    assert SimilarityFilter(["a b c d e f"]).clash("a b c d e g").f1 == pytest.approx(10 / 12)
    assert SimilarityFilter(["a b c d e"]).clash("a b c d").f1 == pytest.approx(8 / 9)
    assert SimilarityFilter(["a b c d e f"], limit=0.84).clash("a b c d e g") is None


def test_order_counts_and_the_shortcut_changes_no_verdict():
    from rouge_score.rouge_scorer import RougeScorer

    # the same words in another order have a short common subsequence
    assert SimilarityFilter(["a b c d e"]).clash("e d c b a") is None
    g = torch.Generator().manual_seed(0)
    scorer = RougeScorer(["rougeL"])
    texts = [
        " ".join("abcd"[k] for k in torch.randint(0, 4, (n,), generator=g))
        for n in (3, 4, 5, 6, 7)
        for _ in range(8)
    ]
    for one in texts:
        for two in texts:
            score = scorer.score(one, two)["rougeL"].fmeasure
            if abs(score - 0.8) > 1e-9:
                assert (SimilarityFilter([one]).clash(two) is not None) == (score > 0.8), (one, two)


def test_prompts_without_latin_letters_are_compared_too():
    assert SimilarityFilter(["красный мяч на снегу"]).clash("Красный мяч на снегу") is not None
    assert SimilarityFilter(["красный мяч на снегу"]).clash("синяя чашка на столе") is None


# -- answers
# --------------------------------------------------------------------------------------------------------------------------

ANSWERS = {
    "plain": ("4. a cat\n5. a dog", ["a cat", "a dog"]),
    "introduced": ("Sure! Here are two:\n\n4) a cat\n\n5) a dog\n\nShall I write more?", ["a cat", "a dog"]),
    "continued": (" a cat\n5. a dog\n6. a cow", ["a cat", "a dog", "a cow"]),
    "markdown": ('**4.** **"a cat"**\n- 5: `a dog`', ["a cat", "a dog"]),
    "wrapped": ("4. a cat on\n   a mat\n5. a dog", ["a cat on a mat", "a dog"]),
    "labelled": ("Prompt 4: a cat\nPrompt 5: a dog", ["a cat", "a dog"]),
    "bullets": ("Here:\n- a cat\n* a dog\n• a cow", ["a cat", "a dog", "a cow"]),
    "json": ('```json\n["a cat", "a dog"]\n```', ["a cat", "a dog"]),
    "fenced": ("```\n4. a cat\n5. a dog\n```", ["a cat", "a dog"]),
    "number inside": ("4. a room with 2. floor sign\n5. 3 cats", ["a room with 2. floor sign", "3 cats"]),
    "empty items": ("4.\n5. ...\n6. 123\n7. a cat", ["a cat"]),
    "control characters": ("4. a \x1b[31mcat\x07\u202e", ["a [31mcat"]),
    "chatter": ("I am sorry, but I cannot do that.", []),
    "empty": ("", []),
    "broken json": ('["a cat", ', []),
}


@pytest.mark.parametrize("answer, found", ANSWERS.values(), ids=ANSWERS)
def test_what_an_answer_holds(answer, found):
    assert parse_prompts(answer, start=4) == found


def test_a_prompt_that_is_too_long_is_none():
    assert clean_prompt("a" * 1000) == "a" * 1000 and clean_prompt("a" * 1001) is None
    assert clean_prompt('"' * 4_000_000) is None and parse_prompts("[" * 100_000 + "]") == []
    assert len(parse_prompts("1. a\n" * 5000)) == 1000


def test_a_request_shows_what_it_is_given_and_counts_on():
    text = request_text(SKILL, ["one fish", "two fish", "no fish"], 20)
    assert (
        "1. one fish\n2. two fish\n3. no fish" in text
        and "from 4 to 23" in text
        and "things of one colour" in text
    )


# -- the stage
# ------------------------------------------------------------------------------------------------------------------------


def test_exact_counts_and_three_of_the_accepted_in_each_request(tmp_path):
    project, writer = Project(tmp_path), Writer()
    found = write_prompts(project, SKILL, writer, SMALL)
    assert len(found) == 10 and project.prompts("colours") == found and len(set(found)) == 10
    rows = read_lines(tmp_path / "colours/requests.jsonl")
    assert [len(row["accepted"]) for row in rows] == [4, 4, 2] and len(rows[2]["spare"]) == 2
    assert sorted(rows[0]["shown"]) == sorted(SKILL.seeds)
    for k, row in enumerate(rows):
        pool = [*SKILL.seeds, *(text for before in rows[:k] for text in before["accepted"])]
        assert len(set(row["shown"])) == 3 and set(row["shown"]) <= set(pool)
        assert all(text in writer.asked[k][1] for text in row["shown"])
    assert set(rows[2]["shown"]) != set(SKILL.seeds)
    assert project.noted("prompts", "colours") == {"prompts": 10, "requests": 3, "rejected": 0, "spare": 2}


def test_what_is_like_a_seed_or_an_accepted_prompt_is_recorded_with_its_reason(tmp_path):
    writer = Writer(
        {
            0: "4. A red ball\n5. a quick brown fox jumps high\n6. a quick brown fox jumps high!\n7. seven tall ships"
        }
    )
    found = write_prompts(Project(tmp_path), SKILL, writer, replace(SMALL, count=2))
    assert found == ["a quick brown fox jumps high", "seven tall ships"]
    (row,) = read_lines(tmp_path / "colours/requests.jsonl")
    assert [(r["prompt"], r["like"], r["rouge_l"]) for r in row["rejected"]] == [
        ("A red ball", "a red ball", 1.0),
        ("a quick brown fox jumps high!", "a quick brown fox jumps high", 1.0),
    ]


@pytest.mark.parametrize("broken", [KeyboardInterrupt(), MemoryError()], ids=["ctrl-c", "memory"])
def test_a_restart_repeats_nothing_and_ends_where_an_unbroken_run_does(tmp_path, broken):
    whole = write_prompts(Project(tmp_path / "whole"), SKILL, Writer(), SMALL)
    with pytest.raises(type(broken)):
        write_prompts(Project(tmp_path / "cut"), SKILL, Writer({2: broken}), SMALL)
    assert (
        len(read_lines(tmp_path / "cut/colours/requests.jsonl")) == 2
        and not (tmp_path / "cut/colours/prompts.jsonl").exists()
    )
    writer = Writer()
    assert write_prompts(Project(tmp_path / "cut"), SKILL, writer, SMALL) == whole
    assert [number for number, _ in writer.asked] == [2]
    again = Writer()
    assert write_prompts(Project(tmp_path / "cut"), SKILL, again, SMALL) == whole and not again.asked
    # a writer that begins its list anew after a restart brings nothing twice
    more = write_prompts(Project(tmp_path / "cut"), SKILL, again, replace(SMALL, count=12))
    assert more[:10] == whole and len(set(more)) == 12


def test_nonsense_is_tried_again_with_other_seeds_then_said_with_progress_kept(tmp_path):
    waits, project = [], Project(tmp_path)
    slow = UnusableAnswer("writer", "later")
    slow.wait = 7.0
    writer = Writer({0: "I cannot", 1: slow})
    write_prompts(project, SKILL, writer, replace(SMALL, count=4, wait=1.0), sleep=waits.append)
    assert (
        waits == [1.0, 7.0]
        and [number for number, _ in writer.asked] == [0, 0, 0]
        and len(set(writer.seeds)) == 3
    )
    assert read_lines(tmp_path / "colours/requests.jsonl")[0]["attempts"] == 3
    useless = Writer(dict.fromkeys(range(9), "no list here"))
    with pytest.raises(
        MoleStateError,
        match=r"request 2: no usable answer in 3 attempts.*\n.*4 prompts accepted so far are kept",
    ):
        write_prompts(project, SKILL, useless, replace(SMALL, wait=1.0), sleep=waits.append)
    assert waits[2:] == [1.0, 2.0] and len(useless.asked) == 3
    assert len(write_prompts(project, SKILL, Writer(), SMALL)) == 10


def test_a_writer_that_repeats_itself_is_stopped(tmp_path):
    same = Writer(dict.fromkeys(range(99), "4. one lonely pine tree"))
    with pytest.raises(MoleStateError, match="5 requests in a row brought nothing new; 1 of 10"):
        write_prompts(Project(tmp_path), SKILL, same, SMALL)
    assert len(same.asked) == 6


def test_other_settings_or_seeds_are_refused_and_change_nothing(tmp_path):
    project = Project(tmp_path)
    write_prompts(project, SKILL, Writer(), SMALL)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for change in (
        lambda: write_prompts(project, SKILL, Writer(), replace(SMALL, limit=0.7)),
        lambda: write_prompts(project, replace(SKILL, seeds=("x y", "y z", "z x")), Writer(), SMALL),
        lambda: write_prompts(project, SKILL, Writer(), replace(SMALL, count=3)),
    ):
        with pytest.raises(MoleStateError, match=r"as before|other seeds|at most 3"):
            change()
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    project = Project(tmp_path)

    class Filling(Writer):
        def write(self, request, number, seed):
            if number == 1:
                monkeypatch.setattr(os, "fsync", full)
            return super().write(request, number, seed)

    def full(handle):
        raise OSError(28, "No space left on device")

    with pytest.raises(MoleFileError, match="No space left"):
        write_prompts(project, SKILL, Filling(), SMALL)
    monkeypatch.undo()
    assert len(read_lines(tmp_path / "colours/requests.jsonl")) == 1 and not list(tmp_path.rglob("*.tmp"))
    assert len(write_prompts(project, SKILL, Writer(), SMALL)) == 10


# -- skills, files, models
# ------------------------------------------------------------------------------------------------------------


def test_the_papers_skills_have_three_seeds_each_that_are_unlike():
    assert set(SKILLS) >= {"localized_narratives", "countbench", "diffusiondb", "coco", "whoops"}
    for skill in SKILLS.values():
        for k, seed in enumerate(skill.seeds):
            assert SimilarityFilter(skill.seeds[:k]).clash(seed) is None


@pytest.mark.parametrize(
    "name, seeds",
    [("", "abc"), ("../up", "abc"), ("a", ()), ("a", "aab"), ("a", ("x", "y", " ")), ("a", None)],
)
def test_skills_that_are_none(name, seeds):
    with pytest.raises(MoleValueError, match=r"Skill|skill"):
        Skill(name, seeds if seeds is None else tuple(seeds))


def test_skills_of_a_file(tmp_path):
    path = tmp_path / "skills.json"
    path.write_text(
        json.dumps(
            {"b": {"seeds": ["x y", "y z", "z x"], "about": "letters"}, "a": {"seeds": ["1 a", "2 b", "3 c"]}}
        )
    )
    assert list(load_skills(path)) == ["b", "a"] and load_skills(path)["b"].about == "letters"
    for bad, error in (
        ("{", MoleFileError),
        ("[]", MoleFileError),
        ('{"a": {"seeds": ["x"]}}', MoleValueError),
    ):
        path.write_text(bad)
        with pytest.raises(error):
            load_skills(path)
    with pytest.raises(MoleFileError):
        load_skills(tmp_path / "none.json")


def test_a_file_as_writer(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text(
        "\ufeffa red ball\n\nsilver moon above hills\n2 cats\nsilver moon above hills\ntall ships at sea\n",
        "utf-8",
    )
    project = Project(tmp_path / "run")
    assert write_prompts(project, SKILL, FileText(path, batch=2), replace(SMALL, count=3)) == [
        "silver moon above hills",
        "2 cats",
        "tall ships at sea",
    ]
    with pytest.raises(MoleStateError, match="all its 5 prompts have been read"):
        write_prompts(project, SKILL, FileText(path, batch=2), replace(SMALL, count=4))
    assert len(project.prompts("colours")) == 3
    for content in (b"", b"\n \n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(MoleFileError):
            FileText(path)


def test_another_writer_may_take_over_and_a_file_begins_at_its_first_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("silver moon above hills\ntwo cats\ntall ships at sea\n")
    project = Project(tmp_path / "run")
    write_prompts(project, SKILL, Writer(), replace(SMALL, count=4))
    found = write_prompts(project, SKILL, FileText(path, batch=2), replace(SMALL, count=7))
    assert found[4:] == ["silver moon above hills", "two cats", "tall ships at sea"]
    assert [row["by"] for row in read_lines(tmp_path / "run/colours/requests.jsonl")] == [
        "writer",
        "file lines.txt",
        "file lines.txt",
    ]


def test_a_local_model_as_writer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["<s>", "?", "\n", *"red ball cat dog a one two".split()])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<s>", unk_token="?")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=256,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    writer = TransformersText.load(str(tmp_path / "model"), device="cpu", max_new_tokens=12)
    state = torch.get_rng_state()
    first, again = ([writer._sample("a red ball", seed)[0] for seed in range(6)] for _ in range(2))
    assert first == again and len(set(first)) > 3 and set(" ".join(first).split()) <= set(vocabulary)
    assert torch.equal(torch.get_rng_state(), state)
    # a random model writes no list: said, not looped over
    with pytest.raises(MoleStateError, match="no usable answer in 2 attempts"):
        write_prompts(Project(tmp_path / "run"), SKILL, writer, replace(SMALL, attempts=2))
    with pytest.raises(MoleFileError, match="no language model"):
        TransformersText.load(str(tmp_path))


def test_manifests_that_are_none(tmp_path):
    project = Project(tmp_path)
    with pytest.raises(MoleStateError, match="holds no skills yet"):
        project.choose()
    for content in (
        "",
        "[]",
        "{}",
        '{"format": "other"}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
    ):
        (tmp_path / "manifest.json").write_text(content, "latin1")
        with pytest.raises(MoleFileError, match="manifest"):
            project.skills()
    (tmp_path / "manifest.json").unlink()
    project.add_skills([SKILL])
    with pytest.raises(MoleValueError, match="one of colours"):
        project.choose(["others"])
    with pytest.raises(MoleStateError, match="has no prompts"):
        project.prompts("colours")
    (tmp_path / "colours/prompts.jsonl").parent.mkdir()
    (tmp_path / "colours/prompts.jsonl").write_text('{"prompt": "a b"}\n{"text": "c d"}\n')
    with pytest.raises(MoleFileError, match=r"prompts\.jsonl, line 2: expected prompt \(str\)"):
        project.prompts("colours")
    (tmp_path / "colours/requests.jsonl").write_text('{"accepted": "a b"}\n')
    with pytest.raises(MoleFileError, match=r"requests\.jsonl, line 1"):
        write_prompts(project, SKILL, Writer(), SMALL)
    (tmp_path / "x.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(MoleFileError, match="line 2"):
        project_room.read_lines(tmp_path / "x.jsonl")
