"""The table of docs/dialects.md: who reads which spelling of which model's layers, found by reading a file of
each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleError
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.io import load_expert
from mole_kernels.io.dialects.paths import kohya_name
from mole_kernels.io.layer_keys import collect_layers
from mole_kernels.io.resolve import resolve
from mole_kernels.modules.scan import scan, sizes
from mole_kernels.patching.plan import plan
from tests.denoisers import DENOISERS, pipeline_of
from tests.io.dialect_files import FLUX1, FLUX2, SAME, WAN, ZIMAGE_FUSED, Module, Names, known_lora, xlabs

diffusers = pytest.importorskip("diffusers")

PAGE = Path(__file__).parents[2] / "docs/dialects.md"
MODELS = {str(model): model for model in DENOISERS}
COLUMNS = {
    "sd15": "SD 1, 2",
    "sdxl": "SDXL",
    "sd3": "SD3",
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "wan": "Wan",
}
CODE: dict[str, Names] = {
    "flux1": [row for row in FLUX1 if not row[1].endswith("linear1")],
    "flux2": FLUX2,
    "wan": WAN,
    "z-image": ZIMAGE_FUSED,
}
Write = Callable[[Mapping[str, Module], str], dict[str, Tensor]]


def writer(prefix: str, down: str, up: str, alpha: bool = False) -> Write:
    """Keys with this prefix; flat behind an underscore."""

    def write(modules: Mapping[str, Module], component: str) -> dict[str, Tensor]:
        file = {}
        for name, module in modules.items():
            start = prefix.replace("COMPONENT", component)
            key = start + (name.replace(".", "_") if start.endswith("_") else name)
            file[f"{key}.{down}.weight"], file[f"{key}.{up}.weight"] = module.down, module.up
            if alpha:
                file[f"{key}.alpha"] = torch.tensor(float(module.down.shape[0]))
        return file

    return write


def ldm(modules: Mapping[str, Module], dots: bool) -> dict[str, Tensor]:
    """The block names of LDM's code: kohya's flat ones, or ComfyUI's behind diffusion_model."""
    file = {}
    for name, module in modules.items():
        key = str(kohya_name(name, sdxl=True))
        if dots:
            key = "diffusion_model." + re.sub(r"_(?=\d)|(?<=\d)_", ".", key.removeprefix("lora_unet_"))
        file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"] = module.down, module.up
    return file


# what the page calls it -> (written from the model's own code's names, its writer)
ROWS: dict[str, tuple[bool, Write]] = {
    "diffusers: `transformer.` or `unet.`, `lora_A`": (False, writer("COMPONENT.", "lora_A", "lora_B")),
    "PEFT: `base_model.model.`, `.default.`": (
        False,
        writer("base_model.model.", "lora_A.default", "lora_B.default"),
    ),
    "no prefix": (False, writer("", "lora_A", "lora_B")),
    "OneTrainer: dotted, `lora_down`, `alpha`": (False, writer("COMPONENT.", "lora_down", "lora_up", True)),
    "OneTrainer: `lora_transformer_`": (False, writer("lora_transformer_", "lora_down", "lora_up", True)),
    "LyCORIS: `lycoris_`": (False, writer("lycoris_", "lora_down", "lora_up", True)),
    "kohya, musubi: `lora_unet_`, diffusers' names": (
        False,
        writer("lora_unet_", "lora_down", "lora_up", True),
    ),
    "ComfyUI, ai-toolkit: `diffusion_model.`, diffusers' names": (
        False,
        writer("diffusion_model.", "lora_A", "lora_B"),
    ),
    "kohya, musubi: `lora_unet_`, the model's own code": (
        True,
        writer("lora_unet_", "lora_down", "lora_up", True),
    ),
    "ComfyUI, ai-toolkit, BFL: `diffusion_model.` or none, the model's own code": (
        True,
        writer("diffusion_model.", "lora_A", "lora_B"),
    ),
    "fal: `base_model.model.`, the model's own code": (True, writer("base_model.model.", "lora_A", "lora_B")),
    "xlabs: `double_blocks.0.processor.…`": (True, lambda modules, component: xlabs(dict(modules))),
}


def own_code(name: str, model: nn.Module) -> tuple[dict[str, Module], dict[str, LowRank]] | None:
    """A LoRA in the names of the model's own code, or None where nobody trains by such names."""
    if name in CODE:
        return known_lora(model, CODE[name])
    return None


def cell(row: str, name: str) -> str:
    """ "own names", "our tables", "converter", or "–" where the file is refused."""
    code, write = ROWS[row]
    pipe = pipeline_of(MODELS[name])
    unet = hasattr(pipe, "unet")
    model = pipe.unet if unet else pipe.transformer
    if code and unet and row.startswith(("kohya", "ComfyUI")):
        modules, layers = known_lora(model, SAME)
        file = ldm(modules, dots=row.startswith("ComfyUI"))
    else:
        spelled = own_code(name, model) if code else known_lora(model, SAME)
        if spelled is None:
            return "–"
        modules, layers = spelled
        file = write(modules, "unet" if unet else "transformer")
    if not file or (row.startswith("xlabs") and name != "flux1"):
        return "–"
    try:
        planned = plan(pipe, {"e": file})
    except MoleError:
        return "–"
    component = "unet." if unet else "transformer."
    for path, planned_layer in planned.layers.items():
        want = layers[path.removeprefix(component)]
        torch.testing.assert_close(planned_layer.factors["e"].delta(), want.delta(), rtol=1e-5, atol=1e-5)
    keys = collect_layers(file, "file")
    resolve(keys, file, pipe, "file")
    if any(layer.foreign for layer in keys):
        return "converter"
    return "our tables" if unet else "own names"


def table() -> str:
    lines = ["| spelling | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(cell(row, name) for name in COLUMNS) + " |" for row in ROWS]
    return "\n".join(lines)


def test_the_page_says_who_reads_what():
    """Each cell is what reading such a file does; what the page lacks is in the message."""
    text = table()
    assert text in PAGE.read_text(), f"docs/dialects.md lacks this table:\n{text}"


def test_layers_of_the_table_are_all_layers():
    """Sizes and names of the tiny models' files are those of all their linear layers."""
    for name in COLUMNS:
        pipe = pipeline_of(MODELS[name])
        model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        _, layers = known_lora(model, SAME)
        linear = [path for path, layer in scan(model).layers.items() if isinstance(layer, nn.Linear)]
        assert list(layers) == linear
        assert all(sizes(model.get_submodule(path))[1] == layers[path].in_features for path in linear)
        assert load_expert(writer("", "lora_A", "lora_B")(known_lora(model, SAME)[0], "")).layers
