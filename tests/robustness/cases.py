"""One bad input: what is done, on which model, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mole_kernels.experts.lowrank import Expert
from mole_kernels.patching.apply import patch
from mole_kernels.patching.handle import Handle
from tests.tiny_models import Mlp, State, make_expert

PATHS = ("first", "second", "mix")


@dataclass
class Ground:
    """A small model, an empty folder, and what a case may put on the model before the fault."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    model: torch.nn.Module = field(init=False)
    handle: Handle | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Mlp()
        self.x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3))

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x.to(self.model.second.weight.dtype))

    def expert(self, seed: int = 0, rank: int = 2) -> Expert:
        return make_expert(self.model, PATHS, rank=rank, seed=seed)


def patched(ground: Ground) -> None:
    """Two experts on every layer, MoLE gates."""
    ground.handle = patch(ground.model, {"a": ground.expert(), "b": ground.expert(1)}, "mole")


@dataclass(frozen=True)
class Case:
    """`id` begins with the number; a refusal has `error` and `words`, anything else checks itself in `act`
    and says its `outcome`.

    says     the bad input, in words
    act      does it; or
    source   makes the bad file or tensors in the ground's folder; they are then given to `patch` and to
             `Handle.swap`
    prepare  done to the ground before its state is taken down
    deeper   tests elsewhere that go further into the same case
    """

    id: str
    says: str
    act: Callable[[Ground], object] | None = None
    source: Callable[[Ground], object] | None = None
    error: type[BaseException] | None = None
    words: tuple[str, ...] = ()
    outcome: str = ""
    prepare: Callable[[Ground], None] = lambda ground: None
    deeper: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.id

    @property
    def number(self) -> str:
        return self.id.split("-")[0]

    def run(self, ground: Ground) -> str:
        """Do it and hold every promise; returns what the table says of it."""
        self.prepare(ground)
        state = State(ground.model, ground.forward)
        if self.source is not None:
            bad = self.source(ground)
            outcome = self._refused(ground, lambda: patch(ground.model, {"a": bad}))
            state.assert_unchanged()
            handle = patch(ground.model, {"a": ground.expert()})
            held = State(ground.model, ground.forward)
            self._refused(ground, lambda: handle.swap("a", bad))
            held.assert_unchanged()
            handle.remove()
        else:
            assert self.act is not None
            if self.error is None:
                self.act(ground)
                outcome = self.outcome
            else:
                outcome = self._refused(ground, lambda: self.act(ground))
        state.assert_unchanged()
        return outcome

    def _refused(self, ground: Ground, act: Callable[[], object]) -> str:
        assert self.error is not None
        with pytest.raises(self.error) as caught:
            act()
        text = str(caught.value)
        assert [word for word in self.words if word not in text] == [], text
        assert all(line.isprintable() for line in text.splitlines()), text
        first = text.splitlines()[0] if text else ""
        return f"`{type(caught.value).__name__}`: {first.replace(str(ground.folder), '…')}".removesuffix(": ")
