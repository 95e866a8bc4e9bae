"""The demo's report: one HTML file with its pictures inside, made from metrics.json and nothing else measured
again.
"""

from __future__ import annotations

from collections.abc import Mapping

from mole_kernels.demo.evaluate import REGIONS
from mole_kernels.reports.page import bullets, fact_cards, html_table, page, picture, section


def make_demo_page(metrics: Mapping, grid: str, maps: str) -> str:
    """The page. grid and maps are data URIs of the two picture sheets."""
    parts = [
        _facts(metrics),
        section("Same captions, same noise", GRID_TEXT, picture(grid, "picture grid")),
        section("Digits read out of generated pictures", READ_TEXT, _reading_table(metrics)),
        section("Where the gates look", MAP_TEXT, picture(maps, "gate maps"), _auc_table(metrics)),
        section("Held-out denoising loss", LOSS_TEXT, _loss_table(metrics)),
        section("Time per denoising step", TIME_TEXT.format(**metrics["time"]), _time_table(metrics["time"])),
        section("What this shows and what it does not", "", bullets(metrics["notes"])),
        section("How it was made", "", bullets(metrics["settings_text"])),
    ]
    return page("A mixture of two LoRA experts", "A mixture of two LoRA experts, in miniature", LEAD, parts)


LEAD = (
    "A tiny Stable Diffusion pipeline draws rows of handwritten digits from a caption, and is poor at "
    "the digits. "
    "One low-rank expert was trained on close-ups of 0–4, one on close-ups of 5–9. Learned gates mix "
    "them, token by token."
)
GRID_TEXT = (
    "Columns differ only in what is added to the frozen base. Below each slot stands what a separately "
    "trained classifier reads there: "
    "green where it agrees with the caption, - for a blank slot."
)
READ_TEXT = (
    "Share of slots in which the classifier reads what the caption asks for. Mean ± standard "
    "deviation over seeds."
)
MAP_TEXT = (
    "The token gates of every layer whose tokens are places of the picture, averaged over layers (none "
    "is picked), for a generated picture "
    "noised to step 300. The table gives the area under the ROC curve on held-out scenes, for tokens "
    "on an expert's own cards against "
    "all others, and against the other expert's cards; 0.5 is chance."
)
LOSS_TEXT = (
    "Mean squared error of the predicted noise on scenes of held-out scans, the same noise for every "
    "variant, as change against the base "
    "in percent (less is better; mean ± standard deviation over seeds). The best constant was picked "
    "on these very scenes, which favours "
    "it. The learned constant is one trained number per layer and expert: the fair control for gates "
    "that see the input."
)
TIME_TEXT = (
    "One UNet call for {pictures} pictures with guidance, one thread, {rounds} interleaved rounds; "
    "each time is divided by the base's in "
    "the same round. The base takes {base_ms:.1f} ms. Layers this small are mostly overhead: see the "
    "benchmarks for real ones. "
    "PEFT adds the experts without gates, the others with both gates."
)


def _facts(metrics: Mapping) -> str:
    reading, loss, ours = metrics["reading"], metrics["loss"], metrics["time"]["ratio"]["ours"]
    mix = metrics["shown"]
    digits = [100 * reading[name]["digits"]["mean"] for name in ("base", mix)]
    # the control is trained in the demo itself, so a quick run has none
    control = (
        f" ({loss['learned constant']['all']['change_mean']:+.1f} % for learned constants)"
        if "learned constant" in loss
        else ""
    )
    eager = metrics["time"]["ratio"]["eager MoLE"]["median"]
    area = metrics["gates"][mix]["mean map"]["own_vs_rest"]["mean"]
    items = [
        (f"{digits[0]:.0f} → {digits[1]:.0f} %", "digits read as asked for, base → mixture"),
        (f"{loss[mix]['all']['change_mean']:+.1f} %", f"held-out loss against the base{control}"),
        (f"{area:.2f}", "AUC of the mean gate map, own cards against the rest"),
        (f"{ours['median']:.2f} ×", f"time per step over the base (eager MoLE {eager:.2f} ×)"),
    ]
    return fact_cards(items)


def _reading_table(metrics: Mapping) -> str:
    columns = ("digits", "low", "high", "blank")
    rows = []
    for name, row in metrics["reading"].items():
        cells = [
            f"{100 * row[c]['mean']:.1f} <span class=soft>± {100 * row[c]['sd']:.1f}</span>" for c in columns
        ]
        rows.append((name, cells))
    return html_table(("variant", "all digits %", "0–4 %", "5–9 %", "blank slots %"), rows, metrics["shown"])


def _loss_table(metrics: Mapping) -> str:
    rows = []
    for name, row in metrics["loss"].items():
        if name == "base":
            cells = [f"{row[r]['mean']:.5f}" for r in REGIONS]
        else:
            cells = [_change(row[r]["change_mean"], row[r]["change_sd"]) for r in REGIONS]
        rows.append((name, cells))
    return html_table(("variant", "all", "0–4 cards", "5–9 cards", "background"), rows, metrics["shown"])


def _auc_table(metrics: Mapping) -> str:
    rows = []
    for variant, found_rows in metrics["gates"].items():
        for row, areas in found_rows.items():
            cells = [
                f"{areas[c]['mean']:.3f} <span class=soft>± {areas[c]['sd']:.3f}</span>"
                for c in ("own_vs_rest", "own_vs_other")
            ]
            rows.append((f"{variant}: {row}", cells))
    return html_table(("gates: averaged over", "own cards vs rest", "own vs other cards"), rows, "")


def _time_table(time: Mapping) -> str:
    rows = [
        (name, [f"{r['median']:.3f}", f"{r['p20']:.3f}", f"{r['p80']:.3f}"])
        for name, r in time["ratio"].items()
    ]
    return html_table(("model", "÷ base, median", "p20", "p80"), rows, "ours")


def _change(mean: float, sd: float) -> str:
    tone = "good" if mean + sd < 0 else "bad" if mean - sd > 0 else "soft"
    return f'<span class="{tone}">{mean:+.2f}</span> <span class=soft>± {sd:.2f}</span>'
