"""The patched model in the caller's hand: change scales and experts, read the gates, switch off, take off,
save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.grouping.groups import Groups
from mole_kernels.io.bank import save_bank
from mole_kernels.io.gates import GateFile, save_gates
from mole_kernels.layers import offload, sharded
from mole_kernels.layers.attach import PLAIN_CLASS, detach, follows_class
from mole_kernels.layers.fingerprint import Check
from mole_kernels.layers.linear import Gated
from mole_kernels.modules.forward_lock import Turns
from mole_kernels.modules.group_offload import in_groups, regroup
from mole_kernels.modules.snapshot import all_or_nothing
from mole_kernels.patching import block_ranks, guards
from mole_kernels.patching.block_scales import LayerScale, Scale, check_scales, layer_scales
from mole_kernels.patching.collect import collect_bank, collect_gates
from mole_kernels.patching.fold import Folded, fold
from mole_kernels.patching.handles import forget
from mole_kernels.patching.patched import Patched
from mole_kernels.patching.scale_writer import ScaleWriter
from mole_kernels.patching.sources import read_expert
from mole_kernels.patching.swap import swap_expert
from mole_kernels.patching.switches import Switch, Switches
from mole_kernels.text_cache.cache import TextCache, cache_text
from mole_kernels.text_cache.layer import CachedForward

if TYPE_CHECKING:
    import os

    from torch.distributed import ProcessGroup

    from mole_kernels.patching.plan import Plan
    from mole_kernels.patching.sources import Source


class GateMap(NamedTuple):
    """What the gates of one layer said in its last forward; None where the layer has no such gate.

    token [B,T,E] float32   sample [B,E] float32   given: broadcastable to [B,T,E] (constants, masks)   names:
                            the experts, in E's order
    """

    token: Tensor | None
    sample: Tensor | None
    names: tuple[str, ...]
    given: Tensor | None = None


class Handle:
    """What `patch` returns. Also a context manager that removes the patch at its end."""

    def __init__(
        self,
        patched: Sequence[Patched],
        made: Plan,
        places: list[tuple[nn.Module, str, list[str]]],
        roots: Sequence[nn.Module],
        turns: Turns,
    ) -> None:
        self._patched = {one.path: one for one in patched}
        self._plan = made
        self._places = places
        self._roots, self._turns = list(roots), turns
        self._names = made.names
        self._writer = ScaleWriter(made.names)
        self._scales: dict[str, Scale] = dict.fromkeys(made.names, 1.0)
        self._layer_scales: dict[str, LayerScale] = dict.fromkeys(made.names, 1.0)
        self._active = True
        self._switches = Switches(self._turns, self._set_experts_on)
        self._folded: Folded | None = None
        self._cache: TextCache | None = None
        self.groups = Groups(nn.Module(), ())

    def __repr__(self) -> str:
        removed = "" if self._active else ", removed"
        return f"Handle({len(self._patched)} layers, experts {', '.join(self._names)}{removed})"

    def __enter__(self) -> Handle:
        self._check_active("with")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._folded is not None:
            self.unfold()
        if self._active:
            self.remove()

    # what is there

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the order of the gates' rows."""
        return self._names

    @property
    def layers(self) -> dict[str, nn.Module]:
        """path -> patched module."""
        return {path: one.module for path, one in self._patched.items()}

    @property
    def model(self) -> object:
        """The module or pipeline that was patched."""
        return self._plan.model

    @property
    def scales(self) -> dict[str, Scale]:
        """The adapter weights last set, as they were given."""
        return dict(self._scales)

    @property
    def active(self) -> bool:
        """False after `remove`."""
        return self._active

    def gate_maps(self) -> dict[str, GateMap]:
        """path -> what the layer's gates said in its last eager forward; layers that have not run since the
        patch are left out.
        """
        self._check_active("gate_maps")
        maps = {}
        for path, one in self._patched.items():
            last = cast(Gated, one.module).last_gates
            if last is not None:
                maps[path] = GateMap(last.token, last.sample, one.experts.names, last.given)
        if not maps:
            raise MoleStateError(
                "gate_maps",
                "no patched layer has run yet",
                hint="run the model first, eagerly: a compiled forward keeps no gate maps",
            )
        return maps

    def expert_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """down and up of every layer; with a name, of the layers of that expert, which must hold it alone
        (they are packed).
        """
        self._check_active("expert_parameters")
        self._check_here("expert_parameters")
        ones = list(self._patched.values())
        if name is not None:
            self._check_names("expert_parameters", [name])
            ones = [one for one in ones if name in one.experts.names]
            if any(len(one.experts.names) > 1 for one in ones):
                raise MoleStateError(
                    "expert_parameters",
                    f"{name} shares its packed parameters with other experts",
                    hint="train it in a patch of its own",
                )
        return [p for one in ones for p in (one.experts.down, one.experts.up)]

    def gate_parameters(self) -> list[nn.Parameter]:
        """Every parameter of every layer's gate."""
        self._check_active("gate_parameters")
        self._check_here("gate_parameters")
        # gates of one block may share their router
        return list(
            dict.fromkeys(
                p for one in self._patched.values() if one.gate is not None for p in one.gate.parameters()
            )
        )

    def train_experts(self, on: bool = True) -> list[nn.Parameter]:
        """Switch gradients of the experts on or off; returns their parameters, for an optimiser."""
        return _require_grad(self.expert_parameters(), on)

    def train_gates(self, on: bool = True) -> list[nn.Parameter]:
        """Switch gradients of the gates on or off; returns their parameters."""
        return _require_grad(self.gate_parameters(), on)

    # change

    def set_scales(self, scales: Mapping[str, Scale]) -> None:
        """Set scales by adapter name; the other adapters keep theirs. A tensor write: nothing recompiles.

        Args:
            scales: {adapter: scale}; a scale is a number, or numbers by component or block as diffusers'
                `set_adapters` takes them: {"unet": 0.8, "text_encoder": 0.4},
                {"down": 0.5, "up": {"block_0": 0.2}}, {"transformer": {"transformer_blocks.0": 0.5}}.
                What a mapping leaves out counts 1.

        Raises:
            MoleStateError: The patch was removed, or is folded.
            MoleTypeError, MoleValueError: No such adapter, component or block, or no finite number. Nothing
                changes.
        """
        self._check_active("set_scales")
        checked = check_scales(scales, self._names)
        new = {
            name: layer_scales(
                name,
                scale,
                self.model,
                [path for path, one in self._patched.items() if name in one.experts.names],
            )
            for name, scale in checked.items()
        }
        layers = {path: one.experts for path, one in self._patched.items()}
        # merged with what is set under the lock: another thread may set other adapters' scales meanwhile
        with (
            self._turns.change(),
            self._fetched(write=True, always=any(one.scale.is_meta for one in layers.values())),
        ):
            try:
                self._writer.write(layers, self._layer_scales | new)
                self._scales, self._layer_scales = self._scales | checked, self._layer_scales | new
            # layers of one device may have been written, those of another not
            except BaseException:
                self._writer.write(layers, self._layer_scales)
                raise

    def swap(self, name: str, source: Source, *, strict: bool = True) -> None:
        """Replace one expert by another, all or nothing; its adapter weight and gate rows stay.

        A rank up to the packed one is written in place, padded with zeros (no shape changes, nothing
        recompiles). A larger rank packs
        those layers anew: their parameters are new objects, which an optimiser or a CUDA graph does not know.
        A layer that the new expert lacks gets none of it. A key that meets no layer of the old expert is an
        error (strict) or a warning.
        """
        self._check_active("swap")
        self._check_names("swap", [name])
        if any(sharded.is_sharded(one.experts.down) for one in self._patched.values()):
            raise MoleStateError(
                "Handle.swap", "the experts are sharded over ranks", hint="swap first, then fully_shard"
            )
        # no forward waits for a file
        expert = read_expert(name, source, self.model)
        with self._turns.change():
            before = [one.experts for one in self._patched.values()]
            with self._fetched(write=True):
                # the old one has staged the old base scales
                self._writer = ScaleWriter(self._names)
                swap_expert(self._patched, self._plan, name, expert, strict, self._layer_scales)
            block_ranks.mark(self.layers)
            block_ranks.pad(block_ranks.compiled(module for module, _, _ in self._places))
            anew = [
                (one.experts, old)
                for one, old in zip(self._patched.values(), before)
                if one.experts is not old
            ]
            for new, old in anew:
                if offload.offloaded(old):
                    offload.offload_like(new, old)
            if anew:
                regroup(in_groups(self._roots))

    def enable(self) -> Switch:
        """Turn the experts on (again); `with handle.enable():` goes back at its end."""
        return self._switch(True)

    def disable(self) -> Switch:
        """Turn the experts off: the base model's output bit for bit. `with handle.disable():` turns them on
        at its end.
        """
        return self._switch(False)

    def cache_text(self, *, check: Check = "sample", texts: int = 4) -> TextCache:
        """Make the keys and values of cross-attention once per text, not once per step: see `cache_text`.
        `remove` closes it.
        """
        self._check_active("cache_text")
        self._cache = cache_text(self._plan.model, check=check, texts=texts)
        return self._cache

    def group(self) -> Groups:
        """Layers that read one tensor (q, k, v of an attention) become one product where that is exact and
        faster; the rest stay.

        Their weights are moved to lie side by side, none twice. `Groups.report()` says what was grouped and
        why the others were not;
        `Groups.remove()`, and `remove`, take the groups apart again, bit for bit.
        """
        self._check_active("group")
        with self._turns.change():
            self.groups.remove()
            self.groups = Groups(self._plan.model, self.layers.values())
        return self.groups

    def fold(self, *, keep: bool = True) -> None:
        """Put the mixture into the weights (W' = W + Σ s g B A): the plain layer's speed, for gates that are
        constant. All or nothing.

        keep  copies of the weights are kept, so that `unfold` is exact; without them it is within two
              roundings (`patching.fold`)
        Until `unfold`, only what reads the handle is allowed.
        """
        self._check_active("fold")
        with self._turns.change():
            self._folded = fold(self._plan.model, self._patched.values(), keep=keep)

    def unfold(self) -> None:
        """Take the mixture out of the weights again and compute it beside them, as before `fold`."""
        if self._folded is None:
            raise MoleStateError("Handle.unfold", "nothing is folded", hint="handle.fold() comes first")
        with self._turns.change():
            try:
                self._folded.unfold()
                self._folded = None
            # Ctrl-C between the two
            except BaseException:
                self._folded = self._folded if self._folded else None
                raise

    def bake(self) -> None:
        """End the patch with the mixture in the weights for good: W' = W + Σ s g B A.

        The experts are folded first where they are not. The model is then a plain one with nothing of this
        package left on it, to be saved or compiled as such.

        Raises:
            MoleStateError: The patch was removed, or cannot be folded (see `fold`). Nothing changes.
        """
        if self._folded is None:
            self.fold(keep=False)
        folded, self._folded = self._folded, None
        try:
            self.remove()
        except BaseException:
            self._folded = folded
            raise

    def hold(self) -> AbstractContextManager[None]:
        """`with handle.hold(): pipe(…)`: no other thread's change comes in between, so that all steps of a
        picture see one model.

        Without it every forward of the model (of each patched component) is wholly before or wholly after a
        change through this handle;
        changes wait for the forwards that run. Not so inside torch.compile of the whole model and for layers
        called on their own.
        """
        return self._turns.hold()

    def change(self) -> AbstractContextManager[None]:
        """`with handle.change(): handle.swap(…); handle.set_scales(…)`: other threads' forwards see all of it
        or none.
        """
        return self._turns.change()

    def split_tokens(self, group: ProcessGroup | None) -> None:
        """The batch's tokens are spread over the ranks of `group` (context parallel): gates per sample look
        at all of them.

        One all-reduce of [B,R] for each layer with such a gate, with its gradient. Token gates need nothing;
        masks and given gates are
        this rank's part. None: each rank's tokens are a batch of their own again. Copies and saved models
        forget the group.
        """
        self._check_active("split_tokens")
        with self._turns.change():
            for one in self._patched.values():
                one.module.tokens_group = group  # type: ignore[assignment]

    def remove(self) -> None:
        """Take everything off, all or nothing: modules, flags and outputs are bit for bit as they were before
        the patch.

        Raises MoleStateError the second time, and where a layer meanwhile belongs to another patch.
        """
        self._check_active("remove")
        for path, one in self._patched.items():
            self._check_ours(path, one)
        with self._turns.change():
            self.groups.remove()
            with all_or_nothing(
                [*self.layers.values(), *(module for module, _, _ in self._places), *self._roots]
            ):
                for one in self._patched.values():
                    detach(one.module)
                    for name, flag in one.flags.items():
                        parameter = one.module._parameters.get(name)
                        if parameter is not None and parameter.requires_grad != flag:
                            parameter.requires_grad_(flag)
                guards.uninstall(self._places)
                self._turns.unwatch(self._roots)
                forget(self, self._roots)
                self._active = False
            if self._cache is not None:
                self._cache.close()
            regroup(in_groups(self._roots))

    # keep

    def bank(self) -> ExpertBank:
        """The experts as they stand (copies), adapter weights not included."""
        self._check_active("bank")
        with self._fetched():
            return collect_bank(self._patched.values(), self._plan)

    def gates(self) -> GateFile | None:
        """The MoLE gates as they stand (copies); None where no layer has any. Other kinds of gates raise
        MoleStateError.
        """
        self._check_active("gates")
        with self._fetched():
            return collect_gates(self._patched.values(), self._names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Experts and gates into one safetensors file, which `patch` and `load_bank` read."""
        save_bank(self.bank(), path, gates=self.gates())

    def save_gates(
        self,
        path: str | os.PathLike[str],
        dialect: Literal["official", "native"] = "native",
        dtype: torch.dtype | None = None,
    ) -> None:
        """The gates alone; "official" is the dialect of MoLE's own files, for a UNet with the experts face
        and hand.
        """
        file = self.gates()
        if file is None:
            raise MoleStateError("save_gates", "the patched layers have no gates")
        save_gates(file, path, dialect=dialect, dtype=dtype)

    # checks

    def _check_active(self, what: str) -> None:
        if not self._active:
            raise MoleStateError(
                f"Handle.{what}", "this patch was removed already", hint="mole_kernels.patch makes a new one"
            )
        if self._folded is not None and what not in ("with", "bank", "gates"):
            raise MoleStateError(
                f"Handle.{what}", "the experts are folded into the weights", hint="handle.unfold() first"
            )

    def _check_here(self, what: str) -> None:
        if any(offload.offloaded(one.experts) for one in self._patched.values()):
            raise MoleStateError(
                f"Handle.{what}",
                "offload hooks hold the experts between calls, and would drop their gradients",
                hint="accelerate.hooks.remove_hook_from_submodules(model) first",
            )

    def _check_names(self, what: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._names:
                raise MoleValueError(
                    f"Handle.{what}", expected=f"one of the experts {', '.join(self._names)}", got=repr(name)
                )

    def _check_ours(self, path: str, one: Patched) -> None:
        if not isinstance(one.module, Gated) or one.module.experts is not one.experts:
            raise MoleStateError(
                "Handle.remove",
                f"{path} no longer holds the experts of this patch",
                hint="remove the other patch of this layer first",
            )
        if type(one.module) not in PLAIN_CLASS:
            raise MoleStateError(
                "Handle.remove",
                f"{path} has become a {type(one.module).__name__}, which cannot be undone",
                hint="fully_shard the blocks that hold the layers, not the layers themselves",
            )
        found = one.module.__dict__.get("forward")
        # a text cache follows the class
        if found is not None and not isinstance(found, CachedForward) and not follows_class(one.module):
            raise MoleStateError(
                "Handle.remove",
                f"a hook replaced the forward of {path} after it was patched, and would go on calling the "
                "patched one",
                hint="take that hook (diffusers' offload or layerwise casting) off first",
            )

    def _switch(self, on: bool) -> Switch:
        self._check_active("enable" if on else "disable")
        return self._switches.add(on)

    def _set_experts_on(self, on: bool) -> None:
        # a block that ends after `remove` has nothing left to switch
        modules = [module for module in self.layers.values() if isinstance(module, Gated)]
        before = [bool(module.experts_on) for module in modules]
        with self._turns.change():
            try:
                for module in modules:
                    module.experts_on = on
            except BaseException:
                for module, was in zip(modules, before):
                    module.experts_on = was
                raise

    @contextmanager
    def _fetched(self, *, write: bool = False, always: bool = True) -> Iterator[None]:
        """Inside the block the tensors are here that accelerate's hooks keep elsewhere; with `write` what was
        written is kept.
        """
        ones = self._patched.values()
        if always and any(offload.offloaded(one.experts) for one in ones):
            with offload.loaded(*(module for one in ones for module in (one.experts, one.gate)), write=write):
                yield
        else:
            yield


def _require_grad(parameters: list[nn.Parameter], on: bool) -> list[nn.Parameter]:
    for parameter in parameters:
        parameter.requires_grad_(on)
    return parameters
