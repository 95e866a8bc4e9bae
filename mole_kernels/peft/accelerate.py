"""`accelerate`: layers that already hold PEFT LoRAs keep their objects and compute through our operator."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.modules.scan import roots


@dataclass
class AccelerateHandle:
    """What `accelerate` did, and its way back.

    layers   path -> PEFT layer that now computes through our operator
    skipped  path -> why that PEFT layer keeps PEFT's forward
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _models: list[nn.Module] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Give every layer its PEFT class back, and every model its `set_adapters`; nothing else was ever
        changed.
        """
        if not self.layers and not self._models:
            return
        from mole_kernels.peft.forward import restore
        from mole_kernels.peft.set_adapters import uninstall

        for layer in self.layers.values():
            restore(layer)
        for model in self._models:
            uninstall(model)
        self.layers.clear()
        self._models.clear()

    def __repr__(self) -> str:
        return f"AccelerateHandle({len(self.layers)} layers accelerated, {len(self.skipped)} skipped)"


def accelerate(model: object) -> AccelerateHandle:
    """Every PEFT LoRA layer in `model` keeps its object, its state and its place, and computes through our
    operator.

    model  an nn.Module, or a diffusers pipeline (all its components)
    Calling again is harmless, and needed after new layers came: adapters that target more layers, or an
    unload and a load.
    A base layer that is quantised, hooked, trained or of a class of its own is called as it is, and the
    adapters are added to that.
    Calls that we cannot compute exactly go through PEFT's own forward; `status()` says how often and why.
    `set_adapters` of a diffusers model then takes the time of the active adapters, not of all that are
    loaded.

    Raises MoleTypeError (neither module nor pipeline), MoleValueError (no PEFT layers in it), MoleStateError
    (PEFT is absent).
    """
    found = roots(model)
    try:
        from mole_kernels.peft.forward import is_peft_layer, swap
        from mole_kernels.peft.set_adapters import install, uninstall
    except ImportError as error:
        raise MoleStateError(
            "accelerate", f"PEFT cannot be imported: {error}", hint="pip install peft"
        ) from error
    handle = AccelerateHandle()
    layers = [m for component in found.values() for m in component.modules() if is_peft_layer(m)]
    before = [(layer, type(layer), layer.__dict__.get("forward")) for layer in layers]
    known = [id(component) for component in found.values() if "set_adapters" in component.__dict__]
    try:
        for root, component in found.items():
            for path, module in component.named_modules(prefix=root):
                if not is_peft_layer(module):
                    continue
                reason = swap(module)
                if reason is None:
                    handle.layers[path] = module
                else:
                    handle.skipped[path] = reason
            if any(
                path == root or path.startswith(f"{root}.") or not root for path in handle.layers
            ) and install(component):
                handle._models.append(component)
        if not handle.layers and not handle.skipped:
            raise MoleValueError(
                "accelerate",
                "there is no PEFT LoRA layer in this model",
                hint="load_lora_weights first, or use mk.patch",
            )
        return handle
    # no layer is left accelerated that no handle knows
    except BaseException:
        for component in found.values():
            if id(component) not in known:
                uninstall(component)
        for layer, cls, forward in before:
            layer.__class__ = cls
            if forward is not None:
                layer.__dict__["forward"] = forward
        raise
