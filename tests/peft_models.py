"""One PEFT layer, and tiny models of four families with adapters on them, as they are and accelerated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mole_kernels as mk
from tests.tiny_models import run_flux, run_unet, tiny_flux, tiny_unet

K, N = 24, 40
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def make(
    ranks: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32, bias: bool = True, **config: Any
) -> nn.Sequential:
    """One PEFT layer with an adapter "a0", "a1", … for every rank, all active, scalings 0.3, 0.55, 0.8, …"""
    import peft

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(K, N, bias=bias))
    for i, rank in enumerate(ranks):
        made = peft.LoraConfig(
            r=rank,
            lora_alpha=rank * (0.3 + 0.25 * i),
            target_modules=["0"],
            init_lora_weights=False,
            **config,
        )
        model = peft.inject_adapter_in_model(made, model, f"a{i}")
    model[0].set_adapter([f"a{i}" for i in range(len(ranks))])
    return model.to(dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def twins(*args: Any, **kwargs: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The same model twice: PEFT's own, and accelerated."""
    plain = make(*args, **kwargs)
    fast = copy.deepcopy(plain)
    handle = mk.accelerate(fast)
    assert list(handle.report()) == ["0"]
    return plain, fast


def calls() -> tuple[int, dict[str, int]]:
    report: Any = mk.status()
    return report["accelerated"], report["fallbacks"]


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def assert_as_right(got: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """No further from float64 than 1.5 times PEFT's own forward, with a floor of two roundings of the
    output.
    """
    floor = 2 * torch.finfo(got.dtype).eps
    assert got.dtype == theirs.dtype and got.shape == theirs.shape
    assert error(got, truth) <= max(1.5 * error(theirs, truth), floor)


def tiny_sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
    ).eval()


def run_sd3(model: Any, **kwargs: Any) -> Tensor:
    g = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": (1, 4, 8, 8),
        "encoder_hidden_states": (1, 5, 12),
        "pooled_projections": (1, 20),
    }
    dtype = model.dtype if model.dtype.itemsize > 1 else torch.float32
    with torch.no_grad():
        drawn = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in inputs.items()}
        return model(**drawn, timestep=torch.tensor([3]), **kwargs).sample


def tiny_qwen() -> Any:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    ).eval()


def run_qwen(model: Any, **kwargs: Any) -> Tensor:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 16, generator=g),
            encoder_hidden_states=torch.randn(1, 5, 12, generator=g),
            encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 4, 4)]],
            **kwargs,
        ).sample


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "unet": (tiny_unet, run_unet),
    "flux": (tiny_flux, run_flux),
    "sd3": (tiny_sd3, run_sd3),
    "qwen": (tiny_qwen, run_qwen),
}


def lora_config(rank: int = 4, **kwargs: Any) -> Any:
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, **kwargs)


class Pair:
    """The same model with adapters "a" and "b" active, plain and accelerated; every check compares the
    two.
    """

    def __init__(self, family: str, **config: Any) -> None:
        self.make, self.run = FAMILIES[family]
        self.plain = self.make()
        self.base = self.run(self.plain)
        self.plain.add_adapter(lora_config(4, **config), adapter_name="a")
        self.plain.add_adapter(lora_config(2, **config), adapter_name="b")
        self.plain.set_adapters(["a", "b"], [0.7, 0.4])
        self.fast = copy.deepcopy(self.plain)
        self.handle = mk.accelerate(self.fast)
        self.number = len(self.handle.report())
        mk.status(reset=True)

    @property
    def both(self) -> tuple[Any, Any]:
        return self.plain, self.fast

    def outputs(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.run(self.plain, **kwargs), self.run(self.fast, **kwargs)

    def assert_same(self, **kwargs: Any) -> Tensor:
        """Outputs agree to rounding, tensors and their names agree exactly; returns the accelerated
        output.
        """
        theirs, ours = self.outputs(**kwargs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        left, right = self.plain.state_dict(), self.fast.state_dict()
        assert list(left) == list(right)
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype and torch.equal(tensor.float(), right[name].float()), (
                name
            )
        return ours

    def counts(self) -> tuple[int, dict[str, int]]:
        report: Any = mk.status(reset=True)
        return report["accelerated"], report["fallbacks"]
