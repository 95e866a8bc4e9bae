"""Which model a file was made for, as far as the names and widths of its layers tell: one family, several
that share them, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mole_kernels.experts.lowrank import Expert, flatten, split_component


class ModelFamily(NamedTuple):
    """What a model is called, the diffusers pipeline that reads its files, and the widths that published
    models of it have.
    """

    title: str
    pipeline: str | None = None
    widths: tuple[int, ...] = ()


UNET, SD1, SD2, SDXL = "sd", "sd1", "sd2", "sdxl"
FLUX1, FLUX2, SD3, QWEN, ZIMAGE, LUMINA, WAN, HUNYUAN, TEXT = (
    "flux1",
    "flux2",
    "sd3",
    "qwen",
    "zimage",
    "lumina2",
    "wan",
    "hunyuan",
    "text",
)
FAMILIES: dict[str, ModelFamily] = {
    UNET: ModelFamily("Stable Diffusion 1 or 2 UNet", "StableDiffusionPipeline"),
    SD1: ModelFamily("Stable Diffusion 1 UNet", "StableDiffusionPipeline"),
    SD2: ModelFamily("Stable Diffusion 2 UNet", "StableDiffusionPipeline"),
    SDXL: ModelFamily("SDXL UNet", "StableDiffusionXLPipeline"),
    FLUX1: ModelFamily("FLUX.1 transformer", "FluxPipeline", (3072,)),
    FLUX2: ModelFamily("FLUX.2 transformer", "Flux2Pipeline", (3072, 4096, 6144)),
    SD3: ModelFamily("SD3 transformer", "StableDiffusion3Pipeline", (1536, 2432)),
    QWEN: ModelFamily("Qwen-Image transformer", "QwenImagePipeline", (3072,)),
    ZIMAGE: ModelFamily("Z-Image transformer", "ZImagePipeline", (3840,)),
    LUMINA: ModelFamily("Lumina 2 transformer", "Lumina2Pipeline", (2304,)),
    WAN: ModelFamily("Wan transformer", "WanPipeline", (1536, 3072, 5120)),
    HUNYUAN: ModelFamily("HunyuanVideo transformer", "HunyuanVideoPipeline", (3072,)),
    TEXT: ModelFamily("text encoder"),
}

UNETS = frozenset({UNET, SD1, SD2, SDXL})

# a part of a flat name -> the families whose layers are called so; of one name the first that fits counts
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"(?:down|up)_blocks_\d+_(?:attentions|resnets|(?:down|up)samplers)|mid_block_(?:attentions|resnets)",
        (UNET,),
    ),
    (r"(?:input|output)_blocks_\d+_|middle_block_\d+_|label_emb_", (UNET,)),
    (r"single_transformer_blocks_\d+_attn_to_(?:qkv_mlp_proj|out)|_stream_modulation", (FLUX2,)),
    (r"(?:\A|_)transformer_blocks_\d+_ff(?:_context)?_linear_", (FLUX2,)),
    (
        r"single_transformer_blocks_\d+_|(?:double|single)_blocks_\d+_(?:\w+_mod_lin|modulation_lin|processor)(?:_|\Z)",
        (FLUX1,),
    ),
    (
        r"(?:double|single)_blocks_\d+_(?:(?:img|txt)_(?:mod_linear|mlp_fc)|modulation_linear)|individual_token_refiner",
        (HUNYUAN,),
    ),
    (r"double_blocks_\d+_(?:img|txt)_mlp_[02]", (FLUX1, FLUX2)),
    (r"(?:double|single)_blocks_\d+_", (FLUX1, FLUX2, HUNYUAN)),
    (r"(?:\A|_)transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_", (QWEN,)),
    (r"joint_blocks_\d+_", (SD3,)),
    (r"(?:\A|_)transformer_blocks_\d+_(?:ff_context_net|norm1_context_linear)", (SD3, FLUX1)),
    (r"(?:\A|_)transformer_blocks_\d+_attn_(?:add_[qkv]_proj|to_add_out)", (SD3, FLUX1, FLUX2, QWEN)),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_attention_to_", (ZIMAGE,)),
    (
        r"(?:layers|noise_refiner|context_refiner)_\d+_(?:attention|feed_forward|adaLN_modulation)_",
        (ZIMAGE, LUMINA),
    ),
    (
        r"(?:\A|model_)blocks_\d+_(?:attn[12]_to_|ffn_net_|(?:self|cross)_attn_[qkvo](?:_img)?(?:_|\Z)|ffn_[02])",
        (WAN,),
    ),
    (r"encoder_layers_\d+_self_attn|encoder_block_\d+_layer_|(?:\A|model_)layers_\d+_self_attn", (TEXT,)),
)
_SIGNS = tuple((re.compile(sign), families) for sign, families in SIGNS)
# a layer whose inputs are the model's width, whatever the family calls it
_WIDE = re.compile(r"(?:attn|attention)1?_(?:to_q|qkv|q)\Z|_linear1\Z|_to_qkv_mlp_proj\Z|self_attn_q\Z")
_TEXT_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL}


def families(layers: Mapping[str, int | None]) -> tuple[str, ...]:
    """The families that every telling name and width allows; () where no name tells anything, or two
    contradict each other.

    Args:
        layers: Path -> K, the layer's inputs, or None where unknown. The component may stand before the path.
    """
    candidates: tuple[str, ...] | None = None
    for path, K in layers.items():
        flat = flatten(split_component(path)[1])
        here = next((names for sign, names in _SIGNS if sign.search(flat)), None)
        if here is None or here == (TEXT,):
            continue
        if K is not None and len(here) > 1 and _WIDE.search(flat):
            here = tuple(name for name in here if K in FAMILIES[name].widths) or here
        candidates = here if candidates is None else tuple(name for name in candidates if name in here)
    if candidates is None:
        return (TEXT,) if any(_SIGNS[-1][0].search(flatten(path)) for path in layers) else ()
    return (_unet(layers),) if candidates == (UNET,) else candidates


def families_of(expert: Expert) -> tuple[str, ...]:
    """`families` of an expert's layers.

    Args:
        expert: An expert of any dialect.
    """
    widths: dict[str, int | None] = dict.fromkeys(expert.families)
    return families(widths | {path: layer.in_features for path, layer in expert.layers.items()})


def titles(names: Iterable[str]) -> str:
    """What these families are called in a sentence: "FLUX.1 or FLUX.2 transformer".

    Args:
        names: Keys of `FAMILIES`.
    """
    texts = [FAMILIES[name].title for name in names]
    return " or ".join([*(title.removesuffix(" transformer") for title in texts[:-1]), *texts[-1:]])


def agree(a: Iterable[str], b: Iterable[str]) -> bool:
    """Whether one model may be meant by both.

    Args:
        a: Keys of `FAMILIES`.
        b: Others.
    """
    # 1 and 2 differ by the text's width alone, which not every file shows
    first, second = ({UNET if name in (SD1, SD2) else name for name in names} for names in (a, b))
    both = {*a, *b}
    return bool(first & second) and not {SD1, SD2} <= both


def _unet(layers: Mapping[str, int | None]) -> str:
    """The width of the text, or SDXL's deeper transformers, tell the Stable Diffusion UNets apart."""
    for path, K in layers.items():
        if flatten(path).endswith("attn2_to_k") and K in _TEXT_WIDTHS:
            return _TEXT_WIDTHS[K]
    deep = any(
        re.search(r"transformer_blocks_[1-9]|label_emb_|add_embedding", flatten(path)) for path in layers
    )
    return SDXL if deep else UNET
