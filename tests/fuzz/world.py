"""A small model, what may be called on it, and what must be the same after a call that failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.experts.lowrank import Expert
from mole_kernels.io.bank import load_bank
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from mole_kernels.peft.accelerate import AccelerateHandle
from tests import peft_models
from tests.fuzz.faults import Fault
from tests.tiny_models import Mlp, State, make_expert

PATHS = ("first", "second", "mix")
NAMES = ("a", "b")


class Both(nn.Module):
    """Layers that take experts, and layers that hold PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ours = Mlp()
        self.peft = peft_models.make((4, 2))
        self.peft_too = peft_models.make((3,))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([self.ours(x).flatten(), self.peft(z).flatten(), self.peft_too(z).flatten()])


class World:
    """`model` as it is now; what it should be: `experts` (None where unpatched), `scales`, `on`, `folded`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Both()
        self.x, self.z = (
            torch.randn(2, 6, n, generator=torch.Generator().manual_seed(3)) for n in (6, peft_models.K)
        )
        self.pool = {(seed, rank): self._expert(seed, rank) for seed in range(3) for rank in (1, 2, 4)}
        self.bare = State(self.model, self.run)
        self.handle: Handle | None = None
        self.accelerated: list[AccelerateHandle] = []
        self.experts: dict[str, Expert] | None = None
        self.sources: dict[str, str] = {}
        self.gates: str | None = None
        self.scales = dict.fromkeys(NAMES, 1.0)
        self.on, self.folded = True, False
        self.saved: dict[str, Any] | None = None

    def _expert(self, seed: int, rank: int) -> Expert:
        # the second seed lacks a layer
        return make_expert(
            self.model.ours,
            PATHS[: 2 if seed == 1 else 3],
            rank=rank,
            seed=seed,
            rename=lambda path: f"ours.{path}",
        )

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.model(self.x, self.z)

    # -- what must not change

    def snapshot(self) -> Callable[[], None]:
        """A check that everything is bit for bit as it is now."""
        state, said, files = State(self.model, self.run), self._said(), self._files()

        def check() -> None:
            state.assert_unchanged()
            now = self._said()
            assert now == said, {
                key: (said.get(key), now.get(key)) for key in {*said, *now} if said.get(key) != now.get(key)
            }
            assert self._files() == files

        return check

    def _said(self) -> dict[str, Any]:
        """What the handles say of themselves."""
        said: dict[str, Any] = {"accelerated": [sorted(handle.layers) for handle in self.accelerated]}
        if self.handle is None:
            return said
        one = self.handle
        said |= {
            "active": one.active,
            "names": one.names,
            "scales": one.scales,
            "layers": {p: id(m) for p, m in one.layers.items()},
        }
        said["folded"] = one._folded is not None
        if one.active:
            said["on"] = [module.experts_on for module in one.layers.values()]
            bank = one.bank()
            said["bank"] = {
                (name, path): (layer.rank, layer.scale, layer.down.tolist(), layer.up.tolist())
                for name, expert in bank.experts.items()
                for path, layer in expert.layers.items()
            }
            said["sources"] = [expert.source for expert in bank.experts.values()]
            said["experts"] = {path: id(module.experts) for path, module in one.layers.items()}
        return said

    def _files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    # -- calls

    def call(self, act: Callable[[], Any], fault: Fault | None, late: bool = True) -> bool:
        """Do it, with a fault or without; whether it went through. Where it did not, nothing has changed.

        late  whether Ctrl-C may come too late; not for calls whose result is the only way back
        """
        check = self.snapshot()
        try:
            if fault is None:
                act()
            else:
                with fault:
                    act()
        # what it was is not the question here: a fault of ours, or a refusal
        except (mk.MoleError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
            if fault is None or not fault.happened:
                assert isinstance(error, mk.MoleError), repr(error)
            try:
                check()
            except AssertionError:
                # Ctrl-C on the way out of what is done: then all of it is done, which `assert_computes` holds
                # next
                if late and fault is not None and fault.kind == "ctrl-c":
                    return True
                raise
            return False
        return True

    def patch(
        self, seeds: tuple[tuple[int, int], tuple[int, int]], gates: str | None, fault: Fault | None = None
    ) -> None:
        experts = {name: self.pool[seed] for name, seed in zip(NAMES, seeds)}
        made: list[Handle] = []
        if self.call(
            lambda: made.append(patch(self.model, experts, gates, scales={"b": 0.5})), fault, late=False
        ):
            self.handle, self.experts, self.gates = made[0], experts, gates
            self.sources = {name: expert.source for name, expert in experts.items()}
            self.scales, self.on, self.folded = {"a": 1.0, "b": 0.5}, True, False

    def patch_saved(self, fault: Fault | None = None) -> None:
        """From the file that `save` wrote."""
        made: list[Handle] = []
        if self.saved is not None and self.call(
            lambda: made.append(patch(self.model, self.folder / "x.safetensors")), fault, late=False
        ):
            self.handle, self.experts, self.gates = made[0], self.saved["experts"], self.saved["gates"]
            self.sources = dict.fromkeys(NAMES, str(self.folder / "x.safetensors"))
            self.scales, self.on, self.folded = dict.fromkeys(NAMES, 1.0), True, False

    def set_scales(self, scales: dict[str, float], fault: Fault | None = None) -> None:
        if self.handle is not None and self.call(lambda: self.handle.set_scales(scales), fault):
            self.scales |= scales

    def swap(self, name: str, seed: tuple[int, int], fault: Fault | None = None) -> None:
        if self.handle is not None and self.call(lambda: self.handle.swap(name, self.pool[seed]), fault):
            assert self.experts is not None
            self.experts = self.experts | {name: self.pool[seed]}
            self.sources[name] = self.pool[seed].source

    def switch(self, on: bool, fault: Fault | None = None) -> None:
        if self.handle is not None and self.call(self.handle.enable if on else self.handle.disable, fault):
            self.on = on

    def fold(self, fault: Fault | None = None) -> None:
        if self.handle is not None and self.call(self.handle.fold, fault):
            self.folded = True

    def unfold(self, fault: Fault | None = None) -> None:
        if self.handle is not None and self.call(self.handle.unfold, fault):
            self.folded = False

    def remove(self, fault: Fault | None = None) -> None:
        if self.handle is not None and self.call(self.handle.remove, fault):
            assert not self.handle.active
            self.handle = self.experts = None
            self.assert_bare()

    def save(self, fault: Fault | None = None) -> None:
        path = self.folder / "x.safetensors"
        if self.handle is not None and self.call(lambda: self.handle.save(path), fault):
            self.saved = {"experts": dict(self.experts or {}), "gates": self.gates}
            bank, _ = load_bank(path)
            assert bank.names == NAMES
            assert all(
                sorted(bank.experts[name].layers) == sorted(expert.layers)
                for name, expert in (self.experts or {}).items()
            )

    def accelerate(self, fault: Fault | None = None) -> None:
        made: list[AccelerateHandle] = []
        if self.call(lambda: made.append(mk.accelerate(self.model)), fault, late=False):
            self.accelerated += made

    def decelerate(self, fault: Fault | None = None) -> None:
        if self.accelerated and self.call(self.accelerated[-1].remove, fault):
            # layers are given back whoever accelerated them
            for handle in self.accelerated:
                handle.remove()
            self.accelerated.clear()

    # -- what must hold

    def assert_bare(self) -> None:
        """Without a patch and without acceleration: every bit, hook, class and flag of the beginning."""
        if not self.accelerated:
            self.bare.assert_unchanged()

    def assert_computes(self) -> None:
        """What a fresh model patched with the same experts and weights computes, and the handle says so."""
        if self.handle is None or self.experts is None:
            return
        said = self._said()
        assert said["active"] and said["scales"] == self.scales and said["folded"] == self.folded
        assert set(said["on"]) == {self.on and not self.folded} and said["sources"] == [
            self.sources[name] for name in NAMES
        ]
        if self.gates not in (None, "constant"):
            return
        other = Both()
        want = other(self.x, self.z)
        if self.on:
            with patch(other, self.experts, self.gates, scales=self.scales):
                want = other(self.x, self.z)
        torch.testing.assert_close(self.run(), want.detach(), rtol=1e-4, atol=1e-5)
