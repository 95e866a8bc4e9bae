"""Factors, experts, the bank of them, and the scale conventions."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank, flatten, split_component
from mole_kernels.experts.scales import alpha_of, scale_of


def lowrank(n: int = 4, k: int = 5, r: int = 2, scale: float = 0.5, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(r, k, generator=draw), torch.randn(n, r, generator=draw), scale)


@pytest.mark.parametrize(
    ("convention", "alpha", "rank", "scale"),
    [
        ("kohya", 128.0, 256, 0.5),
        ("kohya", None, 256, 1.0),
        ("peft", 8.0, 4, 2.0),
        ("rslora", 8.0, 4, 4.0),
        ("rslora", None, 4, 1.0),
        ("mix_of_show", 0.7, 4, 0.7),
        ("mix_of_show", None, 4, 1.0),
        ("kohya", -1.0, 2, -0.5),
        ("kohya", 0.0, 2, 0.0),
    ],
)
def test_scale_of(convention: str, alpha: float | None, rank: int, scale: float):
    assert scale_of(convention, alpha, rank) == scale  # type: ignore[arg-type]
    if alpha is not None:
        assert alpha_of(convention, scale, rank) == pytest.approx(alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "args", [("lycoris", 1.0, 4), ("kohya", math.nan, 4), ("kohya", math.inf, 4), ("peft", 1.0, 0)]
)
def test_scale_of_refuses(args: tuple):
    with pytest.raises(MoleValueError, match="scale_of"):
        scale_of(*args)


@settings(deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 9), r=st.integers(1, 12), scale=st.floats(-10, 10))
def test_norm_without_forming_delta(n: int, k: int, r: int, scale: float):
    layer = lowrank(n, k, r, scale, seed=n * 100 + k * 10 + r)
    truth = (scale * layer.up.double() @ layer.down.double()).norm().item()
    assert layer.norm() == pytest.approx(truth, rel=1e-10, abs=1e-10)
    assert layer.delta(torch.float64).norm().item() == pytest.approx(truth, rel=1e-10, abs=1e-12)


def test_norm_of_an_expert_is_over_all_layers():
    layers = {"a": lowrank(seed=1), "b": lowrank(6, 3, 1, 2.0, seed=2)}
    truth = math.sqrt(sum(layer.delta(torch.float64).square().sum().item() for layer in layers.values()))
    assert Expert(layers).norm() == pytest.approx(truth)


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 5), (4, 3)), ((2, 5), (2, 4)), ((5,), (4, 5)), ((2, 5, 1, 1), (4, 2, 1, 1)), ((0, 5), (4, 0))],
    ids=["ranks", "transposed", "1-D", "4-D", "rank-0"],
)
def test_lowrank_shapes(down: tuple, up: tuple):
    with pytest.raises(MoleShapeError, match=r"down \[R,K\] and up \[N,R\]"):
        LowRank(torch.ones(down), torch.ones(up))


def test_cast_to_float16_refuses_overflow_only():
    layer = LowRank(torch.full((1, 1), 65_504.0), torch.full((1, 1), -65_504.0))
    assert layer.to(torch.float16).down.item() == 65_504
    with pytest.raises(MoleValueError, match="largest value 65505 overflows"):
        LowRank(torch.ones(1, 1), torch.full((1, 1), -65_505.0)).to(torch.float16)
    with pytest.raises(MoleValueError, match="448"):
        LowRank(torch.full((1, 1), 449.0), torch.ones(1, 1)).to(torch.float8_e4m3fn)
    assert layer.to(device="meta").down.is_meta


def test_components():
    assert split_component("unet.a.b") == ("unet", "a.b")
    assert split_component("text_encoder_2.a") == ("text_encoder_2", "a")
    assert split_component("down_blocks.0") == (None, "down_blocks.0")
    assert split_component("unet") == (None, "unet")
    assert flatten("a.b_c.0") == "a_b_c_0"


def test_47_one_layer_twice_in_an_expert():
    with pytest.raises(MoleKeyError, match=r"named twice: a\.b and a_b|named twice: a_b and a\.b"):
        Expert({"a.b": lowrank(), "a_b": lowrank()})


def test_bank_order_paths_and_spellings():
    first, second = (
        Expert({"unet.a_b": lowrank(), "unet.c": lowrank(3)}),
        Expert({"unet.d": lowrank(), "unet.a.b": lowrank(seed=3)}),
    )
    bank = ExpertBank({"hand": first, "face": second})
    assert bank.names == ("hand", "face") and len(bank) == 2
    assert bank.paths() == ["unet.a.b", "unet.c", "unet.d"]
    assert list(bank.layer("unet.a.b")) == list(bank.layer("unet_a_b")) == ["hand", "face"]
    assert list(bank.layer("unet.c")) == ["hand"]
    assert bank.layer("nowhere") == {}
    assert "hand, face; 3 layers" in repr(bank)


def test_pack():
    a, b = lowrank(r=2, scale=0.5), lowrank(r=3, scale=2.0, seed=1)
    packed = ExpertBank({"x": Expert({"p": a}), "y": Expert({"p": b})}).pack("p", torch.float64)
    assert packed.names == ("x", "y") and packed.ranks == (2, 3)
    down, up, scale, *_ = packed.operands()
    assert torch.equal(down[0], torch.cat([a.down, b.down]).double()) and torch.equal(
        up[0], torch.cat([a.up, b.up], 1).double()
    )
    assert scale.tolist() == [0.5, 2.0]
    with pytest.raises(MoleKeyError, match="no expert has the layer zzz"):
        ExpertBank({"x": Expert({"p": a})}).pack("zzz")
    with pytest.raises(MoleShapeError, match="x 4x5, y 4x6"):
        ExpertBank({"x": Expert({"p": a}), "y": Expert({"p": lowrank(k=6)})}).pack("p")


def test_new_experts_start_as_nothing():
    shapes = {"a": (4, 50), "b.c": (6, 7)}
    bank = ExpertBank.new(
        shapes, ["x", "y"], {"x": 2, "y": 3}, {"x": 4.0, "y": 1.5}, generator=torch.Generator().manual_seed(0)
    )
    assert bank.paths() == list(shapes)
    for path, (n, k) in shapes.items():
        for name, r, scale in (("x", 2, 2.0), ("y", 3, 0.5)):
            layer = bank.layer(path)[name]
            assert (layer.rank, layer.out_features, layer.in_features, layer.scale) == (r, n, k, scale)
            # kaiming_uniform(a=√5) is uniform within ±1/√K
            assert layer.down.abs().max() <= 1 / math.sqrt(k) and layer.down.std() > 0.4 / math.sqrt(k)
            assert not layer.up.any()
    assert not torch.equal(bank.layer("a")["x"].down[:2], bank.layer("a")["y"].down[:2])


@pytest.mark.parametrize("name", ["", "a.b", "a\nb", "\x1b[31m", "x" * 129])
def test_54_bad_names(name: str):
    with pytest.raises(MoleValueError, match="expert name"):
        ExpertBank({name: Expert({"a": lowrank()})})


def test_51_54_bad_banks():
    with pytest.raises(MoleValueError, match="at least one expert"):
        ExpertBank({})
    with pytest.raises(MoleValueError, match="names that differ"):
        ExpertBank.new({"a": (2, 2)}, ["x", "x"], 1)
    with pytest.raises(MoleTypeError, match="expected an Expert, got str"):
        ExpertBank({"x": "face.safetensors"})  # type: ignore[dict-item]
    with pytest.raises(MoleTypeError, match="expected a str"):
        ExpertBank({3: Expert({})})  # type: ignore[dict-item]


def test_pickles():
    bank = pickle.loads(pickle.dumps(ExpertBank.new({"a.b": (2, 3)}, ["x"], 1)))
    assert bank.names == ("x",) and bank.layer("a_b")["x"].rank == 1


def test_fresh_gaussian_factors_have_pefts_spread():
    bank = ExpertBank.new(
        {"a": (8, 4000)}, ["x"], 4, generator=torch.Generator().manual_seed(0), init="gaussian"
    )
    layer = bank.experts["x"].layers["a"]
    # 16,000 draws of N(0, 1/4): the sample's deviation is within 0.02 of it at more than three of its own
    assert abs(float(layer.down.std()) - 0.25) < 0.02 and not layer.up.any()
    with pytest.raises(MoleValueError, match="kaiming, gaussian"):
        ExpertBank.new({"a": (2, 2)}, ["x"], 1, init="uniform")
