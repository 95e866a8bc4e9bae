"""`accelerate`: layers that already hold PEFT LoRAs keep their objects and compute through our operator."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TypedDict
from weakref import WeakSet

from torch import nn

from mole_kernels.errors import MoleStateError, MoleValueError, MoleWarning
from mole_kernels.modules.scan import roots
from mole_kernels.peft.status import (
    ACCELERATED,
    PEFT_FORWARD,
    REQUESTED,
    CallReport,
    call_report,
    mark_warned,
    state_of_layer,
)

LATER = "it came after mk.accelerate; call that again"


class LayerStatus(TypedDict):
    """What `AccelerateHandle.report` says of one layer."""

    computes: str
    calls: CallReport


class AccelerateHandle:
    """What `accelerate` returns: which PEFT layers compute through the operator now, and the way back.

    `layers` and `skipped` are looked up in the model whenever they are read. A layer that is merged,
    disabled, replaced or unloaded later is therefore never counted as accelerated.
    """

    def __init__(self, components: dict[str, nn.Module]) -> None:
        self._components = components
        self._methods: list[nn.Module] = []
        # weak: layers that PEFT throws away are not kept alive
        self._exchanged: WeakSet[nn.Module] = WeakSet()
        # reasons of layers that kept their class
        self._kept: dict[int, str] = {}

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Path -> layer, of the PEFT layers whose next call computes through our operator."""
        return {path: layer for path, layer, state in self._states() if state == ACCELERATED}

    @property
    def skipped(self) -> dict[str, str]:
        """Path -> reason, of the PEFT layers whose next call goes through PEFT's own forward."""
        return {
            path: state.removeprefix(f"{PEFT_FORWARD}: ")
            for path, _, state in self._states()
            if state != ACCELERATED
        }

    def report(self) -> dict[str, LayerStatus]:
        """Report every PEFT layer of the model.

        Returns:
            Path -> a dictionary:
                computes: "accelerated", or "PEFT's own forward: " and the reason, as the layer stands now.
                What
                    only a call can decide (its dtype, device or arguments) shows in the counts.
                calls: Counts of its eager calls since it was accelerated: `accelerated`,
                    `base_called` {reason: calls}, `fallbacks` {reason: calls}.
        """
        from mole_kernels.peft.forward import calls_of

        return {
            path: {"computes": state, "calls": call_report(calls_of(layer))}
            for path, layer, state in self._states()
        }

    def remove(self) -> None:
        """Give every layer its PEFT class back, and every model its `set_adapters`. Nothing else was
        changed.
        """
        self._components = {}
        if not self._exchanged and not self._methods:
            return
        from mole_kernels.peft.forward import restore_class
        from mole_kernels.peft.set_adapters import restore_set_adapters

        for layer in list(self._exchanged):
            restore_class(layer)
        for model in self._methods:
            restore_set_adapters(model)
        self._exchanged.clear()
        self._methods.clear()

    def __repr__(self) -> str:
        states = [state for _, _, state in self._states()]
        computed = states.count(ACCELERATED)
        return f"AccelerateHandle({computed} layers accelerated, {len(states) - computed} skipped)"

    def _states(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(path, layer, how its next call is computed) of every tuner layer in the model."""
        if not self._components:
            return
        from mole_kernels.peft.forward import Accelerated

        for path, layer in tuner_layers(self._components):
            if isinstance(layer, Accelerated):
                yield path, layer, state_of_layer(layer)
            else:
                yield path, layer, f"{PEFT_FORWARD}: {self._kept.get(id(layer), LATER)}"


def accelerate(model: object) -> AccelerateHandle:
    """Compute every PEFT LoRA layer of a model by the operator: y = x Wᵀ + b + Σ_a scaling_a (x A_aᵀ) B_aᵀ.

    Every layer keeps its object, its tensors, its state dict and its place; only its class is exchanged. A
    base layer that is quantised, hooked, trained or of a class of its own is called as a module, and the
    adapters are added to its output. Calls that cannot be computed exactly go through PEFT's own forward; the
    handle, `status` and one warning say which and why. `set_adapters` of a diffusers model then takes the
    time of the active adapters, not of all that are loaded.

    Calling it again is harmless, and needed after new layers came: adapters that target more layers, or an
    unload and a load. This is not Hugging Face's package `accelerate`, and it works with models that use
    that.

    Args:
        model: An `nn.Module` with PEFT layers, or a diffusers pipeline (all its components).

    Returns:
        A handle that names the layers, reports on them and takes the acceleration off.

    Raises:
        MoleTypeError: `model` is neither a module nor a pipeline.
        MoleValueError: It holds no PEFT LoRA layer; the message names the adapters that it holds instead.
        MoleStateError: PEFT cannot be imported.

    Example:
        >>> pipe.load_lora_weights("style.safetensors", adapter_name="style")
        >>> handle = mk.accelerate(pipe)
        >>> handle.report()["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]["computes"]
        'accelerated'
    """
    components = roots(model)
    try:
        from mole_kernels.peft.forward import Accelerated, exchange_class, is_lora_layer, restore_class
        from mole_kernels.peft.set_adapters import replace_set_adapters, restore_set_adapters
    except ImportError as error:
        raise MoleStateError(
            "accelerate", f"PEFT cannot be imported: {error}", hint="pip install peft"
        ) from error
    layers = list(tuner_layers(components))
    if not any(is_lora_layer(layer) for _, layer in layers):
        raise _no_lora_layer(components, [layer for _, layer in layers])
    handle = AccelerateHandle(components)
    before = {id(layer) for _, layer in layers if isinstance(layer, Accelerated)}
    replaced = [id(component) for component in components.values() if "set_adapters" in component.__dict__]
    try:
        for _, layer in layers:
            reason = (
                exchange_class(layer)
                if is_lora_layer(layer)
                else f"a {_family(layer)} layer; only LoRA is computed here"
            )
            if reason is None:
                handle._exchanged.add(layer)
            else:
                handle._kept[id(layer)] = reason
        for component in components.values():
            if any(isinstance(m, Accelerated) for m in component.modules()) and replace_set_adapters(
                component
            ):
                handle._methods.append(component)
        _warn_of_skipped(handle.skipped)
        return handle
    # no layer is left accelerated that no handle knows
    except BaseException:
        for component in components.values():
            if id(component) not in replaced:
                restore_set_adapters(component)
        for _, layer in layers:
            if id(layer) not in before:
                restore_class(layer)
        raise


def tuner_layers(components: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every layer that one of PEFT's tuners put into these modules, each once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen: set[nn.Module] = set()
    for name, component in components.items():
        for path, module in component.named_modules(memo=seen, prefix=name):
            if isinstance(module, BaseTunerLayer):
                yield path, module  # type: ignore[misc]


def _family(layer: nn.Module) -> str:
    """The kind of adapter as PEFT spells it: LoKr, OFT, IA3, …"""
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("peft.tuners.") and cls.__name__.endswith("Layer"):
            return cls.__name__.removesuffix("Layer")
    return type(layer).__name__


def _no_lora_layer(components: dict[str, nn.Module], layers: list[nn.Module]) -> MoleValueError:
    """The error for a model without LoRA layers: it names the adapters that are there."""
    if layers:
        families = ", ".join(f"{n} {family}" for family, n in Counter(map(_family, layers)).most_common())
        return MoleValueError(
            "accelerate",
            f"none of this model's {len(layers)} PEFT layers is a LoRA layer ({families}); "
            "they keep PEFT's forward",
            hint="only LoRA layers are computed here",
        )
    for component in components.values():
        configs = getattr(component, "peft_config", None)
        if isinstance(configs, dict) and configs:
            kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()})
            return MoleValueError(
                "accelerate",
                f"this model's PEFT adapters ({', '.join(kinds)}) have put no LoRA layer into it",
                hint="only LoRA layers are computed here",
            )
    return MoleValueError(
        "accelerate",
        "there is no PEFT LoRA layer in this model",
        hint="load_lora_weights first, or use mk.patch",
    )


def _warn_of_skipped(skipped: dict[str, str]) -> None:
    """One warning for all layers that the caller would take for accelerated, and that are not."""
    reasons = Counter(reason for reason in skipped.values() if reason not in REQUESTED)
    if reasons:
        mark_warned(reasons)
        text = "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common())
        warnings.warn(
            f"mole_kernels: {reasons.total()} PEFT layers go through {PEFT_FORWARD}: {text}. "
            "AccelerateHandle.skipped names them.",
            MoleWarning,
            stacklevel=3,
        )
