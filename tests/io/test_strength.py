"""How strong a file's factors are, wherever its writer put it: applied, or refused by name, and never
dropped.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mole_kernels.errors import MoleError, MoleFileError, MoleKeyError, MoleWarning
from mole_kernels.io import load_expert, save_expert
from mole_kernels.io.convert import convert
from mole_kernels.io.merge import compress_file, merge_files
from mole_kernels.patching.apply import patch
from mole_kernels.serving.serve import serve

peft = pytest.importorskip("peft")

R = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.out[1](torch.tanh(self.out[0](self.to_q(x) * self.to_k(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
TARGETS = ["to_q", "to_k", "out.0"]


def saved(folder: Path, **fields: Any) -> tuple[nn.Module, Tensor]:
    """A PEFT adapter on disk, and what PEFT computes with it."""
    base = net()
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(**({"r": R, "target_modules": TARGETS, "init_lora_weights": False} | fields)),
    )
    model.eval().save_pretrained(folder)
    # read again by PEFT: it sorts the patterns when it writes them, and the first that fits counts
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    with torch.no_grad():
        return base, again(X)


def same(out: Tensor, want: Tensor) -> None:
    """A wrong scale moves the output by far more than float32's roundings."""
    assert (out - want).norm() <= 1e-4 * want.norm()


patterns = st.dictionaries(
    st.sampled_from(
        ["to_q", "blocks.1.to_k", "1.to_q", "^blocks.0.to_q", "out.0", "q", "blocks.2.out.0", "locks.1.to_q"]
    ),
    st.integers(1, 9),
    max_size=3,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    alpha=st.integers(1, 32),
    alpha_pattern=patterns,
    rank_pattern=st.dictionaries(
        st.sampled_from(["to_k", "blocks.1.to_q", "^blocks.2.to_q"]), st.integers(1, 5), max_size=2
    ),
    rslora=st.booleans(),
    spelled=st.sampled_from(["folder", "file", "renamed", "index", "bin"]),
)
def test_pefts_settings_give_what_peft_computes(
    tmp_path_factory, alpha, alpha_pattern, rank_pattern, rslora, spelled
):
    folder = tmp_path_factory.mktemp("peft")
    base, want = saved(
        folder, lora_alpha=alpha, alpha_pattern=alpha_pattern, rank_pattern=rank_pattern, use_rslora=rslora
    )
    weights = folder / "adapter_model.safetensors"
    source: Path = folder
    if spelled == "file":
        source = weights
    elif spelled == "renamed":
        source = weights.rename(folder / "face v2.safetensors")
    elif spelled == "index":
        names = dict.fromkeys(load_file(weights), "part-1.safetensors")
        weights.rename(folder / "part-1.safetensors")
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    elif spelled == "bin":
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
        with pytest.raises(MoleFileError, match=r"mole-kernels convert .*adapter_model\.bin"):
            patch(base, {"a": folder})
        source = folder / "out" / "a.safetensors"
        source.parent.mkdir()
        convert(folder / "adapter_model.bin", source, "diffusers")
    patch(base, {"a": source})
    with torch.no_grad():
        same(base(X), want)
    shutil.rmtree(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "all"}, "biases"),
    "lora-only-bias": ({"bias": "lora_only"}, "biases"),
    "modules-to-save": ({"modules_to_save": ["out.1"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base"),
    "olora": ({"init_lora_weights": "olora"}, "changes the base"),
    "regex": ({"alpha_pattern": {r"blocks\.[01].*": 8}}, "regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("tensors_left_out", [False, True])
def test_settings_that_are_not_computed_are_refused_by_name(
    case: str, tensors_left_out: bool, tmp_path: Path
):
    """Also where the tensors that would tell of it were lost."""
    fields, words = REFUSED[case]
    base, _ = saved(tmp_path, lora_alpha=8, **fields)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    if tensors_left_out:
        weights = tmp_path / "adapter_model.safetensors"
        plain = {
            k: t for k, t in load_file(weights).items() if k.endswith((".lora_A.weight", ".lora_B.weight"))
        }
        save_file(plain, weights)
    with pytest.raises(MoleError, match=words if tensors_left_out else ".") as caught:
        patch(base, {"a": tmp_path})
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"peft_type": "VERA", "r": R}, "VERA"),
        ({"r": R + 1, "lora_alpha": 2}, "rank 5"),
        ({"r": R, "lora_alpha": "x"}, "a number as alpha"),
        ({"r": R, "use_new_method": True}, "use_new_method"),
        ({"r": R, "arrow_config": {"a": 1}}, "arrow_config"),
        ([1], "a JSON object"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_right(settings_: Any, words: str, tmp_path: Path):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings_))
    with pytest.raises(MoleError, match=words):
        load_expert(tmp_path)


def pair(path: str, **more: Tensor) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": torch.ones(R, 6), f"{path}.lora_B.weight": torch.ones(6, R)} | {
        f"{path}.{key}": tensor for key, tensor in more.items()
    }


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.r": 4}'}, 2.0),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 4}'}, 2.0),
        ({"adapter_config": '{"lora_alpha": 8, "r": 4, "use_rslora": true}'}, 4.0),
        ({"lora_config": '{"alpha": 2, "rank": 4}'}, 0.5),
        ({"lora_alpha": "8", "r": "4"}, 2.0),
        ({"lora_alpha": "8.0"}, 2.0),
        ({"alpha": "2", "rank": "4"}, 0.5),
        ({"alpha": "2"}, 1.0),
        ({"alpha": "soft", "rank": "4"}, 1.0),
        ({"lora_config": "none of yours"}, 1.0),
    ],
    ids=str,
)
def test_alphas_in_the_header(metadata: dict[str, str], scale: float, tmp_path: Path):
    save_file(pair("blocks.0.to_q"), tmp_path / "x.safetensors", metadata)
    expert = load_expert(tmp_path / "x.safetensors")
    assert expert.scales() == {scale}
    assert ("header" in expert.strength) == (scale != 1.0)


def test_kohyas_header_is_told_of_where_its_alphas_are_lost(tmp_path: Path):
    """kohya's own loader gives a file without alpha tensors scale 1, whatever the header says."""
    header = {"ss_network_alpha": "2.0", "ss_network_dim": "4"}
    save_file(pair("blocks.0.to_q"), tmp_path / "x.safetensors", header)
    with pytest.warns(MoleWarning, match="ss_network_alpha 2 for ss_network_dim 4.*Set 0.5"):
        assert load_expert(tmp_path / "x.safetensors").scales() == {1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_file(pair("blocks.0.to_q", alpha=torch.tensor(2.0)), tmp_path / "x.safetensors", header)
        expert = load_expert(tmp_path / "x.safetensors")
        assert expert.scales() == {0.5}
        # what is written anew says it once
        for dialect in ("diffusers", "kohya"):
            save_expert(expert, tmp_path / "y.safetensors", dialect)
            assert load_expert(tmp_path / "y.safetensors").scales() == {0.5}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "other.safetensors"])
def test_settings_beside_several_files_belong_to_adapter_model_alone(name: str, tmp_path: Path):
    saved(tmp_path, lora_alpha=16)
    shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "other.safetensors")
    if name == "adapter_model.safetensors":
        assert load_expert(tmp_path / name).scales() == {4.0}
        return
    with pytest.raises(MoleKeyError, match="alpha 16 for r 4, and other files"):
        load_expert(tmp_path / name)
    # nothing is at stake where the file has its own, or where alpha is the rank
    save_file(pair("blocks.0.to_q", alpha=torch.tensor(2)), tmp_path / name)
    assert load_expert(tmp_path / name).scales() == {0.5}
    save_file(pair("blocks.0.to_q"), tmp_path / name)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    assert load_expert(tmp_path / name).scales() == {1.0}


def test_alpha_in_the_tensors_and_in_the_settings_must_agree(tmp_path: Path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(pair("blocks.0.to_q", alpha=torch.tensor(2)), path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    assert load_expert(path).scales() == {0.5}
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    with pytest.raises(MoleKeyError, match=r"differ: scale 0.5 by its alpha, 1 by adapter_config\.json"):
        load_expert(path)


def test_layers_that_peft_would_leave_out_are_told(tmp_path: Path):
    save_file(pair("blocks.0.to_q") | pair("blocks.0.to_k"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}')
    with pytest.warns(MoleWarning, match=r"does not target 1 layers.*blocks\.0\.to_k"):
        assert load_expert(tmp_path).scales() == {2.0}


def test_a_folder_stands_wherever_a_file_does(tmp_path: Path):
    """patch, swap, serve, merge, compress and convert carry the strength of a PEFT folder."""
    folder = tmp_path / "face"
    base, want = saved(folder, lora_alpha=16)
    for m in (
        lambda n: patch(n, {"a": folder}),
        lambda n: patch(n, {"a": pair_file(tmp_path)}).swap("a", folder),
    ):
        model = copy.deepcopy(base)
        m(model)
        with torch.no_grad():
            same(model(X), want)
    model = copy.deepcopy(base)
    served = serve(model, {"a": folder}, capacity=1)
    served.assign(["a"])
    with torch.no_grad():
        same(model(X[None])[0], want)
    expert = load_expert(folder)
    merge_files([folder, folder], tmp_path / "m.safetensors")
    compress_file(folder, tmp_path / "c.safetensors", rank=R)
    convert(folder, tmp_path / "v.safetensors", "diffusers")
    for name in "mcv":
        again = load_expert(tmp_path / f"{name}.safetensors")
        for path, layer in expert.layers.items():
            torch.testing.assert_close(again.layers[path].delta(), layer.delta(), rtol=1e-5, atol=1e-5)


def pair_file(folder: Path) -> Path:
    save_file(
        {
            f"blocks.{i}.{name}.lora_{half}.weight": torch.zeros(*shape)
            for i in range(3)
            for name, n in (("to_q", 6), ("to_k", 6), ("out.0", 8))
            for half, shape in (("A", (R, 6)), ("B", (n, R)))
        },
        folder / "zero.safetensors",
    )
    return folder / "zero.safetensors"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "a folder without a safetensors file"),
        (["a.safetensors", "b.safetensors"], "holds 2 files: a.safetensors, b.safetensors"),
        (["adapter_model.bin"], "mole-kernels convert"),
        (["x/adapter_config.json", "y/adapter_config.json"], "holds x, y"),
    ],
    ids=str,
)
def test_folders_that_hold_no_one_adapter(files: list[str], words: str, tmp_path: Path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(MoleFileError, match=words):
        load_expert(tmp_path)


def test_a_folder_of_one_named_adapter(tmp_path: Path):
    """PEFT saves every adapter but the first in a folder of its name."""
    saved(tmp_path / "all" / "face", lora_alpha=8)
    assert load_expert(tmp_path / "all").scales() == {2.0}
