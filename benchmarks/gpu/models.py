"""End to end: one denoising step of a whole model, un-adapted and adapted by PEFT, the eager MoLE layer and
ours.

The copies share the base's weights. Eager, CUDA graph, and compiled where asked; peak memory. Steps take
turns (ABBA) as layers do.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, Case
from benchmarks.device import Run
from benchmarks.gpu import clock, flux
from benchmarks.gpu.context import Context, Item, Outcome
from benchmarks.gpu.methods import PLAIN, installed, layer_of, peft_of
from benchmarks.layer import Layer
from benchmarks.peers import Eager

METHODS: dict[str, Callable[[Layer], nn.Module]] = {"ours": layer_of, "eager": Eager, "peft": peft_of}
# what MoLE adapts in a UNet; in FLUX's blocks every linear layer with a token dimension
PARTS = {"sdxl": "attentions.", "sdxl-tiny": "attentions."}


def sdxl(tiny: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """The UNet by its published configuration and one step's inputs: batch 2, 1024². On the meta device."""
    from diffusers import UNet2DConditionModel

    from benchmarks.patching import SDXL

    small: dict[str, Any] = {
        "block_out_channels": (32, 32, 32),
        "transformer_layers_per_block": [1, 1, 1],
        "attention_head_dim": [2, 2, 2],
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SDXL | (small if tiny else {})))
        edge, width = (8, 64) if tiny else (128, 2048)
        inputs = {
            "sample": torch.empty(2, 4, edge, edge),
            "timestep": torch.empty(2),
            "encoder_hidden_states": torch.empty(2, 77, width),
            "text_embeds": torch.empty(2, 1280),
            "time_ids": torch.empty(2, 6),
        }
    return unet, inputs


def flux_blocks(tiny: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = flux.TINY if tiny else flux.Sizes()
    with torch.device("meta"):
        inputs = {
            "x": torch.empty(1, sizes.picture, sizes.width),
            "c": torch.empty(1, sizes.text, sizes.width),
            "vector": torch.empty(1, sizes.width),
        }
        return flux.Blocks(sizes), inputs


def step(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    if "sample" not in inputs:
        return model(**inputs)
    added = {name: inputs[name] for name in ("text_embeds", "time_ids")}
    args = [inputs[name] for name in ("sample", "timestep", "encoder_hidden_states")]
    return model(*args, added_cond_kwargs=added, return_dict=False)[0]


BUILD: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "sdxl": sdxl,
    "flux": flux_blocks,
    "sdxl-tiny": lambda: sdxl(True),
    "flux-tiny": lambda: flux_blocks(True),
}


def filled(
    model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, kind: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Random weights whose activations stay of size one, random inputs."""
    torch.manual_seed(0)
    model = model.to(dtype).to_empty(device=kind).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(std=(p[0].numel()) ** -0.5)
        else:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model, {name: torch.randn(t.shape, device=kind, dtype=dtype) for name, t in inputs.items()}


def shared(model: nn.Module) -> nn.Module:
    """A copy of the modules; the tensors are the same."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def adapted(
    model: nn.Module, make: Callable[[Layer], nn.Module], R: int, gate: str, part: str
) -> tuple[nn.Module, int]:
    """A copy of `model` whose linear layers named with `part` are `make`'s, and how many they are."""
    model = shared(model)
    found = [
        (name, m)
        for name, m in model.named_modules()
        if type(m).__name__ in ("Linear", "LoRACompatibleLinear") and part in f"{name}."
    ]
    found = [(name, m) for name, m in found if "norm" not in name.rpartition(".")[2]]
    for i, (name, base) in enumerate(found):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(random_layer(base, R, gate, i)).eval())  # type: ignore[arg-type]
    return model, len(found)


def random_layer(base: nn.Linear, R: int, gate: str, seed: int) -> Layer:
    """Experts and gates around an existing layer; small enough that activations stay of size one."""
    dtype, device = base.weight.dtype, base.weight.device.type
    case = Case(
        "", 2, base.in_features, base.out_features, base.bias is not None, _short(dtype), R // 2, 2, gate=gate
    )
    layer = Layer.make(case, seed, device)
    layer.base = base
    return layer


def _short(dtype: torch.dtype) -> str:
    return next(name for name, d in DTYPES.items() if d == dtype)


def check(item: Item, context: Context) -> Outcome:
    """Rows of one model at one rank: every method eager and graphed; compiled where the item says so."""
    out, kind = Outcome(), context.device.kind
    if item["model"].startswith("sdxl") and not installed("diffusers"):
        out.refused[item["model"]] = "diffusers is not installed"
        return out
    with torch.no_grad():
        plain, inputs = filled(
            *BUILD[item["model"]](), DTYPES["bf16"] if kind == "cuda" else DTYPES["fp32"], kind
        )
        models, layers = {PLAIN: plain, "plain again": plain}, 0
        for name, make in METHODS.items():
            if name in context.skip or (name == "peft" and not installed("peft")):
                continue
            context.at(name)
            try:
                models[name], layers = adapted(
                    plain, make, item["R"], item["gate"], PARTS.get(item["model"], "")
                )
                compare(item, name, step(models[name], inputs), step(plain, inputs), out)
            # a model may be too much for one method's memory or code; the others go on
            except Exception as error:
                models.pop(name, None)
                out.fail(item, name, "model", error)
        for launch in item.get("launch", ("eager", "graph")):
            out.rows += rows(item, launch, models, inputs, layers, context, out)
    return out


def compare(item: Item, name: str, y: Tensor, base: Tensor, out: Outcome) -> None:
    """A random model has no truth; the output must be finite, and differ from the un-adapted one."""
    wrong = [] if bool(y.isfinite().all()) else ["the output is not finite"]
    wrong += ["nothing changed: no expert is at work"] if torch.equal(y, base) else []
    out.judge(item, name, "model", wrong)


def rows(
    item: Item,
    launch: str,
    models: dict[str, nn.Module],
    inputs: dict[str, Tensor],
    layers: int,
    context: Context,
    out: Outcome,
) -> list[dict[str, Any]]:
    runs: dict[str, Run] = {}
    peaks: dict[str, int | None] = {}
    for name, model in models.items():
        context.at(name)
        try:
            called = torch.compile(model) if launch == "compiled" else model
            run = functools.partial(step, called, inputs)
            peaks[name] = context.device.peak(run)
            runs[name] = context.device.captured(run) if launch == "graph" else run
        except Exception as error:
            out.fail(item, name, launch, error)
    if PLAIN not in runs:
        return []
    times = clock.measured(context.device, runs, 1, context.seconds)
    made = []
    for name, timed in times.items():
        low, middle, high = timed.to(times[PLAIN])
        ratio = {"plain": round(middle, 4), "p20": round(low, 4), "p80": round(high, 4)}
        if "eager" in times:
            ratio["eager"] = round(timed.to(times["eager"])[1], 4)
        us = dict(zip(("p20", "p50", "p80"), (round(t, 1) for t in timed.us)))
        made.append(
            {
                "id": item["id"],
                "op": "step",
                "model": item["model"],
                "R": item["R"],
                "gate": item["gate"],
                "layers": layers,
                "launch": launch,
                "method": name,
                "us": us,
                "ratio": ratio,
                "rounds": len(timed.samples),
                "peak_mem": peaks.get(name),
            }
        )
    return made


HANDLERS = {"model": check}
