"""DiffLoRA end to end on the demo's digits: `python python/recipes/difflora/run.py [--quick]` writes a table,
plots and pictures.

An identity is a hand: a slant, a stroke, a colour. Each has a folder of cards it wrote. An expert is trained
for every hand, the flat
experts make a data set of LoRAs, an autoencoder and a denoiser are trained on it; then the experts of hands
that none of them saw are
predicted from three of their cards, and compared with trained ones, with the mean of all trained ones, and
with none at all.
Started again, a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
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
from showing import gallery, markdown, plot
from styles import Style, cards, draw_styles, save_cards
from torch import Generator, Tensor

from mole_kernels.demo.evaluate import encode_captions, encode_pictures
from mole_kernels.demo.metrics import spread
from mole_kernels.demo.model import load_pipeline
from mole_kernels.demo.run import quiet
from mole_kernels.experts.lowrank import Expert
from mole_kernels.io import load_expert
from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
from mole_kernels.methods.difflora.dataset import IdentityTraining, MinimumSize, pictures_of, train_identities
from mole_kernels.methods.difflora.features import SmallImages
from mole_kernels.methods.difflora.generate import Sampling, generate_experts
from mole_kernels.methods.difflora.predictor import Predictor
from mole_kernels.methods.difflora.shards import LoRADataset, pack_shards
from mole_kernels.methods.difflora.store import load_predictor, save_predictor
from mole_kernels.methods.difflora.train import train_autoencoder, train_predictor
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.loss import denoising_error

TIMES = (100, 300, 500, 700, 900)
SHOWN = 3
SAMPLING = Sampling(steps=4, kind="dpm")
# found on hands of another seed
_EXPERT = TrainConfig(steps=0, lr=1e-2, warmup=3, schedule="cosine", weight_decay=0.0, snr_gamma=2.0)
_AUTOENCODER = TrainConfig(
    steps=0, lr=3e-3, warmup=20, schedule="cosine", weight_decay=0.0, grad_clip=0.5, checkpoint_every=50
)
_DENOISER = TrainConfig(
    steps=0, lr=1e-3, warmup=20, schedule="cosine", weight_decay=0.0, cond_dropout=0.1, checkpoint_every=100
)


@dataclass(frozen=True)
class Plan:
    """How much is done for each seed.

    hands, unseen  identities whose experts make the data set, and those that are predicted
    cards          pictures of each hand, `asked` more of held-out scans for the loss
    """

    seeds: int = 3
    hands: int = 192
    unseen: int = 12
    cards: int = 24
    asked: int = 32
    expert_steps: int = 48
    autoencoder_steps: int = 1500
    denoiser_steps: int = 2000


QUICK = Plan(
    seeds=2,
    hands=56,
    unseen=6,
    cards=16,
    asked=24,
    expert_steps=32,
    autoencoder_steps=500,
    denoiser_steps=400,
)
TINY = Plan(
    seeds=2,
    hands=24,
    unseen=3,
    cards=16,
    asked=24,
    expert_steps=32,
    autoencoder_steps=200,
    denoiser_steps=200,
)
# small vectors, so that few identities and steps will do: two of attention's layers, rank 1
TARGETS, RANK = ("to_v", "to_out.0"), 1
# three stages, 64 times: of the paper's 256 there would be a dozen numbers left of these
CHANNELS = (16, 64, 128)


def main() -> None:
    """All seeds, then the table, the plots and results.json."""
    parser = argparse.ArgumentParser(description="DiffLoRA end to end on the demo's digits.")
    parser.add_argument(
        "--quick", action="store_true", help="fewer hands and steps: under 15 minutes on two idle cores"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="fewer still: the run whose figures the docs have"
    )
    parser.add_argument("--seeds", type=int, help="how many, instead")
    parser.add_argument(
        "--out", type=Path, help="the folder for everything (default: build/recipes/difflora)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="seeds at once, one thread each"
    )
    asked = parser.parse_args()
    plan, kind, begun = Plan(), "difflora", time.time()
    if asked.quick or asked.tiny:
        plan, kind = (TINY, "difflora_tiny") if asked.tiny else (QUICK, "difflora_quick")
    plan = replace(plan, seeds=asked.seeds or plan.seeds)
    out = asked.out or Path("build/recipes") / kind
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(min(asked.workers, plan.seeds), mp_context=get_context("spawn")) as pool:
        seeds = list(pool.map(partial(run_seed, plan, out), range(plan.seeds)))
    table = combine([one["figures"] for one in seeds])
    result = {
        "plan": asdict(plan),
        "torch": torch.__version__,
        "seconds": time.time() - begun,
        "table": table,
        "seeds": seeds,
    }
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "table.md").write_text(markdown(table))
    plot(table, seeds, out / "figures.png")
    gallery(out, out / "pictures.png")
    print(markdown(table))
    cpu = sum(one["cpu_seconds"] for one in seeds)
    print(
        f"{plan.seeds} seeds, {time.time() - begun:.0f} s, {cpu:.0f} s of processor time; in {out}: table.md, results.json, *.png"
    )


def run_seed(plan: Plan, out: Path, seed: int) -> dict[str, Any]:
    """All stages for one seed; figures by name, losses of training, and what it took."""
    torch.set_num_threads(1)
    quiet()
    begun, folder, pipe = time.time(), out / f"seed{seed}", load_pipeline()
    styles = draw_styles(plan.hands + plan.unseen, seed)
    names = [f"hand{i:03d}" for i in range(len(styles))]
    seen, unseen = names[: plan.hands], names[plan.hands :]
    by_name = dict(zip(names, styles))
    write_folders(plan, by_name, folder / "hands", seed)
    spent = train_all(plan, pipe, folder, seed)
    print(f"seed {seed}: {len(names)} experts, {time.time() - begun:.0f} s", flush=True)
    data = pack_shards(folder / "loras", seen)
    predictor, losses = train_model(plan, folder, data, seed)
    print(f"seed {seed}: autoencoder and denoiser, {time.time() - begun:.0f} s", flush=True)
    figures = measure(plan, pipe, folder, predictor, data, {name: by_name[name] for name in unseen})
    figures["seconds to train"] = sum(spent) / len(spent)
    figures["times faster"] = figures["seconds to train"] / figures["seconds to predict"]
    draw_some(pipe, folder, predictor, data, {name: by_name[name] for name in unseen[:4]})
    print(f"seed {seed}: done, {time.time() - begun:.0f} s", flush=True)
    return {
        "seed": seed,
        "seconds": time.time() - begun,
        "cpu_seconds": time.process_time(),
        "figures": figures,
        "losses": losses,
    }


def write_folders(plan: Plan, hands: Mapping[str, Style], root: Path, seed: int) -> None:
    """A folder of pictures for each hand. All write the same scans, so that hands differ by their hand
    alone.
    """
    for name, style in hands.items():
        if not (root / name / f"{plan.cards - 1:03d}.txt").exists():
            save_cards(*cards(style, "train", plan.cards, Generator().manual_seed(100 + seed)), root / name)


def train_all(plan: Plan, pipe: Any, folder: Path, seed: int) -> list[float]:
    """An expert for every hand; processor seconds of each, kept beside them for a run that is started
    again.
    """
    config = replace(_EXPERT, steps=plan.expert_steps, seed=seed)
    training = IdentityTraining(
        config,
        RANK,
        float(RANK),
        batch_size=8,
        resolution=(24, 24),
        multiple=8,
        targets=TARGETS,
        per_shard=64,
    )
    path, began = folder / "seconds.json", [time.process_time()]
    spent: list[float] = json.loads(path.read_text()) if path.exists() else []
    done = {p.stem for p in (folder / "loras" / "experts").glob("*")}

    def took(name: str, expert: Expert | None) -> None:
        now = time.process_time()
        if name not in done:
            spent.append(now - began[0])
            path.write_text(json.dumps(spent))
        began[0] = now

    train_identities(
        pipe,
        folder / "hands",
        folder / "loras",
        training,
        accept=MinimumSize(24),
        progress=False,
        on_identity=took,
    )
    return spent


def train_model(
    plan: Plan, folder: Path, data: LoRADataset, seed: int
) -> tuple[Predictor, dict[str, list[float]]]:
    """Autoencoder, then denoiser and features; the model is read back from its folder as anyone would."""
    torch.manual_seed(seed)
    autoencoder = LoRAAutoencoder(AutoencoderConfig(data.manifest.length, channels=CHANNELS))
    config = replace(_AUTOENCODER, steps=plan.autoencoder_steps, seed=seed)
    options: dict[str, Any] = {"resume": True, "progress": False}
    first = train_autoencoder(autoencoder, data, config, run_dir=folder / "run_autoencoder", **options)
    # the card whole for the face, small for the image: a stand-in for two encoders that see different things
    encoders = {"face": SmallImages(64, 16, 24), "image": SmallImages(64, 16, 16)}
    shape = {"dim": 64, "hidden": 64, "depth": 3, "width": 96, "heads": 4, "patch": 4}
    predictor = Predictor.new(data.manifest, autoencoder, encoders, **shape)
    references = [predictor.prepare(pictures_of(folder / "loras", name)) for name in data.names]
    config = replace(_DENOISER, steps=plan.denoiser_steps, seed=seed)
    second = train_predictor(
        predictor, data, references, config, batch_size=48, run_dir=folder / "run_denoiser", **options
    )
    save_predictor(folder / "model", predictor, {"seed": str(seed)})
    return load_predictor(folder / "model"), {"autoencoder": first.losses, "denoiser": second.losses}


@torch.no_grad()
def measure(
    plan: Plan, pipe: Any, folder: Path, predictor: Predictor, data: LoRADataset, unseen: Mapping[str, Style]
) -> dict[str, float]:
    """Figures of the unseen hands: errors of the autoencoder by magnitude, losses with each kind of expert,
    time to predict.
    """
    trained = {name: load_expert(folder / "loras" / "experts" / f"{name}.safetensors") for name in unseen}
    vectors = torch.stack([data.manifest.flatten_expert(one) for one in trained.values()])
    mean = data.vectors().mean(0)
    figures = {}
    for said, these in (("seen", data.vectors()), ("unseen", vectors)):
        figures |= {
            f"{key}, {said}": value
            for key, value in errors(predictor.autoencoder(these), these, mean).items()
        }
    shown = {name: pictures_of(folder / "loras", name)[:SHOWN] for name in unseen}
    # once before the clock: the first call fills caches
    generate_experts(predictor, shown, base=pipe, sampling=SAMPLING)
    began = time.process_time()
    predicted = {
        name: generate_experts(predictor, {name: shown[name]}, sampling=SAMPLING).experts[name]
        for name in unseen
    }
    figures["seconds to predict"] = (time.process_time() - began) / len(unseen)
    flat = torch.stack([data.manifest.flatten_expert(one) for one in predicted.values()])
    figures |= {f"{key}, predicted": value for key, value in errors(flat, vectors, mean).items()}
    rebuilt = predictor.autoencoder(vectors)
    total: dict[str, list[float]] = {}
    for i, (name, style) in enumerate(unseen.items()):
        kinds = {
            "no expert": None,
            "mean LoRA": data.manifest.expert(mean),
            "predicted": predicted[name],
            "trained, through the autoencoder": data.manifest.expert(rebuilt[i]),
            "trained": trained[name],
            "another hand's": trained[list(unseen)[i - 1]],
        }
        latents, text = held_out(pipe, style, plan.asked)
        for kind, expert in kinds.items():
            total.setdefault(kind, []).append(loss(pipe, latents, text, expert))
    return figures | {f"loss, {kind}": sum(values) / len(values) for kind, values in total.items()}


def errors(got: Tensor, wanted: Tensor, mean: Tensor) -> dict[str, float]:
    """‖got − wanted‖ ÷ ‖wanted − mean‖ over the 1 % that differ most from the mean, and over the rest: 1 is
    as bad as the mean itself.
    """
    away = wanted - mean
    top = away.abs() >= away.abs().flatten().kthvalue(int(0.99 * away.numel())).values
    found = {"error of the top 1 %": (got - wanted)[top].norm() / away[top].norm()}
    found["error of the rest"] = (got - wanted)[~top].norm() / away[~top].norm()
    return {key: float(value) for key, value in found.items()}


def held_out(pipe: Any, style: Style, count: int) -> tuple[Tensor, Tensor]:
    """Latents and text states of cards of scans that no hand has trained on."""
    pixels, captions = cards(style, "held", count, Generator().manual_seed(5))
    return encode_pictures(pipe, pixels), encode_captions(pipe, captions)


def loss(pipe: Any, latents: Tensor, text: Tensor, expert: Expert | None) -> float:
    """The denoising loss over five timesteps, with the same noise for every expert."""
    if expert is not None:
        with patch(pipe, {"hand": expert}):
            return loss(pipe, latents, text, None)
    g, found = Generator().manual_seed(1), 0.0
    for t in TIMES:
        noise = torch.randn(latents.shape, generator=g)
        at = torch.full((len(latents),), t)
        found += float(denoising_error(pipe.unet, pipe.scheduler, latents, at, noise, text).mean()) / len(
            TIMES
        )
    return found


def draw_some(
    pipe: Any, folder: Path, predictor: Predictor, data: LoRADataset, unseen: Mapping[str, Style]
) -> None:
    """Pictures of the same captions and noise: with no expert, the predicted and the trained one, beside a
    card of the hand.
    """
    captions = ["blank three blank", "blank eight blank"]
    options = {
        "num_inference_steps": 20,
        "guidance_scale": 2.0,
        "height": 24,
        "width": 24,
        "output_type": "pt",
    }
    rows = {}
    for name in unseen:
        pictures = pictures_of(folder / "loras", name)[:SHOWN]
        experts = {
            "none": None,
            "predicted": generate_experts(predictor, {name: pictures}, sampling=SAMPLING).experts[name],
            "trained": load_expert(folder / "loras" / "experts" / f"{name}.safetensors"),
        }
        for kind, expert in experts.items():
            generators = [Generator().manual_seed(7 + i) for i in range(len(captions))]
            if expert is None:
                rows[f"{name} {kind}"] = pipe(captions, generator=generators, **options).images
            else:
                with patch(pipe, {"hand": expert}):
                    rows[f"{name} {kind}"] = pipe(captions, generator=generators, **options).images
    torch.save(rows, folder / "drawn.pt")


def combine(seeds: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """figure -> mean, sd and the seeds' values; losses also as percent against the same seed's base."""
    table = {key: spread([one[key] for one in seeds]) for key in seeds[0]}
    for key in [key for key in table if key.startswith("loss, ") and key != "loss, no expert"]:
        table[f"change, {key[6:]}"] = spread([100 * (one[key] / one["loss, no expert"] - 1) for one in seeds])
    return table


if __name__ == "__main__":
    main()
