"""What makes long runs bearable: Lion, checkpointed activations, trackers, and a process that is killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import MoLEGate
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.training import session
from mole_kernels.training.checkpoint import list_checkpoints, load_latest
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.lion import Lion
from mole_kernels.training.loop import fit
from mole_kernels.training.loss import DenoisingLoss

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import launched  # noqa: E402
from pipelines import sd_pipeline  # noqa: E402


def test_lion_is_its_papers_algorithm():
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3), [torch.randn(5, 3) for _ in range(4)]
    p, q = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(2))
    optimiser = Lion([p, q], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    w, m = start.double(), torch.zeros(5, 3, dtype=torch.float64)
    for g in grads:
        p.grad = g.clone()
        optimiser.step()
        c = 0.9 * m + 0.1 * g.double()
        w = w - 0.1 * (torch.sign(c) + 0.5 * w)
        m = 0.99 * m + 0.01 * g.double()
    torch.testing.assert_close(p.detach(), w.float())
    assert not q.any() and len(optimiser.state[p]) == 1 and q not in optimiser.state
    p.grad = None
    assert optimiser.step(lambda: torch.tensor(3.0)).item() == 3.0


@pytest.mark.parametrize(
    "options", [{"optimiser": "lion", "betas": (0.9, 0.99)}, {"optimiser": "lion", "ema_decay": 0.9}], ids=str
)
def test_lion_resumes_bit_for_bit(tmp_path, options):
    config = TrainConfig(steps=5, lr=1e-3, checkpoint_every=1, weight_decay=0.1, **options)

    def run(steps, **more):
        model, batches = launched.model_and_batches()
        fit(
            model,
            model[2].parameters(),
            batches,
            replace(config, steps=steps),
            loss_fn=launched.noisy_loss,
            progress=False,
            **more,
        )
        return model.state_dict()

    whole = run(5)
    run(2, run_dir=tmp_path)
    resumed = run(5, run_dir=tmp_path, resume=True)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def unet_run(pipe, config, **options):
    g = torch.Generator().manual_seed(3)
    tensors = {
        "latents": torch.randn(4, 4, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(4, 5, 12, generator=g),
    }
    parameters = [p for name, p in pipe.unet.named_parameters() if "attentions" in name]
    return fit(
        pipe.unet,
        parameters,
        TensorBatches(tensors, 2),
        config,
        loss_fn=DenoisingLoss(pipe.scheduler),
        progress=False,
        **options,
    )


class Kept:
    """Bytes that autograd keeps for the backward."""

    def __init__(self):
        self.bytes = 0

    def __enter__(self):
        def pack(tensor):
            self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_checkpointed_activations_give_the_same_steps_with_less_kept(precision):
    config = TrainConfig(steps=3, lr=1e-2, mixed_precision=precision)
    plain, saving = sd_pipeline(), sd_pipeline()
    with Kept() as usual:
        wanted = unet_run(plain, config)
    with Kept() as fewer:
        found = unet_run(saving, replace(config, gradient_checkpointing=True))
    assert found.losses == wanted.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.unet.parameters(), saving.unet.parameters()))
    # measured: a fifth
    assert fewer.bytes < usual.bytes / 3 and not saving.unet.is_gradient_checkpointing
    saving.unet.enable_gradient_checkpointing()
    unet_run(saving, replace(config, gradient_checkpointing=True, steps=1))
    assert saving.unet.is_gradient_checkpointing


@pytest.mark.parametrize("train_experts", [False, True])
def test_no_expert_output_is_kept_for_the_backward(train_experts):
    """x, and of the experts h [B,T,R] and gates [B,T,E], [B,E]: nothing of size [B,T,N]."""
    B, T, K, N, ranks = 2, 64, 48, 80, (3, 5)
    experts = LayerExperts(
        torch.randn(1, 8, K), torch.randn(1, N, 8), torch.ones(2), ("a", "b"), ranks
    ).requires_grad_(train_experts)
    base = nn.Linear(K, N).requires_grad_(False)
    layer = GatedLoRALinear.from_linear(base, experts, MoLEGate(K, N, 2))
    x, kept = torch.randn(B, T, K, requires_grad=True), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    beside = [tensor for where, tensor in kept.items() if where not in own]
    assert x.grad is not None and all(tensor.numel() < B * T * N for tensor in beside)
    # h, token gates, sample gates, and the pooled vector's own small tensors
    assert sum(tensor.numel() for tensor in beside) <= B * T * (8 + 2) + B * 2 + 8 * N + 3 * N * 2


def test_checkpointing_may_change_on_resume_and_needs_a_model_that_can(tmp_path):
    config = TrainConfig(steps=3, lr=1e-2, checkpoint_every=1)
    whole = unet_run(sd_pipeline(), config)
    unet_run(sd_pipeline(), replace(config, steps=1), run_dir=tmp_path)
    resumed = unet_run(
        sd_pipeline(), replace(config, gradient_checkpointing=True), run_dir=tmp_path, resume=True
    )
    assert resumed.losses == whole.losses
    model, batches = launched.model_and_batches()
    with pytest.raises(
        MoleTypeError, match="gradient_checkpointing: expected a model with enable_gradient_checkpointing"
    ):
        fit(
            model,
            model.parameters(),
            batches,
            replace(config, gradient_checkpointing=True),
            loss_fn=launched.noisy_loss,
            progress=False,
        )
    with pytest.raises(MoleValueError, match="gradient_checkpointing: expected True or False"):
        replace(config, gradient_checkpointing="yes")


def test_tensorboard_holds_loss_rate_and_speed_of_each_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, batches = launched.model_and_batches()
    config = TrainConfig(steps=4, lr=1e-2, warmup=2)
    options = {"loss_fn": launched.noisy_loss, "run_dir": tmp_path, "progress": False}
    result = fit(model, model.parameters(), batches, config, trackers=("tensorboard",), **options)
    found = events.EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    found.Reload()
    steps = [(event.step, event.value) for event in found.Scalars("loss")]
    assert [step for step, _ in steps] == [1, 2, 3, 4] and [value for _, value in steps] == pytest.approx(
        result.losses
    )
    assert [event.value for event in found.Scalars("learning_rate")] == pytest.approx(
        [5e-3, 1e-2, 1e-2, 1e-2]
    )
    assert all(event.value > 0 for event in found.Scalars("samples_per_second"))


def test_trackers_that_cannot_be(tmp_path, monkeypatch):
    model, batches = launched.model_and_batches()

    def run(*trackers, **options):
        config = TrainConfig(steps=1)
        fit(
            model,
            model.parameters(),
            batches,
            config,
            loss_fn=launched.noisy_loss,
            progress=False,
            trackers=trackers,
            **options,
        )

    with pytest.raises(MoleValueError, match="trackers: expected a run_dir"):
        run("tensorboard")
    with pytest.raises(MoleValueError, match=r"trackers: .*notepad"):
        run("notepad", run_dir=tmp_path)

    class Without(session.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.log_with = []

    # as accelerate does where the package is not installed
    monkeypatch.setattr(session, "Accelerator", Without)
    with pytest.raises(MoleStateError, match="trackers: tensorboard cannot be used here"):
        run("tensorboard", run_dir=tmp_path)


def test_killed_at_any_moment_the_last_good_checkpoint_is_there(tmp_path):
    """kill -9 while a child writes checkpoints as fast as it can; what it left is whole, and a resume goes on
    as if nothing had been.
    """
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(key, None)
    child = subprocess.Popen(
        [sys.executable, str(HERE / "launched.py"), str(tmp_path), "endless"], env=env, stderr=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 120
        while len(list_checkpoints(tmp_path / "run")) < 2 or list_checkpoints(tmp_path / "run")[-1][0] < 20:
            assert child.poll() is None and time.monotonic() < until, child.stderr.read().decode()[-2000:]
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stderr.close()
    last = load_latest(tmp_path / "run")
    assert last is not None and last.step >= 20
    steps = last.step + 3
    resumed, result = launched.train(tmp_path / "run", 1, steps, resume=True, every=1)
    whole, wanted = launched.train(tmp_path / "whole", 1, steps, resume=False, every=None)
    assert result.losses == wanted.losses
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))
    assert all(path.name.startswith("step-") for path in (tmp_path / "run").iterdir())
