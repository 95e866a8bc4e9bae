"""Which layers of a patched model share their input, and the groups that were made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypedDict

from torch import nn

from mole_kernels.grouping import weights as group_weights
from mole_kernels.grouping.group import COMPUTED, SHARED, WASTED, Group
from mole_kernels.layers.linear import GatedLoRALinear
from mole_kernels.modules.scan import roots
from mole_kernels.tally import totals
from mole_kernels.text_cache.layer import has_offload_hook

# projections of one tensor, by the names that diffusers and transformers give them
SELF = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
CROSS = ("to_k", "to_v")
ADDED = (("add_q_proj", "add_k_proj", "add_v_proj"),)


class GroupReport(TypedDict):
    """What `Groups.report` returns."""

    groups: list[str]
    computed: int
    shared: int
    wasted: int
    apart: dict[str, int]
    skipped: dict[str, str]


class Groups:
    """What `Handle.group` returns: the groups of a patched model.

    Args:
        model: The module or pipeline.
        layers: Its layers with experts.
        always: Compute as groups whatever it costs (for tests and measurements).

    Attributes:
        groups: Path of the attention (or block), with the names of its projections -> their group.
        skipped: The same path -> why its projections are computed one by one.
    """

    def __init__(self, model: object, layers: Iterable[nn.Module], *, always: bool = False) -> None:
        self.groups: dict[str, Group] = {}
        self.skipped: dict[str, str] = {}
        ours = {id(layer) for layer in layers}
        everything = list({id(m): m for root in roots(model).values() for m in root.modules()}.values())
        tied = group_weights.tied_addresses(everything)
        used: set[int] = set()
        try:
            for path, owner, names, members in _candidates(model):
                grouped = {n: m for n, m in zip(names, members) if id(m) in ours and id(m) not in used}
                if not grouped:
                    if any(id(m._modules.get("base_layer")) in ours for m in members):
                        self.skipped[_named(path, names)] = "PEFT's layers are called in their place"
                    continue
                used.update(map(id, grouped.values()))
                where = _named(path, grouped)
                if reason := _reason_against_members(list(grouped.values()), tied):
                    self.skipped[where] = reason
                    continue
                linears = [m for m in grouped.values() if isinstance(m, GatedLoRALinear)]
                group_weights.lay_side_by_side([layer.weight for layer in linears])
                attention = owner._modules.get("attn")
                self.groups[where] = Group(
                    owner, linears, [owner] if attention is None else [owner, attention], always
                )
        # also when memory runs out: all groups, or none
        except BaseException:
            self.remove()
            raise

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        layers = sum(len(group.layers) for group in self.groups.values())
        return f"Groups({len(self.groups)} of {layers} layers, {len(self.skipped)} skipped)"

    def report(self) -> GroupReport:
        """Report what was computed as groups. Calls inside a compiled graph are not counted.

        Returns:
            A dictionary:
                groups: Paths of the groups.
                computed: Forwards whose layers were one product.
                shared: Those among them with one A for all layers.
                wasted: Forwards that were computed as one product, but a layer was called with another input.
                apart: {reason: forwards whose layers computed by themselves}.
                skipped: {path: reason why its projections are no group}.
        """
        counts: Counter[str] = Counter()
        apart: Counter[str] = Counter()
        for group in self.groups.values():
            counts.update(totals(group.counts))
            apart.update(totals(group.apart))
        return {
            "groups": list(self.groups),
            "computed": counts[COMPUTED],
            "shared": counts[SHARED],
            "wasted": counts[WASTED],
            "apart": dict(apart),
            "skipped": dict(self.skipped),
        }

    def remove(self) -> None:
        """Compute every layer by itself again, its weight in memory of its own, bit for bit.

        The second time does nothing.
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
            yield from ((path, owner, *projections) for projections in _families(owner))


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
    present = {name: layer for name in wanted if (layer := owner._modules.get(name)) is not None}
    return tuple(present), list(present.values())


def _reason_against_members(layers: list[nn.Module], tied: set[int]) -> str | None:
    """Why these projections are computed one by one, or None."""
    if len(layers) < 2:
        return "only one of its projections holds experts"
    if any(type(layer) is not GatedLoRALinear for layer in layers):
        return "a projection is no linear layer of ours"
    if len({id(layer) for layer in layers}) < len(layers):
        return "one layer has two names"
    if any(has_offload_hook(layer) for layer in layers):
        return "offload hooks move its weights"
    weights = [layer.weight for layer in layers if isinstance(layer, GatedLoRALinear)]
    if reason := group_weights.reason_against_moving(weights):
        return reason
    if any(weight.data_ptr() in tied for weight in weights) or len({id(w) for w in weights}) < len(weights):
        return "a weight shares its memory with another tensor of the model"
    return None
