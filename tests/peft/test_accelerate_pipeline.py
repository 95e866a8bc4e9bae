"""The pipeline's own LoRA calls, with files, on a pipeline as it is and on an accelerated one: the same
pictures after every call.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mole_kernels as mk
from mole_kernels.peft import forward as peft_forward

pytest.importorskip("peft")
pytest.importorskip("diffusers")

from tests.peft_models import K, N, draw, lora_config, make
from tests.tiny_models import TEXT_WIDTH, tiny_pipeline


def lora_file(folder: Path, name: str, seed: int, rank: int = 4) -> Path:
    """A file as `save_lora_weights` of a training script writes it, UNet and text encoder."""
    from peft import get_peft_model_state_dict

    pipe: Any = tiny_pipeline()
    torch.manual_seed(seed)
    text = lora_config(rank)
    text.target_modules = {"q_proj", "v_proj"}
    pipe.unet.add_adapter(lora_config(rank))
    pipe.text_encoder.add_adapter(text)
    states = {part: get_peft_model_state_dict(getattr(pipe, part)) for part in ("unet", "text_encoder")}
    pipe.save_lora_weights(folder, states["unet"], states["text_encoder"], weight_name=f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    return {name: lora_file(folder, name, seed) for seed, name in enumerate(("a", "b", "other"))}


class Pipes:
    """The pipeline twice; `do` calls both, `assert_same` compares what they draw, text encoder included."""

    def __init__(self) -> None:
        self.plain: Any = tiny_pipeline()
        self.plain.set_progress_bar_config(disable=True)
        self.fast: Any = copy.deepcopy(self.plain)
        self.bare = self.draw(self.plain)

    def do(self, method: str, *args: Any, **kwargs: Any) -> None:
        for pipe in (self.plain, self.fast):
            getattr(pipe, method)(*copy.deepcopy(args), **copy.deepcopy(kwargs))

    def accelerate(self) -> None:
        assert not mk.accelerate(self.fast).skipped
        mk.status(reset=True)

    @staticmethod
    def draw(pipe: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            words = pipe.text_encoder(torch.arange(6)[None])[0]
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        return pipe(
            prompt_embeds=words,
            negative_prompt_embeds=torch.zeros(1, 6, TEXT_WIDTH),
            latents=noise,
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="latent",
            **kwargs,
        ).images

    def assert_same(self, **kwargs: Any) -> Tensor:
        ours, theirs = self.draw(self.fast, **kwargs), self.draw(self.plain, **kwargs)
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)
        return ours

    def counts(self) -> tuple[int, dict[str, int]]:
        report: Any = mk.status(reset=True)
        return report["accelerated"], report["fallbacks"]


@pytest.fixture
def pipes(files: dict[str, Path]) -> Pipes:
    made = Pipes()
    for name in ("a", "b"):
        made.do("load_lora_weights", files[name].parent, weight_name=files[name].name, adapter_name=name)
    made.do("set_adapters", ["a", "b"], [0.7, 0.4])
    made.accelerate()
    return made


def test_load_lora_weights(pipes: Pipes):
    assert not torch.allclose(pipes.assert_same(), pipes.bare, rtol=1e-2)
    count, fallbacks = pipes.counts()
    assert count > 0 and not fallbacks


def test_set_adapters_by_component_and_block(pipes: Pipes):
    full = pipes.assert_same()
    pipes.do(
        "set_adapters",
        ["b", "a"],
        [{"unet": {"down": 0.5, "mid": 0.0, "up": {"block_1": [0.3, 2.0]}}, "text_encoder": 0.2}, -1.0],
    )
    assert not torch.allclose(pipes.assert_same(), full, rtol=1e-2)
    assert pipes.plain.get_active_adapters() == pipes.fast.get_active_adapters() == ["b", "a"]
    assert not pipes.counts()[1]


def test_scale_at_run_time_and_its_traces(pipes: Pipes):
    """diffusers multiplies every layer's scale around the forward, and divides afterwards: twice the same,
    and nothing left behind.
    """
    full = pipes.assert_same()
    half = pipes.assert_same(cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(half, full, rtol=1e-2)
    torch.testing.assert_close(pipes.assert_same(cross_attention_kwargs={"scale": 0.5}), half)
    torch.testing.assert_close(pipes.assert_same(), full)
    # a scale of zero makes diffusers forget the weights; with us it forgets the same
    pipes.assert_same(cross_attention_kwargs={"scale": 0.0})
    pipes.assert_same()
    assert not pipes.counts()[1]


def test_fuse_and_unfuse(pipes: Pipes):
    before = pipes.assert_same()
    pipes.counts()
    parts = ["unet", "text_encoder"]
    pipes.do("fuse_lora", components=parts, adapter_names=["a", "b"])
    torch.testing.assert_close(pipes.assert_same(), before, rtol=2e-3, atol=1e-3)
    assert set(pipes.counts()[1]) == {"adapters are merged into the weight"}
    pipes.do("unfuse_lora", components=parts)
    torch.testing.assert_close(pipes.assert_same(), before, rtol=2e-3, atol=1e-3)
    assert not pipes.counts()[1]
    # a scale for fusing stays in the layers afterwards, as diffusers leaves it
    pipes.do("fuse_lora", components=parts, lora_scale=0.5, adapter_names=["a"])
    assert not torch.allclose(pipes.assert_same(), before, rtol=1e-2)
    pipes.do("unfuse_lora", components=parts)
    assert not torch.allclose(pipes.assert_same(), before, rtol=1e-2)


def test_hotswap(files: dict[str, Path]):
    """The UNet's adapter is replaced in place, through `.data`; text encoders cannot be hot-swapped, by
    diffusers' own rule.
    """
    from safetensors.torch import load_file

    only_unet = {
        name: {k: v for k, v in load_file(file).items() if k.startswith("unet")}
        for name, file in files.items()
    }
    pipes = Pipes()
    pipes.do("enable_lora_hotswap", target_rank=6)
    pipes.do("load_lora_weights", only_unet["a"], adapter_name="x")
    pipes.accelerate()
    before = pipes.assert_same()
    objects = [id(p) for p in pipes.fast.unet.parameters()]
    pipes.do("load_lora_weights", only_unet["other"], adapter_name="x", hotswap=True)
    after = pipes.assert_same()
    assert (
        not torch.allclose(after, before, rtol=1e-2)
        and [id(p) for p in pipes.fast.unet.parameters()] == objects
    )
    # the same file loaded afresh says the same
    fresh = Pipes()
    fresh.do("load_lora_weights", only_unet["other"], adapter_name="x")
    torch.testing.assert_close(after, fresh.draw(fresh.plain), rtol=2e-3, atol=1e-4)
    assert not pipes.counts()[1]


def test_delete_adapters(pipes: Pipes):
    pipes.do("delete_adapters", ["a"])
    pipes.do("set_adapters", ["b"], [1.0])
    pipes.assert_same()
    assert (
        pipes.fast.get_list_adapters()
        == pipes.plain.get_list_adapters()
        == {"unet": ["b"], "text_encoder": ["b"]}
    )
    assert not pipes.counts()[1]


def test_disable_and_enable(pipes: Pipes):
    before = pipes.assert_same()
    pipes.do("disable_lora")
    torch.testing.assert_close(pipes.assert_same(), pipes.bare)
    pipes.do("enable_lora")
    torch.testing.assert_close(pipes.assert_same(), before)


def test_save_lora_weights_writes_the_same_file(pipes: Pipes, tmp_path: Path):
    from peft import get_peft_model_state_dict

    written = []
    for name, pipe in (("plain", pipes.plain), ("fast", pipes.fast)):
        states = [
            get_peft_model_state_dict(part, adapter_name="b") for part in (pipe.unet, pipe.text_encoder)
        ]
        pipe.save_lora_weights(tmp_path / name, *states)
        written.append((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes())
    assert written[0] == written[1]


def test_unload_and_load_again(pipes: Pipes, files: dict[str, Path]):
    pipes.do("unload_lora_weights")
    assert torch.equal(pipes.assert_same(), pipes.bare)
    assert pipes.counts() == (0, {})
    pipes.do(
        "load_lora_weights", files["other"].parent, weight_name=files["other"].name, adapter_name="other"
    )
    pipes.accelerate()
    pipes.assert_same()
    count, fallbacks = pipes.counts()
    assert count > 0 and not fallbacks


def test_weights_of_zero_and_inactive_adapters_are_no_operands(monkeypatch: pytest.MonkeyPatch):
    """Fifty loaded, two active, one of them at zero: the operator sees the ranks of what counts, and nothing
    else of PEFT's is read.
    """
    model = make(tuple(1 + i % 5 for i in range(50)))
    layer: Any = model[0]
    mk.accelerate(model)
    layer.set_adapter(["a7", "a23"])
    seen = []

    def operator(x: Tensor, weight: Tensor, bias: Tensor, experts: Any) -> Tensor:
        seen.append((tuple(experts.ranks), tuple(experts.down.shape), tuple(experts.up.shape)))
        return x @ weight.mT

    monkeypatch.setattr(peft_forward, "gated_lora_linear", operator)
    # whoever reads an inactive adapter fails
    for half in (layer.lora_A, layer.lora_B, layer.lora_dropout):
        for name in list(half._modules):
            if name not in ("a7", "a23"):
                half._modules[name] = None
    with torch.no_grad():
        model(draw(3, K))
        layer.set_scale("a7", 0.0)
        model(draw(3, K))
        layer.set_scale("a23", 0.0)
        assert torch.equal(model(draw(3, K)), layer.base_layer(draw(3, K)))
    assert seen == [((3, 4), (1, 7, K), (1, N, 7)), ((4,), (1, 4, K), (1, N, 4))]
