"""MoLE's gate files: the official names exactly, both ways, and a native form for everything they cannot
hold.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_kernels.errors import (
    MoleError,
    MoleFileError,
    MoleKeyError,
    MoleShapeError,
    MoleTypeError,
    MoleValueError,
)
from mole_kernels.io import GateFile, GateTensors, load_gates, read_header, read_tensors, save_gates

SD15 = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SDXL = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
K, N = 5, 4


def gates_of(*paths: str, E: int = 2, seed: int = 0) -> dict[str, GateTensors]:
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return {path: GateTensors(tensor(E, K), tensor(E), tensor(E, N), tensor(E)) for path in paths}


def official(base: str = "moe_lora_unet_down_blocks_0_attentions_0_proj_in") -> dict[str, Tensor]:
    """A layer as JiePKU/MoLE's network writes it: one Linear(d, 2) and, for each expert, one Linear(d_out,
    1).
    """
    modules = {
        "Phi_1": torch.nn.Linear(K, 2),
        "face_scale": torch.nn.Linear(N, 1),
        "hand_scale": torch.nn.Linear(N, 1),
    }
    return {
        f"{base}.softmoe.{name}.{part}": t.detach()
        for name, module in modules.items()
        for part, t in module.named_parameters()
    }


def same(a: GateTensors, b: GateTensors) -> bool:
    one, other = a.present(), b.present()
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_official_file_read(tmp_path: Path):
    tensors = official()
    save_file(tensors, tmp_path / "g.safetensors", {"ss_step": "7"})
    gates = load_gates(tmp_path / "g.safetensors")
    assert gates.expert_names == ("face", "hand")
    assert gates.metadata == {"ss_step": "7"}
    (path,) = gates.layers
    assert path == "unet.down_blocks.0.attentions.0.proj_in"
    found, base = gates.layers[path], "moe_lora_unet_down_blocks_0_attentions_0_proj_in.softmoe."
    assert torch.equal(found.phi, tensors[f"{base}Phi_1.weight"]) and torch.equal(
        found.phi_bias, tensors[f"{base}Phi_1.bias"]
    )
    for e, name in enumerate(("face", "hand")):
        assert torch.equal(found.head[e], tensors[f"{base}{name}_scale.weight"][0])
        assert torch.equal(found.head_bias[e], tensors[f"{base}{name}_scale.bias"][0])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_official_file_written_has_exactly_the_official_keys(dtype: torch.dtype | None, tmp_path: Path):
    gates = GateFile(gates_of(SD15), ("face", "hand"))
    save_gates(gates, tmp_path / "g.safetensors", "official", dtype)
    entries = read_header(tmp_path / "g.safetensors").entries
    base = "moe_lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.softmoe."
    shapes = {"Phi_1.weight": (2, K), "Phi_1.bias": (2,)}
    for name in ("face", "hand"):
        shapes |= {f"{name}_scale.weight": (1, N), f"{name}_scale.bias": (1,)}
    assert {key: entry.shape for key, entry in entries.items()} == {
        base + name: shape for name, shape in shapes.items()
    }
    assert {entry.dtype for entry in entries.values()} == {dtype or torch.float32}
    if dtype is None:
        assert same(load_gates(tmp_path / "g.safetensors").layers[SD15], gates.layers[SD15])


def test_sdxl_gates_have_ldm_names(tmp_path: Path):
    gates = GateFile(gates_of(SDXL), ("face", "hand"))
    save_gates(gates, tmp_path / "g.safetensors", "official")
    assert all(
        key.startswith("moe_lora_unet_input_blocks_4_1_")
        for key in read_header(tmp_path / "g.safetensors").entries
    )
    assert same(load_gates(tmp_path / "g.safetensors").layers[SDXL], gates.layers[SDXL])


def test_whole_model_of_official_gates(layers: dict[str, tuple[int, int, bool]], tmp_path: Path):
    paths = [path for path in layers if path.startswith("unet.")]
    save_gates(GateFile(gates_of(*paths), ("face", "hand")), tmp_path / "g.safetensors", "official")
    assert len(read_header(tmp_path / "g.safetensors").entries) == 6 * len(paths) in (6 * 192, 6 * 722)
    found = load_gates(tmp_path / "g.safetensors").layers
    assert set(found) == set(paths)
    assert all(same(found[path], gate) for path, gate in gates_of(*paths).items())


def test_rows_go_where_their_names_say(tmp_path: Path):
    gates = gates_of(SD15)[SD15]
    turned = GateTensors(*(tensor.flip(0) for tensor in gates.present().values()))
    save_gates(GateFile({SD15: turned}, ("hand", "face")), tmp_path / "g.safetensors", "official")
    assert same(load_gates(tmp_path / "g.safetensors").layers[SD15], gates)


@pytest.mark.parametrize("E", [1, 3])
@pytest.mark.parametrize("half", ["both", "local", "global"])
def test_native_file_holds_any_number_and_either_half(half: str, E: int, tmp_path: Path):
    names = ("solo",) if E == 1 else ("a b", "ünï", "c")
    full = gates_of(SD15, "transformer.x", E=E)
    cut = {
        "both": lambda g: g,
        "local": lambda g: GateTensors(g.phi, g.phi_bias),
        "global": lambda g: GateTensors(head=g.head, head_bias=g.head_bias),
    }
    gates = GateFile({path: cut[half](gate) for path, gate in full.items()}, names, {"note": "\x1b"})
    save_gates(gates, tmp_path / "g.safetensors")
    found = load_gates(tmp_path / "g.safetensors")
    assert (found.expert_names, found.metadata, list(found.layers)) == (
        names,
        {"note": "\x1b"},
        list(gates.layers),
    )
    assert all(same(found.layers[path], gate) for path, gate in gates.layers.items())


BASE = "moe_lora_unet_down_blocks_0_attentions_0_proj_in.softmoe."


@pytest.mark.parametrize("name", sorted(key.removeprefix(BASE) for key in official()))
def test_missing_key_is_named(name: str, tmp_path: Path):
    tensors = official() | official("moe_lora_unet_mid_block_attentions_0_proj_in")
    del tensors[BASE + name]
    save_file(tensors, tmp_path / "g.safetensors")
    with pytest.raises(MoleKeyError, match="1 keys are missing") as caught:
        load_gates(tmp_path / "g.safetensors")
    assert f"'{BASE}{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        (f"{BASE}Phi_2.weight", "a gate is"),
        (f"{BASE}foot_scale.weight", "a gate is"),
        ("lora_unet_x.softmoe.Phi_1.weight", "a gate is"),
        ("lora_unet_x.lora_down.weight", "this is an expert"),
        (f"{BASE}Phi_1.weight.extra", "a gate is"),
        ("moe_lora_unet_.softmoe.Phi_1.weight", "a gate is"),
    ],
)
def test_extra_key_is_named(key: str, hint: str, tmp_path: Path):
    save_file(official() | {key: torch.ones(2, K)}, tmp_path / "g.safetensors")
    with pytest.raises(MoleKeyError, match="1 of 7 keys are not gates") as caught:
        load_gates(tmp_path / "g.safetensors")
    assert f"'{key}'" in str(caught.value) and hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "words"),
    [
        ("Phi_1.weight", torch.ones(3, K), MoleShapeError, "phi: expected [2, K], got [3, 5]"),
        ("Phi_1.weight", torch.ones(2), MoleShapeError, "phi: expected [2, K], got [2]"),
        ("Phi_1.bias", torch.ones(3), MoleShapeError, "phi_bias: expected [2], got [3]"),
        (
            "hand_scale.weight",
            torch.ones(1, N + 1),
            MoleShapeError,
            "hand_scale': expected weight [1,N] and bias [1]",
        ),
        ("face_scale.weight", torch.ones(2, N), MoleShapeError, "face_scale': expected weight [1,N]"),
        ("face_scale.bias", torch.ones(2), MoleShapeError, "[1, 4] and [2]"),
        ("face_scale.bias", torch.tensor(1.0), MoleShapeError, "[1, 4] and []"),
        ("Phi_1.bias", torch.tensor([1.0, float("nan")]), MoleValueError, "1 NaN and 0 Inf among 2"),
    ],
)
def test_wrong_tensor_is_named(name: str, tensor: Tensor, error: type[MoleError], words: str, tmp_path: Path):
    save_file(official() | {BASE + name: tensor}, tmp_path / "g.safetensors")
    with pytest.raises(error) as caught:
        load_gates(tmp_path / "g.safetensors")
    assert words in str(caught.value)


def test_two_spellings_of_one_layer(tmp_path: Path):
    tensors = official("moe_lora_unet_input_blocks_4_1_proj_in") | official(
        "moe_lora_unet_down_blocks_1_attentions_0_proj_in"
    )
    save_file(tensors, tmp_path / "g.safetensors")
    with pytest.raises(MoleKeyError, match="name the layer"):
        load_gates(tmp_path / "g.safetensors")


def test_official_dialect_refuses_what_it_cannot_hold(tmp_path: Path):
    cases = [
        (GateFile(gates_of(SD15, E=3), ("a", "b", "c")), MoleValueError, "experts face and hand"),
        (
            GateFile({SD15: GateTensors(torch.ones(2, K), torch.ones(2))}, ("face", "hand")),
            MoleKeyError,
            "both gates of each layer",
        ),
        (GateFile(gates_of("text_encoder.x.y"), ("face", "hand")), MoleKeyError, "layers of the UNet"),
        (GateFile(gates_of("transformer.x.y"), ("face", "hand")), MoleKeyError, "layers of the UNet"),
    ]
    for gates, error, words in cases:
        with pytest.raises(error, match=words):
            save_gates(gates, tmp_path / "g.safetensors", "official")
    with pytest.raises(MoleValueError, match="dialect official or native"):
        save_gates(cases[0][0], tmp_path / "g.safetensors", "kohya")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        (GateTensors(), MoleKeyError),
        (GateTensors(phi=torch.ones(2, K)), MoleKeyError),
        (GateTensors(head_bias=torch.ones(2)), MoleKeyError),
        (GateTensors(torch.ones(1, K), torch.ones(1)), MoleShapeError),
        (GateTensors(torch.ones(2, 0), torch.ones(2)), MoleShapeError),
        (GateTensors(torch.ones(2, K, dtype=torch.int64), torch.ones(2)), MoleTypeError),
    ],
)
def test_gate_tensors_are_checked_wherever_they_come_from(layer: GateTensors, error: type[MoleError]):
    with pytest.raises(error, match="gates of"):
        GateFile({SD15: layer}, ("face", "hand"))


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a.b",), ("",)])
def test_gate_file_names(names: tuple[str, ...]):
    with pytest.raises(MoleValueError):
        GateFile({}, names)


def native(tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    save_gates(GateFile(gates_of(SD15), ("a", "b")), tmp_path / "n.safetensors")
    return read_tensors(tmp_path / "n.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, m: (t | {"stray": torch.ones(1)}, m), MoleKeyError, "neither an expert's nor a gate's"),
        (
            lambda t, m: (t | {f"gate.{SD15}.psi": torch.ones(1)}, m),
            MoleKeyError,
            "neither an expert's nor a gate's",
        ),
        (
            lambda t, m: ({k: v for k, v in t.items() if not k.endswith("phi_bias")}, m),
            MoleKeyError,
            "phi and phi_bias",
        ),
        (lambda t, m: (t, m | {"gates": '{"experts": "ab", "metadata": {}}'}), MoleKeyError, "whose gates"),
        (lambda t, m: (t, m | {"gates": "[1]"}), MoleKeyError, "whose gates"),
        (lambda t, m: (t, m | {"gates": "{"}), MoleFileError, "not JSON"),
        (lambda t, m: (t, {k: v for k, v in m.items() if k != "gates"}), MoleKeyError, "whose gates"),
        (
            lambda t, m: (t, m | {"gates": '{"experts": ["a"], "metadata": {}}'}),
            MoleShapeError,
            "expected [1, K]",
        ),
        (lambda t, m: (t, m | {"format_version": "2"}), MoleFileError, "expected format version 1, got 2"),
        (
            lambda t, m: ({}, {"format": "mole_kernels", "format_version": "1"}),
            MoleKeyError,
            "holds no gates",
        ),
    ],
)
def test_broken_native_file(change, error: type[MoleError], words: str, tmp_path: Path):
    tensors, metadata = change(*native(tmp_path))
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(error) as caught:
        load_gates(tmp_path / "x.safetensors")
    assert words in str(caught.value)
