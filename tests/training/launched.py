"""Run by test_launch under `accelerate launch`: a short run, and its weights where the test finds them."""

import sys
from pathlib import Path

import torch

from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.loop import fit


def model_and_batches():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    return model, TensorBatches({"x": torch.randn(11, 4)}, 2)


def noisy_loss(model, batch, generator):
    return (model(batch["x"] + torch.randn(batch["x"].shape, generator=generator)) - batch["x"]).square().mean()


def train(folder: Path, accumulation: int, stop: int, resume: bool):
    model, batches = model_and_batches()
    config = TrainConfig(steps=stop, lr=1e-2, accumulation=accumulation, checkpoint_every=2)
    result = fit(model, model[2].parameters(), batches, config, loss_fn=noisy_loss, run_dir=folder, resume=resume, progress=False)
    return model, result


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    train(out / "run", 1, 3, resume=False)
    model, result = train(out / "run", 1, 5, resume=True)
    rank = torch.distributed.get_rank()
    torch.save({"weights": model.state_dict(), "losses": result.losses, "world": torch.distributed.get_world_size()}, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()
