"""`mole-kernels compress`: an expert of smaller rank, or only what that would cost and bring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mole_kernels.cli.merge import layer_bar
from mole_kernels.cli.screen import done, facts, number, out, table
from mole_kernels.errors import MoleValueError
from mole_kernels.experts.compress import NOMINAL, CompressedLayer, Predicted, Report
from mole_kernels.experts.compress_spectrum import to_json
from mole_kernels.files.writer import atomic_write
from mole_kernels.io.merge import compress_file, spectra_of_file

COLUMNS = ("layer", "N", "K", "rank", "→", "error", "bound", "worst error", "worst bound", "µs", "→ µs")


def run(
    file: Path,
    target: Path | None,
    *,
    report: Path | None,
    spectrum: Path | None,
    layers: bool,
    device: str | None,
    tokens: int | None,
    dtype: torch.dtype | None,
    expert: str | None,
    **arguments: Any,
) -> None:
    """Compress, write and show what was asked for."""
    if any(arguments.get(name) is not None for name in ("rank", "energy", "max_error")) or not spectrum:
        predicted = Predicted(device or NOMINAL.device, tokens or NOMINAL.tokens)
        with layer_bar("compress") as heard:
            made = compress_file(
                file, target, dtype=dtype, expert=expert, predicted=predicted, progress=heard, **arguments
            )
        show(made, layers)
        if target is not None:
            done(str(target), f"{len(made.layers)} layers")
        if report is not None:
            _write(report, made.to_json())
    elif target is not None or report is not None:
        raise MoleValueError(
            "compress", expected="exactly one of --rank, --energy and --max-error", got="none"
        )
    if spectrum is not None:
        with layer_bar("spectrum") as heard:
            found = spectra_of_file(file, expert=expert, progress=heard)
        _write(spectrum, to_json(found))


def show(made: Report, every: bool) -> None:
    """The whole expert in a few lines, and its layers where asked for."""
    total = made.total()
    if every:
        numbers = [column for column in COLUMNS if column != "layer"]
        out().print(
            table(
                "Layers (errors relative to the layer's own norm)", COLUMNS, map(_row, made.layers), numbers
            )
        )
    kept = total["parameters_after"] / max(total["parameters_before"], 1)
    out().print(
        facts(
            [
                ("layers", total["layers"]),
                ("largest rank", f"{total['rank_before']} → {total['rank_after']}"),
                (
                    "parameters",
                    f"{total['parameters_before']:,} → {total['parameters_after']:,} ({kept:.1%})",
                ),
                (
                    "error",
                    f"{number(total['relative_error_frobenius'])} of the expert's norm, all layers together (measured)",
                ),
                (
                    "worst error",
                    f"{number(total['worst_relative_error_spectral'])} of a layer's largest output (measured)",
                ),
                (
                    "predicted",
                    f"{number(total['predicted_us_before'])} → {number(total['predicted_us_after'])} µs, one call of each layer with "
                    f"{made.predicted.tokens} tokens on {made.predicted.device} (×{total['predicted_speedup']:.2f}; a model, not measured)",
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


def _write(path: Path, text: str) -> None:
    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(path, write)
    done(str(path), "JSON")
