"""Random calls on a small model, any of them with a fault at a random moment: a call that fails changes
nothing, `remove` restores.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fuzz.faults import Fault
from tests.fuzz.world import NAMES, World

# of `make fuzz`; about a second for each ten runs
SECONDS = float(os.environ.get("MOLE_FUZZ_SECONDS", "0"))
FAULTS = st.none() | st.builds(
    Fault,
    st.sampled_from(["memory", "host", "disk", "ctrl-c"]),
    st.integers(0, 20) | st.integers(0, 120) | st.integers(0, 2000),
)
SEEDS = st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 4]))
WEIGHTS = st.sampled_from([0.0, 1.0, -0.5, 0.25, 3.0])


class Machine(RuleBasedStateMachine):
    """Every rule also runs where it is refused (a second patch, a swap while folded): a refusal changes
    nothing either.
    """

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.world = World(Path(self.folder.name))

    def teardown(self) -> None:
        world = self.world
        while world.accelerated:
            world.decelerate()
        if world.handle is not None:
            if world.folded:
                world.unfold()
            world.remove()
            assert world.handle is None
        world.assert_bare()
        self.folder.cleanup()

    @invariant()
    def computes(self) -> None:
        self.world.assert_computes()

    @precondition(lambda self: self.world.handle is None)
    @rule(
        seeds=st.tuples(SEEDS, SEEDS),
        gates=st.sampled_from([None, "constant", "mole", "top-1"]),
        fault=FAULTS,
    )
    def patch(self, seeds: tuple, gates: str | None, fault: Fault | None) -> None:
        self.world.patch(seeds, gates, fault)

    @precondition(lambda self: self.world.handle is not None)
    @rule()
    def patch_twice(self) -> None:
        world = self.world
        handle, experts = world.handle, world.experts
        world.patch(((0, 2), (2, 2)), None)
        assert world.handle is handle and world.experts is experts

    @precondition(lambda self: self.world.handle is None and self.world.saved is not None)
    @rule(fault=FAULTS)
    def load(self, fault: Fault | None) -> None:
        self.world.patch_saved(fault)

    @rule(weights=st.dictionaries(st.sampled_from(NAMES), WEIGHTS), fault=FAULTS)
    def set_scales(self, weights: dict[str, float], fault: Fault | None) -> None:
        self.world.set_scales(weights, fault)

    @rule(name=st.sampled_from(NAMES), seed=SEEDS, fault=FAULTS)
    def swap(self, name: str, seed: tuple[int, int], fault: Fault | None) -> None:
        self.world.swap(name, seed, fault)

    @rule(on=st.booleans(), fault=FAULTS)
    def switch(self, on: bool, fault: Fault | None) -> None:
        self.world.switch(on, fault)

    @rule(fault=FAULTS)
    def fold(self, fault: Fault | None) -> None:
        self.world.fold(fault)

    @rule(fault=FAULTS)
    def unfold(self, fault: Fault | None) -> None:
        self.world.unfold(fault)

    @rule(fault=FAULTS)
    def save(self, fault: Fault | None) -> None:
        self.world.save(fault)

    @rule(fault=FAULTS)
    def remove(self, fault: Fault | None) -> None:
        self.world.remove(fault)

    @rule(fault=FAULTS)
    def accelerate(self, fault: Fault | None) -> None:
        self.world.accelerate(fault)

    @rule(fault=FAULTS)
    def decelerate(self, fault: Fault | None) -> None:
        self.world.decelerate(fault)


warnings.filterwarnings("ignore", message="Already found a `peft_config`")
TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=max(20, int(10 * SECONDS)),
    stateful_step_count=20,
    deadline=None,
    derandomize=not SECONDS,
    database=None,
    suppress_health_check=list(HealthCheck),
)
