"""What keeps a patched model's experts and gates: this package's checkpoints and accelerate's save_state."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler

from mole_kernels.errors import MoleStateError
from mole_kernels.methods.mole import train_gates
from mole_kernels.patching.apply import patch
from mole_kernels.training.checkpoint import load_latest
from mole_kernels.training.config import TrainConfig
from tests.methods.test_mole import QUIET, batches, two_experts, unet

CONFIG = TrainConfig(steps=2, lr=1e-2, cond_dropout=0.3, seed=1, mixed_precision="no")


@pytest.fixture
def patched():
    model = unet()
    torch.manual_seed(3)
    with patch(model, two_experts(model), "mole") as handle:
        yield SimpleNamespace(unet=model, scheduler=DDPMScheduler(), handle=handle)


def own(model, kinds=("experts", "gate")):
    return {name: p for name, p in model.named_parameters() if any(f".{kind}." in name for kind in kinds)}


def tensors(model, *kinds):
    return {name: p.detach().clone() for name, p in own(model, *kinds).items()}


def equal(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one
    )


def test_accelerates_save_state_keeps_experts_and_gates_and_load_state_restores_them(patched, tmp_path):
    try:
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare_model(patched.unet)
        before = tensors(patched.unet)
        accelerator.save_state(str(tmp_path))
        with torch.no_grad():
            for p in own(patched.unet).values():
                p.add_(1.0)
        assert not equal(tensors(patched.unet), before)
        accelerator.load_state(str(tmp_path))
        assert equal(tensors(patched.unet), before) and model is patched.unet
    finally:
        AcceleratorState._reset_state()
    assert not any("experts" in name or "gate" in name for name in patched.unet.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_between_two_stages_loses_nothing_that_a_checkpoint_holds(patched, tmp_path, dtype):
    train_gates(patched.handle, batches(), CONFIG, scheduler=patched.scheduler, run_dir=tmp_path, **QUIET)
    trained, saved = tensors(patched.unet, ("gate",)), load_latest(tmp_path).weights
    assert trained and equal(trained, saved)
    experts = tensors(patched.unet, ("experts",))
    patched.unet.to(dtype)
    options = {"scheduler": patched.scheduler, "run_dir": tmp_path, "resume": True} | QUIET
    if equal(tensors(patched.unet, ("experts",)), experts):
        train_gates(patched.handle, batches(), CONFIG, **options)
        assert equal(tensors(patched.unet, ("gate",)), trained)
    else:
        # rounded experts are other experts: said, before a gate is touched
        with pytest.raises(MoleStateError, match="resume: experts"):
            train_gates(patched.handle, batches(), CONFIG, **options)
