"""One HTML page about experts and, where a pipeline ran, about its gates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.compress_svd import singular_values
from mole_kernels.reports import page, plots
from mole_kernels.reports.record import Recorder, layer_kind

LEVELS = (0.9, 0.99, 0.999)


def bank_spectra(bank: ExpertBank) -> dict[str, dict[str, Tensor]]:
    """Singular values of each layer's ΔW, from its factors; the dense ΔW is never formed.

    Returns:
        {expert: {layer: [P] falling}}, scales included.
    """
    return {
        name: {path: singular_values(f) for path, f in expert.layers.items()}
        for name, expert in bank.experts.items()
    }


def rank_for(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of the squares.

    Args:
        values: [P] singular values, falling.
        energy: The share of their sum of squares, in 0…1.

    Returns:
        The rank; 0 where all values are zero.
    """
    squares = values.double().square().cumsum(0)
    if not len(squares) or squares[-1] == 0:
        return 0
    return min(len(values), int((squares < energy * squares[-1]).sum()) + 1)


def report_page(
    bank: ExpertBank,
    recorder: Recorder | None = None,
    picture: Tensor | None = None,
    title: str = "Experts and gates",
) -> str:
    """Write the page.

    Args:
        bank: The experts: their spectra, their sizes, and where each could be compressed.
        recorder: A recorder after a run, for usage over the steps and gate maps.
        picture: [3,H,W] in 0…1, the finished picture, to lay the maps over.
        title: Title and heading.

    Returns:
        HTML that needs no other file.
    """
    values = bank_spectra(bank)
    norms = _norms(values)
    kinds = list(dict.fromkeys(kind for of in norms.values() for kind in of))
    parts = [page.fact_cards(_facts(bank, values))]
    parts.append(
        page.section(
            "Where the experts act",
            SIZE_TEXT,
            page.plot(plots.size_by_layer(norms, kinds), "norms by kind of layer"),
        )
    )
    parts.append(
        page.section(
            "Spectrum of each expert",
            SPECTRUM_TEXT,
            page.plot(plots.plot_spectra(values), "singular values"),
            _ranks(bank, values),
        )
    )
    if recorder is not None:
        parts.append(
            page.section(
                "How much of each expert",
                USAGE_TEXT,
                page.plot(plots.usage_over_steps(recorder), "usage over the steps"),
                _usage(recorder),
            )
        )
        if picture is not None and recorder.kinds():
            parts.append(
                page.section(
                    "Where the gates look",
                    MAP_TEXT,
                    page.plot(plots.maps_over_picture(recorder, picture), "gate maps"),
                )
            )
        if recorder.kinds():
            middle = f"{LAYER_TEXT} Timestep {recorder.steps[len(recorder.steps) // 2]}."
            parts.append(
                page.section(
                    "Layer by layer",
                    middle,
                    page.plot(plots.maps_of_layers(recorder), "gate maps by kind of layer"),
                )
            )
    lead = f"{len(bank.names)} experts: " + ", ".join(bank.names)
    return page.page(title, title, lead, parts)


SIZE_TEXT = (
    "The Frobenius norm of what each expert adds to the weights, by kind of layer: the root of the sum of "
    "squares over its layers."
)
SPECTRUM_TEXT = (
    "Singular values of what each expert adds, layer by layer, divided by the layer's largest. A curve "
    "that falls early means that a lower rank would do: `mole-kernels compress` makes it, and measures "
    "the error. The table counts the ranks that keep a share of the squares."
)
USAGE_TEXT = (
    "The mean gate (given, token and sample gate multiplied; scales not included) over the sample's "
    "tokens, by kind of layer, from the first denoising step to the last."
)
LAYER_TEXT = (
    "The same gates by kind of layer, in the middle of the run; the maps of one expert share their colour "
    "range."
)
MAP_TEXT = (
    "The gates of all kinds of layers whose tokens are places of the picture, averaged with equal weight "
    "and laid over the finished picture. Each row has its own colour range, printed beside it."
)


def _facts(bank: ExpertBank, values: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, str]]:
    paths = {path for layers in values.values() for path in layers}
    parameters = sum(
        f.down.numel() + f.up.numel() for expert in bank.experts.values() for f in expert.layers.values()
    )
    ranks = sorted({f.rank for expert in bank.experts.values() for f in expert.layers.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
    return [
        (str(len(bank.names)), "experts"),
        (str(len(paths)), "layers changed by at least one of them"),
        (span, "rank" if len(ranks) == 1 else "ranks"),
        (f"{parameters / 1e6:.2f} M", "parameters in all experts"),
    ]


def _norms(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for name, layers in values.items():
        squares: dict[str, float] = {}
        for path, singular in layers.items():
            squares[layer_kind(path)] = squares.get(layer_kind(path), 0.0) + singular.square().sum().item()
        out[name] = {kind: math.sqrt(total) for kind, total in squares.items()}
    return out


def _ranks(bank: ExpertBank, values: Mapping[str, Mapping[str, Tensor]]) -> str:
    rows = []
    for name, layers in values.items():
        now = sum(f.rank for f in bank.experts[name].layers.values())
        counts = [sum(rank_for(v, level) for v in layers.values()) for level in LEVELS]
        rows.append(
            (
                name,
                [f"{now}", *(f"{k} <span class=soft>({100 * k / max(now, 1):.0f} %)</span>" for k in counts)],
            )
        )
    return page.html_table(
        ("expert", "ranks, all layers", *(f"for {100 * level:g} %" for level in LEVELS)), rows
    )


def _usage(recorder: Recorder) -> str:
    _, values = recorder.usage("all")
    first, last, mean = values[0, 0], values[0, -1], values[0].mean(0)
    rows = [
        (name, [f"{mean[e]:.3f}", f"{first[e]:.3f}", f"{last[e]:.3f}"])
        for e, name in enumerate(recorder.names)
    ]
    spread = torch.stack([values[0, :, e].std(unbiased=False) for e in range(len(recorder.names))])
    return page.html_table(
        ("expert", "mean gate", "first step", "last step", "spread over steps"),
        [(n, [*c, f"{spread[i]:.3f}"]) for i, (n, c) in enumerate(rows)],
    )
