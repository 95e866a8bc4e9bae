"""What the measured figures say, in sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_kernels.demo.evaluate import GUIDANCE


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """Plain statements, the disappointing ones included."""
    loss, reading, gates = result["loss"], result["reading"], result["gates"]["both"]
    parts = {region: row["change_mean"] for region, row in loss["both"].items()}
    base = reading["base"]["digits"]["mean"]
    real = result["base"]["reader_sharp"]["digits"]
    lines = [
        f"The classifier reads {100 * real:.1f} % of the digits of real held-out scenes, "
        f"{100 * base:.0f} % of the base's "
        f"and {100 * reading['both']['digits']['mean']:.0f} % of the mixture's.",
        f"On held-out scenes the mixture's loss is {parts['all']:+.1f} % against the base: "
        f"{parts['low']:+.1f} % on cards of 0–4, "
        f"{parts['high']:+.1f} % on cards of 5–9, {parts['background']:+.1f} % elsewhere.",
        f"The experts simply summed: {loss['sum']['all']['change_mean']:+.1f} %; the best constant for both "
        f"({loss['best constant']['which'].removeprefix('constant ')}): "
        f"{loss['best constant']['all']['change_mean']:+.1f} %.",
    ]
    if "learned constant" in loss:
        lines += _ablation(result)
    own = gates["mean map"]["own_vs_rest"]["mean"]
    lines.append(
        f"Gate maps: averaged over all layers into one map, AUC {own:.2f} for an expert's own cards "
        "against the rest; a single layer's "
        f"gate has {gates['mean of layers']['own_vs_rest']['mean']:.2f} on average. Localisation is "
        "claimed no further than that."
    )
    lines.append(
        "It says nothing about faces, hands, large models or GPUs: data, base and experts are toys "
        "that anyone can rerun."
    )
    return lines


def _ablation(result: Mapping[str, Any]) -> list[str]:
    loss, z = result["loss"], result["paired_z"]
    change = {
        name: loss[name]["all"]["change_mean"] for name in ("learned constant", "local", "global", "both")
    }
    gain = change["learned constant"] - change["both"]
    verdict = "is worth" if gain > 0 else "costs"
    best = min(change, key=lambda name: change[name])
    return [
        f"Letting the gates see the input {verdict} {abs(gain):.1f} points over learned constants "
        "(paired z over scenes, by seed: "
        f"{', '.join(f'{value:.1f}' for value in z['learned constant'])}).",
        f"Local gates alone {change['local']:+.1f} %, global alone {change['global']:+.1f} %, both "
        f"{change['both']:+.1f} %; "
        f"the lowest of the trained ones is: {best}.",
    ]


def describe_settings(result: Mapping[str, Any]) -> list[str]:
    """How the figures were made."""
    settings, base, seeds = result["settings"], result["base"], result["seeds"]
    trained = (
        "Experts and gates are the shipped ones; seeds vary the noise of the pictures."
        if result["quick"]
        else f"Experts: rank {settings['rank']}, {settings['expert_steps']} steps of "
        f"{settings['expert_batch']} close-ups each. "
        f"Gates: {settings['gate_steps']} steps of {settings['gate_batch']} scenes. Trained anew for "
        "each seed."
    )
    return [
        trained,
        f"Base: {base.get('base_steps', '?')} steps; in its training {100 * base['weak']:.0f} % of the "
        "digits were out of focus and "
        f"{100 * base['mislabel']:.0f} % captioned as another digit of their half.",
        f"{len(seeds)} seed(s): {', '.join(map(str, seeds))}. Loss on {settings['held_out']} held-out "
        "scenes at five timesteps; digits read in "
        f"{settings['captions']} pictures per variant and seed, {settings['steps']} DDIM steps, "
        f"guidance {GUIDANCE:g}.",
        f"torch {result['machine']['torch']} on {result['machine']['processors']} processors.",
    ]
