"""Every family: its denoiser is called as the pipeline calls it, trains, resumes, and its file draws the same."""

import pytest
import torch

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleStateError
from mole_kernels.io.experts import load_expert
from mole_kernels.io.save import save_expert
from mole_kernels.methods.lora import train_expert
from mole_kernels.methods.mole import train_gates, train_unet
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.families.loss import FamilyLoss
from tests.training.tiny_families import FAMILIES

CONFIG = TrainConfig(steps=12, lr=2e-2, checkpoint_every=6)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, batch, steps=2):
    """Latents that a pipeline draws for a batch's texts, beginning at its latents."""
    family = FamilyLoss(pipe).family
    steps = dict(family.row.options).get("num_inference_steps", steps)
    arguments = family.arguments(batch["latents"], family.conditions(batch))
    return pipe(**(arguments | {"num_inference_steps": steps, "return_dict": False}))[0]


@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_the_denoiser_is_called_as_in_a_real_step(tiny):
    """A pipeline's own first step, on its own scheduler, hands over what `predict` gives at that time."""
    pipe, batch = tiny.make(), tiny.batch()
    seen = {}
    step = type(pipe.scheduler).step

    def recorded(self, model_output, timestep, sample, *args, **kwargs):
        seen.setdefault("output", model_output.clone())
        seen.setdefault("timestep", timestep)
        return step(self, model_output, timestep, sample, *args, **kwargs)

    pipe.scheduler.__class__ = type(
        type(pipe.scheduler).__name__, (type(pipe.scheduler),), {"step": recorded}
    )
    draw(pipe, batch)
    family = FamilyLoss(tiny.make()).family
    times = torch.as_tensor(seen["timestep"]).expand(2)
    with torch.no_grad():
        ours = family.predict(batch["latents"], times, family.conditions(batch))
    torch.testing.assert_close(ours, seen["output"].to(ours.dtype))
    # every sample has a time of its own
    with torch.no_grad():
        mixed = family.predict(
            batch["latents"], torch.stack([times[0], times[0] / 2]), family.conditions(batch)
        )
    torch.testing.assert_close(mixed[0], ours[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[1], ours[1], atol=1e-5)


@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_an_expert_trains_resumes_and_draws_the_same_everywhere(tiny, tmp_path):
    pipe, data = tiny.make(), tiny.batch(4)
    before = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}

    def run(steps, folder, resume=False):
        batches = TensorBatches(data, 2, seed=1)
        config = TrainConfig(**(CONFIG.to_dict() | {"steps": steps}))
        options = {"run_dir": tmp_path / folder, "resume": resume, "progress": False}
        return train_expert(pipe, batches, name="own", rank=2, config=config, **options)

    whole = run(12, "whole")
    run(6, "halves")
    resumed = run(12, "halves", resume=True)
    assert list(whole.layers) == list(resumed.layers) and len(whole.layers) >= 4
    for path, factors in whole.layers.items():
        assert torch.equal(factors.down, resumed.layers[path].down)
        assert torch.equal(factors.up, resumed.layers[path].up)
    assert all(torch.equal(before[name], p) for name, p in pipe.transformer.state_dict().items())

    loss, file = FamilyLoss(pipe), tmp_path / "own.safetensors"
    save_expert(whole, file, "diffusers")
    with torch.no_grad():
        untrained = sum(loss(pipe.transformer, data, seeded(n)).item() for n in range(4))
        base = draw(pipe, tiny.batch(seed=9))
        with patch(pipe, {"own": load_expert(file)}):
            trained = sum(loss(pipe.transformer, data, seeded(n)).item() for n in range(4))
            ours = draw(pipe, tiny.batch(seed=9))
    assert trained < untrained
    pipe.load_lora_weights(str(file))
    theirs = draw(pipe, tiny.batch(seed=9))
    assert (ours - base).abs().max() > 2e-4
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_a_batch_lacks_is_named():
    tiny = next(t for t in FAMILIES if t.id == "flux1-dev")
    pipe, batch = tiny.make(), tiny.batch()
    loss = FamilyLoss(pipe)
    with pytest.raises(MoleKeyError, match="latents"):
        loss(pipe.transformer, {"prompt_embeds": batch["prompt_embeds"]}, seeded())
    with pytest.raises(MoleKeyError, match="time_ids"):
        loss(pipe.transformer, batch | {"time_ids": torch.zeros(2, 6)}, seeded())
    with pytest.raises(MoleShapeError, match="2 samples"):
        loss(pipe.transformer, batch | {"prompt_embeds": batch["prompt_embeds"][:1]}, seeded())
    del batch["pooled_prompt_embeds"]
    with pytest.raises(MoleStateError, match="FluxPipeline"):
        loss(pipe.transformer, batch, seeded())


def test_guidance_reaches_a_distilled_model_alone():
    by_id = {tiny.id: tiny for tiny in FAMILIES}
    for name, differs in (("flux1-dev", True), ("flux1-schnell", False), ("flux2", True)):
        pipe, batch = by_id[name].make(), by_id[name].batch()
        low, high = (FamilyLoss(pipe, guidance=g)(pipe.transformer, batch, seeded()) for g in (1.0, 3.5))
        assert torch.equal(low, high) != differs


def test_masks_and_dropped_texts_reach_packed_latents():
    tiny = next(t for t in FAMILIES if t.id == "qwen-image")
    pipe, batch = tiny.make(), tiny.batch()
    with torch.no_grad():
        mask = torch.zeros(2, 1, 4, 8)
        mask[:, :, 1, 2] = 1
        noised = FamilyLoss(pipe).noised(batch | {"mask": mask}, seeded())
        assert noised.mask.shape == noised.target.shape and noised.mask.sum() == 2 * 4
        null = {name: value[0] * 0 for name, value in batch.items() if name == "prompt_embeds"}
        dropped = FamilyLoss(pipe, null=null, cond_dropout=1.0).noised(batch, seeded())
        assert dropped.conditions["prompt_embeds"].abs().sum() == 0
        assert torch.equal(dropped.conditions["prompt_embeds_mask"], batch["prompt_embeds_mask"])


@pytest.mark.parametrize("family", ["flux1-dev", "sd3", "qwen-image", "wan", "lumina2"])
@pytest.mark.parametrize("kind", ["mole", "local", "global", "constant"])
def test_gates_of_transformers_train_alone(family, kind, tmp_path):
    """MoLE's third stage: experts and base stay bit for bit, a resumed run is the whole one."""
    tiny = next(t for t in FAMILIES if t.id == family)
    pipe, data = tiny.make(), tiny.batch(4)
    config = TrainConfig(steps=2, lr=3e-2)
    experts = {}
    for name in ("left", "right"):
        batches = TensorBatches(data, 2, seed=len(name))
        experts[name] = train_expert(pipe, batches, name=name, rank=2, config=config, progress=False)

    def run(steps, folder, resume=False):
        torch.manual_seed(0)
        with patch(pipe, experts, kind) as handle:
            before = [p.clone() for p in (*pipe.transformer.parameters(), *handle.expert_parameters())]
            frozen = [*pipe.transformer.parameters(), *handle.expert_parameters()]
            gates = {id(p) for p in handle.gate_parameters()}
            first = [p.clone() for p in handle.gate_parameters()]
            options = {"run_dir": tmp_path / folder, "resume": resume, "progress": False}
            train_gates(handle, TensorBatches(data, 2, seed=1), TrainConfig(steps=steps, lr=3e-2), **options)
            assert all(torch.equal(a, b) for a, b in zip(before, frozen) if id(b) not in gates)
            assert any(not torch.equal(a, b) for a, b in zip(first, handle.gate_parameters()))
            return [p.detach().clone() for p in handle.gate_parameters()]

    whole = run(4, "whole")
    run(2, "halves")
    assert all(torch.equal(a, b) for a, b in zip(whole, run(4, "halves", resume=True)))


def test_a_whole_transformer_trains_further(tmp_path):
    """MoLE's first stage."""
    tiny = next(t for t in FAMILIES if t.id == "sd3")
    pipe, data = tiny.make(), tiny.batch(4)
    loss = FamilyLoss(pipe)
    with torch.no_grad():
        before = loss(pipe.transformer, data, seeded()).item()
    train_unet(pipe, TensorBatches(data, 2, seed=1), TrainConfig(steps=8, lr=1e-3), progress=False)
    with torch.no_grad():
        assert loss(pipe.transformer, data, seeded()).item() < before
