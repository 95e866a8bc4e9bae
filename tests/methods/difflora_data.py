"""Folders of tiny pictures for DiffLoRA's tests, and what the launched test runs in each of its processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from mole_kernels.methods.difflora.dataset import IdentityTraining, MinimumSize, train_identities
from mole_kernels.methods.difflora.shards import pack_shards
from mole_kernels.training.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from selma_pipeline import tiny_pipeline

CONFIG = TrainConfig(steps=2, lr=1e-2, seed=3)
TRAINING = IdentityTraining(
    CONFIG, rank=2, alpha=2.0, batch_size=2, resolution=(16, 16), multiple=2, caption="one", per_shard=2
)


def write_people(root: Path, names: str = "abcde", pictures: int = 2) -> Path:
    """A folder of plain pictures for each name; everybody has a colour of their own."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(pictures):
            Image.new("RGB", (16, 16), (50 * i, 120 + 20 * k, 250 - 50 * i)).save(root / name / f"{k}.png")
    return root


def make_set(root: Path, work: Path, on_identity=None):
    train_identities(
        tiny_pipeline(), root, work, TRAINING, accept=MinimumSize(16), progress=False, on_identity=on_identity
    )
    return pack_shards(work)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, made = Path(sys.argv[1]), []
    make_set(root / "people", root / "work", lambda name, _: made.append(name))
    rank = torch.distributed.get_rank()
    (root / f"rank{rank}.json").write_text(
        json.dumps({"made": made, "world": torch.distributed.get_world_size()})
    )
    torch.distributed.destroy_process_group()
