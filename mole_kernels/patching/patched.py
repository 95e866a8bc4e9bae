"""What a patch knows of the layers that it changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor, nn

from mole_kernels.errors import MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import Gate
from mole_kernels.layers import offload, sharded
from mole_kernels.layers.attach import PLAIN_CLASS, detach, follows_class
from mole_kernels.layers.linear import Gated
from mole_kernels.text_cache.layer import CachedForward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GateMap(NamedTuple):
    """The values of one layer's gates in its last forward; None where the layer has no such gate.

    Attributes:
        token: [B,T,E] float32, the token gate.
        sample: [B,E] float32, the sample gate.
        names: The experts, in E's order.
        given: A given gate (constants, masks), broadcastable to [B,T,E].
    """

    token: Tensor | None
    sample: Tensor | None
    names: tuple[str, ...]
    given: Tensor | None = None


@dataclass
class Patched:
    """One patched layer: its module, what was put on it, its own parameters' requires_grad before, and each
    expert's rank.

    A rank is smaller than the packed one after a swap to a smaller expert; 0 where the new expert lacks the
    layer.
    """

    path: str
    module: nn.Module
    experts: LayerExperts
    gate: Gate | None
    flags: dict[str, bool]
    ranks: dict[str, int]


class PatchedLayers(dict[str, Patched]):
    """The layers of one patch, by path."""

    def __init__(self, layers: Iterable[Patched]) -> None:
        super().__init__((layer.path, layer) for layer in layers)

    def __reduce__(self) -> tuple[object, ...]:
        return PatchedLayers, (list(self.values()),)

    def modules(self) -> dict[str, nn.Module]:
        """path -> module."""
        return {path: layer.module for path, layer in self.items()}

    def gate_maps(self) -> dict[str, GateMap]:
        """path -> the values of the layer's gates, for layers that have run.

        Raises:
            MoleStateError: None has run.
        """
        maps = {}
        for path, layer in self.items():
            last = cast(Gated, layer.module).last_gates
            if last is not None:
                maps[path] = GateMap(last.token, last.sample, layer.experts.names, last.given)
        if not maps:
            raise MoleStateError(
                "gate_maps",
                "no patched layer has run yet",
                hint="run the model first, eagerly: a compiled forward keeps no gate maps",
            )
        return maps

    def expert_parameters(self, name: str | None) -> list[nn.Parameter]:
        """down and up of every layer, or of the layers that hold the named expert alone.

        Raises:
            MoleStateError: The named expert shares its packed parameters with others.
        """
        layers = [layer for layer in self.values() if name is None or name in layer.experts.names]
        if name is not None and any(len(layer.experts.names) > 1 for layer in layers):
            raise MoleStateError(
                "expert_parameters",
                f"{name} shares its packed parameters with other experts",
                hint="train it in a patch of its own",
            )
        return [p for layer in layers for p in (layer.experts.down, layer.experts.up)]

    def gate_parameters(self) -> list[nn.Parameter]:
        """Every parameter of every gate, once; gates of one block may share their router."""
        gates = [layer.gate for layer in self.values() if layer.gate is not None]
        return list(dict.fromkeys(p for gate in gates for p in gate.parameters()))

    def offloaded(self) -> bool:
        """Whether accelerate's hooks keep experts elsewhere between calls."""
        return any(offload.offloaded(layer.experts) for layer in self.values())

    def sharded(self) -> bool:
        """Whether experts are sharded over ranks."""
        return any(sharded.is_sharded(layer.experts.down) for layer in self.values())

    @contextmanager
    def fetched(self, *, write: bool = False, always: bool = True) -> Iterator[None]:
        """Inside the block the tensors are here that accelerate's hooks keep elsewhere.

        Args:
            write: Keep what the block wrote.
            always: False where the block does not need them.
        """
        if always and self.offloaded():
            modules = [module for layer in self.values() for module in (layer.experts, layer.gate)]
            with offload.loaded(*modules, write=write):
                yield
        else:
            yield

    def set_experts_on(self, on: bool) -> None:
        """Compute the experts, or the base alone; all layers or none."""
        # a block that ends after `remove` has nothing left to switch
        modules = [module for module in self.modules().values() if isinstance(module, Gated)]
        before = [bool(module.experts_on) for module in modules]
        try:
            for module in modules:
                module.experts_on = on
        except BaseException:
            for module, was in zip(modules, before):
                module.experts_on = was
            raise

    def set_tokens_group(self, group: ProcessGroup | None) -> None:
        """The ranks that share a batch's tokens."""
        for layer in self.values():
            layer.module.tokens_group = group  # type: ignore[assignment]

    def replaced(self, before: Sequence[LayerExperts]) -> list[tuple[LayerExperts, LayerExperts]]:
        """(now, before) of the layers whose experts are new objects."""
        return [(layer.experts, old) for layer, old in zip(self.values(), before) if layer.experts is not old]

    def check_removable(self) -> None:
        """Raises:
        MoleStateError: A layer no longer holds what this patch put on it, or cannot be undone.
        """
        for path, layer in self.items():
            reason, hint = _reason_against_removal(path, layer)
            if reason:
                raise MoleStateError("Handle.remove", reason, hint=hint)

    def detach(self) -> None:
        """Every module is of its plain class again, its parameters' flags as they were."""
        for layer in self.values():
            detach(layer.module)
            for name, flag in layer.flags.items():
                parameter = layer.module._parameters.get(name)
                if parameter is not None and parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)


def _reason_against_removal(path: str, layer: Patched) -> tuple[str, str]:
    """Why a layer cannot be restored, and what to do; empty texts where it can."""
    module = layer.module
    if not isinstance(module, Gated) or module.experts is not layer.experts:
        return (
            f"{path} no longer holds the experts of this patch",
            "remove the other patch of this layer first",
        )
    if type(module) not in PLAIN_CLASS:
        return (
            f"{path} has become a {type(module).__name__}, which cannot be undone",
            "fully_shard the blocks that hold the layers, not the layers themselves",
        )
    forward = module.__dict__.get("forward")
    # a text cache follows the class
    if forward is not None and not isinstance(forward, CachedForward) and not follows_class(module):
        return (
            f"a hook replaced the forward of {path} after it was patched, and would go on calling the "
            "patched one",
            "take that hook (diffusers' offload or layerwise casting) off first",
        )
    return "", ""
