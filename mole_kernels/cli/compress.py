"""`mole-kernels compress`: an expert of smaller rank, or only what that would cost and bring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from mole_kernels.cli.explain import device_of
from mole_kernels.cli.files import CompressArgs
from mole_kernels.cli.pipelines import pipeline_of_name
from mole_kernels.cli.place import ready_file
from mole_kernels.cli.screen import done, facts, layer_bar, number, out, table
from mole_kernels.experts.compress_report import CompressedLayer, Predicted, Report
from mole_kernels.experts.compress_spectrum import ENERGIES, to_json
from mole_kernels.io.merge import compress_file, spectra_of_file

COLUMNS = ("layer", "N", "K", "rank", "→", "error", "bound", "worst error", "worst bound", "µs", "→ µs")


def run(asked: CompressArgs) -> None:
    """Compress, write and show what was asked for."""
    goals = (asked.rank, asked.energy, asked.max_error)
    if not asked.spectrum or any(goal is not None for goal in goals) or asked.out is not None:
        report = _compress(asked)
    else:
        report = None
    spectra = None
    if asked.spectrum:
        with layer_bar("spectrum") as on_layer:
            spectra = spectra_of_file(asked.file, expert=asked.expert, progress=on_layer)
    if asked.json:
        data: dict[str, Any] = {} if report is None else json.loads(report.to_json())
        if spectra is not None:
            data["spectrum"] = json.loads(to_json(spectra))
        print(json.dumps(data))
        return
    if report is not None:
        show(report, asked.layers)
    if spectra is not None:
        rows = [(s.path, s.rank, f"{s.effective:.1f}", *s.ranks) for s in spectra]
        columns = ("layer", "rank", "effective", *(f"{energy:.1%}" for energy in ENERGIES))
        out().print(table("Rank that keeps this part of the squared norm", columns, rows, columns[1:]))
    if asked.out is not None and report is not None:
        done(str(asked.out), f"{len(report.layers)} layers")


def _compress(asked: CompressArgs) -> Report:
    if asked.out is not None:
        ready_file(asked.out)
    device = device_of(asked.device)[0].key
    with layer_bar("compress") as on_layer:
        return compress_file(
            asked.file,
            asked.out,
            rank=asked.rank,
            energy=asked.energy,
            max_error=asked.max_error,
            expert=asked.expert,
            dtype=getattr(torch, asked.dtype) if asked.dtype else None,
            predicted=Predicted(device, asked.tokens),
            to=asked.to,
            pipeline=pipeline_of_name(asked.pipeline),
            progress=on_layer,
        )


def show(report: Report, every: bool) -> None:
    """The whole expert in a few lines, and its layers where asked for."""
    total = report.total()
    if every:
        numbers = [column for column in COLUMNS if column != "layer"]
        out().print(
            table(
                "Layers (errors relative to the layer's own norm)", COLUMNS, map(_row, report.layers), numbers
            )
        )
    share = total["parameters_after"] / max(total["parameters_before"], 1)
    out().print(
        facts(
            [
                ("layers", total["layers"]),
                ("largest rank", f"{total['rank_before']} → {total['rank_after']}"),
                (
                    "parameters",
                    f"{total['parameters_before']:,} → {total['parameters_after']:,} ({share:.1%})",
                ),
                (
                    "error",
                    f"{number(total['relative_error_frobenius'])} of the expert's norm, all layers together "
                    "(measured)",
                ),
                (
                    "worst error",
                    f"{number(total['worst_relative_error_spectral'])} of a layer's largest output "
                    "(measured)",
                ),
                (
                    "predicted",
                    f"{number(total['predicted_us_before'])} → {number(total['predicted_us_after'])} µs, "
                    f"one call of each layer with {report.predicted.tokens} tokens on "
                    f"{report.predicted.device} (×{total['predicted_speedup']:.2f}; a model, not measured)",
                ),
            ]
        )
    )


def _row(layer: CompressedLayer) -> Sequence[object]:
    norm, spectral = layer.frobenius or 1.0, layer.spectral or 1.0
    relative = (
        layer.error_frobenius / norm,
        layer.bound_frobenius / norm,
        layer.error_spectral / spectral,
        layer.bound_spectral / spectral,
    )
    times = (f"{layer.layer_us_before:.1f}", f"{layer.layer_us_after:.1f}")
    return (layer.path, layer.N, layer.K, layer.rank_before, layer.rank_after, *map(number, relative), *times)
