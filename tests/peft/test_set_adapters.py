"""`set_adapters` on an accelerated model: what diffusers' own does to every layer, in the time of the
adapters that change.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import mole_kernels as mk

pytest.importorskip("peft")
pytest.importorskip("diffusers")

from peft.tuners import lora

from tests.peft_models import Pair, lora_config
from tests.tiny_models import tiny_pipeline

CALLS: list[tuple[Any, Any]] = [
    (["a"], [0.5]),
    ("b", 2.0),
    (["b", "a"], [0.3, -1.0]),
    (["a", "b"], None),
    (["a", "b"], [{"down": 0.2, "mid": 0.0, "up": {"block_1": [0.5, 0.7]}}, 0.9]),
    (["a", "nobody"], [0.5, 0.5]),
    ([], []),
    (["a", "b"], [0.7, 0.4]),
]


def states(model: nn.Module) -> dict[str, Any]:
    """Active adapters and scales of every LoRA layer, and the gradient flag of every parameter."""
    layers = {
        n: (m.active_adapters, dict(m.scaling))
        for n, m in model.named_modules()
        if isinstance(m, lora.LoraLayer)
    }
    return layers | {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_every_layer_is_left_as_by_diffusers():
    pair = Pair("unet")
    seen = []
    for names, weights in CALLS:
        for model in pair.both:
            model.set_adapters(copy.copy(names), weights=copy.deepcopy(weights))
        assert states(pair.fast) == states(pair.plain)
        seen.append(pair.assert_same())
    # an adapter that no layer has changes nothing
    assert len({tuple(y.flatten()[:32].tolist()) for y in seen}) == len(CALLS) - 1


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_other_families(family: str):
    pair = Pair(family)
    for names, weights in (
        (["b"], [0.5]),
        (["a", "b"], [{"to_q": 0.5, "to_k": 2.0, "to_v": 1.0, "to_out": 1.0}, 0.1]),
    ):
        for model in pair.both:
            model.set_adapters(names, copy.deepcopy(weights))
        assert states(pair.fast) == states(pair.plain)


def test_the_same_errors():
    pair = Pair("unet")
    before = states(pair.fast)
    for names, weights in ((["a"], [1.0, 2.0]), (["a"], [{"up": {"block_1": [1.0] * 4}}])):
        said = []
        for model in pair.both:
            with pytest.raises(ValueError) as error:
                model.set_adapters(names, copy.deepcopy(weights))
            said.append(str(error.value))
        assert said[0] == said[1]
    assert states(pair.fast) == before


@pytest.mark.parametrize("flag", [True, False])
def test_flags_set_by_hand_are_set_again(flag: bool):
    pair = Pair("unet")
    for model in pair.both:
        model.set_adapters(["a"])
        model.requires_grad_(flag)
        model.set_adapters(["a"])
    assert states(pair.fast) == states(pair.plain)


def test_layers_and_adapters_that_came_later():
    """More targets, convolutions and a variant: their layers are not ours, and are found all the same."""
    pair = Pair("unet")
    more = lora_config(3)
    more.target_modules = {"to_q", "proj_in", "ff.net.2"}
    dora = lora_config(2, use_dora=True)
    for model in pair.both:
        torch.manual_seed(3)
        model.add_adapter(copy.deepcopy(more), "c")
        model.add_adapter(copy.deepcopy(dora), "d")
    for names in (["a", "c"], ["d"], ["b", "d", "c"], ["a", "b"]):
        for model in pair.both:
            model.set_adapters(names)
        assert states(pair.fast) == states(pair.plain)
        pair.assert_same()
    for model in pair.both:
        model.delete_adapters(["a", "c"])
        model.set_adapters(["b"], [0.3])
    assert states(pair.fast) == states(pair.plain)


class Touched(dict):
    """A dictionary of adapters that notes whose module was asked for."""

    def __init__(self, held: dict) -> None:
        super().__init__(held)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def items(self) -> Any:
        self.names.update(self)
        return super().items()

    def values(self) -> Any:
        self.names.update(self)
        return super().values()


def test_only_the_adapters_that_change_are_touched():
    pair = Pair("unet")
    for i in range(6):
        pair.fast.add_adapter(lora_config(2), f"more{i}")
    pair.fast.set_adapters(["a", "b"], [1.0, 1.0])
    layers = list(pair.handle.layers.values())
    dictionaries = []
    # the first layer is looked at whole
    for layer in layers[1:]:
        for half in ("lora_A", "lora_B"):
            layer._modules[half].__dict__["_modules"] = Touched(layer._modules[half]._modules)
            dictionaries.append(layer._modules[half]._modules)
    pair.fast.set_adapters(["a", "more3"], [0.5, 0.8])
    assert {frozenset(d.names) for d in dictionaries} == {frozenset({"b", "more3"})}
    for d in dictionaries:
        d.names.clear()
    pair.fast.set_adapters(["a", "more3"], [0.1, 0.2])
    assert not set().union(*(d.names for d in dictionaries))
    assert layers[1].scaling["a"] == pytest.approx(0.1) and layers[1].scaling["more3"] == pytest.approx(0.2)
    type(pair.fast).set_adapters(pair.fast, ["a", "more3"], [0.1, 0.2])
    assert len(set().union(*(d.names for d in dictionaries))) == 8


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_sets_its_own_adapters(make_copy: Any):
    pair = Pair("unet")
    copied = make_copy(pair.fast)
    before = states(pair.fast)
    copied.set_adapters(["b"], [0.5])
    assert states(pair.fast) == before != states(copied)
    assert copied.set_adapters.model is copied


def test_remove_gives_the_method_back():
    pair = Pair("unet")
    mk.accelerate(pair.fast)
    assert "set_adapters" in vars(pair.fast)
    pair.handle.remove()
    assert vars(pair.fast).keys() == vars(pair.plain).keys()
    pair.fast.set_adapters = method = lambda *args: None
    mk.accelerate(pair.fast).remove()
    assert pair.fast.set_adapters is method


def test_a_pipeline():
    pipe: Any = tiny_pipeline()
    for name in ("a", "b"):
        pipe.unet.add_adapter(lora_config(), name)
        text = lora_config()
        text.target_modules = {"q_proj"}
        pipe.text_encoder.add_adapter(text, name)
    plain = copy.deepcopy(pipe)
    handle = mk.accelerate(pipe)
    for one in (plain, pipe):
        one.set_adapters(["b", "a"], [0.5, {"unet": {"up": 0.25}, "text_encoder": 2.0}])
        with pytest.raises(ValueError, match="not in the list of present adapters"):
            one.set_adapters(["zzz"])
    for component in ("unet", "text_encoder"):
        assert states(getattr(pipe, component)) == states(getattr(plain, component))
    handle.remove()
    assert "set_adapters" not in vars(pipe.unet)
