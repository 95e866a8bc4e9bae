"""SDXL in kohya files: the block names of the LDM code, and diffusers' names for the same blocks.

LDM numbers its blocks through; diffusers counts resnets, attentions and samplers within each of its blocks.
SDXL has three levels with
two layers each on the way down and three on the way up. All names here are flat: dots are underscores.
"""

from __future__ import annotations

import re

LAYERS_PER_BLOCK = 2
# LDM's two levels of position -> diffusers' block; the tables below are spelled out once, at import
_STRIDE = LAYERS_PER_BLOCK + 1


def _blocks() -> dict[str, str]:
    """Where each LDM block lies in diffusers' UNet (four levels, which covers SDXL and SD 1.x)."""
    table = {
        "middle_block_0": "mid_block_resnets_0",
        "middle_block_1": "mid_block_attentions_0",
        "middle_block_2": "mid_block_resnets_1",
    }
    for level in range(4):
        for layer in range(_STRIDE):
            down, up = 1 + level * _STRIDE + layer, level * _STRIDE + layer
            if layer < LAYERS_PER_BLOCK:
                table[f"input_blocks_{down}_0"] = f"down_blocks_{level}_resnets_{layer}"
                table[f"input_blocks_{down}_1"] = f"down_blocks_{level}_attentions_{layer}"
            else:
                table[f"input_blocks_{down}_0_op"] = f"down_blocks_{level}_downsamplers_0_conv"
                table[f"output_blocks_{up}_1_conv"] = f"up_blocks_{level}_upsamplers_0_conv"
                table[f"output_blocks_{up}_2_conv"] = f"up_blocks_{level}_upsamplers_0_conv"
            table[f"output_blocks_{up}_0"] = f"up_blocks_{level}_resnets_{layer}"
            table[f"output_blocks_{up}_1"] = f"up_blocks_{level}_attentions_{layer}"
    return table


BLOCKS = _blocks()

# outside the blocks
EDGES = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}

# inside a resnet
RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}

_LDM = re.compile(r"(?:(?:input|output)_blocks_\d+_\d+|middle_block_\d+)(?=_|\Z)")
_DIFFUSERS = re.compile(r"(?:(?:down|up)_blocks_\d+|mid_block)_(?:resnets|attentions)_\d+(?=_|\Z)")


def is_ldm(flat: str) -> bool:
    """Whether a flat name is spelled as LDM spells it."""
    return flat in EDGES or _LDM.match(flat) is not None


def to_diffusers(flat: str) -> str:
    """diffusers' flat name of a flat LDM name; any other name comes back as it is."""
    if flat in EDGES:
        return EDGES[flat]
    if flat in BLOCKS:
        return BLOCKS[flat]
    match = _LDM.match(flat)
    if match is None or match.group() not in BLOCKS:
        return flat
    block, rest = BLOCKS[match.group()], flat[match.end() + 1 :]
    return f"{block}_{RESNET.get(rest, rest) if '_resnets_' in block else rest}"


_BLOCKS_BACK = {diffusers: ldm for ldm, diffusers in BLOCKS.items() if not ldm.endswith(("_op", "_conv"))}
_EDGES_BACK = {diffusers: ldm for ldm, diffusers in EDGES.items()}
_RESNET_BACK = {diffusers: ldm for ldm, diffusers in RESNET.items()}


def to_ldm(flat: str) -> str:
    """The LDM name of a flat diffusers name, or the name itself where LDM has none for it."""
    if flat in _EDGES_BACK:
        return _EDGES_BACK[flat]
    match = _DIFFUSERS.match(flat)
    if match is None or match.group() not in _BLOCKS_BACK:
        return flat
    rest = flat[match.end() + 1 :]
    inner = _RESNET_BACK.get(rest, rest) if "_resnets_" in match.group() else rest
    return f"{_BLOCKS_BACK[match.group()]}_{inner}"
