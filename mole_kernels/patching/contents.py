"""What a patch holds, to be read: experts, gates, scales, parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.io.bank import save_bank
from mole_kernels.io.gates import GateFile, save_gates
from mole_kernels.patching.block_scales import Scale
from mole_kernels.patching.collect import collect_bank, collect_gates
from mole_kernels.patching.fold import Folded
from mole_kernels.patching.patched import GateMap, Patched, PatchedLayers
from mole_kernels.patching.scale_writer import ScaleSettings

if TYPE_CHECKING:
    import os

    from mole_kernels.patching.plan import Plan

# what a folded model still allows
_WHILE_FOLDED = ("with", "bank", "gates")


class PatchContents:
    """The part of a `Handle` that reads.

    Args:
        patched: The patched layers.
        plan: The plan that was carried out.

    Every method raises MoleStateError after `remove`; while the experts are folded, only `bank` and `gates`
    are allowed.
    """

    def __init__(self, patched: Iterable[Patched], plan: Plan) -> None:
        self._patched, self._plan = PatchedLayers(patched), plan
        self._settings = ScaleSettings(plan.names)
        self._active = True
        self._folded: Folded | None = None

    def __repr__(self) -> str:
        removed = "" if self._active else ", removed"
        return f"{type(self).__name__}({len(self._patched)} layers, experts {', '.join(self.names)}{removed})"

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the order of the gates' rows."""
        return self._plan.names

    @property
    def layers(self) -> dict[str, nn.Module]:
        """path -> patched module."""
        return self._patched.modules()

    @property
    def model(self) -> object:
        """The module or pipeline that was patched."""
        return self._plan.model

    @property
    def scales(self) -> dict[str, Scale]:
        """The scales last set, as they were given."""
        return dict(self._settings.asked)

    @property
    def active(self) -> bool:
        """False after `remove`."""
        return self._active

    def gate_maps(self) -> dict[str, GateMap]:
        """path -> the gates' values in the layer's last eager forward, for layers that have run."""
        self._check("gate_maps")
        return self._patched.gate_maps()

    def expert_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """down and up of every layer; with a name, of the layers that hold that expert alone."""
        self._check("expert_parameters", here=True, names=() if name is None else (name,))
        return self._patched.expert_parameters(name)

    def gate_parameters(self) -> list[nn.Parameter]:
        """Every parameter of every layer's gate."""
        self._check("gate_parameters", here=True)
        return self._patched.gate_parameters()

    def experts_require_grad(self, on: bool = True) -> list[nn.Parameter]:
        """Switch gradients of the experts on or off; returns their parameters, for an optimiser."""
        return _require_grad(self.expert_parameters(), on)

    def gates_require_grad(self, on: bool = True) -> list[nn.Parameter]:
        """Switch gradients of the gates on or off; returns their parameters, for an optimiser."""
        return _require_grad(self.gate_parameters(), on)

    def bank(self) -> ExpertBank:
        """The experts as they stand (copies), the scales set not included."""
        self._check("bank")
        with self._patched.fetched():
            return collect_bank(self._patched.values(), self._plan)

    def gates(self) -> GateFile | None:
        """The MoLE gates as they stand (copies); None without gates. Other gates raise MoleStateError."""
        self._check("gates")
        with self._patched.fetched():
            return collect_gates(self._patched.values(), self.names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Experts and gates into one safetensors file, which `patch` and `load_bank` read."""
        save_bank(self.bank(), path, gates=self.gates())

    def save_gates(
        self,
        path: str | os.PathLike[str],
        dialect: Literal["official", "native"] = "native",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the gates alone.

        Args:
            path: The safetensors file.
            dialect: "native", or "official": MoLE's own files, for a UNet with the experts face and hand.
            dtype: Of the tensors; None keeps theirs.
        """
        file = self.gates()
        if file is None:
            raise MoleStateError("save_gates", "the patched layers have no gates")
        save_gates(file, path, dialect=dialect, dtype=dtype)

    def _check(self, what: str, *, here: bool = False, names: Sequence[str] = ()) -> None:
        """The patch is there, not folded, its tensors are here, and the experts are its own."""
        where, fault, hint = f"Handle.{what}", "", ""
        if not self._active:
            fault, hint = "this patch was removed already", "mole_kernels.patch makes a new one"
        elif self._folded is not None and what not in _WHILE_FOLDED:
            fault, hint = "the experts are folded into the weights", "handle.unfold() first"
        elif here and self._patched.offloaded():
            fault = "offload hooks hold the experts between calls, and would drop their gradients"
            hint = "accelerate.hooks.remove_hook_from_submodules(model) first"
        if fault:
            raise MoleStateError(where, fault, hint=hint)
        for name in names:
            if name not in self.names:
                expected = f"one of the experts {', '.join(self.names)}"
                raise MoleValueError(where, expected=expected, got=repr(name))


def _require_grad(parameters: list[nn.Parameter], on: bool) -> list[nn.Parameter]:
    for parameter in parameters:
        parameter.requires_grad_(on)
    return parameters
