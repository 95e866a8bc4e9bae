"""Which layers of a patched model share their input, and the groups that were made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from mole_kernels.grouping import weights as group_weights
from mole_kernels.grouping.group import Group
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.modules.scan import roots
from mole_kernels.text_cache.layer import has_offload_hook

# projections of one tensor, by the names that diffusers and transformers give them
SELF = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
CROSS = ("to_k", "to_v")
ADDED = (("add_q_proj", "add_k_proj", "add_v_proj"),)


class Groups:
    """What `Handle.group` returns.

    groups   path of the attention (or block) -> its groups    skipped  path -> why its projections stay
             layers of their own
    """

    def __init__(self, model: object, layers: Iterable[nn.Module], *, always: bool = False) -> None:
        self.groups: dict[str, Group] = {}
        self.skipped: dict[str, str] = {}
        ours = {id(layer) for layer in layers}
        everything = list({id(m): m for root in roots(model).values() for m in root.modules()}.values())
        tied = group_weights.tied(everything)
        taken: set[int] = set()
        try:
            for path, owner, names, members in _candidates(model):
                held = {name: m for name, m in zip(names, members) if id(m) in ours and id(m) not in taken}
                if not held:
                    if any(id(m._modules.get("base_layer")) in ours for m in members):
                        self.skipped[_named(path, names)] = "PEFT's layers are called in their place"
                    continue
                taken.update(map(id, held.values()))
                where = _named(path, held)
                if reason := _reject(list(held.values()), tied):
                    self.skipped[where] = reason
                    continue
                linears = [m for m in held.values() if isinstance(m, GatedLoRALinear)]
                group_weights.lay([layer.weight for layer in linears])
                attention = owner._modules.get("attn")
                self.groups[where] = Group(
                    owner, linears, [owner] if attention is None else [owner, attention], always
                )
        # whatever it was, and be it a full memory: no half of it
        except BaseException:
            self.remove()
            raise

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return f"Groups({len(self.groups)} of {sum(len(g.layers) for g in self.groups.values())} layers, {len(self.skipped)} skipped)"

    def report(self) -> dict[str, Any]:
        """{groups: [paths], computed, shared, wasted, apart: {reason: forwards}, skipped: {path: reason}};
        compiled graphs are not counted.

        computed  forwards whose layers were one product      shared  of these, A was one for all
        wasted    computed, but a layer was called with another input
        """
        apart: Counter[str] = Counter()
        for group in self.groups.values():
            apart += group.apart
        every = self.groups.values()
        return {
            "groups": list(self.groups),
            "computed": sum(g.taken for g in every),
            "shared": sum(g.shared for g in every),
            "wasted": sum(g.wasted for g in every),
            "apart": dict(apart),
            "skipped": dict(self.skipped),
        }

    def remove(self) -> None:
        """Every layer for itself again, its weight in memory of its own, bit for bit. Harmless the second
        time.
        """
        for group in self.groups.values():
            group.remove()
        self.groups.clear()


def _candidates(model: object) -> Iterator[tuple[str, nn.Module, tuple[str, ...], list[nn.Module]]]:
    """(path, owner, names, layers): layers that `owner` calls with one tensor, if it is what its names
    say.
    """
    for name, root in roots(model).items():
        for path, owner in root.named_modules(prefix=name):
            yield from ((path, owner, *found) for found in _families(owner))


def _families(owner: nn.Module) -> Iterator[tuple[tuple[str, ...], list[nn.Module]]]:
    inside = owner._modules.get("attn")
    beside = owner._modules.get("proj_mlp")
    if (
        isinstance(inside, nn.Module)
        and isinstance(beside, nn.Linear)
        and "add_q_proj" not in inside._modules
    ):
        # FLUX's single block: the MLP reads what the attention reads, and is called first
        names, layers = _present(inside, SELF[0])
        yield ("proj_mlp", *names), [beside, *layers]
    cross = getattr(owner, "is_cross_attention", False) is True
    for wanted in ((CROSS,) if cross else SELF) + ADDED:
        yield _present(owner, wanted)


def _named(path: str, names: Iterable[str]) -> str:
    return f"{path}.({', '.join(names)})" if path else f"({', '.join(names)})"


def _present(owner: nn.Module, wanted: Iterable[str]) -> tuple[tuple[str, ...], list[nn.Module]]:
    found = [(name, layer) for name in wanted if (layer := owner._modules.get(name)) is not None]
    return tuple(name for name, _ in found), [layer for _, layer in found]


def _reject(layers: list[nn.Module], tied: set[int]) -> str | None:
    """Why these projections stay layers of their own."""
    if len(layers) < 2:
        return "only one of its projections holds experts"
    if any(type(layer) is not GatedLoRALinear for layer in layers):
        return "a projection is no linear layer of ours"
    if len({id(layer) for layer in layers}) < len(layers):
        return "one layer has two names"
    if any(has_offload_hook(layer) for layer in layers):
        return "offload hooks move its weights"
    weights = [layer.weight for layer in layers if isinstance(layer, GatedLoRALinear)]
    if reason := group_weights.reject(weights):
        return reason
    if any(weight.data_ptr() in tied for weight in weights) or len({id(w) for w in weights}) < len(weights):
        return "a weight shares its memory with another tensor of the model"
    return None
