"""A pytest plugin: every PEFT lora.Linear made while it is on computes through our operator.

pytest -p plugin --mole-report FILE [--mole-off]
Writes {"outcomes": {test: outcome}, "status": mk.status()} to FILE; with --mole-off nothing is patched and
only the outcomes are kept.
A run in which no call went through our operator fails.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

OUTCOMES = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mole-kernels")
    group.addoption(
        "--mole-report", default="mole_report.json", help="where the outcomes and counts are written"
    )
    group.addoption("--mole-off", action="store_true", help="run the tests as they are, for comparison")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = {}
    _stand_in("datasets", "load_dataset")
    if not config.getoption("--mole-off"):
        _accelerate_every_layer()


def _stand_in(package: str, *names: str) -> None:
    """PEFT's test helpers import `datasets` for tests that need the network; without it the offline ones must
    still load.
    """
    if importlib.util.find_spec(package) is not None:
        return
    module = types.ModuleType(package)

    def absent(*args: object, **kwargs: object) -> None:
        pytest.skip(f"{package} is not installed")

    for name in names:
        setattr(module, name, absent)
    module.__spec__ = importlib.util.spec_from_loader(package, loader=None)
    sys.modules[package] = module


def _accelerate_every_layer() -> None:
    from peft.tuners import lora

    from mole_kernels.peft.forward import exchange_class

    make = lora.Linear.__init__

    @functools.wraps(make)
    def make_accelerated(self, *args, **kwargs):
        make(self, *args, **kwargs)
        exchange_class(self)

    lora.Linear.__init__ = make_accelerated


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    outcomes = item.config.stash[OUTCOMES]
    # a failed set-up or tear-down counts as the test's outcome, a passed one does not
    if report.when == "call" or report.outcome != "passed":
        xfail = hasattr(report, "wasxfail")
        outcome = (
            {"passed": "xpassed", "skipped": "xfailed"}.get(report.outcome, report.outcome)
            if xfail
            else report.outcome
        )
        if outcomes.get(item.nodeid) not in ("failed",):
            outcomes[item.nodeid] = outcome
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    from mole_kernels.peft.status import status

    config = session.config
    on = not config.getoption("--mole-off")
    report = {"outcomes": config.stash[OUTCOMES], "status": status() if on else None}
    Path(config.getoption("--mole-report")).write_text(json.dumps(report, indent=1))
    if on and not config.option.collectonly and not status()["accelerated"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nno call went through mole_kernels: this run shows nothing", file=sys.stderr)
