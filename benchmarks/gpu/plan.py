"""What is verified and measured, in the order of importance: where time runs out, the end of the list is
dropped (and recorded).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from benchmarks.cases import Case, layers
from benchmarks.gpu.context import Item

SDXL, FLUX = "SDXL-UNet", "FLUX.1-dev"
OTHERS = ("SD1.5-UNet", "SD3.5-large", "FLUX.2-dev", "Qwen-Image", "Z-Image", "Wan2.1-T2V-1.3B")
EVERY = (SDXL, FLUX, *OTHERS, "SD3.5-medium", "FLUX.2-klein-4B", "Wan2.1-T2V-14B")
RANKS = (8, 16, 32, 64, 128, 256, 512)
EXPERTS = (1, 2, 4, 8)
# the layer that most of SDXL's time goes to, and its like in FLUX
SQUARE = (2048, 1280, 1280)
LONG = (4608, 3072, 3072)


def of_rank(case: Case, R: int, E: int = 2, **named: Any) -> Case:
    """Rank R in all, in E experts."""
    return replace(case, dtype="bf16", r=max(1, R // E), E=E, **named)


def layer_item(case: Case, kind: str = "layer", **named: Any) -> Item:
    return {"id": str(case), "kind": kind, "case": asdict(case), **named}


def shape_of(model: str, shape: tuple[int, int, int]) -> Case:
    return next(c for c in layers(model) if shape == (c.M, c.K, c.N))


def core() -> Iterator[Item]:
    """What the goals are made of."""
    square, long = shape_of(SDXL, SQUARE), shape_of(FLUX, LONG)
    yield layer_item(of_rank(square, 64), cold=True, compile=True, launches=True)
    yield layer_item(of_rank(square, 64, mode="training"), launches=True)
    yield from (layer_item(of_rank(c, 64), cold=True) for c in layers(SDXL))
    yield from (layer_item(of_rank(c, 16)) for c in layers(SDXL))
    yield from (layer_item(of_rank(c, 64)) for c in layers(FLUX)[:9])
    # against LoRAFusion: attention shapes without gates, as it has none
    yield from (
        layer_item(of_rank(c, 64, gate="none"))
        for c in [*layers(SDXL, "attn"), long]
        if c.K == c.N or c.M == 154
    )


def models() -> Iterator[Item]:
    for model, R in (("sdxl", 64), ("sdxl", 16), ("flux", 64)):
        yield {
            "id": f"step {model} R{R} mole",
            "kind": "model",
            "model": model,
            "R": R,
            "gate": "mole",
            "limit": 90,
        }


def sweeps(full: bool) -> Iterator[Item]:
    """Ranks, numbers of experts, training, the other models."""
    square, long = shape_of(SDXL, SQUARE), shape_of(FLUX, LONG)
    for case in (square, long):
        yield from (layer_item(of_rank(case, R)) for R in RANKS)
    for case in (square, long):
        yield from (layer_item(of_rank(case, 64, E)) for E in EXPERTS)
    some = [shape_of(SDXL, s) for s in ((8192, 640, 640), (2048, 1280, 10240), (154, 2048, 1280))]
    yield from (layer_item(of_rank(c, 64, mode="training")) for c in [*some, long])
    yield layer_item(of_rank(square, 64, mode="training", gate="none"), launches=True)
    yield layer_item(of_rank(long, 64), compile=True)
    for model in OTHERS:
        found = layers(model, "") if full else layers(model)[:2]
        yield from (layer_item(of_rank(c, 64)) for c in found)
    yield layer_item(of_rank(square, 512), cold=True)
    yield {
        "id": "step flux R64 mole compiled",
        "kind": "model",
        "model": "flux",
        "R": 64,
        "gate": "mole",
        "launch": ["compiled"],
        "limit": 120,
    }


def everything() -> Iterator[Item]:
    """Every shape, rank, number of experts, gate and direction; hours, not minutes."""
    for model in EVERY:
        for case in layers(model):
            for R in RANKS:
                for E in EXPERTS:
                    for gate in ("mole", "none"):
                        for mode in ("forward", "training"):
                            made = of_rank(case, R, E, gate=gate, mode=mode)
                            yield layer_item(made, cold=True, compile=E == 2 and gate == "mole")
    yield {
        "id": "step sdxl R64 mole compiled",
        "kind": "model",
        "model": "sdxl",
        "R": 64,
        "gate": "mole",
        "launch": ["compiled"],
        "limit": 600,
    }


def tiny() -> Iterator[Item]:
    """For a machine without a GPU: the same kinds of item, each a fraction of a second."""
    small = Case("tiny", 64, 48, 40, True, "bf16", 8, counts=(("tiny", 3),))
    yield layer_item(small, cold=True)
    yield layer_item(replace(small, r=32))
    yield layer_item(replace(small, gate="none"))
    yield layer_item(replace(small, M=32, N=64, counts=(("tiny", 1),)))
    yield layer_item(replace(small, mode="training"))
    yield {"id": "step flux-tiny R16 mole", "kind": "model", "model": "flux-tiny", "R": 16, "gate": "mole"}


def measured(device: str, quick: bool, full: bool) -> list[Item]:
    if device != "cuda":
        found = list(tiny())
    elif quick:
        few = ("2048x1280x1280-bf16-r32", "8192x640x640-bf16-r32", "4608x3072x3072-bf16-r32")
        found = [{**i, "compile": False} for i in core() if i["id"].endswith(few)]
    else:
        found = [*core(), *models(), *sweeps(full), *(everything() if full else ())]
    return merge(found)


def merge(items: list[Item]) -> list[Item]:
    """One item for each id, with whatever any of them asked for; a shape that several models have counts for
    all of them.
    """
    found: dict[str, Item] = {}
    for item in items:
        first = found.get(item["id"])
        if first is None:
            found[item["id"]] = item
            continue
        both = {**item, **first}
        if "case" in item:
            counts = dict(item["case"]["counts"]) | dict(first["case"]["counts"])
            both["case"] = {**first["case"], "counts": tuple(sorted(counts.items()))}
        found[item["id"]] = both
    return list(found.values())


def warmed(items: list[Item]) -> list[Item]:
    """The same cases, run once: Triton's kernels are then compiled, by many processes at a time, before
    anything is timed.
    """
    return [
        {**i, "kind": "warm", "id": f"warm {i['id']}", "compile": False}
        for i in items
        if i["kind"] == "layer"
    ]


def chosen(items: list[Item], pattern: str) -> list[Item]:
    """Those whose id contains `pattern`, or matches it as a shell's pattern."""
    if not pattern:
        return items
    return [i for i in items if pattern in i["id"] or fnmatch.fnmatch(i["id"], pattern)]
