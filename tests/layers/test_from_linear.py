"""A layer built from a plain one takes the operator's operands, or refuses before it changes anything."""

import pytest
import torch
from torch import nn

import mole_kernels as mk
from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError


def operands(S=1, K=6, N=5, ranks=(2, 3), **more):
    g = torch.Generator().manual_seed(0)
    R = sum(ranks)
    tensors = (
        torch.randn(S, R, K, generator=g),
        torch.randn(S, N, R, generator=g),
        torch.tensor([0.5, 2.0])[: len(ranks)],
    )
    return mk.Experts(*tensors, ranks, **more)


@pytest.mark.parametrize("S", [1, 3])
def test_operands_of_a_call_become_a_layer(S):
    linear, experts = nn.Linear(6, 5), operands(S)
    layer = mk.GatedLoRALinear.from_linear(linear, experts)
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), mk.gated_lora_linear(x, linear.weight, linear.bias, experts))
    assert (
        layer.weight is linear.weight
        and not linear.weight.requires_grad
        and layer.experts.names == ("0", "1")
    )
    gated = mk.GatedLoRALinear.from_linear(linear, operands(), mk.gates.MoLEGate(6, 5, 2))
    assert gated(x).shape == (3, 4, 5)
    assert {"weight", "bias", "experts.down", "gate.phi"} <= set(gated.state_dict())


@pytest.mark.parametrize(
    "experts, error",
    [
        (operands(K=7), MoleShapeError),
        (operands(N=4), MoleShapeError),
        (operands(3, assignment=torch.tensor([0, 1])), MoleValueError),
        (operands()[:4], MoleTypeError),
        ({"face": "face.safetensors"}, MoleTypeError),
        (None, MoleTypeError),
    ],
)
def test_anything_else_is_refused_and_changes_nothing(experts, error):
    linear = nn.Linear(6, 5)
    with pytest.raises(error):
        mk.GatedLoRALinear.from_linear(linear, experts)
    assert linear.weight.requires_grad and type(linear) is nn.Linear
    with pytest.raises(MoleTypeError, match=r"nn\.Linear"):
        mk.GatedLoRALinear.from_linear(nn.Conv2d(6, 5, 1), operands())


@pytest.mark.parametrize(
    "word, meant",
    [
        ("mol", "mole"),
        ("Local", "local"),
        ("top-3", "top-"),
        ("token", "local"),
        ("pooled", "global"),
        ("sample", "global"),
        ("xyzzy", None),
    ],
)
def test_a_mistyped_word_for_gates_is_no_path(word, meant, tmp_path, monkeypatch):
    from tests.tiny_models import Mlp, make_expert

    model = Mlp()
    with pytest.raises(MoleValueError, match=r"expected one of 'mole', 'local'.*, or a file") as caught:
        mk.patch(model, {"a": make_expert(model)}, word)
    assert (f"did you mean '{meant}" in str(caught.value)) if meant else ("mean" not in str(caught.value))
    assert type(model.first) is nn.Linear
    # a file of that name is a file
    monkeypatch.chdir(tmp_path)
    (tmp_path / word).write_text("")
    with pytest.raises(mk.MoleError, match="empty file"):
        mk.patch(model, {"a": make_expert(model)}, word)


def test_doors():
    import mole_kernels.gates.gate

    assert (
        mk.gates.MoLEGate is mole_kernels.gates.gate.MoLEGate and mk.io.load_expert.__name__ == "load_expert"
    )
    assert all(getattr(mk.gates, name) is not None for name in mk.gates.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'MoleGate'"):
        _ = mk.gates.MoleGate
