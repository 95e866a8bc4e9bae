"""Merging and compressing from file to file: the results of merging in memory, the memory of a layer, nothing
left behind.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleShapeError, MoleValueError, MoleWarning
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.compress import compress
from mole_kernels.experts.compress_spectrum import layer_spectra
from mole_kernels.experts.lazy import LazyLayers, layer_size
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.merge import merge
from mole_kernels.io import GateFile, GateTensors, load_expert, save_bank, save_expert
from mole_kernels.io.merge import compress_file, merge_files, spectra_of_file
from mole_kernels.io.stream import open_experts

BLOCK = "unet.down_blocks.0.attentions.0"
PATHS = {
    f"{BLOCK}.proj_in": (32, 32, True),
    f"{BLOCK}.transformer_blocks.0.attn1.to_q": (32, 32, False),
    f"{BLOCK}.transformer_blocks.0.attn2.to_k": (32, 48, False),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (64, 16, False),
}


def expert(seed: int, rank: int = 4, scale: float = 0.5, dtype: torch.dtype = torch.float16) -> Expert:
    draw = torch.Generator().manual_seed(seed)
    layers = {
        path: LowRank(
            torch.randn(rank, k, generator=draw).to(dtype),
            torch.randn(n, rank, generator=draw).to(dtype),
            scale,
            conv,
        )
        for path, (n, k, conv) in PATHS.items()
    }
    return Expert(layers)


def same(one: Expert, other: Expert) -> None:
    assert set(one.layers) == set(other.layers)
    for path, layer in one.layers.items():
        twin = other.layers[path]
        assert (layer.rank, layer.conv, layer.up.dtype) == (twin.rank, twin.conv, twin.up.dtype)
        assert layer.scale == pytest.approx(twin.scale, rel=1e-12)
        assert torch.equal(layer.down, twin.down) and torch.equal(layer.up, twin.up)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "counting.safetensors", tmp_path / "fairy.v2.safetensors"]
    save_expert(expert(0), found[0], "kohya")
    save_expert(expert(1, rank=6), found[1], "diffusers")
    return found


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("mode", ["delta_mean", "svd"])
def test_as_in_memory_whatever_the_dialects(mode: str, to: str, files: list[Path], tmp_path: Path):
    out, heard = tmp_path / "out.safetensors", []
    made = merge_files(files, out, mode=mode, to=to, progress=lambda *said: heard.append(said))
    assert made.weights == {"counting": 0.5, "fairy_v2": 0.5}
    same(load_expert(out), merge({"a": load_expert(files[0]), "b": load_expert(files[1])}, mode=mode))
    assert [said[:2] for said in heard] == [(i, 4) for i in range(1, 5)] and {
        said[2] for said in heard
    } == set(PATHS)
    assert load_expert(out).dialect == to
    assert load_expert(out).metadata["mole_kernels"] == f"{mode} of 0.5 counting, 0.5 fairy_v2"


def test_the_dialect_of_the_result(files: list[Path], tmp_path: Path):
    out = tmp_path / "out.safetensors"
    merge_files([files[0], files[0]], out)
    assert load_expert(out).dialect == "kohya"
    merge_files(files, out)
    assert load_expert(out).dialect == "diffusers"


def test_diffusers_and_peft_read_the_scale(files: list[Path], tmp_path: Path):
    """delta_mean keeps the factors' bits; 1/T is in the alpha that the metadata give."""
    from diffusers import StableDiffusionPipeline

    merge_files([files[1], files[1]], tmp_path / "out.safetensors")
    state, metadata = StableDiffusionPipeline.lora_state_dict(
        tmp_path / "out.safetensors", return_lora_metadata=True
    )[::2]
    assert metadata["unet.lora_alpha"] / metadata["unet.r"] == 0.25 and metadata["unet.r"] == 12
    assert len(state) == 2 * len(PATHS)


def test_single_files_of_ours(files: list[Path], tmp_path: Path):
    bank, out = tmp_path / "bank.safetensors", tmp_path / "out.safetensors"
    gates = GateFile({f"{BLOCK}.proj_in": GateTensors(torch.ones(2, 32), torch.ones(2))}, ("a", "b"))
    save_bank(ExpertBank({"a": expert(0), "b": expert(1)}), bank, gates)
    with pytest.warns(MoleWarning, match="its gates are left out"):
        assert merge_files([bank], out).weights == {"a": 0.5, "b": 0.5}
    same(load_expert(out), merge({"a": expert(0), "b": expert(1)}))
    with pytest.warns(MoleWarning):
        assert list(merge_files([bank, bank, files[0]], out, [1, 2, 3, 4, 5]).weights) == [
            "a",
            "b",
            "a-2",
            "b-2",
            "counting",
        ]
    with pytest.warns(MoleWarning):
        compress_file(bank, out, rank=2, expert="b")
    same(load_expert(out), compress(expert(1), rank=2).result)
    for name in (None, "c"):
        with pytest.warns(MoleWarning), pytest.raises(MoleKeyError, match="--expert as one of a, b"):
            compress_file(bank, out, rank=2, expert=name)


def test_compress_and_spectrum_as_in_memory(files: list[Path], tmp_path: Path):
    out = tmp_path / "out.safetensors"
    report = compress_file(files[1], out, energy=0.8)
    made, said = compress(load_expert(files[1]), energy=0.8)
    same(load_expert(out), made)
    assert report == said and any(layer.rank_after < 6 for layer in report.layers)
    assert compress_file(files[1], None, energy=0.8) == said
    found = spectra_of_file(files[1])
    assert found == layer_spectra(load_expert(files[1]).layers) and len(found) == 4


def alive() -> int:
    """Bytes of all CPU tensors that Python still holds."""
    tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_only_a_layer_is_held_at_a_time(tmp_path: Path):
    layers = {
        f"unet.down_blocks.0.attentions.{i}.proj_in": LowRank(torch.ones(8, 1000), torch.ones(1000, 8))
        for i in range(8)
    }
    one = 4 * 8 * 2000
    for name in "ab":
        save_expert(Expert(layers), tmp_path / f"{name}.safetensors")
    del layers
    gc.collect()
    before, most = alive(), []
    merge_files(
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
        tmp_path / "out.safetensors",
        # looking at every object takes its time
        progress=lambda i, *_: most.append(alive() - before) if i in (4, 8) else None,
    )
    # what was read of both, the result, and its parts on their way out; eight layers would be twenty-four
    assert max(most) <= 6 * one and len(most) == 2


def test_lazy_layers_know_their_sizes_unread(files: list[Path]):
    with open_experts(files[0]) as found:
        (lazy,) = found.values()
        assert isinstance(lazy.layers, LazyLayers) and len(lazy.layers) == 4
        assert {path: layer_size(lazy.layers, path) for path in lazy.layers} == {
            path: (n, k, 4, torch.float16) for path, (n, k, _) in PATHS.items()
        }
        assert layer_size(load_expert(files[0]).layers, f"{BLOCK}.proj_in") == (32, 32, 4, torch.float16)
        assert "nothing" not in lazy.layers and lazy.layers.get("nothing") is None
        same(Expert(dict(lazy.layers)), load_expert(files[0]))


def unchanged(folder: Path, before: dict[str, bytes]) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def snapshot(folder: Path) -> dict[str, bytes]:
    (folder / "out.safetensors").write_bytes(b"old")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def interruptible():
    """Python's own handler: a job in the background of a shell inherits that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("what", ["merge", "compress"])
def test_76_ctrl_c_and_a_full_disk_leave_the_old_file(
    what: str, files: list[Path], tmp_path: Path, interruptible: None
):
    before, out = snapshot(tmp_path), tmp_path / "out.safetensors"

    def run(progress=None) -> None:
        if what == "merge":
            merge_files(files, out, progress=progress)
        else:
            compress_file(files[0], out, rank=3, progress=progress)

    for stop_at in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(
                lambda i, n, path, stop_at=stop_at: (
                    signal.raise_signal(signal.SIGINT) if i == stop_at else None
                )
            )
        unchanged(tmp_path, before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(MoleFileError, match="could not be written"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    unchanged(tmp_path, before)


def test_the_output_may_not_be_an_input(files: list[Path], tmp_path: Path):
    (tmp_path / "link.safetensors").symlink_to(files[0])
    before = snapshot(tmp_path)
    for out in (files[1], tmp_path / "link.safetensors", tmp_path / "." / files[0].name):
        with pytest.raises(MoleValueError, match="the output is one of the inputs"):
            merge_files(files, out)
    with pytest.raises(MoleValueError, match="the output is one of the inputs"):
        compress_file(files[0], files[0], rank=1)
    unchanged(tmp_path, before)


def test_41_nan_names_file_and_layer(files: list[Path], tmp_path: Path):
    bad = expert(2)
    list(bad.layers.values())[2].up[3, 1] = torch.nan
    save_expert(bad, tmp_path / "bad.safetensors")
    before = snapshot(tmp_path)
    for run in (
        lambda out: merge_files([files[0], tmp_path / "bad.safetensors"], out),
        lambda out: compress_file(tmp_path / "bad.safetensors", out, rank=1),
    ):
        with pytest.raises(
            MoleValueError, match=r"bad\.safetensors, .*attn2\.to_k, B \(up\): 1 NaN and 0 Inf"
        ):
            run(tmp_path / "out.safetensors")
        unchanged(tmp_path, before)


def test_other_bases_and_other_refusals_come_before_any_data(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wide = {
        path: LowRank(layer.down.repeat(1, 2), layer.up, 1.0, layer.conv)
        for path, layer in expert(2).layers.items()
    }
    other, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    save_expert(Expert(wide), other)
    before = snapshot(tmp_path)
    monkeypatch.setattr(
        "mole_kernels.files.reader.SafetensorsFile._read", lambda *_: pytest.fail("data were read")
    )
    with pytest.raises(
        MoleShapeError, match=rf"4 of 4 layers .*{BLOCK}\.proj_in \(counting 32x32, other 32x64\)"
    ):
        merge_files([files[0], other], out)
    with pytest.raises(MoleShapeError, match="expected experts of one rank, got counting 4, fairy_v2 6"):
        merge_files(files, out, mode="linear")
    with pytest.raises(MoleValueError, match="expected one of delta_mean"):
        merge_files(files, out, mode="mean")
    with pytest.raises(MoleValueError, match="diffusers or kohya"):
        merge_files(files, out, to="ldm")  # type: ignore[arg-type]
    with pytest.raises(MoleFileError, match="no folder"):
        merge_files(files, tmp_path / "none" / "out.safetensors")
    with pytest.raises(MoleFileError, match="got a folder"):
        merge_files(files, tmp_path)
    with pytest.raises(MoleFileError, match="no such file"):
        merge_files([files[0], tmp_path / "gone.safetensors"], out)
    with pytest.raises(MoleValueError, match="exactly one"):
        compress_file(files[0], out)
    with pytest.raises(MoleValueError, match="at least one expert"):
        merge_files([], out)
    unchanged(tmp_path, before)


def test_a_hole_in_the_keys_is_found_at_once(tmp_path: Path):
    from mole_kernels.io import atomic_save

    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    key = f"{BLOCK}.proj_in.lora_"
    cases = [
        ({}, MoleKeyError, "holds no tensors"),
        ({f"{key}A.weight": torch.ones(2, 3)}, MoleKeyError, r"have no B \(up\)"),
        (
            {f"{key}A.weight": torch.ones(2, 3), f"{key}B.weight": torch.ones(4, 3)},
            MoleShapeError,
            "of one rank",
        ),
        (
            {f"{key}A.weight": torch.ones(2, 3, 3, 3), f"{key}B.weight": torch.ones(4, 2, 3, 3)},
            MoleShapeError,
            "or a convolution",
        ),
        (
            {f"{key}A.weight": torch.ones(0, 3), f"{key}B.weight": torch.ones(4, 0)},
            MoleShapeError,
            "of one rank",
        ),
        ({"unet.x.dora_scale": torch.ones(2)}, MoleKeyError, r"have no A \(down\)"),
    ]
    for tensors, error, words in cases:
        atomic_save(tensors, path)
        with pytest.raises(error, match=words):
            merge_files([path], out)
        assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_flat_kohya_name_is_not_written_as_diffusers(files: list[Path], tmp_path: Path):
    layers = {"unet.some_unknown_block": LowRank(torch.ones(2, 3), torch.ones(4, 2))}
    save_expert(Expert(layers), tmp_path / "flat.safetensors", "kohya")
    before = snapshot(tmp_path)
    both = [tmp_path / "flat.safetensors", files[1]]
    with pytest.raises(MoleKeyError, match=r"its dialect is not known.*\n.*--pipeline FluxPipeline"):
        merge_files(both, tmp_path / "out.safetensors")
    with pytest.raises(MoleKeyError, match=r"known by a flat name only.*\n.*--pipeline"):
        merge_files(both, tmp_path / "out.safetensors", pipeline=None)
    unchanged(tmp_path, before)
    merge_files([tmp_path / "flat.safetensors", files[1]], tmp_path / "out.safetensors", to="kohya")
    assert len(load_expert(tmp_path / "out.safetensors").layers) == 5
