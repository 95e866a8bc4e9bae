"""Every popular model, its text encoders and any module of the user's: patched it computes the summed LoRAs,
removed it is as it was.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleKeyError
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.layers.conv import conv_of
from mole_kernels.modules.scan import mole_targets, scan, sizes
from mole_kernels.patching.apply import patch
from mole_kernels.patching.plan import plan
from tests.denoisers import DENOISERS, ENCODERS, FULL, TARGETS, Model, full_size, pipeline_of, randn
from tests.tiny_models import State, make_expert

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SHAPES = Path(__file__).parents[2] / "benchmarks" / "linear_shapes.json"
BY_ID = {str(model): model for model in DENOISERS}


def merged(model: nn.Module, experts: dict[str, Expert], weights: dict[str, float]) -> nn.Module:
    """The reference: W + Σ w s B A in every layer that an expert names, in float64."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, expert in experts.items():
            for path, layer in expert.layers.items():
                weight = reference.get_submodule(path).weight
                weight += (weights.get(name, 1.0) * layer.delta(torch.float64)).view_as(weight)
    return reference


@pytest.mark.parametrize("case", [*DENOISERS, *ENCODERS], ids=str)
def test_two_loras_on_every_layer_are_their_sum(case: Model):
    model = case.make()
    # T5 and others tie weights: a merged reference would change both owners
    layers = list(scan(model).layers)
    every = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted(layers) == sorted(every) and not scan(model).skipped
    experts = {"a": make_expert(model, layers), "b": make_expert(model, layers[::2], rank=3, seed=1)}
    want = case.run(merged(model, experts, {"b": 0.5}))
    state = State(model, lambda: case.run(model))
    handle = patch(model, experts, scales={"b": 0.5})
    assert len(handle.layers) == len(layers)
    got = case.run(model)
    assert (got - want).norm() <= 1e-9 * want.norm()
    assert (want - state.output).norm() > 0.05 * want.norm()
    handle.remove()
    state.assert_unchanged()


@pytest.mark.parametrize("case", DENOISERS, ids=str)
def test_gates_of_every_kind_run(case: Model):
    """Gates by token and by sample see what each model's layers are given: two dimensions, three, images."""
    model = case.make()
    base = case.run(model)
    experts = {
        "a": make_expert(model, list(scan(model).layers)),
        "b": make_expert(model, list(scan(model).layers), seed=1),
    }
    with patch(model, experts, "mole") as handle:
        gated = case.run(model)
        maps = handle.gate_maps()
    assert torch.isfinite(gated).all() and not torch.equal(gated, base)
    # a layer with a path of its own may be left out of one forward, but most are run
    assert len(maps) > 0.8 * len(handle.layers)
    assert all(m.token is not None and m.sample is not None and m.token.shape[-1] == 2 for m in maps.values())
    assert torch.equal(case.run(model), base)


@pytest.mark.parametrize("case", DENOISERS, ids=str)
def test_a_pipeline_with_its_text_encoders(case: Model):
    """Denoiser and every text encoder in one call, by the names that diffusers' files have."""
    pipe = pipeline_of(case)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, part)
    found = list(scan(pipe).layers)
    assert {path.split(".")[0] for path in found} == {
        name for name in pipe.components if name == part or "text_encoder" in name
    }
    expert = make_expert(pipe, found)
    inner = Expert(
        {
            path.removeprefix(f"{part}."): layer
            for path, layer in expert.layers.items()
            if path.startswith(f"{part}.")
        }
    )
    want = case.run(merged(model, {"e": inner}, {}))
    state = State(model, lambda: case.run(model))
    handle = patch(pipe, {"e": expert})
    assert len(handle.layers) == len(found)
    assert (case.run(model) - want).norm() <= 1e-9 * want.norm()
    handle.remove()
    state.assert_unchanged()
    # a file of the denoiser alone needs no component in its names
    assert len(patch(pipe, {"e": inner}).layers) == len(inner.layers)


def pattern(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


@pytest.mark.parametrize("name", FULL)
def test_the_linear_layers_of_the_full_model(name: str):
    """Names, sizes, biases and counts are those that the benchmarks' shapes were recorded with."""
    said: Counter[tuple] = Counter()
    for row in json.loads(SHAPES.read_text()):
        if row["model"] == name:
            said[row["module_pattern"], row["K"], row["N"], row["bias"]] += row["count"]
    assert said
    found = scan(full_size(name))
    assert not found.skipped
    linear = {path: m for path, m in found.layers.items() if isinstance(m, nn.Linear)}
    assert (
        Counter(
            (pattern(path), m.in_features, m.out_features, m.bias is not None) for path, m in linear.items()
        )
        == said
    )


@pytest.mark.parametrize("name", TARGETS)
def test_the_usual_targets_of_the_full_model(name: str):
    """The count of layers that LoRAs of this model have; a plan finds every one, by dotted and by flat
    name.
    """
    model = full_size(name)
    endings, count = TARGETS[name]
    paths = [
        p
        for p, m in scan(model).layers.items()
        if isinstance(m, nn.Linear) and p.endswith(tuple(f".{e}" for e in endings))
    ]
    assert len(paths) == count
    layers = {}
    for path in paths:
        N, K = sizes(model.get_submodule(path))
        layers[path] = LowRank(torch.empty(4, K, device="meta"), torch.empty(N, 4, device="meta"))
    made = plan(
        model,
        {
            "dotted": Expert(layers),
            "flat": Expert({p.replace(".", "_"): layer for p, layer in layers.items()}),
        },
    )
    assert len(made.layers) == count and made.names == ("dotted", "flat") and not made.unmatched["flat"]


@pytest.mark.parametrize(("name", "count"), [("SD1.5-UNet", 192), ("SDXL-UNet", 722)])
def test_the_papers_targets_of_the_full_model(name: str, count: int):
    assert len(mole_targets(full_size(name))) == count


class Own(nn.Module):
    """A module of the user's own, with a convolution, shared layers and a layer in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleDict(
            {"a": nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU())}
        )
        self.shared = self.blocks["a"]

    def forward(self, x):
        y = self.stem(x).flatten(2).mT
        return self.shared(self.blocks["b"](self.blocks["a"](y)))


def test_any_module_of_the_users():
    torch.manual_seed(0)
    model, x = Own().double(), randn(2, 3, 6, 8)
    state = State(model, lambda: model(x).detach())
    paths = ["stem", "blocks.a", "blocks.b.0"]
    experts = {"e": make_expert(model, paths)}
    want = merged(model, experts, {})(x)
    # the second name of a shared layer will do
    renamed = {path.replace("blocks.a", "shared"): layer for path, layer in experts["e"].layers.items()}
    with patch(model, {"e": Expert(renamed)}) as handle:
        assert list(handle.layers) == paths
        torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-11)
    state.assert_unchanged()


def test_locon_files_are_kept_and_applied(tmp_path: Path):
    """3x3 and strided convolutions of a UNet, from a file and back into one."""
    from mole_kernels.io import load_expert, save_expert

    case = BY_ID["sd15"]
    unet = case.make()
    paths = [p for p, m in scan(unet).layers.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert {
        "conv_in",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
        "mid_block.resnets.0.conv1",
    } <= set(paths)
    expert = make_expert(unet, paths)
    want = case.run(merged(unet, {"e": expert}, {}))
    for dialect in ("diffusers", "kohya"):
        prefixed = Expert({f"unet.{path}": layer for path, layer in expert.layers.items()})
        save_expert(prefixed, tmp_path / f"{dialect}.safetensors", dialect)  # type: ignore[arg-type]
        found = load_expert(tmp_path / f"{dialect}.safetensors")
        assert {layer.conv for layer in found.layers.values()} == {(3, 3)} and set(found.layers) == set(
            prefixed.layers
        )
        with patch(unet, {"e": found}) as handle:
            got = case.run(unet)
            handle.save(tmp_path / "own.safetensors")
        # the file's factors are float32
        assert (got - want).norm() <= 1e-6 * want.norm()
        with patch(unet, tmp_path / "own.safetensors"):
            assert torch.equal(case.run(unet), got)


def locon(unet: nn.Module, seed: int = 0, rank: int = 2) -> Expert:
    """A LoRA on all convolutions of every kernel, and on attention, as LyCORIS trains it."""
    return make_expert(unet, [p for p in scan(unet).layers if "conv" in p or "proj_" in p], rank, seed)


def test_diffusers_loads_our_locon_files_and_agrees(tmp_path: Path):
    peft = pytest.importorskip("peft")
    from mole_kernels.io import save_expert

    pipe = pipeline_of(BY_ID["sd15"])
    expert = locon(pipe.unet)
    save_expert(
        Expert({f"unet.{path}": layer for path, layer in expert.layers.items()}),
        tmp_path / "x.safetensors",
        "kohya",
    )
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="a")
    found = {path: m for path, m in pipe.unet.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert set(found) == set(expert.layers)
    for path, m in found.items():
        torch.testing.assert_close(
            m.get_delta_weight("a").flatten(1).double(), expert.layers[path].delta(torch.float64), msg=path
        )


@pytest.mark.parametrize("mode", ["cat", "svd"])
def test_locon_experts_merge_compress_swap_and_are_served(mode: str, tmp_path: Path):
    """What is made of experts keeps their kernels."""
    from mole_kernels.experts.compress import compress
    from mole_kernels.experts.merge import merge
    from mole_kernels.io.save import save_expert
    from mole_kernels.io.stream import open_experts
    from mole_kernels.serving.serve import serve

    case = BY_ID["sd15"]
    unet = case.make()
    one, two = locon(unet), locon(unet, seed=1)
    both = case.run(merged(unet, {"a": one, "b": two}, {}))
    together = merge({"a": one, "b": two}, {"a": 1.0, "b": 1.0}, mode=mode, rank=4 if mode == "svd" else None)
    assert {p: layer.kernel for p, layer in together.layers.items()} == {
        p: layer.kernel for p, layer in one.layers.items()
    }
    with patch(unet, {"m": together}, allow_large_rank=True):
        assert (case.run(unet) - both).norm() <= 1e-5 * both.norm()
    small, _ = compress(together, rank=4)
    assert {p: layer.conv for p, layer in small.layers.items()} == {
        p: layer.conv for p, layer in one.layers.items()
    }
    alone = case.run(merged(unet, {"b": two}, {}))
    handle = patch(unet, {"a": one})
    handle.swap("a", two)
    assert (case.run(unet) - alone).norm() <= 1e-6 * alone.norm()
    handle.remove()
    base = case.run(unet)
    with serve(unet, {"a": one, "b": two}) as served:
        served.assign(["b", None])
        got = case.run(unet)
    assert (got[0] - alone[0]).norm() <= 1e-6 * alone[0].norm() and (got[1] - base[1]).norm() <= 1e-6 * base[
        1
    ].norm()
    save_expert(one, tmp_path / "one.safetensors")
    with open_experts(tmp_path / "one.safetensors") as found:
        (lazy,) = found.values()
        assert all(
            torch.equal(lazy.layers[p].down, layer.down) and lazy.layers[p].conv == layer.conv
            for p, layer in one.layers.items()
        )


def test_a_convolution_of_another_kernel_is_named():
    unet = BY_ID["sd15"].make()
    conv = unet.get_submodule("conv_in")
    state = State(unet, lambda: torch.zeros(0))
    one = LowRank(torch.zeros(2, 4 * 25), torch.zeros(8, 2), 1.0, (5, 5))
    with pytest.raises(
        Exception,
        match="conv_in: expected factors of a 3x3 convolution, conv_in is one, got factors of a 5x5",
    ) as caught:
        patch(unet, {"e": Expert({"conv_in": one})})
    assert type(caught.value).__name__ == "MoleShapeError" and conv_of(conv) == (3, 3)
    state.assert_unchanged()


# words that files of each family are known by -> layers of such a file
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "flux": (
        "FLUX",
        ["transformer.single_transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"],
    ),
    "flux-kohya": ("FLUX", ["unet.double_blocks_0_img_attn_qkv", "unet.single_blocks_3_linear1"]),
    "flux2": (
        "FLUX.2",
        [
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "transformer.transformer_blocks.0.attn.to_q",
        ],
    ),
    "qwen": (
        "Qwen-Image",
        ["transformer.transformer_blocks.0.img_mlp.net.2", "transformer.transformer_blocks.0.attn.to_q"],
    ),
    "wan": ("Wan", ["transformer.blocks.0.attn1.to_q", "transformer.blocks.0.ffn.net.2"]),
    "z-image": (
        "Z-Image",
        ["transformer.layers.0.attention.to_q", "transformer.noise_refiner.0.attention.to_q"],
    ),
    "sd3": (
        "SD3",
        [
            "transformer.transformer_blocks.0.attn.add_q_proj",
            "transformer.transformer_blocks.0.ff_context.net.2",
        ],
    ),
    "sdxl": ("SDXL UNet", ["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"]),
}
NAMED = {
    "sd15": "Stable Diffusion",
    "sdxl": "SDXL UNet",
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "wan": "Wan",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
}


OTHERS = [
    (here, family)
    for here in NAMED
    for family, (word, _) in FAMILIES.items()
    if not NAMED[here].startswith(word) and (here, family) != ("flux1", "sd3")
]


@pytest.mark.parametrize(("here", "family"), OTHERS)
def test_an_expert_of_another_family_is_named(here: str, family: str):
    """Both are said: what the keys look like, and what this model is; and nothing has changed."""
    word, layers = FAMILIES[family]
    model = BY_ID[here].make()
    state = State(model, lambda: torch.zeros(0))
    expert = Expert(
        {path: LowRank(torch.zeros(1, 2048), torch.zeros(8, 1)) for path in layers},
        source="other.safetensors",
    )
    with pytest.raises(
        MoleKeyError,
        match=rf"(?s)other\.safetensors.*these look like keys of a {word}.*this {type(model).__name__} is a",
    ):
        patch(model, {"e": expert})
    state.assert_unchanged()
