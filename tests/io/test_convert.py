"""From every dialect into every other: nothing is lost, and what cannot be said in a dialect is refused."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import (
    GateFile,
    GateTensors,
    load_bank,
    load_expert,
    load_gates,
    read_header,
    read_tensors,
    save_bank,
    save_expert,
    save_gates,
)
from mole_kernels.io.convert import convert, kind_of

PATHS = [
    "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0",
    "unet.mid_block.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
]


def expert() -> Expert:
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for i, path in enumerate(PATHS):
        layers[path] = LowRank(
            torch.randn(2, 5, generator=draw),
            torch.randn(4, 2, generator=draw),
            0.25 * (i + 1),
            conv="proj_in" in path,
        )
    return Expert(layers, metadata={"ss_output_name": "x"})


def gates() -> GateFile:
    layers = {
        path: GateTensors(torch.randn(2, 5), torch.randn(2), torch.randn(2, 4), torch.randn(2))
        for path in PATHS[:2]
    }
    return GateFile(layers, ("face", "hand"))


def same(found: Expert, truth: Expert) -> None:
    assert set(found.layers) == set(truth.layers)
    for path, layer in truth.layers.items():
        other = found.layers[path]
        # kohya's files hold one alpha: the rest of a scale lies in B, here a power of two
        assert torch.equal(other.down, layer.down) and other.conv == layer.conv, path
        assert torch.equal(other.scale * other.up, layer.scale * layer.up), path


@pytest.mark.parametrize("to", ["diffusers", "kohya", "native"])
@pytest.mark.parametrize("start", ["diffusers", "kohya", "native"])
def test_every_expert_dialect_into_every_other(start: str, to: str, tmp_path: Path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    if start == "native":
        save_bank(ExpertBank({"x": expert()}), source)
    else:
        save_expert(expert(), source, start)  # type: ignore[arg-type]
    done = convert(source, target, to)  # type: ignore[arg-type]
    assert list(done.written) == [str(target)]
    assert kind_of(target) == ("bank" if to == "native" else "expert")
    same(load_expert(target), expert())


@pytest.mark.parametrize("start", ["official", "native"])
@pytest.mark.parametrize("to", ["official", "native"])
def test_gates_both_ways(start: str, to: str, tmp_path: Path):
    made = gates()
    save_gates(made, tmp_path / "a.safetensors", start)  # type: ignore[arg-type]
    assert kind_of(tmp_path / "a.safetensors") == "gates"
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to)  # type: ignore[arg-type]
    found = load_gates(tmp_path / "b.safetensors")
    for path, layer in made.layers.items():
        assert all(
            torch.equal(found.layers[path].present()[name], tensor)
            for name, tensor in layer.present().items()
        )


def test_single_file_with_gates(tmp_path: Path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_bank(ExpertBank({"hand": expert(), "face": expert()}), source, gates())
    convert(source, target, "kohya", expert="hand")
    same(load_expert(target), expert())
    convert(source, target, "official")
    assert len(read_header(target).entries) == 12
    convert(source, target, "native", dtype=torch.bfloat16)
    bank, found = load_bank(target)
    assert bank.names == ("hand", "face") and found is not None
    assert {layer.down.dtype for layer in bank.experts["hand"].layers.values()} == {torch.bfloat16}
    with pytest.raises(MoleKeyError, match="--expert as one of hand, face"):
        convert(source, target, "diffusers")
    with pytest.raises(MoleKeyError, match="got foot"):
        convert(source, target, "diffusers", expert="foot")


def test_name_of_a_new_single_file(tmp_path: Path):
    save_expert(expert(), tmp_path / "my.face v2.safetensors")
    convert(tmp_path / "my.face v2.safetensors", tmp_path / "b.safetensors", "native")
    assert ExpertBank.load(tmp_path / "b.safetensors").names == ("my_face v2",)
    convert(tmp_path / "my.face v2.safetensors", tmp_path / "b.safetensors", "native", expert="face")
    assert ExpertBank.load(tmp_path / "b.safetensors").names == ("face",)


def test_what_makes_no_sense_is_refused(tmp_path: Path):
    save_expert(expert(), tmp_path / "e.safetensors")
    save_gates(gates(), tmp_path / "g.safetensors")
    save_bank(ExpertBank({"x": expert()}), tmp_path / "b.safetensors")
    target = tmp_path / "target.safetensors"
    for source, to, words in (
        ("e", "official", "is an expert"),
        ("g", "kohya", "is a gate file"),
        ("b", "official", "holds no gates"),
    ):
        with pytest.raises(MoleKeyError, match=words):
            convert(tmp_path / f"{source}.safetensors", target, to)  # type: ignore[arg-type]
    with pytest.raises(MoleValueError, match="one of diffusers"):
        convert(tmp_path / "e.safetensors", target, "peft")  # type: ignore[arg-type]
    big = Expert({"unet.a.b": LowRank(torch.full((1, 1), 1e5), torch.ones(1, 1))})
    save_expert(big, tmp_path / "big.safetensors")
    with pytest.raises(MoleValueError, match="100000 overflows"):
        convert(tmp_path / "big.safetensors", target, "kohya", dtype=torch.float16)
    assert not target.exists()


def mix_of_show(research: bool, embeddings: bool = True) -> dict:
    down, up = (
        ("_lora.down.weight", "_lora.up.weight") if research else (".lora_down.weight", ".lora_up.weight")
    )
    unet, text = (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "text_model.encoder.layers.0.self_attn.q_proj",
    )
    params = {
        "unet": {unet + down: torch.ones(4, 5), unet + up: torch.ones(3, 4)},
        "text_encoder": {text + down: torch.ones(4, 5), text + up: torch.ones(3, 4)},
    }
    return {
        "params": params | ({"new_concept_embedding": {"<potter1>": torch.ones(16, 8)}} if embeddings else {})
    }


@pytest.mark.parametrize("research", [False, True], ids=["main", "research"])
@pytest.mark.parametrize("to", ["diffusers", "kohya", "native"])
def test_mix_of_show_pth(to: str, research: bool, tmp_path: Path):
    torch.save(mix_of_show(research), tmp_path / "potter.pth")
    done = convert(tmp_path / "potter.pth", tmp_path / "potter.safetensors", to, alpha=0.7)  # type: ignore[arg-type]
    found = load_expert(tmp_path / "potter.safetensors")
    assert set(found.layers) == {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    }
    assert all(layer.scale == pytest.approx(0.7, rel=1e-7) for layer in found.layers.values())
    beside = tmp_path / "potter.embeddings.safetensors"
    assert list(done.written) == [str(tmp_path / "potter.safetensors"), str(beside)]
    assert read_tensors(beside)[0]["<potter1>"].shape == (16, 8)


def test_mix_of_show_without_embeddings_writes_one_file(tmp_path: Path):
    torch.save(mix_of_show(False, embeddings=False)["params"], tmp_path / "p.pth")
    convert(tmp_path / "p.pth", tmp_path / "p.safetensors", "diffusers")
    assert sorted(os.listdir(tmp_path)) == ["p.pth", "p.safetensors"]
    assert load_expert(tmp_path / "p.safetensors").scales() == {1.0}


class Exploding:
    def __reduce__(self):
        return (sys.exit, (77,))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            lambda path: torch.save({"params": {"unet": Exploding()}}, path), id="24-code-in-torch-zip"
        ),
        pytest.param(
            lambda path: path.write_bytes(pickle.dumps({"params": Exploding()})), id="24-code-in-pickle"
        ),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"PK\x03\x04 and no more"), id="broken-zip"),
        pytest.param(lambda path: path.write_bytes(bytes(1000)), id="zeros"),
        pytest.param(lambda path: torch.save([torch.ones(1)], path), id="list"),
        pytest.param(lambda path: torch.save({"state_dict": {}}, path), id="other-checkpoint"),
        pytest.param(lambda path: torch.save({"params": {"unet": {"a": 1}}}, path), id="not-tensors"),
        pytest.param(lambda path: torch.save({"params": {"unet": {}, "extra": {}}}, path), id="extra-part"),
    ],
)
def test_25_pth_that_is_not_mix_of_show(content, tmp_path: Path):
    content(tmp_path / "x.pth")
    with pytest.raises(MoleFileError) as caught:
        convert(tmp_path / "x.pth", tmp_path / "y.safetensors", "diffusers")
    assert str(tmp_path / "x.pth") in str(caught.value)
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert not (tmp_path / "y.safetensors").exists()


def test_26_pth_fifo_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(MoleFileError, match="a FIFO"):
        convert(tmp_path / "x.pth", tmp_path / "y.safetensors", "diffusers")
