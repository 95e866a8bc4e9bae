"""Trains everything the demo ships, from scratch: autoencoder, digit reader, and the base (UNet and text
encoder).

    python python/tools/train_demo_base.py --out mole_kernels/demo/assets             # about an hour and a
    half on one core
    python python/tools/train_demo_base.py --out /tmp/quick --quick                   # under a minute; the
    pictures are noise

The base sees scenes whose digits are mostly out of focus and partly captioned wrongly, so that it draws good
scenes with poor
digits. With the same seed, steps and torch on the same kind of processor the result is the same; --minutes
ends by the clock and so
is not reproducible to the bit.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mole_kernels.demo import classifier, data, model


@dataclass(frozen=True)
class Plan:
    """Steps, batches and the weakness of the digits; the defaults made the shipped weights."""

    vae_steps: int = 1500
    vae_batch: int = 12
    reader_steps: int = 900
    reader_batch: int = 32
    pool: int = 30_000
    base_steps: int = 7000
    base_batch: int = 32
    base_lr: float = 1.2e-3
    weak: float = 0.93
    mislabel: float = 0.2
    save_every: int = 500
    minutes: float = math.inf


QUICK = Plan(
    vae_steps=30,
    vae_batch=8,
    reader_steps=30,
    reader_batch=16,
    pool=128,
    base_steps=40,
    base_batch=16,
    save_every=1000,
)


class Average:
    """Running average of parameters: the weights that are kept."""

    def __init__(self, params: list[nn.Parameter], decay: float) -> None:
        self.params, self.decay, self.steps = params, decay, 0
        self.mean = [p.detach().clone() for p in params]

    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.params], 1 - decay)

    def swap(self) -> None:
        """Exchange the averages with the parameters; a second call undoes it."""
        for p, mean in zip(self.params, self.mean, strict=True):
            kept = p.detach().clone()
            p.data.copy_(mean)
            mean.copy_(kept)


def rate(progress: float, warm: float = 0.02) -> float:
    """Linear warm-up, then cosine to 2 % of the peak; progress in 0..1."""
    return min(1.0, (progress + 1e-3) / warm) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    )


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def step(optimiser: torch.optim.Optimizer, loss: Tensor, params: list[nn.Parameter]) -> None:
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimiser.step()


def say(text: str, since: float) -> None:
    print(f"[{time.time() - since:6.0f} s] {text}", flush=True)


def train_vae(plan: Plan, seed: int, since: float) -> tuple[nn.Module, dict]:
    """Reconstruction plus a small KL term, on sharp and weak scenes alike. Returns it with its facts."""
    torch.manual_seed(seed)
    vae, digits, g = model.build_vae(), data.load_split("train"), Generator().manual_seed(seed + 1)
    params = list(vae.parameters())
    optimiser, average = torch.optim.AdamW(params, weight_decay=0.0), Average(params, 0.99)
    for i in range(plan.vae_steps):
        set_rate(optimiser, 3e-3 * rate(i / plan.vae_steps))
        x = data.scenes(digits, plan.vae_batch, g, weak=0.3).pixels
        latent = vae.encode(x).latent_dist
        noise = torch.randn(latent.mean.shape, generator=g)
        loss = (
            F.mse_loss(vae.decode(latent.mean + latent.std * noise).sample, x)
            + 2e-5 * latent.kl().mean() / latent.mean[0].numel()
        )
        step(optimiser, loss, params)
        average.update()
        if (i + 1) % 250 == 0 or i + 1 == plan.vae_steps:
            say(f"vae {i + 1}/{plan.vae_steps} loss {loss.item():.5f}", since)
    average.swap()
    vae.requires_grad_(False).eval()
    held = data.scenes(data.load_split("held"), 256, Generator().manual_seed(99)).pixels
    latents = vae.encode(held).latent_dist.mean
    error = F.mse_loss(vae.decode(latents).sample, held)
    facts = {
        "scaling_factor": round(1 / latents.std().item(), 5),
        "vae_psnr_db": round(10 * math.log10(4 / error.item()), 2),
    }
    say(f"vae {facts}, std by channel {[round(s, 2) for s in latents.std((0, 2, 3)).tolist()]}", since)
    return vae, facts


def train_reader(vae: nn.Module, plan: Plan, seed: int, since: float) -> classifier.Reader:
    """The digit reader, on sharp scenes, half of them through the autoencoder."""
    torch.manual_seed(seed)
    reader, digits, g = classifier.Reader(), data.load_split("train"), Generator().manual_seed(seed + 1)
    params = list(reader.parameters())
    optimiser, average = torch.optim.AdamW(params, weight_decay=1e-2), Average(params, 0.99)
    for i in range(plan.reader_steps):
        set_rate(optimiser, 2e-3 * rate(i / plan.reader_steps))
        batch = data.scenes(digits, plan.reader_batch, g)
        pixels = through(vae, batch.pixels) if i % 2 else batch.pixels
        step(optimiser, classifier.loss_on(reader, pixels, batch.labels), params)
        average.update()
    average.swap()
    reader.requires_grad_(False).eval()
    say("reader trained", since)
    return reader


def reader_facts(vae: nn.Module, reader: nn.Module) -> dict:
    """How well held-out scenes are read through the autoencoder, with all digits sharp and with all of them
    weak.
    """
    facts = {}
    for name, weak in (("sharp", 0.0), ("weak", 1.0)):
        held = data.scenes(data.load_split("held"), 1000, Generator().manual_seed(98), weak=weak)
        seen = classifier.read(reader, through(vae, held.pixels))
        facts[f"reader_{name}"] = {k: round(v, 4) for k, v in classifier.accuracy(seen, held.labels).items()}
    return facts


@torch.no_grad()
def through(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Encode and decode."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(128)])


@torch.no_grad()
def latents_of(vae: nn.Module, pixels: Tensor, scaling: float) -> Tensor:
    """Scaled latents, in half precision to save memory."""
    return torch.cat([(vae.encode(part).latent_dist.mean * scaling).half() for part in pixels.split(128)])


def make_pool(vae: nn.Module, scaling: float, plan: Plan, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [pool,4,6,18] half and caption ids [pool,5] of weak scenes."""
    digits, g, latents, captions = data.load_split("train"), Generator().manual_seed(seed), [], []
    for start in range(0, plan.pool, 2000):
        batch = data.scenes(digits, min(2000, plan.pool - start), g, plan.weak, plan.mislabel)
        latents.append(latents_of(vae, batch.pixels, scaling))
        captions += batch.captions
    return torch.cat(latents), token_ids(captions)


def token_ids(captions: list[str]) -> Tensor:
    ids = model.build_tokenizer()(captions, padding="max_length", truncation=True)["input_ids"]
    return torch.tensor(ids)


def save_base(out: Path, unet: nn.Module, text: nn.Module, average: Average) -> None:
    average.swap()
    model.save_weights(unet, out / "unet.safetensors")
    model.save_weights(text, out / "text_encoder.safetensors")
    average.swap()


def train_base(pool: tuple[Tensor, Tensor], plan: Plan, out: Path, seed: int, since: float) -> dict:
    """Plain epsilon loss with one caption in ten dropped; the averaged weights are written every `save_every`
    steps.
    """
    torch.manual_seed(seed)
    unet, text, scheduler = model.build_unet(), model.build_text_encoder(), model.build_scheduler()
    # the usual 0.02 makes all words look alike at first and costs a small model many steps
    nn.init.normal_(text.get_input_embeddings().weight, std=0.5)
    params = [*unet.parameters(), *text.parameters()]
    optimiser = torch.optim.AdamW(params, betas=(0.9, 0.99), weight_decay=0.0)
    average, g, empty = Average(params, 0.9995), Generator().manual_seed(seed + 1), token_ids([""])
    begun, losses = time.time(), []
    for i in range(plan.base_steps):
        progress = max(i / plan.base_steps, (time.time() - begun) / (60 * plan.minutes))
        if progress >= 1:
            break
        set_rate(optimiser, plan.base_lr * rate(progress))
        pick = torch.randint(len(pool[0]), (plan.base_batch,), generator=g)
        x, ids = pool[0][pick].float(), pool[1][pick]
        ids = torch.where(torch.rand(len(x), 1, generator=g) < 0.1, empty, ids)
        t, noise = torch.randint(0, 1000, (len(x),), generator=g), torch.randn(x.shape, generator=g)
        predicted = unet(scheduler.add_noise(x, noise, t), t, text(ids).last_hidden_state).sample
        loss = F.mse_loss(predicted, noise)
        step(optimiser, loss, params)
        average.update()
        losses.append(loss.item())
        if (i + 1) % plan.save_every == 0:
            save_base(out, unet, text, average)
            say(f"base {i + 1}/{plan.base_steps} loss {mean(losses[-plan.save_every :]):.4f}", since)
    save_base(out, unet, text, average)
    tenth = max(1, len(losses) // 10)
    return {
        "base_steps": len(losses),
        "base_loss": [round(mean(part), 5) for part in (losses[:tenth], losses[-tenth:])],
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def make_eyes(out: Path, plan: Plan, seed: int, since: float) -> dict:
    """The autoencoder and the digit reader, written to `out`. Returns their facts."""
    vae, facts = train_vae(plan, seed, since)
    model.save_weights(vae, out / "vae.safetensors")
    # from here on use what is stored, rounded to half precision
    model.load_weights(vae, out / "vae.safetensors")
    model.save_weights(train_reader(vae, plan, seed + 10, since), out / "reader.safetensors")
    return facts


def make_assets(out: Path, plan: Plan, seed: int, base_only: bool = False) -> dict:
    """All stages, each written to `out` as soon as it is done. Returns the facts, which are in facts.json
    too.
    """
    since = time.time()
    facts = model.read_facts(out) if base_only else make_eyes(out, plan, seed, since)
    vae = model.build_vae()
    model.load_weights(vae, out / "vae.safetensors")
    vae.requires_grad_(False).eval()
    facts |= reader_facts(vae, classifier.load_reader(out)) | {
        "seed": seed,
        "weak": plan.weak,
        "mislabel": plan.mislabel,
    }
    say(f"reader {facts}", since)
    model.write_facts(facts, out)
    pool = make_pool(vae, facts["scaling_factor"], plan, seed + 20)
    say(f"pool of {len(pool[0])} scenes", since)
    facts |= train_base(pool, plan, out, seed + 30, since)
    model.write_facts(facts, out)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps of the base")
    parser.add_argument("--minutes", type=float, help="end the base's training by the clock")
    parser.add_argument(
        "--quick", action="store_true", help="a run of under a minute that only shows that it works"
    )
    parser.add_argument(
        "--base-only",
        action="store_true",
        help="take the autoencoder and the reader that are in --out already",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes = {"base_steps": args.steps, "minutes": args.minutes}
    plan = Plan(
        **(vars(QUICK if args.quick else Plan()) | {k: v for k, v in changes.items() if v is not None})
    )
    print(make_assets(args.out, plan, args.seed, args.base_only))


if __name__ == "__main__":
    main()
