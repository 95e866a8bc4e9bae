"""The mean of experts' predictions in one call, against each expert by itself; and blocks by name."""

from __future__ import annotations

import pytest
import torch

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.methods.auto_regions import found_gates
from mole_kernels.methods.composed import composed_experts
from mole_kernels.modules.scan import scan, sizes
from mole_kernels.patching.apply import patch
from mole_kernels.patching.block_presets import BLOCK_PRESETS, block_preset
from tests.training.pipelines import sd_pipeline, sdxl_pipeline

PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}


def experts(model):
    torch.manual_seed(0)
    shapes = {p: sizes(m) for p, m in scan(model).layers.items()}
    bank = ExpertBank.new(shapes, ["a", "b", "c"], 2)
    for expert in bank.experts.values():
        for layer in expert.layers.values():
            torch.nn.init.normal_(layer.up, std=0.3)
    return bank


def inputs(pipe, B):
    g = torch.Generator().manual_seed(1)
    channels = pipe.unet.config.cross_attention_dim
    call = {
        "sample": torch.randn(B, 4, 8, 8, generator=g),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(B, 5, channels, generator=g),
    }
    if hasattr(pipe, "tokenizer_2"):
        width = pipe.text_encoder_2.config.projection_dim
        call["added_cond_kwargs"] = {
            "text_embeds": torch.randn(B, width, generator=g),
            "time_ids": torch.ones(B, 6),
        }
    return call


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("mode", ["composite", "guidance"])
def test_the_mean_over_experts_by_themselves(kind, mode):
    pipe = PIPELINES[kind]()
    bank, call = experts(pipe.unet), inputs(pipe, 4)
    weights = {"c": 3.0, "a": 1.0}

    def run():
        with torch.no_grad():
            return pipe.unet(**call).sample

    base, alone = run(), {}
    for name in weights:
        with patch(pipe.unet, {name: bank.experts[name]}):
            alone[name] = run()
    want = 0.75 * alone["c"] + 0.25 * alone["a"]
    if mode == "guidance":
        # the half without the prompt is the base's
        want[:2] = base[:2]
    # guidance is on
    pipe._guidance_scale = 3.0
    with patch(pipe.unet, bank, gates=found_gates) as handle:
        every = run()
        with composed_experts(pipe, handle, weights, mode):
            torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(), every)
        assert "forward" not in vars(pipe.unet)


def test_a_picture_is_drawn_and_one_expert_is_itself():
    pipe = sd_pipeline()
    bank = experts(pipe.unet)
    options = {
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "guidance_scale": 3.0,
    }

    def draw():
        return pipe(["three", "one"], generator=torch.Generator().manual_seed(0), **options).images

    with patch(pipe.unet, {"a": bank.experts["a"]}):
        want = draw()
    with patch(pipe.unet, bank, gates=found_gates) as handle:
        with composed_experts(pipe, handle, {"a": 0.3}):
            torch.testing.assert_close(draw(), want, rtol=1e-4, atol=1e-4)
        with composed_experts(pipe, handle, {"a": 1.0, "b": 1.0}):
            assert not torch.allclose(draw(), want, atol=1e-3)


def test_what_cannot_be_composed_is_named():
    pipe = sd_pipeline()
    bank = experts(pipe.unet)
    with patch(pipe.unet, bank, gates=found_gates) as handle:
        for call, error, match in (
            (
                lambda: composed_experts(object(), handle, {"a": 1.0}),
                MoleTypeError,
                "a UNet or a transformer",
            ),
            (lambda: composed_experts(pipe, handle, {"d": 1.0}), MoleKeyError, "experts among a, b, c"),
            (lambda: composed_experts(pipe, handle, {}), MoleValueError, "weights above 0"),
            (lambda: composed_experts(pipe, handle, {"a": -1.0}), MoleValueError, "weights above 0"),
            (lambda: composed_experts(pipe, handle, {"a": 1.0}, "sum"), MoleValueError, "mode"),
        ):
            with pytest.raises(error, match=match):
                call()
        with (
            composed_experts(pipe, handle, {"a": 1.0}),
            pytest.raises(MoleStateError, match="replaced already"),
            composed_experts(pipe, handle, {"b": 1.0}),
        ):
            pytest.fail("must not open")
        assert "forward" not in vars(pipe.unet)
    with patch(pipe.unet, bank) as handle, pytest.raises(MoleStateError, match="gates=found_gates"):
        composed_experts(pipe, handle, {"a": 1.0})


@pytest.mark.parametrize("name", BLOCK_PRESETS)
def test_presets_are_scales_of_a_unet(name):
    pipe = sd_pipeline()
    scale = block_preset(name, 0.5)
    assert set(scale) == {"unet"} and set(scale["unet"]) == {"down", "mid", "up"}
    content, style = block_preset("sdxl-content")["unet"]["up"], block_preset("sdxl-style", 0.5)["unet"]["up"]
    assert content["block_0"] == [1.0, 0.0, 0.0] and style["block_0"] == [0.0, 0.5, 0.0]
    if not name.startswith("sdxl"):
        with patch(pipe, {"a": experts(pipe.unet).experts["a"]}) as handle:
            handle.set_scales({"a": scale})
            for path, layer in handle.layers.items():
                part = path.removeprefix("unet.").split("_")[0]
                if part in ("down", "mid", "up") and ".attentions." in path:
                    want = 0.5 * BLOCK_PRESETS[name][part]
                    assert float(layer.experts.scale[0]) == pytest.approx(want * 1.0, abs=1e-6), path
    for wrong in (("content", 1.0), (name, float("nan"))):
        with pytest.raises(MoleValueError, match="block_preset"):
            block_preset(*wrong)
