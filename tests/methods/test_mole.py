"""MoLE's two stages on a tiny UNet: what trains, what stays, what a resume gives, and that training helps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from mole_kernels.errors import MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.gates.gate import ConstantGate, MoLEGate
from mole_kernels.methods.mole import PRESETS, train_expert, train_gates
from mole_kernels.modules.scan import mole_targets, sizes
from mole_kernels.patching.apply import patch
from mole_kernels.training.checkpoint import list_checkpoints
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.loss import denoising_loss

CONFIG = TrainConfig(steps=5, lr=1e-2, accumulation=2, checkpoint_every=2, cond_dropout=0.3, seed=1)
NULL = torch.zeros(6, 12)
QUIET = {"null": NULL, "progress": False}


def unet(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = UNet2DConditionModel(**(config | options)).eval()
    return model if dtype == torch.float32 else model.to(dtype)


def pipeline(**options):
    model = unet(**options)
    return SimpleNamespace(unet=model, scheduler=DDPMScheduler(), components={"unet": model})


def data(seed=0, size=8):
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(9, 4, size, size, generator=g),
        "encoder_hidden_states": torch.randn(9, 6, 12, generator=g),
    }


def batches(seed=0, **options):
    return TensorBatches(data(seed, **options), 2)


def two_experts(model, seed=2, ranks=(2, 3)):
    """Experts with B ≠ 0, so that gates have something to open for."""
    g = torch.Generator().manual_seed(seed)
    shapes = {path: sizes(module) for path, module in mole_targets(model).items()}
    bank = ExpertBank.new(shapes, ["face", "hand"], {"face": ranks[0], "hand": ranks[1]}, generator=g)
    for expert in bank.experts.values():
        for layer in expert.layers.values():
            layer.up.normal_(0, 0.1, generator=g)
    return bank


def bits(model):
    """All tensors by name: a patched model's state dict has neither experts nor gates."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def equal(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def expert_bits(expert):
    return {
        f"{path}.{part}": getattr(layer, part)
        for path, layer in expert.layers.items()
        for part in ("down", "up")
    }


def held_out_loss(model):
    """Mean ε-MSE on the training latents with fixed noise, every tenth of the schedule."""
    latents, text = data().values()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        losses = [
            denoising_loss(model, DDPMScheduler(), latents, torch.full((9,), t), noise, text)
            for t in range(50, 1000, 100)
        ]
    return torch.stack(losses).mean().item()


def test_stage_two_trains_a_fresh_expert_and_leaves_the_model_as_it_was():
    pipe = pipeline()
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    before, kinds = bits(pipe.unet), [type(m) for m in pipe.unet.modules()]
    expert = train_expert(pipe, batches(), name="face", rank=3, alpha=1.5, config=CONFIG, **QUIET)
    assert equal(before, bits(pipe.unet)) and kinds == [type(m) for m in pipe.unet.modules()]
    assert flags == [p.requires_grad for p in pipe.unet.parameters()] and not pipe.unet.training
    assert set(expert.layers) == {f"unet.{path}" for path in mole_targets(pipe.unet)}
    assert expert.ranks() == {3} and expert.scales() == {0.5} and expert.metadata["steps"] == "5"
    fresh = ExpertBank.new({"a": (2, 2)}, ["a"], 1).experts["a"].layers["a"].up
    assert not fresh.any() and all(layer.up.any() for layer in expert.layers.values())


def test_an_expert_lowers_the_loss_it_was_trained_on():
    pipe = pipeline()
    config = replace(CONFIG, steps=20, accumulation=1, cond_dropout=0.0, lr=2e-2)
    base = held_out_loss(pipe.unet)
    expert = train_expert(pipe, batches(), name="face", rank=4, config=config, progress=False)
    with patch(pipe.unet, {"face": expert}):
        adapted = held_out_loss(pipe.unet)
    # measured: 0.874 of the base's, with all randomness fixed
    assert adapted < 0.95 * base, (adapted, base)
    assert held_out_loss(pipe.unet) == base


@pytest.mark.parametrize("stop", [2, 3])
def test_stage_two_resumed_equals_stage_two_unbroken(tmp_path, stop):
    options = {"name": "face", "rank": 3, "alpha": 1.0} | QUIET
    whole = train_expert(pipeline(), batches(), config=CONFIG, **options)
    train_expert(pipeline(), batches(), config=replace(CONFIG, steps=stop), run_dir=tmp_path, **options)
    torch.manual_seed(5)
    resumed = train_expert(pipeline(), batches(), config=CONFIG, run_dir=tmp_path, resume=True, **options)
    assert equal(expert_bits(whole), expert_bits(resumed)) and whole.metadata == resumed.metadata


def test_stage_two_resumed_with_another_rank_name_or_data(tmp_path):
    options = {"config": CONFIG, "run_dir": tmp_path} | QUIET
    train_expert(
        pipeline(), batches(), name="face", rank=3, **(options | {"config": replace(CONFIG, steps=2)})
    )
    pipe = pipeline()
    before = bits(pipe.unet)
    for change, message in (
        ({"rank": 4}, "rank: expected '3'.* got '4'"),
        ({"name": "hand"}, "expert: expected 'face'.* got 'hand'"),
    ):
        with pytest.raises(MoleStateError, match=message):
            train_expert(pipe, batches(), **({"name": "face", "rank": 3} | options | change), resume=True)
    with pytest.raises(MoleStateError, match=r"4, 8, 8.*got.*4, 16, 16"):
        train_expert(pipe, batches(size=16), name="face", rank=3, resume=True, **options)
    other = data()
    other["encoder_hidden_states"][0] += 0.5
    with pytest.raises(MoleStateError, match="resume: batches, encoder_hidden_states: has other values"):
        train_expert(pipe, TensorBatches(other, 2), name="face", rank=3, resume=True, **options)
    wider = pipeline(block_out_channels=(12, 16))
    with pytest.raises(MoleStateError, match=r"experts\.down: expected .* as in the checkpoint"):
        train_expert(wider, batches(), name="face", rank=3, resume=True, **options)
    assert equal(before, bits(pipe.unet)) and not any("experts" in name for name in bits(wider.unet))


def test_an_interrupted_stage_two_removes_its_patch(tmp_path):
    pipe = pipeline()
    before = bits(pipe.unet)

    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_expert(
            pipe, batches(), name="face", rank=3, config=CONFIG, on_step=stop, run_dir=tmp_path, **QUIET
        )
    assert equal(before, bits(pipe.unet))


@pytest.mark.parametrize("kind", ["mole", "local", "global", "constant"])
def test_stage_three_changes_every_gate_and_nothing_else(kind):
    pipe = pipeline()
    torch.manual_seed(3)
    with patch(pipe.unet, two_experts(pipe.unet), kind) as handle:
        gates = {name for name in bits(pipe.unet) if ".gate." in name}
        before = bits(pipe.unet)
        result = train_gates(handle, batches(), CONFIG, scheduler=pipe.scheduler, **QUIET)
        after = bits(pipe.unet)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert (
            changed == gates
            and len(gates) == len(handle.layers) * {"mole": 4, "local": 2, "global": 2, "constant": 1}[kind]
        )
        assert len(result.losses) == 5
        assert all(
            isinstance(m.gate, ConstantGate if kind == "constant" else MoLEGate)
            for m in handle.layers.values()
        )


def test_gates_lower_the_loss_and_the_maps_move():
    pipe = pipeline()
    torch.manual_seed(3)
    config = replace(CONFIG, steps=20, accumulation=1, cond_dropout=0.0, lr=0.2)
    with patch(pipe, two_experts(pipe.unet), "mole") as handle:
        before = held_out_loss(pipe.unet)
        maps = {path: m.token.clone() for path, m in handle.gate_maps().items()}
        train_gates(handle, batches(), config, progress=False)
        # measured: 0.982 of the loss before, and a token gate moved by 0.88
        assert held_out_loss(pipe.unet) < 0.99 * before
        assert any((maps[path] - m.token).abs().max() > 0.5 for path, m in handle.gate_maps().items())


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("kind", ["mole", "constant"])
def test_stage_three_resumed_equals_stage_three_unbroken(tmp_path, kind, stop):
    def gates_after(config, **options):
        pipe = pipeline()
        torch.manual_seed(3)
        with patch(pipe.unet, two_experts(pipe.unet), kind) as handle:
            result = train_gates(handle, batches(), config, scheduler=pipe.scheduler, **QUIET, **options)
            return bits(pipe.unet), result.losses

    whole, losses = gates_after(CONFIG)
    gates_after(replace(CONFIG, steps=stop), run_dir=tmp_path)
    resumed, again = gates_after(CONFIG, run_dir=tmp_path, resume=True)
    assert equal(whole, resumed) and losses == again
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]


def test_stage_three_resumed_with_other_experts_or_gates(tmp_path):
    def run(kind="mole", config=CONFIG, scales=None, **options):
        model = unet()
        with patch(model, two_experts(model, **options), kind, scales=scales) as handle:
            train_gates(
                handle, batches(), config, scheduler=DDPMScheduler(), run_dir=tmp_path, resume=True, **QUIET
            )

    run(config=replace(CONFIG, steps=2))
    # ranks 3 + 2 are packed to the very shapes of 2 + 3
    for change in ({"ranks": (3, 2)}, {"seed": 9}, {"scales": {"hand": 0.5}}):
        with pytest.raises(MoleStateError, match="resume: experts"):
            run(**change)
    with pytest.raises(MoleStateError, match="resume: gates"):
        run(kind="local")
    run()


def test_a_bfloat16_model_gets_float32_experts_and_gates(tmp_path):
    pipe = pipeline(dtype=torch.bfloat16)
    config = replace(CONFIG, steps=2)
    expert = train_expert(pipe, batches(), name="face", rank=3, config=config, **QUIET)
    assert {t.dtype for t in expert_bits(expert).values()} == {torch.float32}
    assert all(layer.up.any() for layer in expert.layers.values())
    with patch(pipe, {"face": expert}, "mole") as handle:
        handle.save_gates(tmp_path / "gates.safetensors")
    with patch(pipe, {"face": expert}, tmp_path / "gates.safetensors") as handle:
        frozen = {name: t for name, t in bits(pipe.unet).items() if ".gate." not in name}
        train_gates(handle, batches(), config, **QUIET)
        after = bits(pipe.unet)
        assert all(torch.equal(t, after[name]) for name, t in frozen.items())
        assert {p.dtype for p in handle.gate_parameters()} == {torch.float32}


def test_what_the_stages_refuse():
    model = unet()
    with pytest.raises(MoleTypeError, match="scheduler"):
        train_expert(model, batches(), name="face", rank=3, config=CONFIG, null=NULL)
    with pytest.raises(MoleTypeError, match="a pipeline with a UNet"):
        train_expert(object(), batches(), name="face", rank=3, config=CONFIG, null=NULL)
    with pytest.raises(MoleValueError, match="null"):
        train_expert(model, batches(), name="face", rank=3, config=CONFIG, scheduler=DDPMScheduler())
    with pytest.raises(MoleValueError, match="Transformer2DModel"):
        train_expert(
            torch.nn.Linear(3, 3),
            batches(),
            name="face",
            rank=3,
            config=CONFIG,
            scheduler=DDPMScheduler(),
            null=NULL,
        )
    with patch(model, two_experts(model)) as handle, pytest.raises(MoleStateError, match="no gates"):
        train_gates(handle, batches(), CONFIG, scheduler=DDPMScheduler(), null=NULL)


def test_presets_hold_the_papers_settings():
    for name, resolution, expert_accumulation, gate_accumulation in (
        ("sd15", 512, 4, 6),
        ("sdxl", 1024, 16, 12),
    ):
        preset = PRESETS[name]
        face, hand = preset.experts["face"], preset.experts["hand"]
        assert (
            list(preset.experts) == ["face", "hand"]
            and preset.rank == 256
            and preset.resolution == resolution
        )
        assert (face.alpha / preset.rank, face.config.lr, face.config.steps) == (0.25, 2e-5, 30_000)
        assert (hand.alpha / preset.rank, hand.config.lr, hand.config.steps) == (0.5, 1e-5, 60_000)
        assert (preset.gates.lr, preset.gates.steps) == (1e-5, 50_000)
        assert {face.config.accumulation, hand.config.accumulation} == {expert_accumulation}
        assert preset.gates.accumulation == gate_accumulation and face.config.mixed_precision == "bf16"
    assert "demo" in PRESETS
