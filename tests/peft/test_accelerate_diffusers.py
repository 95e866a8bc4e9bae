"""What users do to a diffusers model with LoRAs, done to an accelerated one: every step gives what the same
model without us gives.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mole_kernels as mk

pytest.importorskip("peft")
pytest.importorskip("diffusers")

from tests.peft_models import FAMILIES, Pair, lora_config
from tests.tiny_models import tiny_pipeline

DISABLED, MERGED = "adapters are disabled", "adapters are merged into the weight"
VARIANT = "a LoRA variant (DoRA and its like)"
BASE_HOOKS = "hooks on the base layer"


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_both_adapters_every_layer(pair: Pair):
    y = pair.assert_same()
    assert (y - pair.base).norm() > 1e-2 * pair.base.norm()
    assert pair.counts() == (pair.number, {})
    assert not pair.handle.skipped


def test_weights_and_choice_of_adapters(pair: Pair):
    seen = [pair.assert_same()]
    for names, weights in (
        (["a"], [0.5]),
        (["a"], [2.0]),
        (["b"], None),
        (["b", "a"], [0.5, -1.0]),
        (["a", "b"], [0.0, 1.0]),
    ):
        for model in pair.both:
            model.set_adapters(names, weights)
        seen.append(pair.assert_same())
    for model in pair.both:
        model.delete_adapters("b")
        model.set_adapters(["a"], [1.0])
    seen.append(pair.assert_same())
    # ["b"] at its default weight is ["a", "b"] at 0 and 1; all others differ
    distinct = {tuple((y * 1e3).round().flatten().tolist()[:64]) for y in seen}
    assert len(distinct) == len(seen) - 1
    assert pair.counts()[1] == {}


def test_disable_enable(pair: Pair):
    before = pair.assert_same()
    for model in pair.both:
        model.disable_lora()
    assert torch.equal(pair.assert_same(), pair.base)
    assert pair.counts()[1] == {DISABLED: pair.number}
    for model in pair.both:
        model.enable_lora()
    assert torch.equal(pair.assert_same(), before)


def test_fuse_unfuse(pair: Pair):
    before = pair.assert_same()
    for model in pair.both:
        model.fuse_lora(adapter_names=["a", "b"])
    torch.testing.assert_close(pair.assert_same(), before, rtol=1e-3, atol=1e-4)
    assert pair.counts()[1] == {MERGED: pair.number}
    for model in pair.both:
        model.unfuse_lora()
    torch.testing.assert_close(pair.assert_same(), before, rtol=1e-3, atol=1e-4)
    assert pair.counts()[1] == {}


def test_safe_fusing_still_finds_broken_weights(pair: Pair):
    for model in pair.both:
        for name, parameter in model.named_parameters():
            if "lora_A.a" in name:
                parameter.data.fill_(float("inf"))
        with pytest.raises(ValueError):
            model.fuse_lora(safe_fusing=True, adapter_names=["a"])
    theirs, ours = pair.outputs()
    assert torch.isnan(theirs).any() and torch.equal(torch.isnan(theirs), torch.isnan(ours))


@pytest.mark.parametrize("low", [False, True])
def test_save_unload_load(pair: Pair, tmp_path: Path, low: bool):
    files = []
    for i, model in enumerate(pair.both):
        model.set_adapters(["a"], [1.0])
        model.save_lora_adapter(tmp_path / str(i), adapter_name="a")
        files.append(_saved(tmp_path / str(i)))
    before = pair.assert_same()
    assert files[0].keys() == files[1].keys() and all(
        torch.equal(t, files[1][name]) for name, t in files[0].items()
    )
    for model in pair.both:
        model.unload_lora()
    assert torch.equal(pair.assert_same(), pair.base)
    for model in pair.both:
        model.load_lora_adapter(
            tmp_path / "1", prefix=None, adapter_name="again", use_safetensors=True, low_cpu_mem_usage=low
        )
    # unloading threw the accelerated layers away; the new ones want acceleration of their own
    pair.counts()
    handle = mk.accelerate(pair.fast)
    torch.testing.assert_close(pair.assert_same(), before, rtol=1e-5, atol=1e-6)
    assert pair.counts() == (len(handle.layers), {})


def test_loading_more_adapters_into_accelerated_layers(pair: Pair):
    config = lora_config(3)
    for model in pair.both:
        torch.manual_seed(5)
        model.add_adapter(config, adapter_name="c")
        model.set_adapters(["a", "b", "c"], [0.2, 0.3, 0.4])
    pair.assert_same()
    assert pair.counts() == (pair.number, {})


@pytest.mark.parametrize("rank", [2, 4, 6], ids="into-rank-{}".format)
def test_hotswap(pair: Pair, tmp_path: Path, rank: int):
    """A file of rank 4 replaces an adapter of another rank in place, after `enable_lora_hotswap` padded
    it.
    """
    pair.plain.save_lora_adapter(tmp_path / "other", adapter_name="a")
    pair.plain.set_adapters(["a"], [1.0])
    wanted = pair.run(pair.plain)
    model = pair.make()
    model.enable_lora_hotswap(target_rank=max(rank, 4))
    pair.plain, pair.fast = model, pair.make()
    pair.fast.enable_lora_hotswap(target_rank=max(rank, 4))
    for model in pair.both:
        torch.manual_seed(7)
        state = {
            k: 0.1 * torch.randn(rank if "lora_A" in k else v.shape[0], v.shape[1] if "lora_A" in k else rank)
            for k, v in _saved(tmp_path / "other").items()
        }
        model.load_lora_adapter(state, prefix=None, adapter_name="x")
    handle = mk.accelerate(pair.fast)
    pair.counts()
    before = pair.assert_same()
    for model in pair.both:
        model.load_lora_adapter(_saved(tmp_path / "other"), prefix=None, adapter_name="x", hotswap=True)
    after = pair.assert_same()
    assert not torch.allclose(after, before, rtol=1e-3)
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)
    assert pair.counts() == (2 * len(handle.layers), {})


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(folder.iterdir()))


@pytest.mark.parametrize(
    "family, compute", [*((name, torch.float32) for name in FAMILIES), ("sd3", torch.bfloat16)], ids=str
)
def test_layerwise_casting_spares_the_adapters(family: str, compute: torch.dtype):
    pair = Pair(family)
    for model in pair.both:
        model.to(compute)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    theirs, ours = pair.outputs()
    assert (ours - theirs).norm() <= 8 * torch.finfo(compute).eps * theirs.norm()
    assert mk.status()["base_called"] == {BASE_HOOKS: pair.number}
    assert pair.counts() == (pair.number, {})


def test_layerwise_casting_of_adapters_too(pair: Pair):
    from diffusers.hooks import apply_layerwise_casting
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    for model in pair.both:
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, DEFAULT_SKIP_MODULES_PATTERN)
    assert pair.fast.state_dict()[_an_adapter(pair.fast)].dtype == torch.float8_e4m3fn
    theirs, ours = pair.outputs()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not pair.handle.skipped and pair.counts() == (pair.number, {})
    assert pair.fast.state_dict()[_an_adapter(pair.fast)].dtype == torch.float8_e4m3fn


def _an_adapter(model: nn.Module) -> str:
    return next(name for name in model.state_dict() if "lora_A.a" in name)


def test_sequential_offload(pair: Pair):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    before = pair.assert_same()
    pair.counts()
    for model in pair.both:
        cpu_offload(model, torch.device("cpu"))
    assert pair.fast.get_parameter(_an_adapter(pair.fast)).is_meta
    theirs, ours = pair.outputs()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not pair.handle.skipped and pair.counts() == (pair.number, {})
    assert pair.fast.get_parameter(_an_adapter(pair.fast)).is_meta
    for model in pair.both:
        remove_hook_from_submodules(model)
    assert torch.equal(pair.assert_same(), before)
    assert pair.counts() == (pair.number, {})


def test_group_offload_of_leaves(pair: Pair):
    from diffusers.hooks import apply_group_offloading

    for model in pair.both:
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), "leaf_level")
    theirs, ours = pair.outputs()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not pair.handle.skipped and pair.counts() == (pair.number, {})


@pytest.mark.parametrize(
    "extra, reason", [({"use_dora": True}, VARIANT), ({"lora_bias": True}, "lora_bias")], ids=["dora", "bias"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_variants_step_aside(family: str, extra: dict[str, Any], reason: str):
    pair = Pair(family, **extra)
    theirs, ours = pair.outputs()
    assert torch.equal(ours, theirs)
    counted, fallbacks = pair.counts()
    # layers without a bias have no lora_bias to add
    assert counted + sum(fallbacks.values()) == pair.number and set(fallbacks) == {reason}


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_scale_given_at_run_time(family: str):
    pair = Pair(family)
    full = pair.assert_same()
    model, run = pair.fast, inspect.signature(pair.run)
    if "kwargs" not in run.parameters:
        original = pair.run
        pair.run = lambda model, **kwargs: _with_kwargs(model, original, kwargs)
    scaled = pair.assert_same(joint_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(scaled, full, rtol=1e-3)
    torch.testing.assert_close(pair.assert_same(), full)
    assert model is pair.fast and pair.counts()[1] == {}


def _with_kwargs(model: Any, run: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    class Bound:
        dtype = model.dtype

        def __call__(self, **inputs: Any) -> Any:
            return model(**inputs, **kwargs)

    return run(Bound())


def test_wrong_files_change_nothing(pair: Pair, tmp_path: Path):
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors.torch import load_file, save_file

    before = pair.assert_same()
    with pytest.raises(ValueError, match="not found in the model"):
        pair.fast.save_lora_adapter(tmp_path, adapter_name="nobody")
    pair.fast.load_lora_adapter({"lora_foo": torch.ones(1)}, prefix="transformer")
    pair.fast.save_lora_adapter(tmp_path, adapter_name="a")
    file = next(tmp_path.iterdir())
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps({"r": 4, "no_such_option": 1})}
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(TypeError, match="could not be instantiated"):
        pair.fast.load_lora_adapter(tmp_path, prefix=None, adapter_name="c", use_safetensors=True)
    with pytest.raises(ValueError, match="no existing adapter"):
        pair.fast.load_lora_adapter(_saved(tmp_path), prefix=None, adapter_name="nobody", hotswap=True)
    assert torch.equal(pair.assert_same(), before)


def test_training_gives_the_same_weights(pair: Pair):
    trained = []
    for model in pair.both:
        model.train().set_adapters(["a", "b"], [1.0, 1.0])
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = sum(
                    layer(torch.ones(1, 3, layer.in_features)).square().mean() for layer in _layers(model)
                )
            loss.backward()
            optimizer.step()
        trained.append(parameters)
    assert len(trained[0]) == len(trained[1]) == 4 * pair.number
    for theirs, ours in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import Linear

    return [module for module in model.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("family", ["qwen"])
def test_repeated_blocks_compile_without_a_break(family: str):
    torch.compiler.reset()
    pair = Pair(family)
    eager = pair.assert_same()
    pair.fast.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(pair.run(pair.fast), eager, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_gradient_checkpointing_runs_the_forward_again():
    unet = Pair("unet")
    grads = []
    for model in unet.both:
        model.train().enable_gradient_checkpointing()
        x, text = torch.ones(1, 4, 8, 6), torch.ones(1, 5, 12)
        model(x, torch.tensor([3]), text).sample.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, theirs in grads[0].items():
        torch.testing.assert_close(grads[1][name], theirs, rtol=1e-3, atol=1e-5, msg=name)
    assert unet.counts()[0] > unet.number


def test_remove_is_bit_identical(pair: Pair):
    pair.handle.remove()
    theirs, ours = pair.outputs()
    assert torch.equal(ours, theirs)
    assert [(n, type(m)) for n, m in pair.fast.named_modules()] == [
        (n, type(m)) for n, m in pair.plain.named_modules()
    ]
    assert pair.counts() == (0, {})


def test_a_pipeline_and_its_text_encoder(tmp_path: Path):
    pipe: Any = tiny_pipeline()
    pipe.unet.add_adapter(lora_config(), "style")
    text = lora_config()
    text.target_modules = {"q_proj", "v_proj"}
    pipe.text_encoder.add_adapter(text, "style")
    tokens = torch.arange(6)[None]

    def embed() -> torch.Tensor:
        with torch.no_grad():
            return pipe.text_encoder(tokens)[0]

    before = embed()
    handle = mk.accelerate(pipe)
    assert {path.partition(".")[0] for path in handle.layers} == {"unet", "text_encoder"}
    mk.status(reset=True)
    torch.testing.assert_close(embed(), before, rtol=1e-5, atol=1e-6)
    in_text = sum(path.startswith("text_encoder") for path in handle.layers)
    report: Any = mk.status(reset=True)
    assert report["accelerated"] == in_text > 0 and report["fallbacks"] == {}
    pipe.set_adapters("style", 0.5)
    assert pipe.get_active_adapters() == ["style"] and pipe.get_list_adapters().keys() == {
        "unet",
        "text_encoder",
    }
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    pipe.set_lora_device(["style"], "cpu")
    pipe.unload_lora_weights()
    assert not _layers(pipe.unet)
    handle.remove()
