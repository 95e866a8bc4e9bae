"""SELMA end to end on the demo's digits: `python python/recipes/selma/run.py [--quick]` writes a table, plots
and pictures.

The shipped base model reads as the wrong digit where it is asked for a zero, a three or a five. Each of these
is a skill: prompts are
written, pictures made, an expert trained for each; then the experts are merged with weights 1/T and compared
with one expert
trained on all pictures (joint), with each expert alone, and with their plain sum. Twice: on the model's own
pictures, as the paper
has it, and on pictures of real scans, which is the most that other pictures could bring.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# one thread for each process: the seeds run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from drawing import gallery, markdown, plot
from torch import Generator
from words import (
    SKILL_WORDS,
    CaptionWriter,
    ReaderAnswers,
    captions_with,
    captions_without,
    scenes_of,
    skill_of,
    tree_of,
)

from mole_kernels.demo import data
from mole_kernels.demo.classifier import load_reader
from mole_kernels.demo.metrics import spread
from mole_kernels.demo.model import load_pipeline
from mole_kernels.methods.selma.evaluate import score_pictures
from mole_kernels.methods.selma.merging import merge_skills, save_merged, skill_bank
from mole_kernels.methods.selma.pictures import (
    METADATA,
    PictureSettings,
    draw_prompts,
    file_name,
    make_pictures,
)
from mole_kernels.methods.selma.project import Project, write_lines
from mole_kernels.methods.selma.prompts import PromptSettings, write_prompts
from mole_kernels.methods.selma.train import SkillTraining, join_pictures, size_multiple, train_skill
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig

SOURCES = ("own pictures", "scans")
OTHERS = "other digits"
OPTIONS = {"guidance_scale": 4.0, "height": data.HEIGHT, "width": data.WIDTH}


@dataclass(frozen=True)
class Plan:
    """How much is done.

    prompts, asked  of each skill: prompts to train on, captions to be asked about
    steps           of each expert; joint training takes T times as many, so that it sees as many pictures as
                    all experts together
    denoising       steps of each picture that is asked about; those to train on take 20
    """

    seeds: int = 3
    prompts: int = 96
    steps: int = 200
    asked: int = 32
    denoising: int = 20
    rank: int = 16
    lr: float = 3e-3
    batch: int = 16


QUICK = Plan(seeds=2, prompts=48, steps=64, asked=16, denoising=10)


def main() -> None:
    """All seeds, then the table, the plots and metrics.json."""
    parser = argparse.ArgumentParser(description="SELMA end to end on the demo's digits.")
    parser.add_argument(
        "--quick", action="store_true", help="fewer seeds, pictures and steps: under ten minutes on two cores"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/recipes/selma"),
        help="the folder for everything; goes on where it stopped",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="seeds and sources at once, one thread each"
    )
    asked = parser.parse_args()
    plan, begun = (QUICK if asked.quick else Plan()), time.time()
    out = asked.out / ("quick" if asked.quick else "full")
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(seed, source) for source in SOURCES for seed in range(plan.seeds)]
    with ProcessPoolExecutor(min(asked.workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        done = dict(zip(jobs, pool.map(partial(run_source, plan, out), jobs), strict=True))
    results = combine(
        [
            {name: row for source in SOURCES for name, row in done[seed, source].items()}
            for seed in range(plan.seeds)
        ]
    )
    (out / "metrics.json").write_text(
        json.dumps({"plan": asdict(plan), "seconds": time.time() - begun, "results": results}, indent=1)
    )
    table = markdown(results)
    (out / "table.md").write_text(table)
    plot(results, out / "skills.png")
    gallery(out / "seed0", out / "pictures.png")
    print(table)
    print(f"{time.time() - begun:.0f} s; written to {out}: table.md, skills.png, pictures.png, metrics.json")


def run_source(plan: Plan, out: Path, job: tuple[int, str]) -> dict[str, dict[str, float]]:
    """{variant: {skill: DSG score}} of one seed and one source of pictures; all stages. The base is scored
    with the first source.
    """
    torch.set_num_threads(1)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    (seed, source), pipe = job, load_pipeline()
    folder = out / f"seed{seed}"
    scores = {"base": score(plan, folder / "base", pipe, seed)} if source == SOURCES[0] else {}
    project = Project(folder / source.replace(" ", "_"))
    teach(plan, project, pipe, source, seed)
    bank = skill_bank(project)
    merged = merge_skills(bank)
    save_merged(project, merged)
    variants: dict[str, Mapping[str, Any]] = {
        f"{name} alone": {name: bank.experts[name]} for name in bank.names
    }
    variants |= {
        "joint": {"joint": project.expert_file("joint")},
        "merged, 1/T": {"merged": merged},
        "sum": bank.experts,
    }
    for name, experts in variants.items():
        with patch(pipe, experts):
            scores[f"{source}: {name}"] = score(
                plan, project.root / "drawn" / name.replace(" ", "_").replace("/", "_"), pipe, seed
            )
    print(f"seed {seed}, {source}: done", flush=True)
    return scores


def teach(plan: Plan, project: Project, pipe: Any, source: str, seed: int) -> None:
    """Stages 1 to 3 for every skill, and joint training."""
    config = TrainConfig(
        steps=plan.steps,
        lr=plan.lr,
        warmup=plan.steps // 15,
        schedule="cosine",
        weight_decay=0.0,
        cond_dropout=0.1,
        snr_gamma=2.0,
        seed=seed,
    )
    # not flipped: a mirrored digit is none, and captions name places
    training = SkillTraining(
        config,
        plan.rank,
        float(plan.rank),
        (data.HEIGHT, data.WIDTH),
        plan.batch,
        flip=False,
        multiple=size_multiple(pipe),
    )
    for word in SKILL_WORDS:
        write_prompts(
            project, skill_of(word), CaptionWriter(word), PromptSettings(count=plan.prompts, seed=seed)
        )
        if source == "scans":
            scan_pictures(project, word, seed)
        else:
            make_pictures(
                project, word, pipe, PictureSettings(1000 + seed, 16, OPTIONS | {"num_inference_steps": 20})
            )
        train_skill(project, word, pipe, training, progress=False)
    join_pictures(project, SKILL_WORDS)
    longer = replace(training, config=replace(config, steps=plan.steps * len(SKILL_WORDS)))
    train_skill(project, "joint", pipe, longer, progress=False)


def scan_pictures(project: Project, word: str, seed: int) -> None:
    """The same prompts with pictures of real scans instead of the model's own."""
    folder, prompts = project.pictures_folder(word), project.prompts(word)
    folder.mkdir(parents=True, exist_ok=True)
    images = scenes_of(
        prompts, data.load_split("train"), Generator().manual_seed(1000 * seed + data.WORDS.index(word))
    )
    for number, image in enumerate(images):
        image.save(folder / file_name(number))
    write_lines(
        folder / METADATA,
        ({"file_name": file_name(number), "text": text} for number, text in enumerate(prompts)),
    )


def score(plan: Plan, folder: Path, pipe: Any, seed: int) -> dict[str, float]:
    """DSG scores of pictures for captions that no training saw, by skill, and for captions of the other
    digits.
    """
    # captions with a skill's digit that the writer of its prompts keeps to itself are asked about by every
    # variant
    asked = {word: captions_with(word, held=True)[: plan.asked] for word in SKILL_WORDS} | {
        OTHERS: captions_without()[: plan.asked]
    }
    draw_prompts(
        pipe,
        [caption for captions in asked.values() for caption in captions],
        folder,
        PictureSettings(seed=seed, batch=32, options=OPTIONS),
    )
    answerer = ReaderAnswers(load_reader())
    return {
        name: score_pictures(folder, [tree_of(c) for c in captions], answerer)[0].score
        for name, captions in asked.items()
    }


def combine(seeds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{variant: {column: mean, sd, seeds}}, with the mean over skills as a column."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in seeds[0]:
        rows = [seed[variant] for seed in seeds]
        out[variant] = {column: spread([row[column] for row in rows]) for column in rows[0]}
        out[variant]["all skills"] = spread(
            [sum(row[word] for word in SKILL_WORDS) / len(SKILL_WORDS) for row in rows]
        )
    return out


if __name__ == "__main__":
    main()
