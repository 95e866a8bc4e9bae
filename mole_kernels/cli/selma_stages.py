"""What `mole-kernels selma` does. Everything that can be wrong is looked at before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mole_kernels.cli import pipelines
from mole_kernels.cli.place import ready_file, ready_folder
from mole_kernels.cli.scales import scale_of_text
from mole_kernels.cli.screen import done, facts, number, out, table
from mole_kernels.cli.selma import (
    DrawArgs,
    SelmaDrawArgs,
    SelmaEvaluateArgs,
    SelmaMergeArgs,
    SelmaPicturesArgs,
    SelmaPromptsArgs,
    SelmaTrainArgs,
)
from mole_kernels.cli.training import resolution_of
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.files.writer import atomic_write
from mole_kernels.methods.selma.choices import SentenceChoice
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

JOINT = "joint"
# what each mean is taken over, and who reports it
MEANS = {
    "score": "mean over pictures; DSG's and TIFA's papers",
    "spread": "standard deviation over pictures; TIFA's code",
    "accuracy": "mean over questions; SELMA's code for DSG",
}


def write_skills(asked: SelmaPromptsArgs) -> None:
    """Stage 1."""
    project = Project(asked.work)
    settings = PromptSettings(
        count=asked.count,
        more=asked.per_request,
        limit=asked.max_rouge,
        seed=asked.seed,
        attempts=asked.attempts,
    )
    chosen = _skills(project, asked)
    writers = _writers(asked, chosen)
    ready_folder(asked.work)
    for skill in chosen:
        accepted = sum(len(row["accepted"]) for row in kept_requests(project, skill.name))
        with _progress(f"prompts of {skill.name}", settings.count, accepted) as line:

            def show(have: int, _: int, line: ProgressLine = line) -> None:
                line.update(have, samples=have)

            write_prompts(project, skill, writers[skill.name], settings, on_request=show)
        figures = project.noted("prompts", skill.name) or {}
        done(
            str(project.prompts_file(skill.name)),
            ", ".join(f"{value} {key}" for key, value in figures.items()),
        )


def draw_skills(asked: SelmaPicturesArgs) -> None:
    """Stage 2."""
    project = Project(asked.work)
    names = project.choose(asked.skill or ())
    wanted = {name: len(project.prompts(name)) for name in names}
    pipe = read_pipeline(asked.model, asked.dtype)
    for name in names:
        with _counting(f"pictures of {name}", wanted[name]) as count:
            count_now = make_pictures(project, name, pipe, _settings(asked), on_picture=count)
        figures = project.noted("pictures", name) or {}
        _say_done(
            project.pictures_folder(name),
            f"{figures.get('pictures', 0)} pictures, {count_now} made by this process now",
        )


def train_skills(asked: SelmaTrainArgs) -> None:
    """Stage 3."""
    project = Project(asked.work)
    names = project.choose(asked.skill or ())
    training = _training(asked)
    # as mixed precision has it, since float32 factors beside a float16 model want autocast
    wide = (
        "bfloat16" if training.config.mixed_precision == "bf16" and torch.cuda.is_available() else "float32"
    )
    pipe = read_pipeline(asked.model, asked.dtype or wide)
    training = replace(training, multiple=size_multiple(pipe))
    state = processes()
    if asked.joint:
        if state.is_main_process:
            join_pictures(project, names, JOINT)
        state.wait_for_everyone()
        names = [JOINT]
    for name in names:
        train_skill(project, name, pipe, training, cache=asked.cache)
        figures = project.noted("train", name) or {}
        _say_done(project.expert_file(name), f"{figures.get('steps')} steps, late loss {figures.get('loss')}")


def merge_experts(asked: SelmaMergeArgs) -> None:
    """Stage 4."""
    project = Project(asked.work)
    bank = skill_bank(project, asked.skill or (), asked.step)
    merged = merge_skills(bank, asked.mode, asked.rank)
    save_merged(project, merged)
    ranks = ", ".join(map(str, sorted(merged.ranks())))
    what = f"{len(bank)} experts with weight 1/{len(bank)} each, {asked.mode}, ranks {ranks}"
    done(str(project.merged_file), what)


def draw_questions(asked: SelmaDrawArgs) -> None:
    """Pictures for a file of questions."""
    prompts = list(dict.fromkeys(tree.prompt for tree in load_questions(asked.questions)))
    scale = scale_of_text(asked.scale)
    ready_folder(asked.out)
    pipe = read_pipeline(asked.model, asked.dtype)
    with (
        patch(pipe, {"adapter": asked.adapter}) if asked.adapter else nullcontext() as handle,
        _counting("pictures", len(prompts)) as count,
    ):
        if handle is not None and scale is not None:
            handle.set_scales({"adapter": scale})
        draw_prompts(pipe, prompts, asked.out, _settings(asked), on_picture=count)
    _say_done(asked.out, f"{len(prompts)} pictures")


def evaluate_pictures(asked: SelmaEvaluateArgs) -> None:
    """Questions put to the pictures of a folder."""
    trees = load_questions(asked.questions, strict=asked.strict)
    if asked.out is not None:
        ready_file(asked.out)
    answerer = TransformersVQA.load(asked.vqa)
    nearest = SentenceChoice.load(asked.sentence_encoder) if asked.sentence_encoder else None
    with _progress("asking", len(trees), 0) as line:
        summary, _ = score_pictures(
            asked.folder,
            trees,
            answerer,
            answers_file=asked.folder / "answers.jsonl",
            nearest=nearest,
            on_picture=lambda have, _: line.update(have, samples=have),
        )
    figures = asdict(summary) | {"means": MEANS}
    if asked.json:
        print(json.dumps(figures | {"by": answerer.name}, indent=1))
    else:
        _show_figures(figures)
    if asked.out is not None:
        _write_json(asked.out, figures | {"by": answerer.name})
        if not asked.json:
            done(str(asked.out), "the same as JSON")


def _show_figures(figures: Mapping[str, Any]) -> None:
    shown = {
        f"{key} ({MEANS[key]})" if key in MEANS else key: number(value) if isinstance(value, float) else value
        for key, value in figures.items()
        if not isinstance(value, dict)
    }
    shown |= {f"{name}s in the file": count for name, count in figures["oddities"].items()}
    out().print(facts(shown.items()))
    for title, key, column in (
        ("by category", "categories", "accuracy"),
        ("by finer category", "details", "accuracy"),
        ("by set of prompts", "sources", "score"),
    ):
        if figures[key]:
            rows = [(name, number(value)) for name, value in figures[key].items()]
            out().print(table(title, [key, column], rows, [column]))


def show_status(work: Path) -> None:
    """A table of the skills and what is done."""
    project = Project(work)
    rows = []
    for name in project.choose():
        cells = []
        for stage in STAGES:
            figures = project.noted(stage, name)
            cells.append("-" if figures is None else ", ".join(f"{v} {k}" for k, v in figures.items()))
        rows.append([name, *cells])
    out().print(table(printable(work, 300), ["skill", *STAGES], rows))
    out().print(f"merged: {'yes' if project.merged_file.exists() else 'no'}")


def _skills(project: Project, asked: SelmaPromptsArgs) -> list[Skill]:
    """The skills asked for; those of the run where none is named."""
    known = load_skills(asked.skill_file) if asked.skill_file else {**SKILLS, **project.skills()}
    names = asked.skill or list(known if asked.skill_file else project.skills())
    if not names:
        raise MoleValueError(
            "selma prompts: --skill", expected=f"at least one of {', '.join(known)}", got="none"
        )
    if unknown := [name for name in names if name not in known]:
        hint = "--skill-file FILE brings your own skills"
        raise MoleValueError(
            "selma prompts: --skill",
            expected=f"one of {', '.join(known)}",
            got=printable(unknown[0]),
            hint=hint,
        )
    return [known[name] for name in names]


def _writers(asked: SelmaPromptsArgs, skills: list[Skill]) -> dict[str, TextGenerator]:
    """Who writes the prompts of each skill."""
    if asked.text_file is not None:
        if asked.url or asked.llm:
            raise MoleValueError(
                "selma prompts", expected="one of --text-file and --llm or --url", got="both"
            )
        path: Path = asked.text_file
        if not path.is_dir() and len(skills) > 1:
            raise MoleValueError(
                "selma prompts: --text-file",
                expected=f"a folder of SKILL.txt for {len(skills)} skills",
                got=printable(path),
            )
        return {
            s.name: FileText(path / f"{s.name}.txt" if path.is_dir() else path, batch=asked.per_request)
            for s in skills
        }
    if asked.llm is None:
        raise MoleValueError(
            "selma prompts", expected="--llm, --url with --llm, or --text-file", got="none of them"
        )
    writer: TextGenerator
    if asked.url is not None:
        from mole_kernels.methods.selma.endpoint import EndpointText

        writer = EndpointText(
            asked.url,
            asked.llm,
            key=asked.api_key,
            kind=asked.endpoint_kind,
            temperature=asked.temperature,
            timeout=asked.timeout,
        )
    else:
        writer = TransformersText.load(asked.llm, temperature=asked.temperature)
    return dict.fromkeys((skill.name for skill in skills), writer)


def _training(asked: SelmaTrainArgs) -> SkillTraining:
    if asked.preset not in PRESETS:
        raise MoleValueError("--preset", expected=f"one of {', '.join(PRESETS)}", got=asked.preset)
    preset = PRESETS[asked.preset]
    config: dict[str, Any] = {
        "steps": asked.steps,
        "lr": asked.lr,
        "accumulation": asked.accumulation,
        "seed": asked.seed,
    }
    more: dict[str, Any] = {
        "batch_size": asked.batch_size,
        "flip": asked.flip,
        "resolution": resolution_of(asked.resolution),
    }
    if asked.rank is not None:
        more |= {"rank": asked.rank, "alpha": preset.alpha / preset.rank * asked.rank}
    run = replace(preset.config, **{key: value for key, value in config.items() if value is not None})
    return replace(preset, config=run, **{key: value for key, value in more.items() if value is not None})


def _settings(asked: DrawArgs) -> PictureSettings:
    size = resolution_of(asked.resolution)
    height, width = (size, size) if isinstance(size, int) or size is None else size
    options: dict[str, Any] = {
        "num_inference_steps": asked.sampling_steps,
        "guidance_scale": asked.guidance,
        "height": height,
        "width": width,
    }
    options = {name: value for name, value in options.items() if value is not None}
    return PictureSettings(seed=asked.seed, batch=asked.batch_size, options=options)


def read_pipeline(name: str, dtype: str | None) -> Any:
    """The pipeline on this process's device."""
    return pipelines.read_pipeline(
        name, getattr(torch, dtype) if dtype else None, processes().device, command="selma"
    )


@contextmanager
def _progress(title: str, total: int, start: int) -> Iterator[ProgressLine]:
    with ProgressLine(title, total, start, 0, processes().is_main_process) as line:
        yield line


@contextmanager
def _counting(title: str, total: int) -> Iterator[Any]:
    """A function to be called once for each picture; the others are made by the other processes."""
    share = -(-total // processes().num_processes)
    with _progress(title, share, 0) as line:
        pictures: list[int] = []

        def count(picture: int) -> None:
            pictures.append(picture)
            line.update(len(pictures), samples=len(pictures))

        yield count


def _say_done(path: Path, what: str) -> None:
    if processes().is_main_process:
        done(str(path), what)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    def put(file: BinaryIO) -> None:
        file.write((json.dumps(content, indent=1) + "\n").encode())

    atomic_write(path, put)
