"""An expert in memory is held to what a file is held to: no NaN, no Inf, wherever it enters."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mole_kernels.errors import MoleKeyError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank, canonical_path
from mole_kernels.patching.apply import patch
from mole_kernels.serving.serve import serve


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))


def expert(value: float | None = None, where: str = "down", path: str = "1") -> Expert:
    sizes = {"0": (6, 4), "1": (4, 6)}
    layers = {name: LowRank(torch.ones(2, K), torch.ones(N, 2)) for name, (N, K) in sizes.items()}
    if value is not None:
        layer = layers[path]
        down, up, scale = layer.down.clone(), layer.up.clone(), layer.scale
        if where == "scale":
            scale = value
        else:
            {"down": down, "up": up}[where].view(-1)[-1] = value
        layers[path] = LowRank(down, up, scale)
    return Expert(layers)


DOORS = {
    "patch": lambda m, e: patch(m, {"a": e}),
    "bank": lambda m, e: patch(m, ExpertBank({"b": expert(), "a": e})),
    "swap": lambda m, e: patch(m, {"a": expert()}).swap("a", e),
    "serve": lambda m, e: serve(m, {"a": e}, capacity=1),
    "add": lambda m, e: serve(m, {"b": expert()}, capacity=2).add("a", e),
}


@pytest.mark.parametrize("door", DOORS)
@settings(max_examples=12, deadline=None)
@given(
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    where=st.sampled_from(["down", "up", "scale"]),
    path=st.sampled_from(["0", "1"]),
)
def test_values_that_are_not_finite_are_refused(door, value, where, path):
    m = model()
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(MoleValueError, match=rf"expert 'a', {path}"):
        DOORS[door](m, expert(value, where, path))
    if door in ("patch", "bank"):
        assert all(torch.equal(before[key], tensor) for key, tensor in m.state_dict().items())


@pytest.mark.parametrize("door", DOORS)
def test_finite_values_are_taken(door):
    DOORS[door](model(), expert())


SPELLINGS = ["unet.a.b_c", "a.b_c", "a_b_c", "transformer.a.b.c", "prior.a_b.c"]
TEXT = ["text_encoder.text_model.encoder.x", "text_encoder.encoder.x", "text_encoder.text_model_encoder_x"]


def test_identity_of_a_layer_is_not_its_spelling():
    assert len({canonical_path(path) for path in SPELLINGS}) == 1
    assert len({canonical_path(path) for path in TEXT}) == 1
    different = [SPELLINGS[0], TEXT[0], "text_encoder_2.encoder.x", "transformer_2.a.b_c", "a.b_d"]
    assert len({canonical_path(path) for path in different}) == len(different)


@given(first=st.sampled_from(SPELLINGS), second=st.sampled_from(SPELLINGS))
def test_one_expert_names_a_layer_once(first, second):
    layer = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    if first != second:
        with pytest.raises(MoleKeyError, match="named twice"):
            Expert({first: layer, second: layer})
    bank = ExpertBank({"a": Expert({first: layer}), "b": Expert({second: layer})})
    assert len(bank.paths()) == 1 and list(bank.layer(first)) == ["a", "b"]
