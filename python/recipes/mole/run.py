"""MoLE end to end, on the demo's digits: folders of pictures, two experts, four kinds of gates, and what each
of them is worth.

python python/recipes/mole/run.py            five seeds
python python/recipes/mole/run.py --quick    two seeds and shorter runs: under ten minutes on two idle cores

Digits 0-4 play the paper's faces, 5-9 its hands: the base model was kept from learning them well, each expert
sees sharp close-ups of one
half, the gates see sharp scenes. Everything goes the way a user's own data would: pictures with a
metadata.jsonl, a cache of latents and
text states, `train_expert`, `train_gates`. Started again, a run goes on from its checkpoints.
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
from seeds import run_seeds

from mole_kernels.demo import data, evaluate
from mole_kernels.demo.classifier import load_reader
from mole_kernels.demo.metrics import spread
from mole_kernels.demo.model import load_pipeline
from mole_kernels.demo.run import quiet
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods import mole
from mole_kernels.patching.apply import patch
from mole_kernels.training.cached import PictureBatches, picture_batches
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import PictureFolder

GATES = {"learned constant": "constant", "local": "local", "global": "global", "both": "mole"}
VARIANTS = ("none", "low expert", "high expert", "sum", *GATES)


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured for each seed."""

    seeds: int = 5
    closeups: int = 1536
    scenes: int = 1024
    expert_steps: int = 400
    gate_steps: int = 120
    batch: int = 16
    rank: int = 16
    held_out: int = 64
    captions: int = 48
    sampling_steps: int = 20


QUICK = Settings(
    seeds=2,
    closeups=768,
    scenes=512,
    expert_steps=200,
    gate_steps=60,
    held_out=48,
    captions=24,
    sampling_steps=12,
)
# found for the demo on other seeds than are used here; one constant a layer and expert moves too slowly at
# the gates' rate
_EXPERT = TrainConfig(
    steps=0,
    lr=3e-3,
    schedule="cosine",
    weight_decay=0.0,
    cond_dropout=0.1,
    snr_gamma=2.0,
    checkpoint_every=50,
)
_GATE_RATES = {"constant": 9e-2, "local": 3e-2, "global": 3e-2, "mole": 3e-2}


def run_seed(seed: int, made: Settings, out: Path) -> dict[str, Any]:
    """Trains both experts and every kind of gates for one seed, and measures every variant on the same
    held-out scenes.
    """
    torch.set_num_threads(1)
    quiet()
    begun, folder = time.time(), out / f"seed{seed}"
    files = {half: folder / f"{half}.safetensors" for half in data.HALVES}
    for number, half in enumerate(data.HALVES):
        pictures = data.closeups(
            data.load_split("train"), made.closeups, Generator().manual_seed(1000 * seed + number), number
        )
        batches = _batches(pictures, folder / f"closeups_{half}", (data.SLOT, data.SLOT), made, seed)
        config = replace(_EXPERT, steps=made.expert_steps, warmup=made.expert_steps // 15, seed=seed)
        options = {"run_dir": folder / f"run_{half}", "resume": True, "progress": False, "null": batches.null}
        expert = mole.train_expert(
            load_pipeline(), batches, name=half, rank=made.rank, config=config, **options
        )
        save_expert(expert, files[half], "kohya")
        print(
            f"seed {seed}: expert {half}, loss {expert.metadata['loss']}, {time.time() - begun:.0f} s",
            flush=True,
        )
    scenes = data.scenes(data.load_split("train"), made.scenes, Generator().manual_seed(1000 * seed + 500))
    batches = _batches(scenes, folder / "scenes", (data.HEIGHT, data.WIDTH), made, seed)
    found: dict[str, Any] = {"none": _measure(load_pipeline(), made, seed)}
    experts = {half: load_expert(path) for half, path in files.items()}
    pipe = load_pipeline()
    with patch(pipe, experts) as handle:
        for name, weights in {"low expert": (1.0, 0.0), "high expert": (0.0, 1.0), "sum": (1.0, 1.0)}.items():
            handle.set_scales(dict(zip(data.HALVES, weights)))
            found[name] = _measure(pipe, made, seed)
    for name, kind in GATES.items():
        pipe = load_pipeline()
        torch.manual_seed(1000 * seed + 7)
        config = replace(
            _EXPERT, steps=made.gate_steps, warmup=made.gate_steps // 15, lr=_GATE_RATES[kind], seed=seed
        )
        options = {
            "run_dir": folder / f"run_gates_{kind}",
            "resume": True,
            "progress": False,
            "null": batches.null,
        }
        with patch(pipe, experts, kind) as handle:
            mole.train_gates(handle, batches, config, **options)
            found[name] = _measure(pipe, made, seed)
            # a learned constant is the control, no gate that a file holds
            if kind != "constant":
                handle.save(folder / f"mixture_{kind}.safetensors")
        print(f"seed {seed}: gates {name}, {time.time() - begun:.0f} s", flush=True)
    return {
        "seed": seed,
        "seconds": time.time() - begun,
        "cpu_seconds": time.process_time(),
        "variants": found,
    }


def write_folder(pictures: data.Pictures, folder: Path) -> None:
    """The pictures as PNG files with a metadata.jsonl, as anyone's own would be."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (pixels, caption) in enumerate(zip(pictures.pixels, pictures.captions)):
        values: Tensor = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
        Image.fromarray(values.numpy()).save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def _batches(
    pictures: data.Pictures, folder: Path, size: tuple[int, int], made: Settings, seed: int
) -> PictureBatches:
    write_folder(pictures, folder)
    found = PictureFolder(folder, size, multiple=8)
    return picture_batches(
        load_pipeline(),
        found,
        made.batch,
        cache=folder.parent / "cache",
        seed=seed,
        encode_batch=64,
        progress=False,
    )


def _measure(pipe: Any, made: Settings, seed: int) -> dict[str, float]:
    """Loss by region on the held-out scenes, and the share of slots that a reader reads in drawn pictures as
    their captions say.
    """
    held = evaluate.make_held_out(pipe, made.held_out)
    losses = evaluate.region_loss(evaluate.scene_losses(pipe, held), held)
    labels = data.draw_labels(made.captions, Generator().manual_seed(4242))
    captions = [data.caption_of(row) for row in labels.tolist()]
    drawn = evaluate.generate_pictures(pipe, captions, 100 + seed, made.sampling_steps)
    return {f"loss {region}": loss for region, loss in losses.items()} | evaluate.read_back(
        load_reader(), drawn, captions
    )


def combine(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> figure -> mean, sd and the seeds' values; losses as percent against the same seed's base."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in VARIANTS:
        table[variant] = {}
        for key in seeds[0]["variants"][variant]:
            values = [one["variants"][variant][key] for one in seeds]
            if key.startswith("loss"):
                values = [100 * (v / one["variants"]["none"][key] - 1) for v, one in zip(values, seeds)]
            table[variant][key] = spread(values)
    return table


def markdown(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Rows of variants; every cell is mean ± standard deviation over the seeds."""
    losses = {
        "loss all": "loss, all",
        "loss low": "cards 0-4",
        "loss high": "cards 5-9",
        "loss background": "elsewhere",
    }
    columns = losses | {"digits": "digits read"}
    lines = [f"| variant | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for variant, row in table.items():
        cells = [
            f"{row[key]['mean']:+.1f} ± {row[key]['sd']:.1f} %" if variant != "none" else "–"
            for key in losses
        ]
        cells.append(f"{100 * row['digits']['mean']:.0f} ± {100 * row['digits']['sd']:.0f} %")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(table: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Loss against the base and digits read, each seed a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, key, factor, title in zip(
        figure.subplots(1, 2),
        ("loss all", "digits"),
        (1, 100),
        ("held-out loss against the base, %", "digits read as captioned, %"),
    ):
        for y, variant in enumerate(VARIANTS):
            found = table[variant][key]
            axis.barh(y, factor * found["mean"], color="#7a9cc6" if variant in GATES else "#c9ced6")
            axis.plot([factor * v for v in found["seeds"]], [y] * len(found["seeds"]), "k.", ms=5)
        axis.set_yticks(range(len(VARIANTS)), VARIANTS)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    settings = {True: QUICK, False: Settings()}
    run_seeds("mole", __doc__ or "", settings, run_seed, combine, markdown, plot, "ablation.png")


if __name__ == "__main__":
    main()
