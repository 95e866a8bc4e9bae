"""Adapter weights by block: what diffusers' set_adapters makes of them, layer by layer."""

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleTypeError, MoleValueError
from mole_kernels.patching.apply import patch
from tests.tiny_models import Mlp, make_expert, run_unet, tiny_unet

BLOCKS = [
    {"down": 0.25, "mid": 0.5, "up": 2.0},
    {"up": {"block_1": [0.5, -1.0]}},
    {"mid": 0.0, "down": {"block_0": 3.0}},
]


def by_diffusers(unet: nn.Module, blocks: object, paths) -> dict[str, float]:
    """scaling[adapter] of every layer after PEFT has loaded an adapter onto the same paths and diffusers has
    set its weights.
    """
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(paths)), "a")
    unet.set_adapters("a", [blocks])
    return {path: unet.get_submodule(path).scaling["a"] for path in paths}


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_every_layer_gets_the_weight_diffusers_gives_it(blocks):
    unet = tiny_unet()
    handle = patch(unet, {"a": make_expert(unet, scale=0.5)})
    handle.set_scales({"a": blocks})
    want = by_diffusers(tiny_unet(), blocks, handle.layers)
    got = {path: (m.experts.scale / m.experts.base_scale).item() for path, m in handle.layers.items()}
    assert got == pytest.approx(want) and len(set(want.values())) > 1
    assert handle.scales == {"a": blocks}


def test_a_number_and_blocks_together_and_back_again():
    unet = tiny_unet()
    experts = {"a": make_expert(unet), "b": make_expert(unet, seed=1)}
    plain = patch(unet, experts)
    want = run_unet(unet)
    plain.set_scales({"a": BLOCKS[0], "b": 0.3})
    assert not torch.equal(run_unet(unet), want)
    mid = next(m for p, m in plain.layers.items() if "mid_block" in p)
    torch.testing.assert_close(mid.experts.scale, mid.experts.base_scale * torch.tensor([0.5, 0.3]))
    # a swap keeps the block weights, a larger rank included
    plain.swap("a", make_expert(unet, seed=2, rank=5))
    torch.testing.assert_close(mid.experts.scale, mid.experts.base_scale * torch.tensor([0.5, 0.3]))
    plain.swap("a", experts["a"])
    plain.set_scales({"a": 1.0, "b": 1.0})
    torch.testing.assert_close(run_unet(unet), want)


@pytest.mark.parametrize(
    "weight, error, words",
    [
        ({"down": "much"}, MoleTypeError, "a number, got str"),
        ({"up": {"block_1": [0.5, float("nan")]}}, MoleValueError, "a finite number"),
        ({"up": {"block_1": [0.5, 1.0, 1.0, 1.0]}}, MoleValueError, "do not fit this UNet"),
        ([0.5], MoleTypeError, "a number, or a mapping by component or block"),
    ],
)
def test_bad_block_weights_change_nothing(weight, error, words):
    unet = tiny_unet()
    handle = patch(unet, {"a": make_expert(unet)})
    before = run_unet(unet)
    with pytest.raises(error, match=words):
        handle.set_scales({"a": weight})
    assert torch.equal(run_unet(unet), before) and handle.scales == {"a": 1.0}


def test_block_weights_need_a_unet():
    model = Mlp()
    with pytest.raises(MoleValueError, match="no layer of this adapter lies in a block 'down'"):
        patch(model, {"a": make_expert(model)}, scales={"a": {"down": 1.0}})
    assert type(model.first) is nn.Linear
