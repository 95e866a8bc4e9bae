"""Tiny models of the real classes, experts for them, and what "nothing changed" means."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.layers.conv import conv_of
from mole_kernels.modules.scan import mole_targets, scan, sizes

TEXT_WIDTH = 12


def tiny_unet() -> nn.Module:
    """SD1.5 in miniature: 1x1 convolutions as proj_in and proj_out, cross-attention to a text of width 12."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def tiny_flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def tiny_pipeline() -> object:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=30,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Mlp(nn.Module):
    """A plain module: two linear layers and a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.mix = nn.Linear(6, 10), nn.Linear(10, 5, bias=False), nn.Conv2d(5, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        return self.mix(y.mT.unflatten(2, (2, -1)))


def run_unet(unet: nn.Module, batch: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, text = (
        torch.randn(batch, 4, 8, 6, generator=generator),
        torch.randn(batch, 5, TEXT_WIDTH, generator=generator),
    )
    with torch.no_grad():
        return unet(x, torch.tensor([3] * batch), text).sample


def run_flux(flux: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return flux(
            hidden_states=torch.randn(1, 6, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 24, generator=generator),
            pooled_projections=torch.randn(1, 20, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


def make_expert(
    model: object,
    paths: Iterable[str] | None = None,
    rank: int = 2,
    seed: int = 0,
    scale: float = 0.5,
    rename: Callable[[str], str] = str,
) -> Expert:
    """Random factors for `paths` (the MoLE layers by default, all layers where there are none), under the
    names `rename` gives them.
    """
    generator = torch.Generator().manual_seed(seed)
    found = scan(model)
    layers = {**found.layers, **found.patched}
    if paths is None:
        paths = mole_targets(model) or layers
    factors = {}
    for path in paths:
        N, K = sizes(layers[path])
        down, up = torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator)
        factors[rename(path)] = LowRank(down / K**0.5, up / rank**0.5, scale, conv_of(layers[path]))
    return Expert(factors, source=f"expert of seed {seed}")


class State:
    """Everything a patch might leave behind: tensors (objects and values), flags, hooks, classes, attributes,
    output.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Tensor]) -> None:
        self.model, self.run = model, run
        self.tensors = {
            name: (tensor, tensor.detach().clone())
            for name, tensor in model.state_dict(keep_vars=True).items()
        }
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.shape = self._shape()
        self.output = run()

    def _shape(self) -> list[tuple]:
        return [
            (
                name,
                id(m),
                type(m),
                sorted(m.__dict__),
                sorted(m._modules),
                list(m._forward_hooks),
                list(m._forward_pre_hooks),
            )
            for name, m in self.model.named_modules()
        ]

    def assert_unchanged(self) -> None:
        now = self.model.state_dict(keep_vars=True)
        assert list(now) == list(self.tensors)
        for name, (tensor, value) in self.tensors.items():
            assert now[name] is tensor and torch.equal(tensor, value), name
        assert {
            name: parameter.requires_grad for name, parameter in self.model.named_parameters()
        } == self.flags
        assert self._shape() == self.shape
        assert torch.equal(self.run(), self.output)


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture
def flux() -> nn.Module:
    return tiny_flux()


@pytest.fixture
def pipeline() -> object:
    return tiny_pipeline()
