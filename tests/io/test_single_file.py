"""One file for experts and gates: bit for bit, in order, and broken ones refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mole_kernels.errors import MoleError, MoleFileError, MoleKeyError, MoleShapeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import GateFile, GateTensors, load_bank, load_expert, load_gates, read_tensors, save_bank

names = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="."), min_size=1, max_size=8
).filter(str.isprintable)
paths = st.text("abc_.0 é/", min_size=1, max_size=12)


@st.composite
def factors(draw: st.DrawFn) -> LowRank:
    n, k, r = (draw(st.integers(1, 4)) for _ in range(3))
    dtype = draw(
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    )
    scale = draw(st.floats(allow_nan=False, allow_infinity=False))
    return LowRank(torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype), scale, draw(st.booleans()))


@st.composite
def experts(draw: st.DrawFn) -> Expert:
    layers = draw(st.dictionaries(paths, factors(), max_size=4))
    flat = {path.replace(".", "_"): path for path in layers}
    metadata = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
    return Expert(
        {path: layers[path] for path in flat.values()},
        draw(st.sampled_from(["kohya", "memory"])),
        metadata=metadata,
    )


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=st.dictionaries(names, experts(), min_size=1, max_size=3))
def test_round_trip_is_exact(made: dict[str, Expert], tmp_path: Path):
    path = tmp_path / "bank.safetensors"
    save_bank(ExpertBank(made), path)
    found, gates = load_bank(path)
    assert gates is None
    assert found.names == tuple(made)
    for name, expert in made.items():
        other = found.experts[name]
        assert (list(other.layers), other.dialect, other.metadata) == (
            list(expert.layers),
            expert.dialect,
            expert.metadata,
        )
        for key, layer in expert.layers.items():
            assert identical(other.layers[key].down, layer.down) and identical(other.layers[key].up, layer.up)
            assert (other.layers[key].scale, other.layers[key].conv) == (layer.scale, layer.conv)


def bank(*names: str) -> ExpertBank:
    shapes = {"unet.a.b": (4, 5), "unet.c": (3, 2)}
    return ExpertBank.new(
        shapes, names or ("face", "hand"), rank=2, alpha=0.3, generator=torch.Generator().manual_seed(0)
    )


def gates(E: int = 2) -> dict[str, GateTensors]:
    return {"unet.a.b": GateTensors(torch.randn(E, 5), torch.randn(E), torch.randn(E, 4), torch.randn(E))}


def test_experts_and_gates_in_one_file(tmp_path: Path):
    path = tmp_path / "bank.safetensors"
    made = GateFile(gates(), ("hand", "face"), {"step": "30000"})
    save_bank(bank(), path, made)
    found, said = load_bank(path)
    assert found.names == ("face", "hand")
    assert said.expert_names == ("hand", "face") and said.metadata == {"step": "30000"}
    assert torch.equal(said.layers["unet.a.b"].head, made.layers["unet.a.b"].head)
    assert torch.equal(load_gates(path).layers["unet.a.b"].phi, made.layers["unet.a.b"].phi)
    assert ExpertBank.load(path).paths() == ["unet.a.b", "unet.c"]


def test_gates_of_other_experts_are_refused(tmp_path: Path):
    with pytest.raises(MoleKeyError, match="expected gates of the experts face, hand, got face, foot"):
        save_bank(bank(), tmp_path / "x.safetensors", GateFile(gates(), ("face", "foot")))
    assert list(tmp_path.iterdir()) == []


def test_single_expert_is_an_expert_file(tmp_path: Path):
    bank("solo").save(tmp_path / "one.safetensors")
    assert load_expert(tmp_path / "one.safetensors").scales() == {0.15}
    bank().save(tmp_path / "two.safetensors")
    with pytest.raises(MoleKeyError, match="holds 2 experts: face, hand"):
        load_expert(tmp_path / "two.safetensors")


def test_scales_survive_that_decimal_fractions_do_not_hold(tmp_path: Path):
    for scale in (1 / 3, math.pi, 5e-324, 1.7976931348623157e308, -0.1):
        ExpertBank({"x": Expert({"a": LowRank(torch.ones(1, 1), torch.ones(1, 1), scale)})}).save(
            tmp_path / "x.safetensors"
        )
        assert ExpertBank.load(tmp_path / "x.safetensors").layer("a")["x"].scale == scale


def edited(metadata: dict[str, str], **fields: object) -> dict[str, str]:
    """The metadata with fields of the first expert's record changed."""
    records = json.loads(metadata["experts"])
    records[0] |= fields
    return metadata | {"experts": json.dumps(records)}


DOWN = "expert.face.unet.a.b.down"
BROKEN = {
    "not-ours": (lambda t, m: (t, {}), MoleFileError, "is not a mole_kernels file"),
    "version": (
        lambda t, m: (t, m | {"format_version": "2"}),
        MoleFileError,
        "expected format version 1, got 2",
    ),
    "missing-half": (
        lambda t, m: ({k: v for k, v in t.items() if k != DOWN}, m),
        MoleKeyError,
        "lacks half of unet.a.b (no down)",
    ),
    "extra-expert": (
        lambda t, m: (t | {"expert.foot.a.up": torch.ones(1, 1)}, m),
        MoleKeyError,
        "belongs to no expert",
    ),
    "extra-half": (
        lambda t, m: (t | {"expert.face.a.mid": torch.ones(1, 1)}, m),
        MoleKeyError,
        "belongs to no expert",
    ),
    "no-path": (
        lambda t, m: (t | {"expert.face.up": torch.ones(1, 1)}, m),
        MoleKeyError,
        "belongs to no expert",
    ),
    "stray": (
        lambda t, m: (t | {"stray": torch.ones(1)}, m),
        MoleKeyError,
        "the metadata does not say whose gates",
    ),
    "no-records": (
        lambda t, m: (t, {k: v for k, v in m.items() if k != "experts"}),
        MoleKeyError,
        "belongs to no expert",
    ),
    "no-experts": (lambda t, m: ({}, m | {"experts": "[]"}), MoleValueError, "at least one expert"),
    "records-not-json": (lambda t, m: (t, m | {"experts": "{"}), MoleFileError, "not JSON"),
    "records-not-list": (lambda t, m: (t, m | {"experts": "{}"}), MoleFileError, "a list of experts"),
    "records-deep": (
        lambda t, m: (t, m | {"experts": "[" * 50_000 + "]" * 50_000}),
        MoleFileError,
        "nested too deep",
    ),
    "record-field": (lambda t, m: (t, edited(m, extra=1)), MoleFileError, "name, dialect, ranks"),
    "scale-text": (lambda t, m: (t, edited(m, scale="1")), MoleFileError, "name, dialect, ranks"),
    "scale-inf": (
        lambda t, m: (t, edited(m, scale=1) | {"experts": m["experts"].replace("0.15", "1e999")}),
        MoleFileError,
        "name, dialect, ranks",
    ),
    "scale-of-no-layer": (
        lambda t, m: (t, edited(m, scales={"zzz": 1.0})),
        MoleKeyError,
        "names zzz, which has no tensors",
    ),
    "ranks": (lambda t, m: (t, edited(m, ranks=[3])), MoleFileError, "expected ranks [3], got [2]"),
    "two-names": (lambda t, m: (t, edited(m, name="hand")), MoleFileError, "two experts have one name"),
    "bad-name": (lambda t, m: (t, edited(m, name="a.b")), MoleError, "belongs to no expert"),
    "shape": (
        lambda t, m: (t | {DOWN: torch.ones(3, 5)}, m),
        MoleShapeError,
        "unet.a.b: expected A [R,K] and B [N,R] of one rank",
    ),
    "nan": (
        lambda t, m: (t | {DOWN: torch.full((2, 5), float("nan"))}, m),
        MoleValueError,
        "10 NaN and 0 Inf",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused(case: str, tmp_path: Path):
    change, error, words = BROKEN[case]
    bank().save(tmp_path / "good.safetensors")
    tensors, metadata = change(*read_tensors(tmp_path / "good.safetensors"))
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(error) as caught:
        load_bank(tmp_path / "x.safetensors")
    assert words in str(caught.value)
