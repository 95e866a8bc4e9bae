"""Files meet layers by any of their spellings, or say why not; every size is checked before anything
happens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mole_kernels.errors import (
    MoleFileError,
    MoleKeyError,
    MoleShapeError,
    MoleStateError,
    MoleTypeError,
    MoleValueError,
    MoleWarning,
)
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank, flatten
from mole_kernels.io.gates import GateFile, GateTensors
from mole_kernels.modules.scan import mole_targets, scan
from mole_kernels.patching.apply import patch
from mole_kernels.patching.plan import plan
from tests.tiny_models import make_expert

PATHS = ["first", "second", "mix"]


def test_layers_experts_and_order(mlp):
    made = plan(
        mlp, {"b": make_expert(mlp, ["mix", "first"]), "a": make_expert(mlp, ["first"], rank=3, seed=1)}
    )
    assert made.names == ("b", "a")
    assert {path: list(layer.factors) for path, layer in made.layers.items()} == {
        "first": ["b", "a"],
        "mix": ["b"],
    }
    assert made.layers["first"].module is mlp.first and made.layers["first"].factors["a"].rank == 3
    assert not made.skipped and made.unmatched == {"b": [], "a": []}


SPELLINGS = {
    "dotted": str,
    "component": lambda path: f"unet.{path}",
    "flat": flatten,
    "component and flat": lambda path: f"unet.{flatten(path)}",
    "base_layer": lambda path: f"{path}.base_layer",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_meets_its_layer(unet, spelling):
    made = plan(unet, {"e": make_expert(unet, rename=SPELLINGS[spelling])})
    assert set(made.layers) == set(mole_targets(unet)) and len(made.layers) == 48


@pytest.mark.parametrize("spelling", ["dotted", "component", "flat", "component and flat"])
def test_every_spelling_meets_a_pipelines_denoiser(pipeline, spelling):
    made = plan(pipeline, {"e": make_expert(pipeline.unet, rename=SPELLINGS[spelling])})
    assert set(made.layers) == set(mole_targets(pipeline))


@pytest.mark.parametrize("level", ["encoder.layers", "text_model.encoder.layers"])
def test_text_encoders_of_old_and_new_transformers(pipeline, level):
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    expert = make_expert(pipeline, [name], rename=lambda path: path.replace("encoder.layers", level))
    assert list(plan(pipeline, {"e": expert}).layers) == [name]


def test_state_dicts_are_read(unet):
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"unet.{path}.lora_A.weight": torch.randn(2, 16),
        f"unet.{path}.lora_B.weight": torch.randn(16, 2),
    }
    assert list(plan(unet, {"e": tensors}).layers) == [path]


def test_31_no_key_matches_is_always_an_error(unet):
    keys = {
        f"transformer.single_transformer_blocks.{i}.attn.to_q": LowRank(torch.zeros(2, 8), torch.zeros(8, 2))
        for i in range(5)
    }
    for strict in (True, False):
        with pytest.raises(MoleKeyError, match="none of its 5 layers") as error:
            plan(unet, {"e": Expert(keys, source="flux.safetensors")}, strict=strict)
        message = str(error.value)
        assert (
            "flux.safetensors" in message
            and "single_transformer_blocks.0.attn.to_q" in message
            and "and 2 more" in message
        )
        assert (
            "FLUX.1 transformer" in message
            and "UNet2DConditionModel" in message
            and "Stable Diffusion" in message
        )


def test_31_sdxl_and_sd1_are_told_apart_by_width(unet):
    keys = {
        "down_blocks.9.attentions.0.transformer_blocks.1.attn2.to_k": LowRank(
            torch.zeros(2, 2048), torch.zeros(640, 2)
        )
    }
    with pytest.raises(MoleKeyError, match="look like keys of a SDXL UNet"):
        plan(unet, {"e": Expert(keys)})


def test_32_some_keys_unmatched(mlp):
    expert = make_expert(mlp, ["first", "second"], rename=lambda path: path.replace("second", "secend"))
    with pytest.raises(
        MoleKeyError, match=r"1 of the 2 layers .* meet no layer: secend \(nearest: second\)"
    ) as error:
        plan(mlp, {"e": expert})
    assert "strict=False" in error.value.hint
    with pytest.warns(MoleWarning, match="secend"):
        made = plan(mlp, {"e": expert}, strict=False)
    assert made.unmatched == {"e": ["secend"]} and list(made.layers) == ["first"]
    assert "secend" in str(made)


def test_32_hostile_keys_are_escaped(mlp):
    expert = make_expert(mlp, ["first", "second"], rename=lambda path: path.replace("second", "\x1b[31mred"))
    with pytest.raises(MoleKeyError) as error:
        plan(mlp, {"e": expert})
    assert "\x1b" not in str(error.value) and "\\x1b" in str(error.value)


def test_a_key_of_an_unpatchable_layer_is_an_error_with_the_reason():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "own": Own(4, 4),
            "conv": nn.Conv2d(4, 4, 3, groups=2),
            "norm": nn.LayerNorm(4),
        }
    )
    factor = LowRank(torch.zeros(1, 4), torch.zeros(4, 1))
    for name, reason in (
        ("own", "Own has a forward of its own"),
        ("conv", "3x3 convolution of 2 groups"),
        ("norm", "LayerNorm"),
    ):
        experts = {"e": Expert({"plain": factor, name: factor})}
        with pytest.raises(MoleKeyError, match=f"{name}: .*{reason}"):
            plan(model, experts)
        with pytest.warns(MoleWarning, match=reason):
            made = plan(model, experts, strict=False)
        assert made.unmatched == {"e": [name]} and reason in made.skipped[name]
    # a layer that no file names is only listed
    made = plan(model, {"e": Expert({"plain": factor})})
    assert list(made.skipped) == ["own", "conv"] and "own: Own has" in str(made)


@pytest.mark.parametrize("side", ["in", "out", "transposed"])
def test_36_sizes_that_do_not_fit(mlp, side):
    K, N = {"in": (7, 10), "out": (6, 9), "transposed": (10, 6)}[side]
    expert = Expert({"first": LowRank(torch.zeros(2, K), torch.zeros(N, 2))}, source="wrong.safetensors")
    with pytest.raises(
        MoleShapeError, match=r"wrong.safetensors.*first: expected down \[R,6\] and up \[10,R\]"
    ) as error:
        plan(mlp, {"e": expert})
    assert f"down [2, {K}]" in str(error.value)


def test_40_rank_above_the_layers_size(mlp):
    with pytest.raises(MoleShapeError, match=r"rank of at most min\(K, N\) = 6 .*, got 7"):
        plan(mlp, {"e": make_expert(mlp, ["first"], rank=7)})
    assert (
        plan(mlp, {"e": make_expert(mlp, ["first"], rank=7)}, allow_large_rank=True)
        .layers["first"]
        .factors["e"]
        .rank
        == 7
    )
    assert plan(mlp, {"e": make_expert(mlp, ["first"], rank=6)}).layers


def test_47_two_keys_for_one_layer(unet):
    path = "mid_block.attentions.0.proj_in"
    factor = LowRank(torch.zeros(2, 16), torch.zeros(16, 2))
    with pytest.raises(MoleKeyError, match=f"named twice: unet.{path} and {path}"):
        plan(unet, {"e": Expert({f"unet.{path}": factor, path: factor})})
    tied = nn.ModuleDict({"a": nn.Linear(4, 4)})
    tied["b"] = tied["a"]
    small = LowRank(torch.zeros(2, 4), torch.zeros(4, 2))
    with pytest.raises(MoleKeyError, match="named twice: a and b are both a"):
        plan(tied, {"e": Expert({"a": small, "b": small})})
    assert list(plan(tied, {"e": Expert({"b": small})}).layers) == ["a"]


def test_50_convolution_factors_on_a_linear_layer(mlp):
    factor = LowRank(torch.zeros(2, 6), torch.zeros(10, 2), conv=True)
    with pytest.raises(MoleShapeError, match=r"first: expected factors of a linear layer.*convolution"):
        plan(mlp, {"e": Expert({"first": factor})})
    # the other way is harmless: a 1x1 convolution is a linear layer at every pixel
    assert plan(mlp, {"e": Expert({"mix": LowRank(torch.zeros(2, 5), torch.zeros(7, 2))})}).layers


def test_51_no_experts(mlp):
    for none in ({}, []):
        with pytest.raises(MoleValueError, match="at least one expert"):
            plan(mlp, none)
    with pytest.raises(MoleKeyError, match="at least one layer, got none"):
        plan(mlp, {"e": Expert({})})


def test_54_names(mlp):
    expert = make_expert(mlp, PATHS)
    for bad in ("", "a.b", "a\nb"):
        with pytest.raises(MoleValueError, match="expert name"):
            plan(mlp, {bad: expert})
    with pytest.raises(MoleTypeError, match="expert name"):
        plan(mlp, {3: expert})
    with pytest.raises(MoleValueError, match="names that differ, got a twice"):
        plan(mlp, [("a", expert), ("a", expert)])
    assert plan(mlp, [("b", expert), ("a", expert)]).names == ("b", "a")


WRONG_EXPERTS = {
    "int": 3,
    "value": {"e": 3},
    "tensors": {"first.lora_A.weight": torch.zeros(2, 6)},
    "list": ["x.safetensors"],
}


@pytest.mark.parametrize("wrong", WRONG_EXPERTS.values(), ids=WRONG_EXPERTS)
def test_experts_of_the_wrong_type(mlp, wrong):
    with pytest.raises(MoleTypeError):
        plan(mlp, wrong)


def test_missing_files(mlp, tmp_path):
    for experts in ({"e": tmp_path / "none.safetensors"}, str(tmp_path / "none.safetensors")):
        with pytest.raises(MoleFileError, match=r"none\.safetensors"):
            plan(mlp, experts)


def test_64_patched_layers_name_their_experts(mlp):
    patch(mlp, {"a": make_expert(mlp, ["first"]), "b": make_expert(mlp, ["first"])})
    with pytest.raises(MoleStateError, match="first already holds the experts a, b") as error:
        plan(mlp, {"c": make_expert(nn.ModuleDict({"first": nn.Linear(6, 10)}))})
    assert "remove()" in error.value.hint
    assert list(plan(mlp, {"c": make_expert(mlp, ["second"])}).layers) == ["second"]


# -- gates
# ---------------------------------------------------------------------------------------------------------------------------


def gate_file(model, names=("a", "b"), paths=PATHS, seed=5) -> GateFile:
    generator = torch.Generator().manual_seed(seed)
    E, layers = len(names), {}
    for path in paths:
        N, K = scan(model).layers[path].weight.shape[:2]
        tensors = [torch.randn(*shape, generator=generator) for shape in ((E, K), (E,), (E, N), (E,))]
        layers[path] = GateTensors(*tensors)
    return GateFile(layers, tuple(names))


@pytest.fixture
def two(mlp) -> dict[str, Expert]:
    return {"a": make_expert(mlp, PATHS), "b": make_expert(mlp, PATHS, seed=1)}


def test_gates_cover_the_layers(mlp, two):
    file = gate_file(mlp)
    made = plan(mlp, two, file)
    assert all(made.layers[path].gates is file.layers[path] for path in PATHS)
    assert "local + global" in str(made)


def test_52_gates_of_other_layers(mlp, two):
    fewer, more = gate_file(mlp, paths=["first"]), gate_file(mlp)
    more = replace(more, layers={**more.layers, "fourth": more.layers["first"]})
    for file, word in (
        (fewer, "2 patched layers have no gates in it: second, mix"),
        (more, "1 of its layers are not patched: fourth"),
    ):
        with pytest.raises(MoleKeyError, match=word):
            plan(mlp, two, file)
        with pytest.warns(MoleWarning, match=word):
            made = plan(mlp, two, file, strict=False)
        assert (made.gates_missing, made.gates_unmatched) in ((["second", "mix"], []), ([], ["fourth"]))
    foreign = GateFile({"fourth": more.layers["first"]}, ("a", "b"))
    for strict in (True, False):
        with pytest.raises(MoleKeyError, match="none of its 1 layers is patched: fourth"):
            plan(mlp, two, foreign, strict=strict)


def test_52_gates_of_other_experts(mlp, two):
    with pytest.raises(MoleKeyError, match="expected gates for the experts a, b, got gates for a, c"):
        plan(mlp, two, gate_file(mlp, ("a", "c")))
    with pytest.raises(MoleKeyError, match="gates experts that are not given: c"):
        plan(mlp, two, gate_file(mlp, ("a", "b", "c")))
    with pytest.warns(MoleWarning, match="not given: c"):
        plan(mlp, two, gate_file(mlp, ("a", "b", "c")), strict=False)


def test_52_gates_of_other_sizes(mlp, two):
    file = gate_file(mlp)
    layer = file.layers["first"]
    wrong = {
        "phi": replace(layer, phi=torch.zeros(2, 7)),
        "head": replace(layer, head=torch.zeros(2, 6)),
    }
    for name, tensors in wrong.items():
        with pytest.raises(MoleShapeError, match=rf"first: expected {name} \[E,.\]"):
            plan(mlp, two, GateFile({**file.layers, "first": tensors}, file.expert_names))


@pytest.mark.parametrize("wrong", [3, ["mole"], torch.zeros(2)], ids=["int", "list", "tensor"])
def test_52_gates_of_the_wrong_type(mlp, two, wrong):
    with pytest.raises(MoleTypeError, match="gates: expected None, a path, a GateFile"):
        plan(mlp, two, wrong)


# -- targets
# -------------------------------------------------------------------------------------------------------------------------


def test_targets_narrow_the_plan(unet):
    expert = make_expert(unet)
    by_ending = plan(unet, {"e": expert}, targets=["attn2.to_k"])
    assert by_ending.layers and all(path.endswith("attn2.to_k") for path in by_ending.layers)
    assert by_ending.skipped["mid_block.attentions.0.proj_in"] == "not among the targets asked for"
    by_call = plan(unet, {"e": expert}, targets=lambda path, module: path.endswith("attn2.to_k"))
    assert list(by_call.layers) == list(by_ending.layers)
    assert len(plan(unet, {"e": expert}, targets=mole_targets(unet)).layers) == 48
    assert list(plan(unet, {"e": expert}, targets=["unet.mid_block.attentions.0.proj_in"]).layers) == [
        "mid_block.attentions.0.proj_in"
    ]


def test_targets_that_name_nothing(mlp):
    expert = make_expert(mlp, ["first"])
    with pytest.raises(MoleKeyError, match="frist is no layer that can be patched") as error:
        plan(mlp, {"e": expert}, targets=["frist"])
    assert "first" in error.value.hint
    with pytest.raises(MoleKeyError, match="none of the layers asked for is in expert 'e'"):
        plan(mlp, {"e": expert}, targets=["second"])
    with pytest.raises(MoleTypeError, match="targets"):
        plan(mlp, {"e": expert}, targets="first")


def test_the_table(mlp):
    bank = ExpertBank({"a": make_expert(mlp, PATHS), "b": make_expert(mlp, ["first"], rank=3)})
    lines = str(plan(mlp, bank, "mole")).splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["first", "6", "→", "10", "a", "(2),", "b", "(3)", "mole", "(fresh)"],
        ["second", "10", "→", "5", "a", "(2)", "mole", "(fresh)"],
        ["mix", "5", "→", "7", "a", "(2)", "mole", "(fresh)"],
    ]
    assert lines[5] == "3 layers, experts: a, b"
