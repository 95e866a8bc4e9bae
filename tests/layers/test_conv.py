"""A gated convolution is the gated linear layer on the patches that its pixels see; without experts it is the
convolution itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.experts.layer import LayerExperts
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.gates.gate import ConstantGate, MoLEGate
from mole_kernels.layers.attach import attach, detach
from mole_kernels.layers.conv import GatedLoRAConv2d, conv_of, conv_sizes
from mole_kernels.layers.linear import GatedLoRALinear

K, N = 5, 7


@dataclass(frozen=True)
class Conv:
    """One kind of convolution; `pad` is what F.pad makes of its padding."""

    id: str
    kernel: Any
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: str = "constant"

    def __str__(self) -> str:
        return self.id

    def make(self) -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(K, N, self.kernel, **self.more).double().requires_grad_(False)

    def patches(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """[B,T,K·k·k]"""
        padded = F.pad(x, self.pad, mode=self.mode)
        return F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride).mT


CONVS = [
    Conv("3x3", 3, {"padding": 1}, (1, 1, 1, 1)),
    Conv("3x3-unpadded-no-bias", 3, {"bias": False}),
    Conv("downsampler", 3, {"padding": 1, "stride": 2}, (1, 1, 1, 1)),
    Conv("dilated", 3, {"padding": 2, "dilation": 2}, (2, 2, 2, 2)),
    Conv("1x5", (1, 5), {"padding": (0, 2), "stride": (2, 1)}, (2, 2, 0, 0)),
    Conv("even-same", 4, {"padding": "same"}, (1, 2, 1, 2)),
    Conv("1x1-strided", 1, {"stride": 2}),
    Conv("1x1-padded", 1, {"padding": 1}, (1, 1, 1, 1)),
    Conv("reflect", 3, {"padding": 1, "padding_mode": "reflect"}, (1, 1, 1, 1), "reflect"),
    Conv("circular", 3, {"padding": (2, 1), "padding_mode": "circular"}, (1, 1, 2, 2), "circular"),
]
BY_ID = {str(case): case for case in CONVS}


def experts_for(conv: nn.Conv2d, ranks: tuple[int, ...] = (3, 2), sets: int = 1) -> LayerExperts:
    k, n = conv_sizes(conv)
    torch.manual_seed(1)
    down, up = torch.randn(sets, sum(ranks), k) / k**0.5, torch.randn(sets, n, sum(ranks))
    names = tuple(f"e{i}" for i in range(len(ranks)))
    return LayerExperts(down.double(), up.double(), torch.tensor([0.5, 2.0][: len(ranks)]), names, ranks)


def gate_for(kind: str, conv: nn.Conv2d, experts: int = 2) -> nn.Module | None:
    k, n = conv_sizes(conv)
    torch.manual_seed(2)
    if kind == "constant":
        return ConstantGate(experts, 0.3)
    if kind == "none":
        return None
    return MoLEGate(k, n, experts, local=kind != "global", pooled=kind != "local", dtype=torch.float64)


def on_patches(
    case: Conv,
    conv: nn.Conv2d,
    experts: LayerExperts,
    gate: nn.Module | None,
    x: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """The same experts and gates on a linear layer whose tokens are the patches."""
    linear = nn.Linear(1, 1, bias=conv.bias is not None)
    linear.in_features, linear.out_features = conv_sizes(conv)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1), requires_grad=False), conv.bias
    layer = GatedLoRALinear.from_linear(linear, experts, gate)  # type: ignore[arg-type]
    return layer(case.patches(x, conv)).mT.unflatten(2, size)


@pytest.mark.parametrize("kind", ["none", "constant", "local", "global", "both"])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_the_linear_layer_on_patches(case: Conv, kind: str):
    conv, x = case.make(), torch.randn(2, K, 9, 6, dtype=torch.float64)
    plain = conv(x)
    experts, gate = experts_for(conv), gate_for(kind, conv)
    want = on_patches(case, conv, experts, gate, x, plain.shape[2:])
    assert not torch.allclose(want, plain, rtol=0.05)
    layer = attach(conv, experts, gate)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer(x[1]), layer(x[1:])[0], rtol=1e-12, atol=1e-12)
    detach(conv)
    assert type(conv) is nn.Conv2d and torch.equal(conv(x), plain)


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("case", [BY_ID["3x3"], BY_ID["downsampler"], BY_ID["circular"]], ids=str)
def test_gradients_are_those_on_patches(case: Conv, kind: str):
    conv = case.make()
    x = torch.randn(2, K, 6, 5, dtype=torch.float64)
    dy = torch.randn_like(conv(x))
    found = []
    for way in ("conv", "patches"):
        experts, gate, leaf = experts_for(conv), gate_for(kind, conv), x.clone().requires_grad_()
        experts.down.requires_grad_()
        experts.up.requires_grad_()
        layer = GatedLoRAConv2d.from_conv(copy.deepcopy(conv), experts, gate) if way == "conv" else None  # type: ignore[arg-type]
        y = layer(leaf) if layer is not None else on_patches(case, conv, experts, gate, leaf, dy.shape[2:])
        y.backward(dy)
        found.append(
            [
                leaf.grad,
                experts.down.grad,
                experts.up.grad,
                *(p.grad for p in (gate.parameters() if gate else ())),
            ]
        )
    assert len(found[0]) == (3 if kind == "none" else 7)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", [BY_ID["3x3"], BY_ID["reflect"]], ids=str)
def test_every_sample_its_own_experts(case: Conv):
    x = torch.randn(3, K, 6, 5, dtype=torch.float64)
    conv, experts = case.make(), experts_for(case.make(), sets=3)
    base = conv(x)
    alone = []
    for b in range(3):
        one = LayerExperts(
            experts.down[b : b + 1].clone(),
            experts.up[b : b + 1].clone(),
            experts.base_scale,
            experts.names,
            experts.ranks,
        )
        alone.append(attach(case.make(), one)(x[b : b + 1]))
    layer = attach(conv, experts)
    torch.testing.assert_close(layer(x), torch.cat(alone), rtol=1e-12, atol=1e-12)

    class Route:
        current = torch.tensor([2, -1, 0])

    experts.route = Route()
    y = layer(x)
    torch.testing.assert_close(y[1], base[1], rtol=0, atol=0)
    own = [
        LayerExperts(
            experts.down[i : i + 1].clone(),
            experts.up[i : i + 1].clone(),
            experts.base_scale,
            experts.names,
            experts.ranks,
        )
        for i in (2, 0)
    ]
    want = [attach(case.make(), one)(x[b : b + 1]) for b, one in zip((0, 2), own)]
    torch.testing.assert_close(y[[0, 2]], torch.cat(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_dtypes_and_channels_last(dtype: torch.dtype):
    case = BY_ID["3x3"]
    conv, x = case.make(), torch.randn(2, K, 8, 6, dtype=torch.float64).to(dtype)
    low, experts = case.make().to(dtype), experts_for(conv).to(dtype)
    want = on_patches(case, conv, copy.deepcopy(experts).double(), None, x.double(), (8, 6))
    got = attach(low, experts)(x.to(memory_format=torch.channels_last))
    assert got.dtype == dtype
    # four roundings to dtype on the way: base, A x, B (A x), their sum; and W's
    assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def test_under_autocast_it_computes_as_the_convolution_does():
    conv, x = BY_ID["3x3"].make().float(), torch.randn(1, K, 6, 6)
    layer = attach(conv, experts_for(conv).float())
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16 and (got.float() - want).norm() <= 0.02 * want.norm()


def test_delta_is_the_convolutions_weight():
    conv, x = BY_ID["downsampler"].make(), torch.randn(1, K, 7, 7, dtype=torch.float64)
    k, n = conv_sizes(conv)
    one = LowRank(
        torch.randn(2, k, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64), 0.5, conv_of(conv)
    )
    merged = copy.deepcopy(conv)
    merged.weight.add_(one.delta(torch.float64).view_as(conv.weight))
    layer = attach(conv, LayerExperts.from_factors({"e": one}))
    torch.testing.assert_close(layer(x), merged(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("first", [True, False], ids=["offloaded-then-attached", "attached-then-offloaded"])
def test_sequential_offload(first: bool):
    """accelerate keeps weights and experts on meta between calls."""
    from accelerate import cpu_offload

    case = BY_ID["3x3"]
    x, experts, gate = (
        torch.randn(1, K, 5, 5, dtype=torch.float64),
        experts_for(case.make()),
        gate_for("both", case.make()),
    )
    want = attach(case.make(), copy.deepcopy(experts), copy.deepcopy(gate))(x)  # type: ignore[arg-type]
    holder = nn.ModuleDict({"conv": case.make()})
    if first:
        cpu_offload(holder, torch.device("cpu"))
    layer = attach(holder["conv"], experts, gate)  # type: ignore[arg-type]
    if not first:
        cpu_offload(holder, torch.device("cpu"))
        assert layer.experts.down.is_meta
    assert layer.weight.is_meta
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)


def test_a_compiled_layer_does_not_recompile_for_other_scales():
    layer = attach(BY_ID["3x3"].make().float(), experts_for(BY_ID["3x3"].make()).float())
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(1, K, 6, 6)
    for weight in (1.0, 0.3, 0.0):
        layer.experts.set_weights({"e0": weight})
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert count == 1
