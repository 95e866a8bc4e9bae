"""The suite that every backend is held to, test by test, until one of them notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from tests.backends import test_assignment, test_backends, test_special_numbers
from tests.cases import CASES
from tests.truth import DTYPES

Check = tuple[str, Callable[[], None]]


def forwards(backend: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Check]:
    for dtype in dtypes:
        yield (
            f"test_small_integers_are_exact[{dtype}]",
            partial(test_backends.test_small_integers_are_exact, backend, dtype),
        )
        for case in CASES:
            yield f"test_forward[{case}-{dtype}]", partial(test_backends.test_forward, case, backend, dtype)
    yield "test_each_expert_alone", partial(test_backends.test_each_expert_alone, backend)
    for name, test in vars(test_special_numbers).items():
        if name.startswith("test_"):
            for dtype in test_special_numbers.DTYPES if dtypes == DTYPES else dtypes:
                yield f"{name}[{dtype}]", partial(test, backend, dtype)
    for gate in ("none", "both", "softmax+mask") if torch.float32 in dtypes else ():
        test = test_assignment.test_samples_of_one_set_are_as_if_it_were_the_only_one
        yield f"{test.__name__}[{gate}]", partial(test, backend, gate)


def backwards(backend: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Check]:
    for dtype in dtypes:
        for case in CASES:
            yield (
                f"test_gradients[{case}-{dtype}]",
                partial(test_backends.test_gradients, case, backend, dtype),
            )


def noticed(
    backends: tuple[str, ...], backward: bool, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> str | None:
    """The first test that fails, None where all pass."""
    for backend in backends:
        there, back = forwards(backend, dtypes), backwards(backend, dtypes)
        every = [*back, *there] if backward else [*there, *back]
        for name, check in every:
            try:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    check()
            except AssertionError:
                return name if len(backends) == 1 else f"{name} of {backend}"
            except pytest.skip.Exception:
                continue
    return None
