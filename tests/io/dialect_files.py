"""Writers of the dialects that other tools speak: a LoRA known on diffusers' layers becomes the file that
such a tool would have saved.

Layers that the tool's model holds fused (q, k, v; and FLUX's MLP with them) share one A, and their B lie one
under the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mole_kernels.experts.lowrank import LowRank, flatten
from mole_kernels.modules.scan import scan, sizes

# a diffusers name (a pattern) -> the name in the model's own code, and the place among the parts fused there
Names = list[tuple[str, str, int]]
DOUBLE, SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."


def _double(first: str, fused: tuple[str, str, str], stream: str) -> Names:
    return [
        (rf"{DOUBLE}attn\.{name}", rf"double_blocks.\1.{stream}_attn.qkv", i) for i, name in enumerate(fused)
    ]


FLUX1: Names = [
    *_double("img", ("to_q", "to_k", "to_v"), "img"),
    *_double("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "txt"),
    (rf"{DOUBLE}attn\.to_out\.0", r"double_blocks.\1.img_attn.proj", 0),
    (rf"{DOUBLE}attn\.to_add_out", r"double_blocks.\1.txt_attn.proj", 0),
    (rf"{DOUBLE}ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0", 0),
    (rf"{DOUBLE}ff\.net\.2", r"double_blocks.\1.img_mlp.2", 0),
    (rf"{DOUBLE}ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0", 0),
    (rf"{DOUBLE}ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2", 0),
    (rf"{DOUBLE}norm1\.linear", r"double_blocks.\1.img_mod.lin", 0),
    (rf"{DOUBLE}norm1_context\.linear", r"double_blocks.\1.txt_mod.lin", 0),
    *[(rf"{SINGLE}attn\.to_{x}", r"single_blocks.\1.linear1", i) for i, x in enumerate("qkv")],
    (rf"{SINGLE}proj_mlp", r"single_blocks.\1.linear1", 3),
    (rf"{SINGLE}proj_out", r"single_blocks.\1.linear2", 0),
    (rf"{SINGLE}norm\.linear", r"single_blocks.\1.modulation.lin", 0),
    ("x_embedder", "img_in", 0),
    ("context_embedder", "txt_in", 0),
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer", 0),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer", 0),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer", 0),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer", 0),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer", 0),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer", 0),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1", 0),
    ("proj_out", "final_layer.linear", 0),
]
FLUX2: Names = [
    *FLUX1[:8],
    (rf"{DOUBLE}ff\.linear_in", r"double_blocks.\1.img_mlp.0", 0),
    (rf"{DOUBLE}ff\.linear_out", r"double_blocks.\1.img_mlp.2", 0),
    (rf"{DOUBLE}ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0", 0),
    (rf"{DOUBLE}ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2", 0),
    (rf"{SINGLE}attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1", 0),
    (rf"{SINGLE}attn\.to_out", r"single_blocks.\1.linear2", 0),
    *[
        (rf"{name}\.linear", f"{name}.lin", 0)
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ],
    ("x_embedder", "img_in", 0),
    ("context_embedder", "txt_in", 0),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer", 0),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer", 0),
    (r"time_guidance_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer", 0),
    (r"time_guidance_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer", 0),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1", 0),
    ("proj_out", "final_layer.linear", 0),
]
WAN: Names = [
    *[
        (rf"blocks\.(\d+)\.attn{i}\.{ours}", rf"blocks.\1.{name}_attn.{theirs}", 0)
        for i, name in ((1, "self"), (2, "cross"))
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), (r"to_out\.0", "o"))
    ],
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0", 0),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2", 0),
    (r"condition_embedder\.time_proj", "time_projection.1", 0),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0", 0),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2", 0),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0", 0),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2", 0),
    ("proj_out", "head.head", 0),
]
ZIMAGE_FUSED: Names = [
    *[(rf"(.*)\.attention\.to_{x}", r"\1.attention.qkv", i) for i, x in enumerate("qkv")],
    (r"(.*)\.attention\.to_out\.0", r"\1.attention.out", 0),
]
SAME: Names = [("(.*)", r"\1", 0)]
SWAPPED = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class Module:
    """One module of a tool's model: A, the fused B's, and alpha (None: none in the file)."""

    down: Tensor
    up: Tensor
    alpha: float | None


def known_lora(
    model: nn.Module, names: Names, rank: int = 3, alpha: Callable[[str], float | None] = lambda name: None
) -> tuple[dict[str, Module], dict[str, LowRank]]:
    """(by the tool's names, by diffusers' names) of one random LoRA on every linear layer that the table
    covers.
    """
    generator = torch.Generator().manual_seed(0)
    fused: dict[str, list[tuple[int, str, nn.Module]]] = {}
    for path, layer in scan(model).layers.items():
        for pattern, theirs, place in names:
            if isinstance(layer, nn.Linear) and re.fullmatch(pattern, path):
                fused.setdefault(re.sub(pattern, theirs, path), []).append((place, path, layer))
                break
    modules, layers = {}, {}
    for name, parts in fused.items():
        parts.sort(key=lambda part: part[0])
        down = torch.randn(rank, sizes(parts[0][2])[1], generator=generator)
        ups = [torch.randn(sizes(layer)[0], rank, generator=generator) for _, _, layer in parts]
        said = alpha(name)
        for (_, path, _), up in zip(parts, ups, strict=True):
            layers[path] = LowRank(down, up, 1.0 if said is None else said / rank)
        whole = torch.cat(ups)
        # FLUX's own code has (shift, scale) where diffusers has (scale, shift)
        modules[name] = Module(down, torch.cat(whole.chunk(2)[::-1]) if name == SWAPPED else whole, said)
    return modules, layers


def kohya(modules: dict[str, Module], prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """sd-scripts and musubi: flat names, lora_down, lora_up, alpha."""
    file = {}
    for name, module in modules.items():
        flat = f"{prefix}{flatten(name)}"
        file[f"{flat}.lora_down.weight"], file[f"{flat}.lora_up.weight"] = module.down, module.up
        if module.alpha is not None:
            file[f"{flat}.alpha"] = torch.tensor(module.alpha)
    return file


def dotted(
    modules: dict[str, Module], prefix: str = "", halves: tuple[str, str] = ("lora_A", "lora_B")
) -> dict[str, Tensor]:
    """The model's own names: "" as BFL publishes, diffusion_model. as ComfyUI and ai-toolkit do,
    base_model.model. as fal does.
    """
    file = {}
    for name, module in modules.items():
        file[f"{prefix}{name}.{halves[0]}.weight"], file[f"{prefix}{name}.{halves[1]}.weight"] = (
            module.down,
            module.up,
        )
        if module.alpha is not None:
            file[f"{prefix}{name}.alpha"] = torch.tensor(module.alpha)
    return file


def xlabs(modules: dict[str, Module]) -> dict[str, Tensor]:
    """xlabs: LoRA held by attention processors, 1 for the image and 2 for the text; only attention."""
    spelled = {
        r"double_blocks\.(\d+)\.img_attn\.(qkv|proj)": r"double_blocks.\1.processor.\2_lora1",
        r"double_blocks\.(\d+)\.txt_attn\.(qkv|proj)": r"double_blocks.\1.processor.\2_lora2",
        r"single_blocks\.(\d+)\.linear2": r"single_blocks.\1.processor.proj_lora",
    }
    file = {}
    for name, module in modules.items():
        for pattern, theirs in spelled.items():
            if re.fullmatch(pattern, name):
                there = re.sub(pattern, theirs, name)
                file[f"{there}.down.weight"], file[f"{there}.up.weight"] = module.down, module.up
    return file
