"""Many jobs in one step: each expert's file is the one it has alone, whoever else trains, joins, leaves or fails."""

import hashlib
import itertools

import pytest
import torch

from mole_kernels.demo.evaluate import encode_captions
from mole_kernels.demo.model import load_pipeline
from mole_kernels.demo.stages import scene_batches
from mole_kernels.errors import MoleKeyError, MoleStateError, MoleValueError, MoleWarning
from mole_kernels.io.save import save_expert
from mole_kernels.methods.lora import train_expert
from mole_kernels.modules.scan import scan
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.many.job import TrainJob
from mole_kernels.training.many.run import TrainMany
from tests.training.tiny_families import FAMILIES

# rank, samples of a batch, and settings of each job
JOBS = {
    "one": (4, 1, {"lr": 1e-3}),
    "wide": (16, 1, {"lr": 2e-3, "snr_gamma": 2.0, "schedule": "cosine"}),
    "odd": (3, 2, {"lr": 1e-3, "warmup": 3, "weight_decay": 0.0}),
    "lion": (5, 1, {"lr": 1e-4, "optimiser": "lion", "betas": (0.9, 0.99)}),
    "slow": (8, 1, {"lr": 1e-3, "accumulation": 2, "grad_clip": None}),
    "mean": (2, 3, {"lr": 1e-2, "ema_decay": 0.9}),
    "drop": (4, 1, {"lr": 1e-3, "cond_dropout": 0.5}),
    "conv": (2, 1, {"lr": 1e-3}),
}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def tensors(pipe):
    return scene_batches(pipe, 24, 1).tensors


def wanted(pipe, tensors, name, steps=6):
    """The arguments of `TrainJob` and of `train_expert` for one job."""
    rank, samples, settings = JOBS[name]
    layers = scan(pipe.unet).layers
    targets = {path: layer for path, layer in layers.items() if "resnets.0.conv" in path}
    return {
        "name": name,
        "batches": TensorBatches(tensors, samples, seed=len(name)),
        "config": TrainConfig(steps=steps, seed=rank, **settings),
        "rank": rank,
        "alpha": 2.0 if name == "odd" else None,
        "targets": targets if name == "conv" else None,
        "null": encode_captions(pipe, [""])[0] if name == "drop" else None,
    }


def alone(pipe, tensors, name, **options):
    arguments = wanted(pipe, tensors, name, **options)
    return train_expert(pipe, arguments.pop("batches"), progress=False, **arguments)


def digest(expert, folder):
    path = folder / "expert.safetensors"
    save_expert(expert, path, "diffusers")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_is_the_one_of_a_job_alone(pipe, tensors, tmp_path):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    many = TrainMany(pipe)
    experts = many.run([TrainJob(**wanted(pipe, tensors, name)) for name in JOBS])
    assert {name: job.status for name, job in many.jobs.items()} == dict.fromkeys(JOBS, "done")
    assert not many.separate
    for name in JOBS:
        assert digest(experts[name], tmp_path) == digest(alone(pipe, tensors, name), tmp_path), name
    after = pipe.unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_jobs_join_and_leave_at_any_step(pipe, tensors, tmp_path):
    many = TrainMany(pipe, run_dir=tmp_path / "runs")
    many.add(TrainJob(**wanted(pipe, tensors, "one")))
    many.add(TrainJob(**wanted(pipe, tensors, "wide")))
    with many.mixing():
        many.step()
        many.add(TrainJob(**wanted(pipe, tensors, "odd")))
        many.step()
        many.cancel("wide")
    experts = many.run([TrainJob(**wanted(pipe, tensors, "conv"))])
    assert list(experts) == ["one", "odd", "conv"] and many.jobs["wide"].status == "cancelled"
    for name, expert in experts.items():
        assert digest(expert, tmp_path) == digest(alone(pipe, tensors, name), tmp_path), name
    with pytest.raises(MoleKeyError, match="nobody"):
        many.cancel("nobody")
    with pytest.raises(MoleValueError, match="one"):
        many.add(TrainJob(**wanted(pipe, tensors, "one")))


class Breaks:
    """Batches whose third is broken."""

    def __init__(self, source, how):
        self.source, self.how = source, how

    def __iter__(self):
        for number, batch in enumerate(self.source):
            if number == 2 and self.how == "raises":
                raise OSError("the picture is gone")
            if number == 2 and self.how == "nan":
                batch = batch | {"latents": batch["latents"] * float("nan")}
            if number == 2 and self.how == "shape":
                batch = batch | {"encoder_hidden_states": batch["encoder_hidden_states"][..., :-1]}
            yield batch


@pytest.mark.parametrize("how", ["raises", "nan", "shape"])
def test_a_failing_job_ends_alone(pipe, tensors, tmp_path, how):
    many = TrainMany(pipe, run_dir=tmp_path / "runs")
    broken = wanted(pipe, tensors, "wide") | {"name": "broken"}
    broken["config"] = TrainConfig(steps=6, checkpoint_every=1)
    broken["batches"] = Breaks(broken["batches"], how)
    experts = many.run(
        [TrainJob(**broken), *(TrainJob(**wanted(pipe, tensors, name)) for name in ("one", "odd"))]
    )
    job = many.jobs["broken"]
    assert job.status == "failed" and job.step == 2 and job.error is not None
    assert [path.name for path in sorted((tmp_path / "runs/broken").iterdir())] == [
        "step-00000001",
        "step-00000002",
    ]
    for name in ("one", "odd"):
        assert digest(experts[name], tmp_path) == digest(alone(pipe, tensors, name), tmp_path), name


def test_a_checkpoint_goes_on_in_a_mixed_step_or_alone(pipe, tensors, tmp_path):
    whole = digest(alone(pipe, tensors, "mean"), tmp_path)
    for resumed_by in ("many", "alone"):
        folder = tmp_path / resumed_by
        many = TrainMany(pipe, run_dir=folder)
        many.run([TrainJob(**wanted(pipe, tensors, name, steps=4)) for name in ("mean", "one")])
        with pytest.raises(MoleStateError, match="holds checkpoints"):
            TrainMany(pipe, run_dir=folder).add(TrainJob(**wanted(pipe, tensors, "mean")))
        if resumed_by == "many":
            again = TrainMany(pipe, run_dir=folder)
            jobs = [TrainJob(**wanted(pipe, tensors, name), resume=True) for name in ("mean", "one")]
            expert = again.run(jobs)["mean"]
            other = wanted(pipe, tensors, "one") | {"config": TrainConfig(steps=6, lr=0.5, seed=4)}
            with pytest.raises(MoleStateError, match="lr"):
                TrainMany(pipe, run_dir=folder).add(TrainJob(**other, resume=True))
        else:
            arguments = wanted(pipe, tensors, "mean")
            expert = train_expert(
                pipe,
                arguments.pop("batches"),
                progress=False,
                run_dir=folder / "mean",
                resume=True,
                **arguments,
            )
        assert digest(expert, tmp_path) == whole


@pytest.mark.parametrize("family", ["flux1-dev", "qwen-image", "sd3", "wan", "z-image"])
def test_transformers_mix_too(family, tmp_path):
    tiny = next(t for t in FAMILIES if t.id == family)
    pipe, data = tiny.make(), tiny.batch(6)

    def arguments(j):
        config = TrainConfig(steps=4, lr=1e-2, seed=j)
        batches = TensorBatches(data, 1 + j % 2, seed=j)
        return {"name": f"job{j}", "batches": batches, "config": config, "rank": 2 + j}

    many = TrainMany(pipe)
    experts = many.run([TrainJob(**arguments(j)) for j in range(4)])
    # Qwen-Image's gradients differ at these widths, which is found out: its jobs take steps of their own
    assert family == "qwen-image" or not many.separate
    for j in range(4):
        own = arguments(j)
        solo = train_expert(pipe, own.pop("batches"), progress=False, **own)
        assert digest(experts[f"job{j}"], tmp_path) == digest(solo, tmp_path)


def test_a_base_that_looks_across_samples_is_found_out(pipe, tensors, tmp_path):
    """Whatever makes a mixed step differ, the jobs then take steps of their own."""

    def across(module, args, out):
        return out + 1e-3 * out.mean(0, keepdim=True)

    hook = pipe.unet.conv_in.register_forward_hook(across)
    try:
        many = TrainMany(pipe)
        with pytest.warns(MoleWarning, match="steps of its own"):
            experts = many.run([TrainJob(**wanted(pipe, tensors, name)) for name in ("one", "slow")])
        assert many.separate == {"one", "slow"}
        for name, expert in experts.items():
            assert digest(expert, tmp_path) == digest(alone(pipe, tensors, name), tmp_path)
    finally:
        hook.remove()


def test_a_limit_of_samples_lets_everybody_have_their_turn(pipe, tensors, tmp_path):
    many = TrainMany(pipe, most_samples=2)
    steps = []
    experts = many.run(
        [TrainJob(**wanted(pipe, tensors, name, steps=4)) for name in ("one", "wide", "drop")],
        on_step=lambda m: steps.append([job.step for job in m.jobs.values()]),
    )
    assert all(max(row) - min(row) <= 1 for row in steps)
    assert all(sum(now) - sum(then) <= 2 for then, now in itertools.pairwise(steps))
    for name, expert in experts.items():
        assert digest(expert, tmp_path) == digest(alone(pipe, tensors, name, steps=4), tmp_path)


def test_memory_of_a_job_is_said_beforehand(pipe, tensors):
    job = TrainMany(pipe).add(TrainJob(**wanted(pipe, tensors, "one")))
    factors = sum(p.numel() * 4 for p in job.named.values())
    assert job.bytes == 6 * factors


def test_what_cannot_be_mixed_is_refused(pipe, tensors):
    with pytest.raises(MoleValueError, match="mixed_precision"):
        arguments = wanted(pipe, tensors, "one")
        TrainMany(pipe).add(
            TrainJob(**(arguments | {"config": TrainConfig(steps=1, mixed_precision="bf16")}))
        )
    with pytest.raises(MoleValueError, match="most_samples"):
        TrainMany(pipe, most_samples=0)
    with pytest.raises(MoleStateError, match="mixing"):
        TrainMany(pipe).step()
