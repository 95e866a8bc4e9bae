"""Adapter families beside LoRA on a model: PEFT's own forward, the writers' formulas, gates, scales, removal."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.errors import MoleError, MoleKeyError, MoleShapeError, MoleStateError, MoleTypeError
from mole_kernels.gates import ConstantGate, MaskGate

K, N = 24, 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(K, N), nn.LayerNorm(N), nn.Linear(N, K, bias=False)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[..., :16].reshape(-1, 4, 2, 2)
        out: Tensor = self.second(self.norm(self.first(x))) + self.conv(pixels).mean()
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3


def merged(net: Net, deltas: dict[str, Tensor]) -> Net:
    """A copy with parameters changed by name."""
    other = copy.deepcopy(net)
    for name, delta in deltas.items():
        parameter = other.get_parameter(name)
        parameter.data = parameter.data + delta.view(parameter.shape)
    return other


def lycoris_dora(weight: Tensor, delta: Tensor, magnitude: Tensor, axis: int, w: float = 1.0) -> Tensor:
    """LyCORIS' weight_decompose: (w (m/‖W+ΔW‖ − 1) + 1)(W + ΔW) − W."""
    changed = weight + delta
    norm = changed.norm(dim=1 - axis, keepdim=True) + torch.finfo(torch.float32).eps
    scale = magnitude.view(norm.shape) / norm
    return changed * (w * (scale - 1) + 1) - weight


FIRST = {"down": draw(4, K), "up": draw(N, 4, seed=1)}
DELTA = FIRST["up"] @ FIRST["down"]
BLOCK = draw(4, 4, 4, seed=5)


def cayley(skew: Tensor) -> Tensor:
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def files(net: Net) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """name -> (a file's tensors, what they change by the writer's formula)."""
    W = net.first.weight
    rows = draw(N, seed=2).abs() + 0.5
    columns = draw(K, seed=2).abs() + 0.5
    lora = {"first.lora_down.weight": FIRST["down"], "first.lora_up.weight": FIRST["up"]}
    w1, w2a, w2b = draw(4, 3, seed=7), draw(4, 2, seed=8), draw(2, 8, seed=9)
    halves = {
        f"first.hada_w{n}_{s}": draw(*shape, seed=10 + n)
        for n in (1, 2)
        for s, shape in (("a", (N, 3)), ("b", (3, K)))
    }
    core = {
        "conv.hada_w1_a": draw(2, 6),
        "conv.hada_w1_b": draw(2, 4, seed=1),
        "conv.hada_t1": draw(2, 2, 3, 3, seed=2),
    }
    core |= {
        "conv.hada_w2_a": draw(2, 6, seed=3),
        "conv.hada_w2_b": draw(2, 4, seed=4),
        "conv.hada_t2": draw(2, 2, 3, 3, seed=5),
    }
    tucker = [
        torch.einsum(
            "ijhw,ip,jq->pqhw", core[f"conv.hada_t{n}"], core[f"conv.hada_w{n}_a"], core[f"conv.hada_w{n}_b"]
        )
        for n in (1, 2)
    ]
    rotation = torch.block_diag(*cayley(BLOCK - BLOCK.mT).mT)
    glora = {
        f"first.{n}.weight": draw(*s, seed=20 + i)
        for i, (n, s) in enumerate((("a1", (K, 3)), ("a2", (3, K)), ("b1", (N, 3)), ("b2", (3, K))))
    }
    a1, a2, b1, b2 = glora.values()
    return {
        "LoHa": (
            halves | {"first.alpha": torch.tensor(1.5)},
            {
                "first.weight": 0.5
                * (halves["first.hada_w1_a"] @ halves["first.hada_w1_b"])
                * (halves["first.hada_w2_a"] @ halves["first.hada_w2_b"])
            },
        ),
        "LoHa, tucker": (core, {"conv.weight": tucker[0] * tucker[1]}),
        "LoKr, factored": (
            {
                "first.lokr_w1": w1,
                "first.lokr_w2_a": w2a,
                "first.lokr_w2_b": w2b,
                "first.alpha": torch.tensor(4),
            },
            {"first.weight": 2.0 * torch.kron(w1, w2a @ w2b)},
        ),
        "LoKr, whole": (
            {"first.lokr_w1": w1, "first.lokr_w2": draw(4, 8, seed=3), "first.alpha": torch.tensor(1.0)},
            {"first.weight": torch.kron(w1, draw(4, 8, seed=3))},
        ),
        "full": (
            {"first.diff": draw(N, K), "first.diff_b": draw(N, seed=1), "conv.diff": draw(6, 4, 3, 3)},
            {"first.weight": draw(N, K), "first.bias": draw(N, seed=1), "conv.weight": draw(6, 4, 3, 3)},
        ),
        "bias alone": (lora | {"conv.diff_b": draw(6)}, {"first.weight": DELTA, "conv.bias": draw(6)}),
        "norm": (
            lora | {"norm.w_norm": draw(N), "norm.b_norm": draw(N, seed=4)},
            {"first.weight": DELTA, "norm.weight": draw(N), "norm.bias": draw(N, seed=4)},
        ),
        "norm as diff": (lora | {"norm.diff": draw(N)}, {"first.weight": DELTA, "norm.weight": draw(N)}),
        "DoRA, rows": (
            lora | {"first.dora_scale": rows[:, None]},
            {"first.weight": lycoris_dora(W, DELTA, rows, 0)},
        ),
        "DoRA, columns": (
            lora | {"first.dora_scale": columns[None]},
            {"first.weight": lycoris_dora(W, DELTA, columns, 1)},
        ),
        "OFT": ({"first.oft_blocks": BLOCK}, {"first.weight": rotation @ W - W}),
        "GLoRA": (glora, {"first.weight": W @ a1 @ a2 + b1 @ b2}),
        "IA3, output": (
            {"first.weight": draw(N), "first.on_input": torch.tensor(False)},
            {"first.weight": W * draw(N)[:, None]},
        ),
        "IA3, input": (
            {"first.weight": draw(K), "first.on_input": torch.tensor(True)},
            {"first.weight": W * draw(K)[None]},
        ),
    }


NAMES = list(files(Net().double()))


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_its_writers_formula_and_leaves_no_trace(net: Net, x: Tensor, name: str) -> None:
    tensors, changes = files(net)[name]
    before = {key: t.clone() for key, t in net.state_dict().items()}
    plain = net(x)
    with mk.patch(net, {"a": tensors}):
        got = net(x)
        want = merged(net if name == "-" else _plain(net, before), changes)(x)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert not torch.equal(got, plain)
    assert torch.equal(net(x), plain)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def _plain(net: Net, state: dict[str, Tensor]) -> Net:
    other = Net().double()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", NAMES)
def test_gates_weigh_what_a_family_adds(net: Net, x: Tensor, name: str) -> None:
    """A constant gate of 0.5 beside a LoRA of another layer's: half of ΔW and of β."""
    tensors, changes = files(net)[name]
    if name.startswith("norm"):
        pytest.skip("no gate reaches a norm")
    state = {key: t.clone() for key, t in net.state_dict().items()}
    with mk.patch(net, {"a": tensors}, gates=lambda path, module, experts: ConstantGate(1, [0.5])):
        got = net(x)
    want = merged(_plain(net, state), {key: 0.5 * t for key, t in changes.items()})(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_mask_takes_a_bias_difference_where_it_is_one(net: Net, x: Tensor) -> None:
    mask = torch.zeros(1, 5, 1, dtype=torch.float64)
    mask[0, :2] = 1
    tensors, changes = files(net)["full"]
    tensors = {key: t for key, t in tensors.items() if key.startswith("first")}
    with mk.patch(net, {"a": tensors}, gates=lambda path, module, experts: MaskGate(mask)):
        got = net.first(x)
    inside = merged(net, {k: t for k, t in changes.items() if k.startswith("first")}).first(x)
    torch.testing.assert_close(got[:, :2], inside[:, :2])
    torch.testing.assert_close(got[:, 2:], net.first(x)[:, 2:])


@pytest.mark.parametrize("w", [0.0, 0.4, 1.7])
@pytest.mark.parametrize("axis", [0, 1])
def test_doras_strength_is_lycoris_rule(net: Net, x: Tensor, axis: int, w: float) -> None:
    magnitude = draw((N, K)[axis], seed=2).abs() + 0.5
    tensors = {"first.lora_down.weight": FIRST["down"], "first.lora_up.weight": FIRST["up"]}
    tensors["first.dora_scale"] = magnitude[:, None] if axis == 0 else magnitude[None]
    plain = net.first(x)
    with mk.patch(net, {"a": tensors}) as handle:
        handle.set_scales({"a": w})
        got = net.first(x)
        handle.set_scales({"a": 1.0})
        one = net.first(x)
    change = lycoris_dora(net.first.weight, DELTA, magnitude, axis, w) if w else torch.zeros(N, K)
    torch.testing.assert_close(got, plain + x @ change.double().mT, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        one, plain + x @ lycoris_dora(net.first.weight, DELTA, magnitude, axis).mT, rtol=1e-6, atol=1e-6
    )


def test_a_norms_difference_follows_its_scale(net: Net, x: Tensor) -> None:
    tensors, _ = files(net)["norm"]
    weight = net.norm.weight.clone()
    with mk.patch(net, {"a": tensors}) as handle:
        handle.set_scales({"a": 0.5})
        torch.testing.assert_close(net.norm.weight, weight + 0.5 * draw(N), rtol=1e-6, atol=1e-6)
        handle.set_scales({"a": 0.0})
        assert torch.equal(net.norm.weight, weight)


def test_families_mix_in_one_layer(net: Net, x: Tensor) -> None:
    """ΔW and β of each, weighed, add up; the same as each alone."""
    chosen = ("LoHa", "LoKr, factored", "full", "DoRA, rows", "OFT", "IA3, output", "GLoRA")
    every = files(net)
    experts = {
        name.split(",")[0]: {k: t for k, t in every[name][0].items() if k.startswith("first")}
        for name in chosen
    }
    plain = net.first(x)
    alone = {}
    for name, tensors in experts.items():
        with mk.patch(net, {name: tensors}):
            alone[name] = net.first(x) - plain
    with mk.patch(net, experts):
        torch.testing.assert_close(net.first(x), plain + sum(alone.values()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["LoHa", "LoKr, factored", "LoKr, whole", "DoRA, rows", "OFT", "GLoRA", "IA3, input"]
)
def test_each_prompt_may_take_another_family(net: Net, x: Tensor, name: str) -> None:
    tensors = files(net)[name][0]
    lora = {"first.lora_down.weight": draw(4, K, seed=30), "first.lora_up.weight": draw(N, 4, seed=31)}
    solo = []
    for source in (tensors, lora):
        with mk.patch(net, {"a": source}):
            solo.append(net(x))
    with mk.serve(net, {"anna": tensors, "ben": lora}) as served, served.assign(["anna", "ben"]):
        got = net(x)
    torch.testing.assert_close(got[0], solo[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], solo[1][1], rtol=1e-6, atol=1e-6)


def test_what_a_batch_cannot_hold_is_refused_by_serve(net: Net) -> None:
    for name in ("full", "norm"):
        with pytest.raises(MoleTypeError, match="of which a batch has one for all"):
            mk.serve(net, {"anna": files(net)[name][0]})


def test_merging_and_saving_take_what_needs_no_base(net: Net, tmp_path: Path) -> None:
    every = files(net)
    loha, lokr = (
        mk.io.load_expert({f"unet.mid_block.{key}": t for key, t in every[name][0].items()})
        for name in ("LoHa", "LoKr, factored")
    )
    whole = mk.merge({"a": loha, "b": lokr}, [1.0, 1.0])
    want = every["LoHa"][1]["first.weight"] + every["LoKr, factored"][1]["first.weight"]
    torch.testing.assert_close(
        whole.layers["unet.mid_block.first"].delta(torch.float64), want, rtol=1e-5, atol=1e-6
    )
    mk.io.save_expert(loha, tmp_path / "a.safetensors")
    again = mk.io.load_expert(tmp_path / "a.safetensors")
    torch.testing.assert_close(
        again.layers["unet.mid_block.first"].delta(torch.float64), every["LoHa"][1]["first.weight"]
    )
    dora = mk.io.load_expert(every["DoRA, rows"][0])
    for act in (
        lambda: mk.merge({"a": dora}),
        lambda: mk.compress(dora, rank=1),
        lambda: mk.io.save_expert(dora, tmp_path / "b.safetensors"),
    ):
        with pytest.raises(MoleTypeError, match="layers of DoRA, which depend on the base"):
            act()
    assert not (tmp_path / "b.safetensors").exists()


BAD: dict[str, tuple[dict[str, Tensor], type[MoleError], str]] = {
    "another magnitude": (
        {
            "first.lora_down.weight": draw(4, K),
            "first.lora_up.weight": draw(N, 4),
            "first.dora_scale": draw(9, 1),
        },
        MoleShapeError,
        "magnitude",
    ),
    "halves of two layers": (
        {f"first.hada_w{n}_{s}": draw(*((N + n, 3) if s == "a" else (3, K))) for n in (1, 2) for s in "ab"},
        MoleShapeError,
        "halves of one shape",
    ),
    "a Kronecker product of another size": (
        {"first.lokr_w1": draw(3, 3), "first.lokr_w2": draw(4, 4)},
        MoleShapeError,
        r"down \[R,24\] and up \[16,R\]",
    ),
    "half a LoKr": ({"first.lokr_w1": draw(3, 3), "first.lokr_w2_a": draw(4, 2)}, MoleKeyError, "w2_b"),
    "blocks that do not divide": ({"first.oft_blocks": draw(3, 4, 4)}, MoleShapeError, "square blocks"),
    "a bias of another layer": ({"first.diff_b": draw(9)}, MoleShapeError, "another layer"),
    "a norm of another size": ({"norm.w_norm": draw(9)}, MoleShapeError, "difference of the weight of norm"),
    "a norm that is not there": ({"nothing.w_norm": draw(9)}, MoleError, "nothing"),
    "a weight of its own": ({"first.set_weight": draw(N, K)}, MoleKeyError, "replaces the model's own"),
}


@pytest.mark.parametrize("name", BAD)
def test_parts_that_disagree_are_named_and_change_nothing(net: Net, x: Tensor, name: str) -> None:
    tensors, error, words = BAD[name]
    before, plain = {key: t.clone() for key, t in net.state_dict().items()}, net(x)
    with pytest.raises(error, match=words):
        mk.patch(net, {"a": tensors})
    assert torch.equal(net(x), plain) and all(
        torch.equal(t, before[key]) for key, t in net.state_dict().items()
    )


def test_a_swap_that_would_be_half_done_is_refused(net: Net, x: Tensor) -> None:
    tensors, _ = files(net)["DoRA, rows"]
    lora = {key: t for key, t in tensors.items() if "lora" in key}
    with mk.patch(net, {"a": lora}) as handle:
        before = net(x)
        with pytest.raises(MoleStateError, match="new expert is not A and B alone"):
            handle.swap("a", tensors)
        assert torch.equal(net(x), before)


PEFT = ("DoRA", "lora_bias", "LoHa", "LoKr", "OFT", "OFT, Neumann", "IA3")


@pytest.mark.parametrize("name", PEFT)
def test_a_peft_folder_is_pefts_forward(x: Tensor, name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["first", "second"]
    made = {
        "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets),
        "lora_bias": lambda: peft.LoraConfig(r=4, lora_alpha=8, lora_bias=True, target_modules=["first"]),
        "LoHa": lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=targets),
        "LoKr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=targets, decompose_factor=4),
        "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=targets, use_cayley_neumann=False),
        "OFT, Neumann": lambda: peft.OFTConfig(oft_block_size=4, target_modules=targets),
        "IA3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=["second"]),
    }[name]()
    torch.manual_seed(1)
    base = Net().float()
    theirs = peft.get_peft_model(copy.deepcopy(base), made)
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape) * 0.2
            parameter.data = parameter.data + noise if "magnitude" in key or "ia3" in key else noise
    theirs.save_pretrained(tmp_path)
    want = theirs.eval()(x.float())
    with mk.patch(base, {"a": tmp_path}):
        got = base(x.float())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
