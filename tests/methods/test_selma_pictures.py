"""Stage 2: one picture per prompt, the same whoever makes it, none made twice, nothing half-written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleStateError, MoleTypeError, MoleValueError, MoleWarning
from mole_kernels.methods.selma.pictures import PictureSettings, draw_prompts, make_pictures, seed_of
from mole_kernels.methods.selma.project import Project, read_lines, write_lines
from mole_kernels.methods.selma.skills import Skill

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from selma_pipeline import tiny_pipeline  # noqa: E402

PROMPTS = ["one two three", "four five six", "blank blank seven", "eight", "nine zero one", "two"]
SETTINGS = PictureSettings(seed=7, batch=2, options={"num_inference_steps": 2})


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    """An unbroken run of the stage."""
    root = tmp_path_factory.mktemp("whole")
    make_pictures(project(root), "digits", pipe, SETTINGS)
    return root


def project(root, prompts=PROMPTS):
    made = Project(root)
    made.add_skills([Skill("digits", ("one two", "three four", "five six"))])
    write_lines(made.prompts_file("digits"), ({"prompt": text} for text in prompts))
    return made


def pixels(root):
    return {p.name: Image.open(p).tobytes() for p in sorted((root / "digits/pictures").glob("*.png"))}


class Painter:
    """Stands for a pipeline where only what is asked of it matters; pictures of one colour, drawn from each
    generator.
    """

    def __init__(self, stop_at=None, colour=None, flag=()):
        self.calls, self.stop_at, self.colour, self.flag = [], stop_at, colour, flag

    def __call__(self, prompt, generator, output_type):
        if self.stop_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(list(prompt))
        values = [self.colour or tuple(torch.randint(1, 256, (3,), generator=g).tolist()) for g in generator]
        return SimpleNamespace(
            images=[Image.new("RGB", (4, 4), value) for value in values],
            nsfw_content_detected=[text in self.flag for text in prompt],
        )


def test_pictures_metadata_and_seeds(whole):
    folder = whole / "digits/pictures"
    rows = read_lines(folder / "metadata.jsonl")
    assert [row["file_name"] for row in rows] == [f"{k:06d}.png" for k in range(6)] and [
        row["text"] for row in rows
    ] == PROMPTS
    assert [row["seed"] for row in rows] == [seed_of(7, k) for k in range(6)] and len(
        {row["seed"] for row in rows}
    ) == 6
    assert sorted(p.name for p in folder.iterdir()) == [*(row["file_name"] for row in rows), "metadata.jsonl"]
    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            assert image.size == (16, 16) and (image.info["prompt"], image.info["seed"]) == (
                row["text"],
                str(row["seed"]),
            )
    assert len(set(pixels(whole).values())) == 6
    assert Project(whole).noted("pictures", "digits") == {"pictures": 6, "flagged": 0}


def test_a_picture_can_be_made_again_from_its_seed_alone(whole, pipe):
    row = read_lines(whole / "digits/pictures/metadata.jsonl")[3]
    image = pipe(
        row["text"], generator=torch.Generator().manual_seed(row["seed"]), num_inference_steps=2
    ).images[0]
    kept = Image.open(whole / "digits/pictures" / row["file_name"])
    # a batch of two rounds otherwise than one
    assert max(abs(a - b) for a, b in zip(image.tobytes(), kept.tobytes())) <= 1


@pytest.mark.slow
def test_two_processes_make_each_picture_once(whole, tmp_path, pipe):
    project(tmp_path)
    # one is there already
    folder = tmp_path / "digits/pictures"
    folder.mkdir()
    (folder / "000001.png").write_bytes((whole / "digits/pictures/000001.png").read_bytes())
    options = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(HERE / "selma_pipeline.py"), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world"] for rank in ranks] == [2, 2] and sorted(len(rank["made"]) for rank in ranks) == [
        2,
        3,
    ]
    assert sorted(ranks[0]["made"] + ranks[1]["made"]) == [0, 2, 3, 4, 5]
    assert (folder / "metadata.jsonl").read_bytes() == (whole / "digits/pictures/metadata.jsonl").read_bytes()
    for name, kept in pixels(whole).items():
        assert max(abs(a - b) for a, b in zip(kept, pixels(tmp_path)[name])) <= 1


def test_a_restart_makes_only_what_is_missing(tmp_path):
    settings, made = PictureSettings(seed=7, batch=2), []
    draw_prompts(Painter(), PROMPTS, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        draw_prompts(Painter(stop_at=1), PROMPTS, tmp_path / "cut", settings)
    assert not (tmp_path / "cut/metadata.jsonl").exists()
    # as a kill leaves it
    (tmp_path / "cut/.000002.png.0123.tmp").write_bytes(b"half")
    painter = Painter()
    assert draw_prompts(
        painter, PROMPTS, tmp_path / "cut", settings, on_picture=made.append
    ) == 4 and made == [
        2,
        3,
        4,
        5,
    ]
    assert painter.calls == [PROMPTS[2:4], PROMPTS[4:6]]
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "cut")]
    assert files[0] == files[1]
    again = Painter()
    assert draw_prompts(
        again, [*PROMPTS, "ten more"], tmp_path / "cut", replace(settings, batch=5)
    ) == 1 and again.calls == [["ten more"]]
    assert len(read_lines(tmp_path / "cut/metadata.jsonl")) == 7


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch):
    draw_prompts(Painter(), PROMPTS[:2], tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MoleFileError, match=r"000002\.png.*No space left"):
        draw_prompts(Painter(), PROMPTS, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["000000.png", "000001.png"] and not list(
        tmp_path.glob(".*.tmp")
    )
    assert draw_prompts(Painter(), PROMPTS, tmp_path) == 4


def test_a_folder_of_other_prompts_or_seeds_is_refused(tmp_path):
    draw_prompts(Painter(), PROMPTS, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(MoleStateError, match=r"000001\.png: prompt: expected another, got four five six"):
        draw_prompts(Painter(), [PROMPTS[0], "another"], tmp_path)
    with pytest.raises(MoleStateError, match=r"000000\.png: seed"):
        draw_prompts(Painter(), PROMPTS, tmp_path, PictureSettings(seed=8))
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    (tmp_path / "000003.png").write_bytes(b"not a picture")
    with pytest.raises(MoleFileError, match=r"000003\.png.*\n.*remove it"):
        draw_prompts(Painter(), PROMPTS, tmp_path)


def test_other_settings_or_another_model_are_refused(tmp_path):
    there = project(tmp_path)
    make_pictures(there, "digits", Painter())
    with pytest.raises(MoleStateError, match=r"pictures of digits, options: expected \{\} as before"):
        make_pictures(there, "digits", Painter(), PictureSettings(options={"num_inference_steps": 3}))

    class Other(Painter):
        pass

    with pytest.raises(MoleStateError, match="model: expected 'Painter' as before, got 'Other'"):
        make_pictures(there, "digits", Other())
    assert make_pictures(there, "digits", Painter(), PictureSettings(batch=4)) == 0


def test_flagged_pictures_are_kept_apart_and_not_made_again(tmp_path):
    there = project(tmp_path)
    make_pictures(there, "digits", Painter(flag=[PROMPTS[1]]))
    folder = tmp_path / "digits/pictures"
    assert (tmp_path / "digits/pictures_flagged/000001.png").exists() and not (folder / "000001.png").exists()
    assert [row["text"] for row in read_lines(folder / "metadata.jsonl")] == [PROMPTS[0], *PROMPTS[2:]]
    assert there.noted("pictures", "digits") == {"pictures": 5, "flagged": 1}
    assert make_pictures(there, "digits", Painter()) == 0


def test_a_black_picture_is_named(tmp_path):
    with pytest.warns(MoleWarning, match=r"000000\.png is black all over"):
        draw_prompts(Painter(colour=(0, 0, 0)), PROMPTS[:1], tmp_path)


def test_what_the_stage_refuses(tmp_path):
    with pytest.raises(MoleTypeError, match="takes prompts"):
        draw_prompts(lambda latents: None, PROMPTS, tmp_path)
    with pytest.raises(MoleStateError, match="expected 1 pictures"):
        draw_prompts(
            type(
                "None_",
                (Painter,),
                {"__call__": lambda self, prompt, generator, output_type: SimpleNamespace(images=[])},
            )(),
            PROMPTS,
            tmp_path,
        )
    with pytest.raises(MoleValueError, match="batch"):
        PictureSettings(batch=0)
    with pytest.raises(MoleValueError, match="generator"):
        PictureSettings(options={"generator": 1})
    empty = project(tmp_path / "empty", prompts=[])
    with pytest.raises(MoleStateError, match="skill digits: has no prompts"):
        make_pictures(empty, "digits", Painter())
