"""What `mole-kernels selma` does. Everything that can be wrong is looked at before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mole_kernels.cli import pipelines
from mole_kernels.cli.screen import done, facts, number, out, table
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.files.writer import atomic_write
from mole_kernels.methods.selma.evaluate import score_pictures
from mole_kernels.methods.selma.generators import FileText, TextGenerator, TransformersText
from mole_kernels.methods.selma.merging import merge_skills, save_merged, skill_bank
from mole_kernels.methods.selma.pictures import PictureSettings, draw_prompts, make_pictures
from mole_kernels.methods.selma.project import STAGES, Project
from mole_kernels.methods.selma.prompts import PromptSettings, kept_requests, write_prompts
from mole_kernels.methods.selma.questions import load_questions
from mole_kernels.methods.selma.skills import SKILLS, Skill, load_skills
from mole_kernels.methods.selma.train import PRESETS, SkillTraining, join_pictures, size_multiple, train_skill
from mole_kernels.methods.selma.vqa import TransformersVQA
from mole_kernels.patching.apply import patch
from mole_kernels.training.processes import processes
from mole_kernels.training.progress import ProgressLine

Given = Mapping[str, Any]
JOINT = "joint"


def write(given: Given) -> None:
    """Stage 1."""
    asked, project = _plain(given), Project(given["work"])
    settings = PromptSettings(
        count=asked["count"],
        more=asked["more"],
        limit=asked["limit"],
        seed=asked["seed"],
        attempts=asked["attempts"],
    )
    chosen = _skills(project, asked)
    writers = _writers(asked, chosen)
    for skill in chosen:
        title, kept = f"prompts of {skill.name}", kept_requests(project, skill.name)
        with _progress(title, settings.count, sum(len(row["accepted"]) for row in kept)) as line:

            def show(have: int, _: int, line: ProgressLine = line) -> None:
                line.update(have, samples=have)

            write_prompts(project, skill, writers[skill.name], settings, on_request=show)
        figures = project.noted("prompts", skill.name) or {}
        done(
            str(project.prompts_file(skill.name)),
            ", ".join(f"{value} {key}" for key, value in figures.items()),
        )


def paint(given: Given) -> None:
    """Stage 2."""
    asked, project = _plain(given), Project(given["work"])
    names = project.choose(asked["skill"] or ())
    wanted = {name: len(project.prompts(name)) for name in names}
    pipe = read_pipeline(asked["model"], asked["dtype"])
    for name in names:
        with _counting(f"pictures of {name}", wanted[name]) as count:
            made = make_pictures(project, name, pipe, _settings(asked), on_picture=count)
        figures = project.noted("pictures", name) or {}
        _say_done(
            project.pictures_folder(name),
            f"{figures.get('pictures', 0)} pictures, {made} made by this process now",
        )


def teach(given: Given) -> None:
    """Stage 3."""
    asked, project = _plain(given), Project(given["work"])
    names = project.choose(asked["skill"] or ())
    training = _training(asked)
    # as mixed precision has it, since float32 factors beside a float16 model want autocast
    wide = (
        "bfloat16" if training.config.mixed_precision == "bf16" and torch.cuda.is_available() else "float32"
    )
    pipe = read_pipeline(asked["model"], asked["dtype"] or wide)
    training = replace(training, multiple=size_multiple(pipe))
    state = processes()
    if asked["joint"]:
        if state.is_main_process:
            join_pictures(project, names, JOINT)
        state.wait_for_everyone()
        names = [JOINT]
    for name in names:
        train_skill(project, name, pipe, training, cache=asked["cache"])
        figures = project.noted("train", name) or {}
        _say_done(project.expert_file(name), f"{figures.get('steps')} steps, late loss {figures.get('loss')}")


def unite(given: Given) -> None:
    """Stage 4."""
    asked, project = _plain(given), Project(given["work"])
    bank = skill_bank(project, asked["skill"] or ())
    merged = merge_skills(bank, asked["mode"], asked["rank"])
    save_merged(project, merged)
    what = f"{len(bank)} experts with weight 1/{len(bank)} each, {asked['mode']}, ranks {', '.join(map(str, sorted(merged.ranks())))}"
    done(str(project.merged_file), what)


def paint_for(given: Given) -> None:
    """Pictures for a file of questions."""
    asked = _plain(given)
    prompts = list(dict.fromkeys(tree.prompt for tree in load_questions(asked["questions"])))
    pipe = read_pipeline(asked["model"], asked["dtype"])
    with (
        patch(pipe, {"expert": asked["expert"]}) if asked["expert"] else nullcontext(),
        _counting("pictures", len(prompts)) as count,
    ):
        draw_prompts(pipe, prompts, asked["folder"], _settings(asked), on_picture=count)
    _say_done(asked["folder"], f"{len(prompts)} pictures")


def judge(given: Given) -> None:
    """Questions put to the pictures of a folder."""
    asked = _plain(given)
    trees = load_questions(asked["questions"])
    answerer = TransformersVQA.load(asked["vqa"])
    with _progress("asking", len(trees), 0) as line:
        summary, _ = score_pictures(
            asked["folder"],
            trees,
            answerer,
            answers_file=asked["folder"] / "answers.jsonl",
            on_picture=lambda have, _: line.update(have, samples=have),
        )
    figures = asdict(summary)
    shown = {
        key: number(value) if isinstance(value, float) else value
        for key, value in figures.items()
        if key != "categories"
    }
    out().print(facts(shown.items()))
    if summary.categories:
        out().print(
            table(
                "by category",
                ["category", "accuracy"],
                [(k, number(v)) for k, v in summary.categories.items()],
                ["accuracy"],
            )
        )
    if asked["out"] is not None:
        _write_json(asked["out"], figures | {"by": answerer.name})
        done(str(asked["out"]), "the same as JSON")


def tell(work: Path) -> None:
    """A table of the skills and what is done."""
    project = Project(work)
    rows = []
    for name in project.choose():
        told = (project.noted(stage, name) for stage in STAGES)
        rows.append(
            [
                name,
                *(
                    "-" if figures is None else ", ".join(f"{v} {k}" for k, v in figures.items())
                    for figures in told
                ),
            ]
        )
    out().print(table(printable(work, 300), ["skill", *STAGES], rows))
    out().print(f"merged: {'yes' if project.merged_file.exists() else 'no'}")


def _skills(project: Project, asked: Given) -> list[Skill]:
    """The skills asked for; those of the run where none is named."""
    known = load_skills(asked["skills"]) if asked["skills"] else {**SKILLS, **project.skills()}
    names = asked["skill"] or list(known if asked["skills"] else project.skills())
    if not names:
        raise MoleValueError(
            "selma prompts: --skill", expected=f"at least one of {', '.join(known)}", got="none"
        )
    if unknown := [name for name in names if name not in known]:
        hint = "--skills FILE brings skills of one's own"
        raise MoleValueError(
            "selma prompts: --skill",
            expected=f"one of {', '.join(known)}",
            got=printable(unknown[0]),
            hint=hint,
        )
    return [known[name] for name in names]


def _writers(asked: Given, skills: list[Skill]) -> dict[str, TextGenerator]:
    """Who writes the prompts of each skill."""
    if asked["file"] is not None:
        if asked["url"] or asked["model"]:
            raise MoleValueError(
                "selma prompts", "--file and --url or --model are given", expected="one of them"
            )
        path: Path = asked["file"]
        if not path.is_dir() and len(skills) > 1:
            raise MoleValueError(
                "selma prompts: --file",
                expected=f"a folder of SKILL.txt for {len(skills)} skills",
                got=printable(path),
            )
        return {
            s.name: FileText(path / f"{s.name}.txt" if path.is_dir() else path, batch=asked["more"])
            for s in skills
        }
    if asked["model"] is None:
        raise MoleValueError(
            "selma prompts", expected="--model, --url with --model, or --file", got="none of them"
        )
    writer: TextGenerator
    if asked["url"] is not None:
        from mole_kernels.methods.selma.endpoint import EndpointText

        writer = EndpointText(
            asked["url"],
            asked["model"],
            key=asked["key"],
            kind=asked["kind"],
            temperature=asked["temperature"],
            timeout=asked["timeout"],
        )
    else:
        writer = TransformersText.load(asked["model"], temperature=asked["temperature"])
    return dict.fromkeys((skill.name for skill in skills), writer)


def _training(asked: Given) -> SkillTraining:
    preset = PRESETS[asked["preset"]]
    config = {
        "steps": asked["steps"],
        "lr": asked["lr"],
        "accumulation": asked["accumulation"],
        "seed": asked["seed"],
    }
    more = {
        "batch_size": asked["batch"],
        "flip": asked["flip"],
        "resolution": _resolution(asked["resolution"]),
    }
    if asked["rank"] is not None:
        more |= {"rank": asked["rank"], "alpha": preset.alpha / preset.rank * asked["rank"]}
    made = replace(preset.config, **{key: value for key, value in config.items() if value is not None})
    return replace(preset, config=made, **{key: value for key, value in more.items() if value is not None})


def _resolution(said: str | None) -> int | tuple[int, int] | None:
    if said is None:
        return None
    sides = said.split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise MoleValueError(
            "--resolution", expected="a side in pixels, or HEIGHTxWIDTH", got=printable(said)
        )
    return int(said) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _settings(asked: Given) -> PictureSettings:
    named = {
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "height": "height",
        "width": "width",
    }
    options = {key: asked[ours] for key, ours in named.items() if asked[ours] is not None}
    return PictureSettings(seed=asked["seed"], batch=asked["batch"], options=options)


def read_pipeline(name: str, dtype: str | None) -> Any:
    """The pipeline on this process's device."""
    return pipelines.read_pipeline(
        name, getattr(torch, dtype) if dtype else None, processes().device, command="selma"
    )


def _plain(given: Given) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in given.items()}


@contextmanager
def _progress(title: str, total: int, start: int) -> Iterator[ProgressLine]:
    with ProgressLine(title, total, start, max(1, total // 10), processes().is_main_process) as line:
        yield line


@contextmanager
def _counting(title: str, total: int) -> Iterator[Any]:
    """A function to be called once for each picture; the others are made by the other processes."""
    share = -(-total // processes().num_processes)
    with _progress(title, share, 0) as line:
        made: list[int] = []

        def count(picture: int) -> None:
            made.append(picture)
            line.update(len(made), samples=len(made))

        yield count


def _say_done(path: Path, what: str) -> None:
    if processes().is_main_process:
        done(str(path), what)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    def put(file: BinaryIO) -> None:
        file.write((json.dumps(content, indent=1) + "\n").encode())

    atomic_write(path, put)
