"""Equal A in the projections of one attention is found, stored once, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch

from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.shared import same_content, shared_down, store_once

QKV = tuple(f"transformer.blocks.0.attn.to_{x}" for x in "qkv")


def fused(seed: int = 0, rank: int = 2) -> dict[str, LowRank]:
    """One A for q, k and v (each its own copy), as a file of fused projections is cut."""
    torch.manual_seed(seed)
    down = torch.randn(rank, 6)
    return {path: LowRank(down.clone(), torch.randn(4, rank), 0.5) for path in QKV}


def changed(layers: dict[str, LowRank], path: str) -> dict[str, LowRank]:
    down = layers[path].down.clone()
    down[-1, -1] = torch.nextafter(down[-1, -1], torch.tensor(9.0))
    return layers | {path: LowRank(down, layers[path].up, layers[path].scale)}


def test_equal_a_of_one_parent_is_found():
    assert shared_down(Expert(fused())) == [QKV]
    # one value, by one step of float32: k and v are left
    assert shared_down(Expert(changed(fused(), QKV[0]))) == [QKV[1:]]
    assert shared_down(Expert(changed(changed(fused(), QKV[0]), QKV[1]))) == [QKV[:2]]
    assert (
        shared_down(Expert({path: LowRank(torch.randn(2, 6), layer.up) for path, layer in fused().items()}))
        == []
    )


def test_another_parent_does_not_read_the_same_input():
    layers = fused()
    other = {path.replace("blocks.0", "blocks.1"): layer for path, layer in layers.items()}
    assert shared_down(Expert(layers | other)) == [QKV, tuple(other)]


@pytest.mark.parametrize(
    "other",
    [
        lambda d: d.to(torch.float64),
        lambda d: d.reshape(-1, 3),
        lambda d: torch.empty_like(d, device="meta"),
        lambda d: d[:1],
    ],
    ids=["dtype", "shape", "meta", "rank"],
)
def test_what_is_not_the_same_content(other):
    down = torch.randn(2, 6)
    assert (
        same_content(down, down)
        and same_content(down, down.clone())
        and same_content(down, down.mT.contiguous().mT)
    )
    assert not same_content(down, other(down))


def test_a_bank_shares_what_every_expert_shares():
    one, two = Expert(fused(0)), Expert(fused(1, rank=3))
    assert shared_down(ExpertBank({"a": one, "b": two})) == [QKV]
    assert shared_down(ExpertBank({"a": one, "b": Expert(changed(fused(1), QKV[2]))})) == [QKV[:2]]
    # b lacks v: there the packed A would be another
    lacking = Expert({path: layer for path, layer in fused(1).items() if path != QKV[2]})
    assert shared_down(ExpertBank({"a": one, "b": lacking})) == [QKV[:2]]


def test_equal_a_is_stored_once():
    layers = changed(fused(), QKV[0])
    kept = store_once(layers)
    assert kept[QKV[1]].down is kept[QKV[2]].down and kept[QKV[0]].down is layers[QKV[0]].down
    assert list(kept) == list(layers)
    for path, layer in layers.items():
        assert torch.equal(kept[path].delta(), layer.delta()) and kept[path].scale == layer.scale
