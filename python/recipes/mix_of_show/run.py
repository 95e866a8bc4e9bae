"""Mix-of-Show end to end, on the demo's digits: two concepts trained apart, fused by weights and by
gradients, drawn alone and together.

python python/recipes/mix_of_show/run.py            five seeds
python python/recipes/mix_of_show/run.py --quick    two seeds and shorter runs: under twelve minutes on two
idle cores

"amber" is a four in the colours of the high digits, in the middle of a scene; "navy" a seven in those of the
low ones, on its right.
Each is an ED-LoRA of two tokens, trained by itself on a few pictures. No caption has room for both: only
regions bring them together.
A small classifier says how often a picture shows the concept. Started again, a run goes on from its
checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import scenes as known
from seeds import run_seeds

from mole_kernels.demo import data, evaluate
from mole_kernels.demo.classifier import load_reader
from mole_kernels.demo.metrics import spread
from mole_kernels.demo.model import FACTOR, LATENT_CHANNELS, load_pipeline
from mole_kernels.demo.run import quiet
from mole_kernels.experts.lowrank import Expert
from mole_kernels.methods.mix_of_show.concept import Concept, at_weights, save_concept
from mole_kernels.methods.mix_of_show.data import concept_batches
from mole_kernels.methods.mix_of_show.edlora import EDLoRATraining, train_edlora
from mole_kernels.methods.mix_of_show.folder import save_fused
from mole_kernels.methods.mix_of_show.fusion import FusionSettings, fuse_by_weights, fuse_pipeline
from mole_kernels.methods.mix_of_show.fusion_check import noise_errors
from mole_kernels.methods.mix_of_show.fusion_records import FusedConcepts
from mole_kernels.methods.mix_of_show.prompts import encode_prompts, sample_concepts
from mole_kernels.methods.mix_of_show.regions import Region
from mole_kernels.methods.mix_of_show.sampling import regional
from mole_kernels.methods.mix_of_show.tokens import Tokens, concept_tokens
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import PictureFolder

# begins the columns of what was neither fitted nor chosen by, and of what each way does elsewhere and scaled
HELD, BESIDE = "held out:", "beside:"
# weight fusion has each expert at one half, so 2 is the plain sum
SCALES = (0.7, 1.0, 1.4, 2.0)
BASE = "base"
WAYS = ("single", "weight fusion", "gradient fusion")
SIZE = (data.HEIGHT, data.WIDTH)
# prompts whose inputs are fitted, that choose the ridge, and that judge: no text is in two of them
FITTED = ("blank {}", "{}", "one {}", "six {}", "three {}", "nine {}")
CHOOSING = ("two {}", "zero {}", "four {}", "seven {}")
JUDGING = ("five {}", "eight {}")


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured for each seed."""

    seeds: int = 5
    pictures: int = 64
    steps: int = 400
    batch: int = 16
    rank: int = 4
    drawn: int = 60
    sampling_steps: int = 20
    fusion_steps: int = 20
    noise_runs: int = 2
    classifier_steps: int = 300


QUICK = Settings(seeds=2, steps=250, drawn=40, sampling_steps=12, fusion_steps=12, classifier_steps=150)
# the demo's model learns at other rates than Stable Diffusion, and its words are ten times as long; found on
# another seed
_CONFIG = TrainConfig(steps=0, lr=3e-3, schedule="linear", weight_decay=0.0, checkpoint_every=50)
_TRAINING = EDLoRATraining(_CONFIG, embedding_lr=3e-2, text_encoder_lr=3e-4, norm_limit=None)


def run_seed(seed: int, made: Settings, out: Path) -> dict[str, Any]:
    """Trains both concepts, fuses them both ways, and measures every way on the same noise."""
    torch.set_num_threads(1)
    quiet()
    begun, folder, pipe = time.time(), out / f"seed{seed}", load_pipeline()
    reader, accuracy = known.train_classifier(made.classifier_steps, seed)
    trained = {}
    for number, name in enumerate(known.NAMES):
        trained[name] = train(pipe, name, made, folder, 1000 * seed + number)
        print(
            f"seed {seed}: {name}, loss {trained[name].expert.metadata['loss']}, {time.time() - begun:.0f} s",
            flush=True,
        )
    began = time.time()
    settings = FusionSettings(
        FITTED,
        choose_templates=CHOOSING,
        held_templates=JUDGING,
        steps=made.fusion_steps,
        height=SIZE[0],
        width=SIZE[1],
        seed=seed,
        lbfgs=50,
    )
    fused = fuse_pipeline(pipe, list(trained.values()), settings)
    fusing = time.time() - began
    save_fused(fused, folder / "fused")
    averaged = fuse_by_weights(list(trained.values()))
    found: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    shown: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    with concept_tokens(pipe, fused.embeddings) as tokens:
        for name, concept in trained.items():
            for way, expert in zip(WAYS, (at_weights(concept), averaged, fused.expert)):
                drawn = draw(pipe, expert, concept, tokens, made, seed)
                found[way][name] = known.fidelity(reader, drawn, name)
                shown[way].append(drawn[:4])
        for way, expert in zip(WAYS[1:], (averaged, fused.expert)):
            drawn = draw_regions(pipe, expert, list(trained.values()), tokens, made, seed)
            for name in known.NAMES:
                found[way][f"{name}, both in one"] = known.fidelity(reader, drawn, name)
            shown[way].append(drawn[:4])
        # seeds and prompts that neither fitted nor chose
        errors = noise_errors(
            pipe,
            list(trained.values()),
            dict(zip(WAYS[1:], (averaged, fused.expert))),
            tokens,
            JUDGING,
            range(100_000, 100_000 + made.noise_runs),
            num_inference_steps=made.fusion_steps,
            height=SIZE[0],
            width=SIZE[1],
        )
        beside = {
            way: beside_fidelity(pipe, expert, trained, reader, tokens, made, seed)
            for way, expert in zip(WAYS[1:], (averaged, fused.expert))
        }
        beside["base"] = {"usual digits": usual_digits(pipe, None, made, seed)}
    noise = {way: {name: own[trained[name].name] for name in known.NAMES} for way, own in errors.items()}
    sheet(shown, folder / "pictures.png")
    print(
        f"seed {seed}: fused in {fusing:.1f} s, {json.dumps(found)}, {time.time() - begun:.0f} s", flush=True
    )
    about = {
        "fusing_seconds": fusing,
        "objective": fused.totals(),
        "worst_layer": worst_layer(fused),
        "noise": noise,
        "beside": beside,
        "classifier": accuracy,
    }
    return {
        "seed": seed,
        "seconds": time.time() - begun,
        "cpu_seconds": time.process_time(),
        "ways": found,
    } | about


def beside_fidelity(
    pipe: Any,
    expert: Expert,
    trained: Mapping[str, Concept],
    reader: Any,
    tokens: Tokens,
    made: Settings,
    seed: int,
) -> dict[str, float]:
    """What a fused expert does to captions without concepts, and how it fares at its best scale of `SCALES`.

    usual digits  share of slots of usual captions that show what they say
    best scale    that of the highest mean fidelity
    NAME          fidelity there
    """
    found: dict[float, dict[str, float]] = {}
    for scale in SCALES:
        scaled = replace(
            expert,
            layers={p: replace(layer, scale=layer.scale * scale) for p, layer in expert.layers.items()},
        )
        found[scale] = {
            name: known.fidelity(reader, draw(pipe, scaled, concept, tokens, made, seed), name)
            for name, concept in trained.items()
        }
    best = max(found, key=lambda scale: sum(found[scale].values()))
    usual = usual_digits(pipe, expert, made, seed)
    return {"usual digits": usual, "best scale": best} | found[best]


def usual_digits(pipe: Any, expert: Expert | None, made: Settings, seed: int) -> float:
    """Share of slots of captions without a concept that show what the caption says."""
    labels = data.draw_labels(made.drawn, Generator().manual_seed(4242))
    captions = [data.caption_of(row) for row in labels.tolist()]
    if expert is None:
        pixels = evaluate.generate_pictures(pipe, captions, seed, made.sampling_steps)
    else:
        with patch(pipe, {"x": expert}):
            pixels = evaluate.generate_pictures(pipe, captions, seed, made.sampling_steps)
    read = evaluate.read_back(load_reader(), pixels, captions)
    return sum(read[key] for key in ("digits", "blank")) / 2


def worst_layer(fused: FusedConcepts) -> dict[str, Any]:
    """The layer whose held-out objective is the worst against weight fusion's, and by how much."""
    held = {layer.path: layer.held for layer in fused.layers if layer.held and layer.held["by_weights"]}
    ratios = {path: values["fused"] / values["by_weights"] for path, values in held.items()}
    path = max(ratios, key=ratios.__getitem__)
    return {"path": path, "ratio": ratios[path]}


def train(pipe: Any, name: str, made: Settings, folder: Path, seed: int) -> Concept:
    """One concept by itself, from a folder of pictures as anyone's own would be; kept as the paper's tools
    keep theirs.
    """
    write_folder(known.pictures(name, made.pictures, Generator().manual_seed(seed)), folder / name)
    tokens = known.tokens_of(name)
    batches = concept_batches(
        pipe, PictureFolder(folder / name, SIZE, multiple=8), tokens, made.batch, seed=seed
    )
    config = replace(_TRAINING.config, steps=made.steps, warmup=made.steps // 15, seed=seed)
    training = replace(_TRAINING, config=config, rank=made.rank)
    concept = train_edlora(
        pipe, batches, tokens, training, run_dir=folder / f"run_{name}", resume=True, progress=False
    )
    save_concept(concept, folder / f"{name}.pth")
    return concept


def draw(pipe: Any, expert: Expert, concept: Concept, tokens: Tokens, made: Settings, seed: int) -> Tensor:
    """Pictures of "WORD V" for all words in turn, [B,3,24,72] in -1..1."""
    words = [data.caption_of([k % 11 - 1]) for k in range(made.drawn)]
    prompts = [f"{word} {concept.name}" for word in words]
    with patch(pipe, {"x": expert}):
        return _pixels(sample_concepts(pipe, prompts, tokens, "", **_options(made, seed, len(prompts))))


def draw_regions(
    pipe: Any, expert: Expert, trained: Sequence[Concept], tokens: Tokens, made: Settings, seed: int
) -> Tensor:
    """Pictures of both concepts, each in its slot's region, and usual digits in the first slot."""
    words = [data.caption_of([k % 11 - 1]) for k in range(made.drawn)]
    boxes = [((at := known.slot_of(name)) / data.SLOTS, (at + 1) / data.SLOTS) for name in known.NAMES]
    regions = [Region(concept.name, box=(0.0, x0, 1.0, x1)) for concept, (x0, x1) in zip(trained, boxes)]
    with patch(pipe, {"x": expert}):
        positive = torch.stack(
            [encode_prompts(pipe, [f"blank {c.name}" for c in trained], tokens).states] * made.drawn
        )
        negative = encode_prompts(pipe, [""] * len(trained), tokens).states.expand_as(positive)
        with regional(pipe, [regions] * made.drawn, embeds=(positive, negative)):
            prompts = [f"{word} blank blank" for word in words]
            return _pixels(sample_concepts(pipe, prompts, tokens, "", **_options(made, seed, len(prompts))))


def _options(made: Settings, seed: int, n: int) -> dict[str, Any]:
    size = (data.HEIGHT // FACTOR, data.WIDTH // FACTOR)
    latents = torch.randn(n, LATENT_CHANNELS, *size, generator=Generator().manual_seed(100 + seed))
    return {
        "num_inference_steps": made.sampling_steps,
        "guidance_scale": evaluate.GUIDANCE,
        "latents": latents,
        "output_type": "pt",
    }


def _pixels(result: Any) -> Tensor:
    pixels: Tensor = result.images.float() * 2 - 1
    return pixels


def write_folder(pictures: data.Pictures, folder: Path) -> None:
    """The pictures as PNG files with a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (pixels, caption) in enumerate(zip(pictures.pixels, pictures.captions)):
        _image(pixels).save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def sheet(shown: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """Rows: the ways. Columns: four pictures of each concept, and of both by regions."""
    wide = max(map(len, shown.values()))
    rows = []
    for drawn in shown.values():
        blank = torch.ones_like(drawn[0])
        rows.append(
            torch.cat([torch.cat(list(part), 1) for part in [*drawn, *[blank] * (wide - len(drawn))]], 2)
        )
    image = _image(torch.cat(rows, 1).clamp(-1, 1))
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)


def _image(pixels: Tensor) -> Image.Image:
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(values.numpy())


def combine(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """way -> column -> mean, sd and the seeds' values: fidelity, then what was held out, for both fusions."""
    columns = (*known.NAMES, *(f"{name}, both in one" for name in known.NAMES))
    table = {
        way: {c: spread([s["ways"][way][c] for s in seeds]) for c in columns if c in seeds[0]["ways"][way]}
        for way in WAYS
    }
    for way, key in zip(WAYS[1:], ("held_by_weights", "held_fused")):
        for group in seeds[0]["objective"]:
            sums = [s["objective"][group] for s in seeds]
            table[way][f"{HELD} {group}"] = spread([own[key] / (own["held_base"] or 1.0) for own in sums])
        for name in known.NAMES:
            table[way][f"{HELD} noise of {name}"] = spread([s["noise"][way][name] for s in seeds])
        for key in seeds[0]["beside"][way]:
            table[way][f"{BESIDE} {key}"] = spread([s["beside"][way][key] for s in seeds])
    table[BASE] = {f"{BESIDE} usual digits": spread([s["beside"]["base"]["usual digits"] for s in seeds])}
    return table


def markdown(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Three tables, mean ± standard deviation over the seeds: concept fidelity in percent; what was held out; what
    else the expert does, and each way at its best scale.
    """
    fidelity = [c for c in table[WAYS[1]] if not c.startswith((HELD, BESIDE))]
    beside = [c for c in table[WAYS[1]] if c.startswith(BESIDE)]
    held = [c for c in table[WAYS[1]] if c.startswith(HELD)]
    lines = [f"| concept fidelity | {' | '.join(fidelity)} |", "|---" * (1 + len(fidelity)) + "|"]
    for way in WAYS:
        row = table[way]
        cells = [
            f"{100 * row[c]['mean']:.0f} ± {100 * row[c]['sd']:.0f} %" if c in row else "–" for c in fidelity
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    names = " | ".join(c.removeprefix(HELD).strip() for c in held)
    lines += ["", f"| held out, ÷ the base's | {names} |", "|---" * (1 + len(held)) + "|"]
    for way in WAYS[1:]:
        cells = [f"{table[way][c]['mean']:.2f} ± {table[way][c]['sd']:.2f}" for c in held]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    names = " | ".join(c.removeprefix(BESIDE).strip() for c in beside)
    lines += ["", f"| at the best scale | {names} |", "|---" * (1 + len(beside)) + "|"]
    for way in (BASE, *WAYS[1:]):
        row = table[way]
        cells = [f"{row[c]['mean']:.2f} ± {row[c]['sd']:.2f}" if c in row else "–" for c in beside]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(table: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """A bar for each way and column, each seed a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis, columns = figure.subplots(), [c for c in table[WAYS[1]] if not c.startswith((HELD, BESIDE))]
    for w, (way, colour) in enumerate(zip(WAYS, ("#c9ced6", "#d9a679", "#7a9cc6"))):
        there = [i for i, column in enumerate(columns) if column in table[way]]
        axis.bar(
            [i + 0.27 * (w - 1) for i in there],
            [100 * table[way][columns[i]]["mean"] for i in there],
            0.25,
            color=colour,
            label=way,
        )
        for i in there:
            values = table[way][columns[i]]["seeds"]
            axis.plot([i + 0.27 * (w - 1)] * len(values), [100 * v for v in values], "k.", ms=4)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_ylabel("pictures that show the concept, %")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    settings = {True: QUICK, False: Settings()}
    run_seeds("mix_of_show", __doc__ or "", settings, run_seed, combine, markdown, plot, "fidelity.png")


if __name__ == "__main__":
    main()
