"""MoLE beyond its two usual stages: stage 1, any number of experts, activations computed again, pictures as
the generators make them.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mole_kernels.errors import MoleStateError, MoleTypeError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.mole import (
    PRESETS,
    prompt_arguments,
    sample_pictures,
    train_expert,
    train_gates,
    train_unet,
)
from mole_kernels.modules.scan import mole_targets, sizes
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from pipelines import sd_pipeline, sdxl_pipeline

CONFIG = TrainConfig(steps=2, lr=1e-2, seed=1)


def batches(xl=False):
    g = torch.Generator().manual_seed(3)
    tensors = {
        "latents": torch.randn(5, 4, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(5, 5, 20 if xl else 12, generator=g),
    }
    if xl:
        tensors |= {"text_embeds": torch.randn(5, 10, generator=g), "time_ids": torch.full((5, 6), 16.0)}
    return TensorBatches(tensors, 2)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def bank(unet, names, seed=2, ranks=(2, 3, 1)):
    """Experts with B ≠ 0, so that gates have something to open for."""
    g = torch.Generator().manual_seed(seed)
    shapes = {path: sizes(module) for path, module in mole_targets(unet).items()}
    made = ExpertBank.new(shapes, names, dict(zip(names, ranks)), generator=g)
    for expert in made.experts.values():
        for layer in expert.layers.values():
            layer.up.normal_(0, 0.1, generator=g)
    return made


@pytest.mark.parametrize("optimiser", ["lion", "adamw"])
def test_stage_one_trains_the_whole_unet_and_nothing_beside_it(optimiser, tmp_path):
    pipe = sd_pipeline()
    before, text = bits(pipe.unet), bits(pipe.text_encoder)
    config = replace(CONFIG, optimiser=optimiser, snr_gamma=5.0, accumulation=2)
    result = train_unet(pipe, batches(), config, run_dir=tmp_path, progress=False)
    after = bits(pipe.unet)
    still = {name for name in before if torch.equal(before[name], after[name])}
    # attention keys of a query that sees one key, and nothing else, may have no gradient
    assert len(result.losses) == 2 and not still, still
    assert all(torch.equal(text[name], tensor) for name, tensor in bits(pipe.text_encoder).items())
    again = sd_pipeline()
    train_unet(again, batches(), replace(config, steps=1), run_dir=tmp_path / "broken", progress=False)
    again = sd_pipeline()
    train_unet(again, batches(), config, run_dir=tmp_path / "broken", resume=True, progress=False)
    assert all(torch.equal(after[name], tensor) for name, tensor in bits(again.unet).items())


def test_stage_one_refuses_a_patched_or_a_narrow_unet():
    pipe = sd_pipeline()
    with patch(pipe, bank(pipe.unet, ["a"])), pytest.raises(MoleStateError, match="the UNet holds experts"):
        train_unet(pipe, batches(), CONFIG, progress=False)
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(MoleTypeError, match="float32"):
        train_unet(pipe, batches(), CONFIG, progress=False)


@pytest.mark.parametrize("names", [["one"], ["c", "a", "b"]], ids=len)
@pytest.mark.parametrize("kind", ["mole", "local", "global"])
def test_any_number_of_experts_in_the_order_given(names, kind):
    pipe = sd_pipeline()
    torch.manual_seed(0)
    with patch(pipe, bank(pipe.unet, names), kind) as handle:
        before = bits(pipe.unet)
        train_gates(handle, batches(), CONFIG, progress=False)
        changed = {name for name, tensor in bits(pipe.unet).items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if ".gate." in name}
        assert handle.gates().expert_names == tuple(names)


@pytest.mark.parametrize("make", [sd_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_experts_and_gates_with_activations_computed_again_are_the_same(make, precision):
    def run(again):
        pipe, config = make(), replace(CONFIG, gradient_checkpointing=again, mixed_precision=precision)
        xl = make is sdxl_pipeline
        expert = train_expert(pipe, batches(xl), name="a", rank=2, config=config, progress=False)
        torch.manual_seed(0)
        with patch(pipe, {"a": expert}, "mole") as handle:
            train_gates(handle, batches(xl), config, progress=False)
            return [layer.up for layer in expert.layers.values()] + [
                p.detach().clone() for p in handle.gate_parameters()
            ]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_criterion_3_whole_model_fresh_experts_shut_gates_and_open_gates():
    pipe = sd_pipeline()
    given = (torch.randn(2, 4, 6, 10), torch.tensor([3, 700]), torch.randn(2, 5, 12))
    with torch.no_grad():
        base = pipe.unet(*given).sample
        shapes = {path: sizes(module) for path, module in mole_targets(pipe.unet).items()}
        with patch(pipe, ExpertBank.new(shapes, ["a", "b"], 2), "mole"):
            # each linear layer bit for bit (tests/gates); a 1x1 convolution is a matrix product here, with
            # roundings of its own
            torch.testing.assert_close(pipe.unet(*given).sample, base, rtol=1e-5, atol=1e-6)
        experts = bank(pipe.unet, ["a", "b"])
        with patch(pipe, experts) as handle:
            summed = pipe.unet(*given).sample
        with patch(pipe, experts, "mole") as handle:
            for logit, wanted in ((-30.0, base), (30.0, summed)):
                for p in handle.gate_parameters():
                    p.fill_(logit) if p.dim() == 1 else p.zero_()
                torch.testing.assert_close(pipe.unet(*given).sample, wanted, rtol=1e-4, atol=1e-4)
    assert (summed - base).abs().max() > 0.01


def test_criterion_4_samples_of_a_batch_do_not_see_each_other():
    pipe = sd_pipeline()
    given = (torch.randn(2, 4, 6, 10), torch.tensor([3, 700]), torch.randn(2, 5, 12))
    with patch(pipe, bank(pipe.unet, ["a", "b"]), "mole"), torch.no_grad():
        both = pipe.unet(*given).sample
        alone = torch.cat([pipe.unet(*(x[i : i + 1] for x in given)).sample for i in range(2)])
    torch.testing.assert_close(both, alone)


def test_criterion_6_a_gradient_passes_every_frozen_layer_on_its_way():
    pipe = sd_pipeline()
    with patch(pipe, bank(pipe.unet, ["a", "b"]), "mole") as handle:
        handle.gates_require_grad()
        pipe.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 5, 12)).sample.square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in handle.gate_parameters())
        trained = {id(p) for p in handle.gate_parameters()}
        assert all(p.grad is None for p in pipe.unet.parameters() if id(p) not in trained)


def test_criterion_7_a_kohya_file_without_alpha_has_scale_one(tmp_path):
    pipe = sd_pipeline()
    expert = bank(pipe.unet, ["a"]).experts["a"]
    layers = {f"unet.{path}": replace(layer, scale=0.25) for path, layer in expert.layers.items()}
    save_expert(replace(expert, layers=layers), tmp_path / "a.safetensors", "kohya")
    assert load_expert(tmp_path / "a.safetensors").scales() == {0.25}
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a.safetensors")
    assert load_expert(
        {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    ).scales() == {1.0}


def test_criterion_8_experts_and_gate_rows_swapped_together_change_nothing(tmp_path):
    pipe = sd_pipeline()
    given = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 5, 12))
    experts = bank(pipe.unet, ["face", "hand"])
    with torch.no_grad():
        with patch(pipe, experts, "mole") as handle:
            handle.save_gates(tmp_path / "gates.safetensors", "official")
            one = pipe.unet(*given).sample
        # the file's rows find their experts by name, whatever the order
        with patch(pipe, dict(reversed(experts.experts.items())), tmp_path / "gates.safetensors") as handle:
            assert handle.names == ("hand", "face")
            torch.testing.assert_close(pipe.unet(*given).sample, one)
        swapped = {"face": experts.experts["hand"], "hand": experts.experts["face"]}
        with patch(pipe, swapped, tmp_path / "gates.safetensors"):
            assert (pipe.unet(*given).sample - one).abs().max() > 1e-4


def test_suffixes_are_the_generators_and_off_unless_asked_for():
    assert prompt_arguments(["a", "b"], "bad") == {"prompt": ["a", "b"], "negative_prompt": ["bad", "bad"]}
    asked = prompt_arguments(["a"], "bad", suffixes=True)
    assert asked == {
        "prompt": ["a best quality, 8K"],
        "negative_prompt": ["bad poor quality, unclear hand, bad face "],
    }


def test_pictures_are_drawn_with_ddim_and_each_from_its_own_seed():
    pipe = sd_pipeline()
    before = pipe.scheduler
    seen = []
    encode = pipe.encode_prompt

    def spy(prompt, *args, **options):
        seen.append((prompt, options.get("negative_prompt", args[3] if len(args) > 3 else None)))
        return encode(prompt, *args, **options)

    pipe.encode_prompt = spy
    options = {"steps": 2, "height": 16, "width": 16, "output_type": "np"}
    two = sample_pictures(pipe, ["one", "two"], seed=4, **options)
    one = sample_pictures(pipe, ["two"], seed=5, **options)
    assert pipe.scheduler is before and two.shape == (2, 16, 16, 3)
    torch.testing.assert_close(torch.tensor(two[1]), torch.tensor(one[0]), rtol=1e-4, atol=1e-4)
    sample_pictures(pipe, ["one"], suffixes=True, **options)
    assert [prompt for prompt, _ in seen] == [["one", "two"], ["two"], ["one best quality, 8K"]]
    assert seen[-1][1] == [" poor quality, unclear hand, bad face "]


def test_drawing_leaves_the_pipelines_scheduler_to_other_threads():
    pipe = sd_pipeline()
    before, config, seen = pipe.scheduler, dict(pipe.config), []

    def spy(module, args, options):
        seen.append(pipe.scheduler)

    hook = pipe.unet.register_forward_pre_hook(spy, with_kwargs=True)
    sample_pictures(pipe, ["one"], steps=2, height=16, width=16, output_type="np")
    hook.remove()
    assert seen and all(scheduler is before for scheduler in seen) and dict(pipe.config) == config


def test_presets_of_stage_one_and_of_small_machines():
    stage = PRESETS["sd15"].unet
    assert (stage.optimiser, stage.lr, stage.steps, stage.snr_gamma, stage.accumulation) == (
        "lion",
        2e-6,
        300_000,
        5.0,
        4,
    )
    assert (
        stage.mixed_precision == "bf16" and PRESETS["sd15"].batch_size == 4 and PRESETS["sdxl"].unet is None
    )
    assert (PRESETS["sdxl"].batch_size, PRESETS["sdxl"].gates_batch_size) == (2, 3)
    small = PRESETS["small"]
    assert (
        small.expert("anything") is small.experts["expert"]
        and small.gates.gradient_checkpointing
        and small.batch_size == 1
    )
    assert PRESETS["sd15"].expert("hand").alpha == 128 and PRESETS["sd15"].expert("feet").alpha == 64
