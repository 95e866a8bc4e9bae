"""Each call on a patched model with a fault at every moment it has: nothing changes, and then the call goes
through.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.faults import Fault
from tests.fuzz.world import World

LARGER, SMALLER = (2, 4), (2, 1)


def patched(world: World, gates: str | None = None) -> None:
    world.patch(((0, 2), (1, 2)), gates)


def folded(world: World) -> None:
    patched(world, "constant")
    world.fold()


def saved(world: World) -> None:
    patched(world, "mole")
    world.save()
    world.remove()


def saved_before(world: World) -> None:
    saved(world)
    patched(world)


def off(world: World) -> None:
    patched(world)
    world.switch(False)


def fresh(folder: Path, before: Callable[[World], None]) -> World:
    own = folder / str(len(list(folder.iterdir())))
    own.mkdir()
    world = World(own)
    before(world)
    return world


def state_of(world: World) -> tuple:
    return (
        world.handle is None,
        dict(world.experts or {}),
        dict(world.scales),
        world.on,
        world.folded,
        len(world.accelerated),
    )


# call -> (what comes before it, the call)
CALLS: dict[str, tuple[Callable[[World], None], Callable[[World, Fault | None], None]]] = {
    "patch": (lambda world: None, lambda world, fault: world.patch(((0, 2), (1, 2)), "mole", fault)),
    "patch-saved": (saved, lambda world, fault: world.patch_saved(fault)),
    "set_scales": (patched, lambda world, fault: world.set_scales({"a": 0.25, "b": -1.0}, fault)),
    "swap-larger": (patched, lambda world, fault: world.swap("a", LARGER, fault)),
    "swap-smaller": (patched, lambda world, fault: world.swap("a", SMALLER, fault)),
    "disable": (patched, lambda world, fault: world.switch(False, fault)),
    "enable": (off, lambda world, fault: world.switch(True, fault)),
    "fold": (lambda world: patched(world, "constant"), lambda world, fault: world.fold(fault)),
    "unfold": (folded, lambda world, fault: world.unfold(fault)),
    "remove": (patched, lambda world, fault: world.remove(fault)),
    "save": (patched, lambda world, fault: world.save(fault)),
    "save-over": (saved_before, lambda world, fault: world.save(fault)),
    "accelerate": (lambda world: None, lambda world, fault: world.accelerate(fault)),
    "decelerate": (lambda world: world.accelerate(), lambda world, fault: world.decelerate(fault)),
}
# every so many moments, another beginning for each call; `make fuzz` (MOLE_FUZZ_SECONDS) takes them all
STEPS = (
    dict.fromkeys(("memory", "disk", "ctrl-c"), 1)
    if os.environ.get("MOLE_FUZZ_SECONDS")
    else {"memory": 9, "disk": 1, "ctrl-c": 41}
)


@pytest.mark.parametrize("kind", ["memory", "disk", "ctrl-c"])
@pytest.mark.parametrize("name", CALLS)
def test_a_fault_at_every_moment(name: str, kind: str, tmp_path: Path):
    before, act = CALLS[name]
    dry = Fault(kind, -1)
    act(fresh(tmp_path, before), dry)
    assert not dry.happened
    step = STEPS[kind]
    if dry.count == 0:
        pytest.skip(f"no moment of this kind: {name} needs none")
    world = fresh(tmp_path, before)
    for at in range(sum(map(ord, name)) % min(step, dry.count), dry.count, step):
        fault = Fault(kind, at)
        had = state_of(world)
        act(world, fault)
        # the dry call also did what is done once in a process
        if not fault.happened:
            assert at > 0, "the fault never came"
            break
        world.assert_computes()
        if state_of(world) != had:
            world = fresh(tmp_path, before)
    # after all that went wrong, it goes through
    act(world, None)
    world.assert_computes()
    while world.accelerated:
        world.decelerate()
    if world.handle is not None:
        if world.folded:
            world.unfold()
        world.remove()
    world.assert_bare()
