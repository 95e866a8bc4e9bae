"""One LoRA in every spelling of names, halves and strength: the same ΔW on the same layers, or a refusal."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_kernels.errors import MoleError, MoleKeyError
from mole_kernels.experts.lowrank import canonical_path
from mole_kernels.io import load_expert, save_expert
from mole_kernels.io.dialects.own import (
    OwnLayers,
    classes_with_layers,
    denoisers,
    own_layers_of_classes,
    own_layers_of_model,
)
from mole_kernels.io.stream import open_experts
from mole_kernels.modules.scan import scan, sizes
from mole_kernels.patching.plan import plan
from tests.denoisers import DENOISERS, pipeline_of
from tests.io.dialect_files import FLUX1, FLUX2, WAN, ZIMAGE_FUSED, Names, known_lora

pytest.importorskip("diffusers")

MODELS = {str(model): model for model in DENOISERS}
RANK = 2
PREFIXES = (
    "",
    "COMPONENT.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "lora_unet_",
    "lycoris_",
)
TRANSFORMER_PREFIXES = (
    "lora_transformer_",
    "base_model.model.COMPONENT.",
    "base_model.model.diffusion_model.",
)
ENDINGS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.my-face_2.weight", "lora_B.my-face_2.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
# where the strength stands
STRENGTHS = ("none", "float32", "float16", "int64", "int32", "uint8", "one", "header", "beside", "folder")


@dataclass(frozen=True)
class Spelling:
    """How a tool would write the file."""

    prefix: str
    ending: tuple[str, str]
    strength: str

    def key(self, path: str, component: str) -> str:
        prefix = self.prefix.replace("COMPONENT", component)
        return prefix + (path.replace(".", "_") if prefix.endswith("_") else path)


@functools.cache
def model_of(name: str) -> tuple[nn.Module, Any, dict[str, tuple[Tensor, Tensor]]]:
    """A tiny denoiser, its pipeline, and factors for every third of its linear layers."""
    pipe = pipeline_of(MODELS[name])
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    generator = torch.Generator().manual_seed(0)
    layers = [(path, layer) for path, layer in scan(model).layers.items() if isinstance(layer, nn.Linear)]
    factors = {}
    for path, layer in layers[::3]:
        N, K = sizes(layer)
        factors[path] = (torch.randn(RANK, K, generator=generator), torch.randn(N, RANK, generator=generator))
    return model, pipe, factors


def write(folder: Path, spelling: Spelling, factors: dict, component: str, alpha: int) -> tuple[Any, float]:
    """(what to load, the scale that it says)."""
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in factors.items():
        key = spelling.key(path, component)
        tensors[f"{key}.{spelling.ending[0]}"], tensors[f"{key}.{spelling.ending[1]}"] = down, up
        if spelling.strength in ("float32", "float16", "int64", "int32", "uint8"):
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=getattr(torch, spelling.strength))
        elif spelling.strength == "one":
            tensors[f"{key}.alpha"] = torch.tensor([float(alpha)])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "bias": "none"}
    metadata = {}
    if spelling.strength == "header":
        metadata = {"lora_adapter_metadata": json.dumps({f"{component}.{k}": v for k, v in config.items()})}
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file, metadata)
    (folder / "adapter_config.json").unlink(missing_ok=True)
    if spelling.strength in ("beside", "folder"):
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return (
        folder if spelling.strength == "folder" else file,
        1.0 if spelling.strength == "none" else alpha / RANK,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spelled")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(MODELS)),
    prefix=st.sampled_from((*PREFIXES, *TRANSFORMER_PREFIXES)),
    ending=st.sampled_from(ENDINGS),
    strength=st.sampled_from(STRENGTHS),
    bare=st.booleans(),
    alpha=st.integers(1, 7),
)
def test_own_names_under_every_prefix(folder, name, prefix, ending, strength, bare, alpha):
    """The model's own names are read wherever a tool puts its prefix, and never go through a converter."""
    model, pipe, factors = model_of(name)
    unet = hasattr(pipe, "unet")
    spelling = Spelling(prefix, ending, strength)
    source, scale = write(folder, spelling, factors, "unet" if unet else "transformer", alpha)
    try:
        planned = plan(model if bare else pipe, {"e": source})
    except MoleKeyError:
        # a UNet's names behind a transformer's prefix are no tool's
        assert unet and prefix == "lora_transformer_", spelling
        return
    component = "" if bare else ("unet." if unet else "transformer.")
    assert set(planned.layers) == {f"{component}{path}" for path in factors}
    for path, (down, up) in factors.items():
        factor = planned.layers[f"{component}{path}"].factors["e"]
        assert factor.scale == pytest.approx(scale, rel=1e-6), (path, spelling)
        assert torch.equal(factor.down, down) and torch.equal(factor.up, up), (path, spelling)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([name for name in sorted(MODELS) if name not in ("sd15", "sdxl")]),
    prefix=st.sampled_from((*PREFIXES, *TRANSFORMER_PREFIXES)),
    ending=st.sampled_from(ENDINGS),
    strength=st.sampled_from(STRENGTHS),
)
def test_files_alone_give_every_layer_one_identity(folder, name, prefix, ending, strength):
    """Without a model, too: whole or layer by layer, all spellings of one layer have one identity and one
    scale.
    """
    _, _, factors = model_of(name)
    source, scale = write(folder, Spelling(prefix, ending, strength), factors, "transformer", 3)
    expert = load_expert(source)
    assert {canonical_path(path) for path in expert.layers} == {canonical_path(path) for path in factors}
    assert {round(layer.scale, 6) for layer in expert.layers.values()} == {round(scale, 6)}
    with open_experts(source) as found:
        (lazy,) = found.values()
        assert set(lazy.layers) == set(expert.layers)
        for path, layer in expert.layers.items():
            again = lazy.layers[path]
            assert again.scale == layer.scale and torch.equal(again.up, layer.up)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(MODELS)))
def test_mixed_spellings_in_one_file(folder, data, name):
    """Each layer in a spelling of its own gives the same patch; one layer in two spellings is refused."""
    _, pipe, factors = model_of(name)
    unet = hasattr(pipe, "unet")
    component = "unet" if unet else "transformer"
    prefixes = ("", "COMPONENT.", "base_model.model.", "lora_unet_", "lycoris_") + (
        () if unet else ("diffusion_model.", "lora_transformer_")
    )
    tensors, twice = {}, data.draw(st.booleans(), label="one layer twice")
    spelled = {}
    for path, (down, up) in factors.items():
        spelling = Spelling(data.draw(st.sampled_from(prefixes)), data.draw(st.sampled_from(ENDINGS)), "none")
        spelled[path] = spelling.key(path, component)
        tensors[f"{spelled[path]}.{spelling.ending[0]}"], tensors[f"{spelled[path]}.{spelling.ending[1]}"] = (
            down,
            up,
        )
    if twice:
        path, (down, up) = next(iter(factors.items()))
        prefix = data.draw(st.sampled_from(prefixes))
        other = Spelling(prefix, ENDINGS[0], "none").key(path, component)
        if other == spelled[path]:
            return
        tensors[f"{other}.lora_A.weight"], tensors[f"{other}.lora_B.weight"] = down, up
        with pytest.raises(MoleError, match=r"both name|named twice"):
            plan(pipe, {"e": tensors})
        return
    planned = plan(pipe, {"e": tensors})
    assert set(planned.layers) == {f"{component}.{path}" for path in factors}


FOREIGN_PREFIXES = (
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "base_model.model.diffusion_model.",
    "pipe.dit.",
    "transformer.",
    "lora_unet_",
)
FOREIGN: dict[str, Names] = {
    "flux1": [row for row in FLUX1 if not row[1].endswith("linear1")],
    "flux2": FLUX2,
    "wan": WAN,
    "z-image": ZIMAGE_FUSED,
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(FOREIGN)),
    prefix=st.sampled_from(FOREIGN_PREFIXES),
    ending=st.sampled_from(
        [ending for ending in ENDINGS if "linear" not in ending[0] and "lora." not in ending[0]]
    ),
    strength=st.sampled_from(STRENGTHS),
    bare=st.booleans(),
)
def test_names_of_a_models_own_code_under_every_prefix(folder, name, prefix, ending, strength, bare):
    """What goes to a converter: wrappers, adapter names and strengths are taken off before, whatever they
    are.
    """
    model, pipe, _ = model_of(name)
    modules, layers = known_lora(model, FOREIGN[name], rank=RANK)
    factors = {module: (lora.down, lora.up) for module, lora in modules.items()}
    source, scale = write(folder, Spelling(prefix, ending, strength), factors, "transformer", 3)
    planned = plan(model if bare else pipe, {"e": source})
    component = "" if bare else "transformer."
    assert set(planned.layers) == {f"{component}{path}" for path in layers}
    for path, layer in layers.items():
        factor = planned.layers[f"{component}{path}"].factors["e"]
        assert factor.scale == pytest.approx(scale, rel=1e-6)
        torch.testing.assert_close(factor.delta(torch.float64), scale * layer.delta(torch.float64))


def test_flat_names_of_all_denoisers_are_unambiguous():
    """A flat name means one dotted path, whichever denoiser it is of."""
    dotted: dict[str, str] = {}
    for row in denoisers().values():
        for path in row["layers"]:
            assert dotted.setdefault(path.replace(".", "_"), path) == path


def test_every_layer_of_the_table_is_found_by_both_names():
    for cls, row in denoisers().items():
        own = own_layers_of_classes((cls,))
        for pattern in row["layers"]:
            path = pattern.replace("#", "11")
            assert own.find(path) == own.find(path.replace(".", "_")) == path
            assert cls in classes_with_layers([path])


@given(parts=st.lists(st.sampled_from(["a", "b", "1", "c_d"]), min_size=2, max_size=4))
def test_ambiguous_flat_names_are_refused(parts):
    """Two layers whose flat names are the same are told apart by dots, and never guessed."""
    dotted, flat = ".".join(parts), "_".join(parts)
    half = f"{parts[0]}_{'.'.join(parts[1:])}"
    own = OwnLayers([dotted, half])
    assert own.find(dotted) == dotted and own.find(half) == half
    if dotted != half and "." in dotted and flat not in (dotted, half):
        with pytest.raises(MoleKeyError, match="stands for"):
            own.find(flat)


def test_the_models_at_hand_are_asked_before_the_table():
    """A model configured to have other layers than the table knows has names of its own all the same."""
    model, _, _ = model_of("flux1")
    name = "transformer_blocks.0.attn.to_q"
    expert = load_expert(
        {f"lora_unet_{name.replace('.', '_')}.lora_down.weight": torch.ones(2, 32),
         f"lora_unet_{name.replace('.', '_')}.lora_up.weight": torch.ones(32, 2)},
        pipeline=model,
    )  # fmt: skip
    assert list(expert.layers) == [f"transformer.{name}"]


@pytest.mark.slow
def test_the_table_holds_what_the_installed_diffusers_has():
    from python.tools import own_names

    rows = own_names.table()
    for cls, row in rows.items():
        assert set(row["layers"]) <= set(denoisers()[cls]["layers"]), cls


def test_saved_again_it_is_the_same(tmp_path: Path):
    """Names that came flat are written with dots, under the denoiser's component."""
    _, _, factors = model_of("qwen-image")
    source, _ = write(tmp_path, Spelling("lora_unet_", ENDINGS[3], "int64"), factors, "transformer", 3)
    expert = load_expert(source)
    save_expert(expert, tmp_path / "again.safetensors", "diffusers")
    (tmp_path / "adapter_model.safetensors").unlink()
    again = load_expert(tmp_path / "again.safetensors")
    assert set(again.layers) == {f"transformer.{path}" for path in factors}
    assert {layer.scale for layer in again.layers.values()} == {1.5}


def test_containers_do_not_make_a_flat_name_ambiguous():
    """Only layers count: a block `a.b` beside a layer `a_b` is no second meaning; two layers are."""
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Sequential(nn.ReLU())}), "a_b": layer})
    assert own_layers_of_model(model).find("a_b") == "a_b"
    # the flat name is also a dotted name here, which wins; behind one more block it is not
    two = nn.ModuleDict({"c": nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a_b": layer})})
    with pytest.raises(MoleKeyError, match="stands for"):
        own_layers_of_model(two).find("c_a_b")
