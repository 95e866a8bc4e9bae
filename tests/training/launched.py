"""Run by test_launch under `accelerate launch`, and by test_scale to be killed: short runs, and their weights
where the tests find them.
"""

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
    return (
        (model(batch["x"] + torch.randn(batch["x"].shape, generator=generator)) - batch["x"]).square().mean()
    )


def train(folder: Path, accumulation: int, stop: int, resume: bool, every=2):
    model, batches = model_and_batches()
    config = TrainConfig(steps=stop, lr=1e-2, accumulation=accumulation, checkpoint_every=every)
    result = fit(
        model,
        model[2].parameters(),
        batches,
        config,
        loss_fn=noisy_loss,
        run_dir=folder,
        resume=resume,
        progress=False,
    )
    return model, result


def experts_and_gates(pictures: Path, cache: Path, accumulation: int):
    """Stages 2 and 3 of MoLE on a folder of pictures: (an expert's factors, gates, losses) of two steps
    each.
    """
    from pipelines import sd_pipeline

    from mole_kernels.methods.mole import train_expert, train_gates
    from mole_kernels.patching.apply import patch
    from mole_kernels.training.cached import picture_batches
    from mole_kernels.training.pictures import PictureFolder

    pipe = sd_pipeline()
    batches = picture_batches(
        pipe, PictureFolder(pictures, (16, 16), multiple=8), 2, cache=cache, progress=False
    )
    config = TrainConfig(steps=2, lr=1e-2, accumulation=accumulation, snr_gamma=5.0)
    options = {"null": batches.null, "progress": False}
    expert = train_expert(pipe, batches, name="face", rank=2, config=config, **options)
    torch.manual_seed(2)
    with patch(pipe, {"face": expert}, "mole") as handle:
        result = train_gates(handle, batches, config, **options)
        gates = [p.detach().clone() for p in handle.gate_parameters()]
    return [t for layer in expert.layers.values() for t in (layer.down, layer.up)], gates, result.losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    if sys.argv[2:] == ["endless"]:
        train(out / "run", 1, 10**9, resume=False, every=1)
    train(out / "run", 1, 3, resume=False)
    model, result = train(out / "run", 1, 5, resume=True)
    rank = torch.distributed.get_rank()
    mole = experts_and_gates(out / "set", out / "cache", 1)
    found = {
        "weights": model.state_dict(),
        "losses": result.losses,
        "world": torch.distributed.get_world_size(),
        "mole": mole,
    }
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()
