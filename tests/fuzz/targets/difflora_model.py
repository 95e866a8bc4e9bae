"""The settings of a trained model: sizes of a stranger's network, beside weights that are whole."""

from __future__ import annotations

import functools
import json
import os

import torch

from mole_kernels.errors import MoleError
from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
from mole_kernels.methods.difflora.manifest import Manifest
from mole_kernels.methods.difflora.store import load_autoencoder, load_predictor, save_autoencoder
from tests.fuzz.meeting import CORPUS, file_of, folder

JSON = True


@functools.cache
def digest(process: int) -> bytes:
    """Writes the weights that the first seed speaks of, and says what a record must say of them."""
    record = json.loads((CORPUS / "difflora_model" / "seed-0").read_bytes())
    with torch.random.fork_rng():
        autoencoder = LoRAAutoencoder(AutoencoderConfig(**record["autoencoder"]))
    save_autoencoder(folder() / "made", autoencoder, Manifest.from_json(json.dumps(record["manifest"])))
    made = json.loads((folder() / "made" / "model.json").read_text())
    (folder() / "made" / made["weights"]).rename(folder() / "w.safetensors")
    return made["digest"].encode()


def check(data: bytes) -> None:
    file_of(data.replace(b"DIGEST", digest(os.getpid())), "model.json")
    for load in (load_autoencoder, load_predictor):
        try:
            load(folder())
        except MoleError:
            continue
    load_autoencoder(folder())
