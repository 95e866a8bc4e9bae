"""Write the table of the layers that each denoiser of the installed diffusers has.

    python python/tools/own_names.py           write mole_kernels/io/dialects/own_names.json
    python python/tools/own_names.py --check    exit 1 where the installed diffusers would add to it

For each denoiser whose pipeline loads LoRA files: that pipeline, the mixin that loads them, and the path of every
linear layer and convolution, with `#` for the number of a block.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

TABLE = Path(__file__).resolve().parents[2] / "mole_kernels/io/dialects/own_names.json"
# settings that add layers which the default configuration lacks, or without which it cannot be built
MORE: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"guidance_embeds": True},
    "SD3Transformer2DModel": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "WanTransformer3DModel": {"added_kv_proj_dim": 5120, "image_dim": 1280},
    "SkyReelsV2Transformer3DModel": {"added_kv_proj_dim": 2048, "image_dim": 1280},
    "HunyuanVideoTransformer3DModel": {"guidance_embeds": True},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "caption_channels": [64, 64],
        "text_emb_dim": 64,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (8, 12, 12),
        "max_resolution": (32, 32),
        "llama_layers": (0, 1),
    },
}
# what files hold factors for
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# proteins, no pictures
LEFT_OUT = ("RFD4ProteinaTransformer",)


def pipelines() -> Iterator[tuple[str, str]]:
    """(denoiser's class, pipeline's class) of every pipeline that loads LoRA files into a transformer."""
    import diffusers

    for name in dir(diffusers):
        if not name.endswith("Pipeline"):
            continue
        try:
            cls = getattr(diffusers, name)
            loadable = cls._lora_loadable_modules
        # a pipeline whose packages are missing cannot be asked
        except (AttributeError, ImportError, RuntimeError):
            continue
        parameter = inspect.signature(cls.__init__).parameters.get("transformer")
        if "transformer" not in loadable or parameter is None:
            continue
        for denoiser in re.findall(r"\w+(?:Transformer\w*|Model)", str(parameter.annotation)):
            if hasattr(diffusers, denoiser) and denoiser not in LEFT_OUT:
                yield denoiser, name


def layers_of(model: nn.Module) -> list[str]:
    """The paths of all linear layers and convolutions; the number of a block is `#`."""
    names: dict[str, None] = {}

    def walk(module: nn.Module, path: str) -> None:
        children = {key: child for key, child in module._modules.items() if child is not None}
        if isinstance(module, LAYERS):
            names[path] = None
        blocks = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        for key, child in children.items():
            part = "#" if blocks else key
            walk(child, f"{path}.{part}" if path else part)

    walk(model, "")
    return list(names)


def table() -> dict[str, dict[str, Any]]:
    """denoiser -> its pipeline and its layers."""
    import diffusers

    by_denoiser: dict[str, list[str]] = {}
    for denoiser, pipeline in pipelines():
        by_denoiser.setdefault(denoiser, []).append(pipeline)
    rows = {}
    for denoiser, names in sorted(by_denoiser.items()):
        layers: dict[str, None] = {}
        configs = [MORE[denoiser]] if denoiser in MORE else [{}]
        for config in configs:
            with torch.device("meta"):
                layers |= dict.fromkeys(layers_of(getattr(diffusers, denoiser)(**config)))
        # the plain pipeline of a denoiser has the shortest name
        pipeline = min(names, key=len)
        mixins = [base.__name__ for base in getattr(diffusers, pipeline).__mro__]
        loader = next(name for name in mixins if name.endswith("LoraLoaderMixin"))
        rows[denoiser] = {"pipeline": pipeline, "loader": loader, "layers": list(layers)}
    return rows


def text_of(rows: dict[str, dict[str, Any]]) -> str:
    """JSON with one line for each denoiser, so that a change shows as one."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> int:
    rows = table()
    if "--check" not in arguments:
        TABLE.write_text(text_of(rows))
        return 0
    written = json.loads(TABLE.read_text())
    lacking = {
        name: sorted(set(row["layers"]) - set(written.get(name, {"layers": []})["layers"]))
        for name, row in rows.items()
    }
    print("\n".join(f"{name}: {', '.join(names)}" for name, names in lacking.items() if names))
    return 1 if any(lacking.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
