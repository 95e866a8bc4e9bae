"""Key sets of whole models: the names and sizes of every layer of SD 1.5 and SDXL, without weights."""

from __future__ import annotations

import pytest
from torch import nn

from mole_kernels.cli.models import skeleton


@pytest.fixture(scope="session")
def skeletons() -> dict[str, dict[str, nn.Module]]:
    pytest.importorskip("diffusers")
    return {name: skeleton(name).components for name in ("sd15", "sdxl")}


@pytest.fixture(scope="session", params=["sd15", "sdxl"])
def layers(
    request: pytest.FixtureRequest, skeletons: dict[str, dict[str, nn.Module]]
) -> dict[str, tuple[int, int, bool]]:
    """component.path -> (N, K, is a convolution) of every linear layer and 1x1 convolution of the attention
    blocks and text encoders.
    """
    found = {}
    for component, module in skeletons[request.param].items():
        for path, layer in module.named_modules():
            inside = component != "unet" or ".attentions." in f".{path}"
            conv = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
            if inside and (isinstance(layer, nn.Linear) or conv):
                found[f"{component}.{path}"] = (*layer.weight.shape[:2], conv)
    return found
