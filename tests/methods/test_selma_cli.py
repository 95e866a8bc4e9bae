"""`mole-kernels selma`: all stages on the demo's digits, and how they fail."""

import json
import sys
from pathlib import Path

import pytest

from mole_kernels.cli import app
from mole_kernels.io import load_expert
from mole_kernels.methods.selma.project import Project, read_lines

sys.path.insert(0, str(Path(__file__).parent))
from test_selma_evaluate import vilt


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the entry point; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*args):
        words = ["train", "selma", *args[1:]] if args[0] == "train" else ["selma", *args]
        monkeypatch.setattr(sys, "argv", ["mole-kernels", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def given(tmp_path):
    """Two skills of the demo's captions and a file of prompts for each."""
    seeds = {
        "low": ["one two blank", "blank zero three", "four blank one"],
        "high": ["five six blank", "blank nine seven", "eight blank six"],
    }
    (tmp_path / "skills.json").write_text(
        json.dumps({name: {"seeds": lines} for name, lines in seeds.items()})
    )
    (tmp_path / "low.txt").write_text("zero zero one\ntwo two blank\none two blank\nblank blank four\n")
    (tmp_path / "high.txt").write_text("nine nine five\nsix blank blank\nseven seven eight\n")
    return tmp_path


@pytest.mark.slow
def test_every_stage_from_prompts_to_figures(cli, given):
    work, skills = given / "run", ["--skill-file", given / "skills.json"]
    assert cli("prompts", work, *skills, "--text-file", given, "--count", 2)[0] == 0
    assert (
        cli("pictures", work, "--model", "demo", "--sampling-steps", 1, "--batch-size", 2, "--skill", "low")[
            0
        ]
        == 0
    )
    code, out, err = cli("pictures", work, "--model", "demo", "--sampling-steps", 1, "--batch-size", 2)
    assert code == 0 and "0 made by this process now" in out and "2 made by this process now" in out
    settings = (
        "--model demo --steps 1 --rank 2 --resolution 24x72 --no-flip --accumulation 1 --batch-size 2".split()
    )
    assert cli("train", work, *settings)[0] == 0
    code, out, err = cli("merge", work)
    assert code == 0 and "2 experts with weight 1/2 each, delta_mean, ranks 4" in out
    assert load_expert(work / "merged.safetensors").ranks() == {4}
    code, out, err = cli("status", work)
    assert (
        code == 0 and "2 prompts" in out and "2 pictures" in out and "1 steps" in out and "merged: yes" in out
    )
    assert [row["text"] for row in read_lines(work / "low/pictures/metadata.jsonl")] == Project(work).prompts(
        "low"
    )

    questions = [
        {"caption": "one two three", "question": f"{word}?", "answer": word, "choices": ["yes", "no"]}
        for word in ("yes", "no")
    ]
    (given / "tifa.json").write_text(json.dumps(questions))
    drawn = given / "drawn"
    assert (
        cli(
            "draw",
            given / "tifa.json",
            "--out",
            drawn,
            "--model",
            "demo",
            "--sampling-steps",
            1,
            "--adapter",
            work / "merged.safetensors",
            "--scale",
            "unet=0.5",
        )[0]
        == 0
    )
    for part in vilt():
        part.save_pretrained(given / "vqa")
    code, out, err = cli(
        "evaluate", given / "tifa.json", drawn, "--vqa", given / "vqa", "--out", given / "figures.json"
    )
    assert code == 0, err
    figures = json.loads((given / "figures.json").read_text())
    assert figures["pictures"] == 1 and figures["questions"] == 2 and figures["score"] in (0.0, 0.5, 1.0)
    assert len(read_lines(drawn / "answers.jsonl")) == 2


def test_what_a_user_gets_wrong(cli, given):
    skills = ["--skill-file", given / "skills.json"]
    for args, message in (
        (["prompts", given / "run"], "--skill: expected at least one of localized_narratives"),
        (["prompts", given / "run", "--skill", "flying"], "got flying"),
        (["prompts", given / "run", "--skill", "coco"], "--llm, --url with --llm, or --text-file"),
        (["prompts", given / "run", *skills, "--text-file", given / "low.txt"], "a folder of SKILL.txt"),
        (
            ["prompts", given / "run", *skills, "--text-file", given, "--llm", "x"],
            "expected one of --text-file",
        ),
        (["prompts", given / "run", "--skill", "coco", "--url", "nowhere", "--llm", "x"], "url"),
        (["pictures", given / "run", "--model", "demo"], "holds no skills yet"),
        (["merge", given / "run"], "holds no skills yet"),
        (["evaluate", given / "none.csv", given, "--vqa", "x"], "none.csv"),
    ):
        code, _, err = cli(*args)
        assert code == 2 and message in err and "Traceback" not in err, (args, err)
    assert not (given / "run").exists()
    assert cli("prompts", given / "run", *skills, "--text-file", given, "--count", 2)[0] == 0
    assert "no expert yet for low, high" in cli("merge", given / "run")[2]
    assert "HEIGHTxWIDTH" in cli("train", given / "run", "--model", "demo", "--resolution", "wide")[2]
    assert "no pipeline can be read" in cli("pictures", given / "run", "--model", given / "nothing")[2]


def test_help_names_every_stage(cli):
    code, out, _ = cli("--help")
    assert code == 0 and all(
        name in out for name in ("prompts", "pictures", "train selma", "merge", "draw", "evaluate", "status")
    )
