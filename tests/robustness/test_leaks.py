"""Nothing is left behind: memory, objects, caches and open files after many cycles (docs/memory.md has the
figures of `make endurance`).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import mole_kernels as mk
from mole_kernels import functional
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.gates.block import BlockRouting
from mole_kernels.serving.serve import Served
from tests.peft_models import make as make_peft
from tests.tiny_models import Mlp, make_expert

# `make endurance` asks for 1000
CYCLES = int(os.environ.get("MOLE_ENDURANCE_CYCLES", "100"))
PATHS = ("first", "second", "mix")
PAGE = os.sysconf("SC_PAGE_SIZE")
# what an allocator may keep for itself; what is left behind is counted in objects, too
SLACK = 1_500_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


class Footprint(NamedTuple):
    resident: int
    objects: int
    tensors: int
    files: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        # freed pages go back to the system, so that what is left is what is held
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * PAGE
        objects = gc.get_objects()
        tensors = sum(isinstance(one, torch.Tensor) for one in objects)
        return cls(resident, len(objects), tensors, len(os.listdir("/proc/self/fd")))


def module_caches() -> Iterator[tuple[str, Any]]:
    """(name, object) of every cache, dict, list and set at the top of a module of this package."""
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] != "mole_kernels" or module is None:
            continue
        for key, value in vars(module).items():
            here = getattr(value, "__module__", name) == name
            if (isinstance(value, _lru_cache_wrapper) and here) or (
                isinstance(value, dict | list | set | weakref.WeakSet) and key[:2] != "__"
            ):
                yield f"{name}.{key}", value


def sizes_of_caches() -> dict[str, int]:
    return {
        name: one.cache_info().currsize if isinstance(one, _lru_cache_wrapper) else len(one)
        for name, one in module_caches()
    }


@torch.no_grad()
def cycle_of_a_patch(folder: Any) -> Callable[[], None]:
    """Load, patch, run, swap in place and repacked, scale, copy, remove; now and then a call that fails
    half-way.
    """
    model, x = Mlp(), torch.randn(2, 6, 6)
    bank = str(folder / "bank.safetensors")
    ExpertBank({"a": make_expert(model, PATHS), "b": make_expert(model, PATHS, seed=1)}).save(bank)
    larger = make_expert(model, PATHS, rank=4, seed=2)
    base = model(x)

    @torch.no_grad()
    def cycle() -> None:
        loaded = mk.ExpertBank.load(bank)
        handle = mk.patch(model, loaded, "mole")
        model(x)
        handle.swap("a", make_expert(model, PATHS, seed=3))
        handle.swap("b", larger)
        handle.set_scales({"a": 0.5})
        with pytest.raises(mk.MoleError):
            handle.swap("a", str(folder / "missing.safetensors"))
        with handle.hold():
            model(x)
        handle.save(folder / "saved.safetensors")
        handle.remove()

    def checked() -> None:
        cycle()
        assert torch.equal(model(x), base)

    return checked


def cycle_of_training(folder: Any) -> Callable[[], None]:
    """Fresh experts, a step with gradients, off again; routers of whole blocks among them."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    )
    x = torch.randn(2, 3, 6)

    def cycle() -> None:
        routing = BlockRouting(model, is_block=lambda path, module: isinstance(module, nn.Sequential))
        for gates in (routing, "mole"):
            with mk.patch(
                model,
                {"a": make_expert(model, ["0.0", "1.0"]), "b": make_expert(model, ["0.0", "1.0"], seed=1)},
                gates,
            ) as handle:
                parameters = handle.experts_require_grad() + handle.gates_require_grad()
                model(x).square().sum().backward()
                torch.optim.SGD(parameters, 0.1).step()
        routing.remove()

    return cycle


def cycle_of_acceleration(folder: Any) -> Callable[[], None]:
    model, x = make_peft((2, 4)), torch.randn(2, 24)
    with torch.no_grad():
        want = model(x)

    @torch.no_grad()
    def cycle() -> None:
        handle = mk.accelerate(model)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        handle.remove()

    return cycle


def cycle_of_serving(folder: Any) -> Callable[[], None]:
    """Identities come, are assigned, pushed out, dropped; the whole service starts and ends now and then."""
    model, x = Mlp(), torch.randn(2, 6, 6)
    people = {name: make_expert(model, PATHS, seed=seed) for seed, name in enumerate("abcd")}
    served: list[Served] = []
    count = iter(range(10**9))

    @torch.no_grad()
    def cycle() -> None:
        i = next(count)
        if i % 10 == 0:
            if served:
                served.pop().remove()
            served.append(mk.serve(model, {name: people[name] for name in "abc"}, capacity=2))
        one = served[0]
        for names in (["a", None], ["b", "c"], ["c", "a"]):
            with one.assign(names):
                model(x)
        one.prefetch(["b"])
        one.add("d", people["d"])
        one.assign(["d", "d"])
        one.drop("d")

    return cycle


def cycle_of_shapes(folder: Any) -> Callable[[], None]:
    """A new number of tokens and another rank at each call: what is kept by shape must have an end."""
    model, count = nn.Linear(6, 6), iter(range(10**9))

    @torch.no_grad()
    def cycle() -> None:
        i = next(count)
        with mk.patch(
            nn.Sequential(model), {"a": make_expert(nn.Sequential(model), ["0"], rank=1 + i % 5)}
        ) as handle:
            handle.layers["0"](torch.randn(1, 1 + i % 4, 6))

    return cycle


WORKS = [cycle_of_a_patch, cycle_of_training, cycle_of_acceleration, cycle_of_serving, cycle_of_shapes]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__.removeprefix("cycle_of_"))
def test_many_cycles_leave_nothing_behind(work, tmp_path, capsys):
    cycle = work(tmp_path)
    # caches fill, the allocator finds its size
    for _ in range(max(30, CYCLES // 10)):
        cycle()
    before, caches = Footprint.now(), sizes_of_caches()
    for _ in range(CYCLES):
        cycle()
    after = Footprint.now()
    grown = {
        name: (caches.get(name, 0), size)
        for name, size in sizes_of_caches().items()
        if size > caches.get(name, 0)
    }
    if "MOLE_ENDURANCE_CYCLES" in os.environ:
        name, rss = work.__name__.removeprefix("cycle_of_"), (after.resident - before.resident) / 1e3
        counts = [f"{now - then:+}" for now, then in zip(after[1:], before[1:])]
        with capsys.disabled():
            print(
                "\n|",
                " | ".join([name, str(CYCLES), f"{before.resident / 1e6:.0f}", f"{rss:+.0f}", *counts]),
                "|",
            )
    assert not grown, "caches that grow"
    assert after.files == before.files
    assert after.tensors <= before.tensors
    # far fewer than one for each cycle
    assert after.objects - before.objects < CYCLES / 4
    assert after.resident - before.resident < SLACK


def test_every_cache_has_an_end():
    """Each lru_cache is bounded; the dictionaries that grow with what is called are known by name, and
    bounded in their code.
    """
    import pkgutil

    for package in (
        "modules",
        "peft",
        "grouping",
        "text_cache",
        "patching",
        "serving",
        "backends",
        "dispatch",
        "kernels",
        "ops",
        "gates",
        "experts",
        "layers",
        "io",
        "files",
    ):
        path = [os.path.join(next(iter(mk.__path__)), package)]
        for found in pkgutil.iter_modules(path, f"mole_kernels.{package}."):
            if not found.ispkg:
                __import__(found.name)
    caches = [(name, one) for name, one in module_caches() if isinstance(one, _lru_cache_wrapper)]
    assert len(caches) > 5
    assert not [name for name, one in caches if one.cache_info().maxsize is None]
    counters = {name for name, one in module_caches() if type(one).__name__ == "Counter"}
    # counted by reason or backend: as many as there are words in the code
    assert counters <= {
        "mole_kernels.backends.select.refusals",
        "mole_kernels.peft.status.all_calls",
        "mole_kernels.peft.forward.NOT_KEPT",
    }


def test_what_is_known_of_calls_is_forgotten_in_the_end(monkeypatch):
    monkeypatch.setattr(functional, "MOST_KNOWN", 8)
    monkeypatch.setattr(functional, "_KNOWN", {})
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad(), mk.patch(model, {"a": make_expert(model, ["0"])}):
        for tokens in range(1, 40):
            model(torch.randn(1, tokens, 6))
            assert len(functional._KNOWN) <= 8


def everything(model: nn.Module) -> None:
    """Patched with gates, run, swapped, cached, copied, compiled around; then removed."""
    experts = {"a": make_expert(model, PATHS), "b": make_expert(model, PATHS, seed=1)}
    with torch.no_grad():
        handle = mk.patch(model, experts, "mole")
        model(torch.randn(1, 6, 6))
        handle.swap("a", make_expert(model, PATHS, rank=5, seed=3))
        with handle.disable():
            model(torch.randn(1, 6, 6))
        model(torch.randn(1, 6, 6))
        handle.remove()
        with mk.serve(model, experts) as served, served.assign(["a"]):
            model(torch.randn(1, 6, 6))


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "dropped"])
def test_a_model_dies_when_its_owner_lets_go(removed):
    model = Mlp()
    everything(model)
    if not removed:
        # the patch, its handle and all dies with the model
        mk.patch(model, {"a": make_expert(model, PATHS)}, "mole")
        with torch.no_grad():
            model(torch.randn(1, 6, 6))
    parts = [
        weakref.ref(model),
        *(weakref.ref(module) for module in model.modules()),
        *(weakref.ref(p) for p in model.parameters()),
    ]
    del model
    gc.collect()
    assert not [part() for part in parts if part() is not None]


def test_experts_die_when_they_are_removed_or_replaced():
    model = Mlp()
    handle = mk.patch(model, {"a": make_expert(model, PATHS)}, "mole")
    with torch.no_grad():
        model(torch.randn(1, 6, 6))
    old = [weakref.ref(layer.experts) for layer in handle.layers.values()]
    handle.swap("a", make_expert(model, PATHS, rank=4, seed=2))
    gc.collect()
    assert not [one() for one in old if one() is not None]
    held = [weakref.ref(layer.experts) for layer in handle.layers.values()] + [
        weakref.ref(layer.gate) for layer in handle.layers.values()
    ]
    handle.remove()
    del handle
    gc.collect()
    assert not [one() for one in held if one() is not None]


def test_a_file_that_was_refused_is_closed(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    model = Mlp()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(mk.MoleError):
            mk.patch(model, {"a": str(tmp_path / "bad.safetensors")})
    assert len(os.listdir("/proc/self/fd")) == before
