"""Counts of the calls of accelerated PEFT layers: computed here, or by PEFT's own forward and why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypedDict
from weakref import WeakSet

from torch import nn

from mole_kernels.backends import select
from mole_kernels.errors import MoleWarning
from mole_kernels.tally import count, totals

ACCELERATED = "accelerated"
PEFT_FORWARD = "PEFT's own forward"
# what a caller asked for, by a state of the layer or by the kind of call: no reason for a warning
DISABLED = "adapters are disabled"
MERGED = "adapters are merged into the weight"
NONE_ACTIVE = "no adapter is active"
ADAPTER_NAMES = "adapter_names were given"
GLOBAL_HOOKS = "global module hooks"
TRANSFORMS = "function transforms or forward-mode derivatives"
TRACING = "tracing"
REQUESTED = frozenset((DISABLED, MERGED, NONE_ACTIVE, ADAPTER_NAMES, GLOBAL_HOOKS, TRANSFORMS, TRACING))


class CallReport(TypedDict):
    """Calls of one layer, or of all: how many were computed here, and why the others were not."""

    accelerated: int
    base_called: dict[str, int]
    fallbacks: dict[str, int]


class Status(TypedDict):
    """What `status` returns."""

    accelerated: int
    base_called: dict[str, int]
    fallbacks: dict[str, int]
    layers: dict[str, int]
    backends: dict[str, str | None]
    refusals: dict[str, int]


class Outcome(NamedTuple):
    """How one call was computed: the key that calls are counted by."""

    way: Literal["operator", "base called", "fallback"]
    reason: str


OPERATOR = Outcome("operator", "")
# of the whole process
all_calls: Counter[Outcome] = Counter()
# every layer whose class was exchanged, in any model
accelerated_layers: WeakSet[nn.Module] = WeakSet()
# reasons that were warned about: each once in a process
_warned: set[str] = set()


def count_fallback(reason: str, layer_calls: Counter[Outcome]) -> None:
    """Count one call of PEFT's own forward; warn of a reason that the caller did not ask for, once."""
    count(Outcome("fallback", reason), all_calls, layer_calls)
    if reason not in REQUESTED and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"mole_kernels: a call of an accelerated layer went through {PEFT_FORWARD}: {reason}. "
            "mk.status() counts such calls, AccelerateHandle.report() names the layers.",
            MoleWarning,
            stacklevel=3,
        )


def mark_warned(reasons: Iterable[str]) -> None:
    """Note that the caller has been warned of these reasons."""
    _warned.update(reasons)


def status(*, reset: bool = False, device: str = "cpu") -> Status:
    """Report, for the whole process, what `accelerate` computes: calls and layers of every model.

    Counts run from the start or the last reset. They are exact under threads. Calls inside a compiled graph
    are not counted. `AccelerateHandle.report` says the same of one model, layer by layer.

    Args:
        reset: Begin again at zero after this report.
        device: Type of the device that the backends are asked about.

    Returns:
        A dictionary:
            accelerated: Calls of PEFT layers that were computed here.
            base_called: {reason: those among them whose base layer was called as a module}.
            fallbacks: {reason: calls that PEFT's own forward computed}.
            layers: {"accelerated" or "PEFT's own forward: reason": number of layers whose next call goes that
            way}.
            backends: {name: None where it takes a small float32 problem on `device`, else the reason against
            it}.
            refusals: {"backend: reason": kinds of calls for which "auto" passed a backend of their device
            over}.

    Example:
        >>> handle = mk.accelerate(pipe)
        >>> image = pipe("a portrait").images[0]
        >>> mk.status()["fallbacks"]
        {}
    """
    report: Status = {
        **call_report(all_calls, reset=reset),  # type: ignore[typeddict-item]
        "layers": dict(Counter(state_of_layer(layer) for layer in list(accelerated_layers)).most_common()),
        "backends": select.report(device),
        "refusals": {
            f"{backend}: {reason}": count for (backend, reason), count in select.refusals.most_common()
        },
    }
    if reset:
        select.refusals.clear()
    return report


def state_of_layer(layer: nn.Module) -> str:
    """How the next call of an accelerated layer will be computed, as far as its own state decides."""
    # PEFT is there, or there would be no layer
    from mole_kernels.peft.operands import reason_against_peft_layer

    reason = reason_against_peft_layer(layer)  # type: ignore[arg-type]
    return ACCELERATED if reason is None else f"{PEFT_FORWARD}: {reason}"


def call_report(calls: Counter[Outcome], *, reset: bool = False) -> CallReport:
    """Sort counted calls by what happened to them; with `reset`, begin again at zero."""
    report: CallReport = {"accelerated": 0, "base_called": {}, "fallbacks": {}}
    for outcome, n in totals(calls, reset=reset).items():
        if outcome.way == "fallback":
            report["fallbacks"][outcome.reason] = n
            continue
        report["accelerated"] += n
        if outcome.way == "base called":
            report["base_called"][outcome.reason] = n
    return report
