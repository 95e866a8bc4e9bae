"""The patched model in the caller's hand: change scales and experts, switch off, fold, take off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn

from mole_kernels.errors import MoleStateError
from mole_kernels.grouping.groups import Groups
from mole_kernels.layers import offload
from mole_kernels.layers.fingerprint import Check
from mole_kernels.modules.forward_lock import ForwardLock
from mole_kernels.modules.group_offload import in_groups, regroup
from mole_kernels.modules.snapshot import all_or_nothing
from mole_kernels.patching import block_ranks, guards
from mole_kernels.patching.block_scales import Scale
from mole_kernels.patching.contents import PatchContents
from mole_kernels.patching.families import AppliedDifferences
from mole_kernels.patching.fold import fold
from mole_kernels.patching.handles import forget
from mole_kernels.patching.patched import Patched
from mole_kernels.patching.sources import read_expert
from mole_kernels.patching.swap import swap_expert
from mole_kernels.patching.switches import Switch, Switches
from mole_kernels.text_cache.cache import TextCache, cache_text

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mole_kernels.patching.plan import Plan
    from mole_kernels.patching.sources import Source

_RENAMED = {"train_experts": "experts_require_grad", "train_gates": "gates_require_grad"}


class Handle(PatchContents):
    """What `patch` returns. Also a context manager that removes the patch at its end.

    Every method but `active` and the properties raises MoleStateError after `remove`; while the experts are
    folded, only `unfold`, `bake`, `bank` and `gates` are allowed.
    """

    def __init__(
        self,
        patched: Iterable[Patched],
        plan: Plan,
        places: list[tuple[nn.Module, str, list[str]]],
        roots: Sequence[nn.Module],
        lock: ForwardLock,
    ) -> None:
        super().__init__(patched, plan)
        self._roots, self._places, self._lock = list(roots), places, lock
        self._switches = Switches(lock, self._set_experts_on)
        self._cache: TextCache | None = None
        self._differences = AppliedDifferences(plan.differences)
        self.groups = Groups(nn.Module(), ())

    def __getattr__(self, name: str) -> Any:
        if name in _RENAMED:
            raise AttributeError(f"Handle.{name} is called {_RENAMED[name]}: it trains nothing")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __enter__(self) -> Handle:
        self._check("with")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._folded is not None:
            self.unfold()
        if self._active:
            self.remove()

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
        self._check("set_scales")
        layers = {path: layer.experts for path, layer in self._patched.items()}
        checked, by_layer = self._settings.resolve(scales, self.model, layers)
        absent = any(experts.scale.is_meta for experts in layers.values())
        # merged with what is set under the lock: another thread may set other adapters' scales meanwhile
        with self._lock.change(), self._patched.fetched(write=True, always=absent):
            self._settings.write(layers, checked, by_layer)
            self._differences.write(self._settings.numbers())

    def swap(self, name: str, source: Source, *, strict: bool = True) -> None:
        """Replace one expert by another, all or nothing; its scale and gate rows stay.

        A rank up to the packed one is written in place, padded with zeros: nothing recompiles. A larger rank
        makes new parameters, which an optimiser or a CUDA graph does not know.

        Args:
            name: The expert to replace.
            source: The new one: a file, tensors or an `Expert`.
            strict: Whether a key that matches no layer of the old expert is an error, else a warning.

        Raises:
            MoleError: The source does not fit, or the experts are sharded. Nothing changes.
        """
        self._check("swap", names=(name,))
        if self._patched.sharded():
            raise MoleStateError(
                "Handle.swap", "the experts are sharded over ranks", hint="swap first, then fully_shard"
            )
        # no forward waits for a file
        expert = read_expert(name, source, self.model)
        with self._lock.change():
            before = [layer.experts for layer in self._patched.values()]
            with self._patched.fetched(write=True):
                self._settings.forget_staged()
                swap_expert(self._patched, self._plan, name, expert, strict, self._settings.by_layer)
            block_ranks.mark(self.layers)
            block_ranks.pad(block_ranks.compiled(module for module, _, _ in self._places))
            replaced = self._patched.replaced(before)
            for new, old in replaced:
                if offload.offloaded(old):
                    offload.offload_like(new, old)
            if replaced:
                regroup(in_groups(self._roots))

    def enable(self) -> Switch:
        """Turn the experts on (again); `with handle.enable():` goes back at its end."""
        self._check("enable")
        return self._switches.add(True)

    def disable(self) -> Switch:
        """Turn the experts off: the base's output bit for bit; after `with handle.disable():` they are on."""
        self._check("disable")
        return self._switches.add(False)

    def cache_text(self, *, check: Check = "sample", texts: int = 4) -> TextCache:
        """Keys and values of cross-attention once per text: see `mk.cache_text`. `remove` closes it."""
        self._check("cache_text")
        self._cache = cache_text(self._plan.model, check=check, texts=texts)
        return self._cache

    def group(self) -> Groups:
        """Layers that read one tensor (q, k, v) become one product where that is exact and faster.

        `Groups.report()` says what was grouped and why the others were not; `remove` takes groups apart.
        """
        self._check("group")
        with self._lock.change():
            self.groups.remove()
            self.groups = Groups(self._plan.model, self.layers.values())
        return self.groups

    def fold(self, *, keep: bool = True) -> None:
        """W' = W + Σ s g B A: the plain layer's speed, for constant gates. All or nothing.

        Args:
            keep: Whether copies of the weights are kept, so that `unfold` is exact; without them it is within
                two roundings.

        Raises:
            MoleStateError: A gate is not constant, or a weight cannot be written. Nothing changes.
        """
        self._check("fold")
        with self._lock.change():
            self._folded = fold(self._plan.model, self._patched.values(), keep=keep)

    def unfold(self) -> None:
        """Take the mixture out of the weights again and compute it beside them, as before `fold`."""
        if self._folded is None:
            raise MoleStateError("Handle.unfold", "nothing is folded", hint="handle.fold() comes first")
        with self._lock.change():
            try:
                self._folded.unfold()
                self._folded = None
            except BaseException:  # Ctrl-C between the two
                self._folded = self._folded if self._folded else None
                raise

    def bake(self) -> None:
        """End the patch with the mixture in the weights for good: W' = W + Σ s g B A.

        The model is then a plain one with nothing of this package left on it, to be saved or compiled.

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
        """`with handle.hold(): pipe(…)`: no other thread's change comes between the steps of a picture.

        Without it each forward of the model is wholly before or wholly after a change; changes wait for
        forwards that run. Not so inside torch.compile of the whole model, nor for layers called alone.
        """
        return self._lock.hold()

    def change(self) -> AbstractContextManager[None]:
        """`with handle.change(): …`: other threads' forwards see all changes of the block, or none."""
        return self._lock.change()

    def split_tokens(self, group: ProcessGroup | None) -> None:
        """The batch's tokens lie on the ranks of `group` (context parallel); sample gates see them all.

        One all-reduce of [B,R] for each layer with such a gate; masks and given gates are this rank's part.

        Args:
            group: The ranks; None: each rank's tokens are a batch of their own again.
        """
        self._check("split_tokens")
        with self._lock.change():
            self._patched.set_tokens_group(group)

    def remove(self) -> None:
        """Take everything off, all or nothing: modules, flags and outputs are as before, bit for bit.

        Raises:
            MoleStateError: The second time, and where a layer meanwhile belongs to another patch.
        """
        self._check("remove")
        self._patched.check_removable()
        with self._lock.change():
            self.groups.remove()
            places = [module for module, _, _ in self._places]
            with all_or_nothing([*self.layers.values(), *places, *self._roots]):
                self._patched.detach()
                self._differences.restore()
                guards.uninstall(self._places)
                self._lock.unwatch(self._roots)
                forget(self, self._roots)
                self._active = False
            if self._cache is not None:
                self._cache.close()
            regroup(in_groups(self._roots))

    def _set_experts_on(self, on: bool) -> None:
        with self._lock.change():
            self._patched.set_experts_on(on)
