"""The spectrum of every layer of an expert: where it could be compressed; the data that a plot draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mole_kernels.experts.compress import CompressionTarget
from mole_kernels.experts.compress_svd import singular_values
from mole_kernels.experts.lowrank import LowRank

ENERGIES = (0.9, 0.99, 0.999)


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's singular values, and the ranks that keep 90, 99 and 99.9 % of Σσ².

    Attributes:
        path: The layer.
        N: Outputs.
        K: Inputs.
        rank: R.
        values: Singular values of ΔW, falling.
        ranks: One for each of `ENERGIES`.
        effective: exp(−Σ p ln p) with p = σ²/Σσ²: the rank that so even a spectrum would have (Roy and
            Vetterli, 2007).
    """

    path: str
    N: int
    K: int
    rank: int
    values: tuple[float, ...]
    ranks: tuple[int, ...]
    effective: float


def layer_spectrum(path: str, layer: LowRank, dtype: torch.dtype = torch.float64) -> LayerSpectrum:
    """The spectrum of one layer's ΔW, scale included.

    Args:
        path: The layer.
        layer: Its factors.
        dtype: What the decompositions are computed in.
    """
    values = singular_values(layer, dtype).double()
    share = values.square() / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    effective = torch.special.entr(share).sum().exp().item() if values[0] > 0 else 0.0
    ranks = tuple(CompressionTarget(energy=energy).ranks(values) for energy in ENERGIES)
    return LayerSpectrum(
        path, layer.out_features, layer.in_features, layer.rank, tuple(values.tolist()), ranks, effective
    )


def layer_spectra(layers: Mapping[str, LowRank], dtype: torch.dtype = torch.float32) -> list[LayerSpectrum]:
    """Every layer's spectrum, in the expert's order; one layer at a time, ΔW is never formed.

    Args:
        layers: Path -> LowRank.
        dtype: What the decompositions are computed in.
    """
    return [layer_spectrum(path, layers[path], dtype) for path in layers]


def to_json(spectra: list[LayerSpectrum]) -> str:
    """{energies, layers: [{path, N, K, rank, values, ranks, effective}]}"""
    layers = [
        {**vars(layer), "values": [float(f"{value:.6g}") for value in layer.values]} for layer in spectra
    ]
    return json.dumps({"energies": ENERGIES, "layers": layers})
