"""`inspect` names every adapter family that a file holds, and counts its layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mole_kernels.cli.app import app

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LORA = {f"{LAYER}.lora_down.weight": torch.ones(4, 16), f"{LAYER}.lora_up.weight": torch.ones(16, 4)}
FILES = {
    "DoRA": (LORA | {f"{LAYER}.dora_scale": torch.ones(16, 1)}, {"DoRA": 1}),
    "LoKr": ({f"{LAYER}.lokr_w1": torch.ones(4, 4), f"{LAYER}.lokr_w2": torch.ones(4, 4)}, {}),
    "a full bias difference": (LORA | {f"{LAYER}.diff_b": torch.ones(16)}, {"bias difference": 1}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_family_is_named(name: str, tmp_path: Path):
    tensors, families = FILES[name]
    save_file(tensors, tmp_path / "a.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.safetensors")])
    assert shown.exit_code == 0 and name in shown.output and "Stable Diffusion" in shown.output
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.safetensors"), "--json"])
    expert = next(iter(json.loads(told.output)["experts"].values()))
    assert sorted(expert["families"].values()) == [kind for kind, n in families.items() for _ in range(n)]
    assert len(expert["layers"]) + len(expert["families"]) == 1
