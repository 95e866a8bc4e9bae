"""What the demo measures: held-out loss by region, digits read out of generated pictures, and where the gates
look.

Every variant of the model meets the same scenes, the same noise and the same timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mole_kernels.demo import classifier, data
from mole_kernels.demo.model import FACTOR, LATENT_CHANNELS, Pipeline
from mole_kernels.reports.record import layer_kind

TIMES = (50, 150, 300, 500, 750)
REGIONS = ("all", "low", "high", "background")
STEPS, GUIDANCE = 20, 4.0


@dataclass(frozen=True)
class HeldOut:
    """Scenes no training has seen, sharp, ready for the loss.

    latents [B,4,6,18]; text [B,5,64]; noise [len(TIMES),B,4,6,18]; regions [B,4,6,18], weights 0..1 in the
    order of REGIONS;
    boxes [B,2,24,72], the cards of the low and of the high half.
    """

    latents: Tensor
    text: Tensor
    noise: Tensor
    regions: Tensor
    boxes: Tensor


@torch.no_grad()
def encode_pictures(pipe: Pipeline, pixels: Tensor) -> Tensor:
    """Pixels [B,3,H,W] in -1..1 -> scaled latents [B,4,H/4,W/4]."""
    means = [pipe.vae.encode(part).latent_dist.mean for part in pixels.split(128)]
    return torch.cat(means) * pipe.vae.config.scaling_factor


@torch.no_grad()
def encode_captions(pipe: Pipeline, captions: Sequence[str]) -> Tensor:
    """Captions -> text states [B,5,64]; each different caption is encoded once."""
    unique = sorted(set(captions))
    ids = pipe.tokenizer(unique, padding="max_length", truncation=True)["input_ids"]
    states = torch.cat([pipe.text_encoder(part).last_hidden_state for part in torch.tensor(ids).split(512)])
    place = {caption: i for i, caption in enumerate(unique)}
    return states[[place[caption] for caption in captions]]


def make_held_out(pipe: Pipeline, n: int = 64, seed: int = 99) -> HeldOut:
    """n sharp scenes of held-out scans with their noise."""
    g = Generator().manual_seed(seed)
    pictures = data.scenes(data.load_split("held"), n, g)
    latents = encode_pictures(pipe, pictures.pixels)
    noise = torch.randn(len(TIMES), *latents.shape, generator=g)
    cards = F.avg_pool2d(pictures.boxes, FACTOR)
    whole = torch.ones_like(cards[:, :1])
    regions = torch.cat([whole, cards, whole - cards.sum(1, keepdim=True).clamp(max=1)], 1)
    return HeldOut(latents, encode_captions(pipe, pictures.captions), noise, regions, pictures.boxes)


@torch.no_grad()
def scene_losses(pipe: Pipeline, held: HeldOut) -> Tensor:
    """Squared epsilon errors summed over each region, mean over channels and times: [B,4], columns as
    REGIONS.
    """
    total = torch.zeros(len(held.latents), len(REGIONS))
    for time, noise in zip(TIMES, held.noise, strict=True):
        t = torch.full((len(noise),), time)
        noisy = pipe.scheduler.add_noise(held.latents, noise, t)
        error = (pipe.unet(noisy, t, held.text).sample - noise).square().mean(1, keepdim=True)
        total += (error * held.regions).sum((2, 3))
    return total / len(TIMES)


def region_loss(losses: Tensor, held: HeldOut) -> dict[str, float]:
    """Losses [B,4] per unit of area: the mean squared error of each region over all scenes."""
    return dict(zip(REGIONS, (losses.sum(0) / held.regions.sum((0, 2, 3))).tolist(), strict=True))


@torch.no_grad()
def generate_pictures(pipe: Pipeline, captions: Sequence[str], seed: int, steps: int = STEPS) -> Tensor:
    """Pictures [B,3,24,72] in -1..1 by the pipeline itself (DDIM, classifier-free guidance); the noise
    depends on seed alone.
    """
    size = (data.HEIGHT // FACTOR, data.WIDTH // FACTOR)
    latents = torch.randn(len(captions), LATENT_CHANNELS, *size, generator=Generator().manual_seed(seed))
    images = pipe(
        list(captions), num_inference_steps=steps, guidance_scale=GUIDANCE, latents=latents, output_type="pt"
    ).images
    return images.float() * 2 - 1


def read_back(reader: classifier.Reader, pixels: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of slots in which the reader sees what the caption says: digits, low, high, blank."""
    labels = torch.tensor([data.labels_of(caption) for caption in captions])
    return classifier.accuracy(classifier.read(reader, pixels), labels)


def demo_grid(tokens: int) -> tuple[int, int] | None:
    """Height and width of a layer's tokens when they are places of the picture, None when they are words."""
    h, w = data.HEIGHT // FACTOR, data.WIDTH // FACTOR
    return next(((a, b) for a, b in ((h, w), (h // 2, w // 2)) if a * b == tokens), None)


def picture_maps(token_gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token gates [B,T,E] by layer -> maps [B,E,h,w], for the layers whose tokens are places of the
    picture.
    """
    maps = {}
    for path, gate in token_gates.items():
        if (size := demo_grid(gate.shape[1])) is not None:
            maps[path] = gate.transpose(1, 2).unflatten(2, size)
    return maps


def mean_map(maps: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers [B,E,6,18], coarse ones enlarged."""
    size = (data.HEIGHT // FACTOR, data.WIDTH // FACTOR)
    return torch.stack([F.interpolate(m, size, mode="nearest") for m in maps.values()]).mean(0)


@torch.no_grad()
def collect_maps(pipe: Pipeline, handle, held: HeldOut) -> list[dict[str, Tensor]]:
    """The gate maps of every picture layer at each of TIMES, on the held-out scenes."""
    out = []
    for time, noise in zip(TIMES, held.noise, strict=True):
        t = torch.full((len(noise),), time)
        pipe.unet(pipe.scheduler.add_noise(held.latents, noise, t), t, held.text)
        gates = {
            path: layer_gates.token
            for path, layer_gates in handle.gate_maps().items()
            if layer_gates.token is not None
        }
        out.append(picture_maps({path: gate.float().clone() for path, gate in gates.items()}))
    return out


def auc(score: Tensor, positive: Tensor) -> float:
    """P(score of a positive > score of a negative), ties half; nan without both kinds. score [n] float,
    positive [n] bool.
    """
    values, place = score.double().unique(return_inverse=True)
    up = torch.bincount(place[positive], minlength=len(values)).double()
    down = torch.bincount(place[~positive], minlength=len(values)).double()
    pairs = up.sum() * down.sum()
    return float(((down.cumsum(0) - 0.5 * down) * up).sum() / pairs) if pairs > 0 else float("nan")


def gate_auc(maps: Sequence[Mapping[str, Tensor]], boxes: Tensor) -> dict[str, dict[str, float]]:
    """How well gates find their own cards, averaged over experts and times. A token belongs to a card that
    covers over half of it.

    Rows: "mean of layers", "mean map" (the gates of all layers averaged into one map), and one per kind of
    layer; columns:
    "own_vs_rest" and "own_vs_other" (among tokens on cards only). No layer is picked by its result.
    """
    rows: dict[str, list[tuple[float, float]]] = {}
    for at_time in maps:
        whole = mean_map(at_time)
        rows.setdefault("mean map", []).extend(_scores(whole, boxes))
        for path, areas in at_time.items():
            scores = _scores(areas, boxes)
            rows.setdefault("mean of layers", []).extend(scores)
            rows.setdefault(layer_kind(path), []).extend(scores)
    means = {row: torch.tensor(scores).nanmean(0).tolist() for row, scores in sorted(rows.items())}
    return {row: {"own_vs_rest": a, "own_vs_other": b} for row, (a, b) in means.items()}


def _scores(maps: Tensor, boxes: Tensor) -> list[tuple[float, float]]:
    """[(own cards vs the rest, own vs other cards)] for each expert of maps [B,2,h,w]; expert e owns half
    e.
    """
    cover = F.adaptive_avg_pool2d(boxes, (maps.shape[2], maps.shape[3])) > 0.5
    on_cards = cover.any(1).flatten()
    out = []
    for e in range(2):
        score, own = maps[:, e].flatten(), cover[:, e].flatten()
        out.append((auc(score, own), auc(score[on_cards], own[on_cards])))
    return out
