"""The GPU's side of the device words against stand-ins for torch.cuda: what is called, in which order, in
which unit.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device as devices
from benchmarks.device import Cpu, Gpu, poisoned


class Stream:
    cuda_stream = 1

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class Event:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins that note what they were asked."""
    log: list[str] = []
    memory = iter([100, 900])

    @contextlib.contextmanager
    def inside(name):
        log.append(f"into {name}")
        yield
        log.append(f"out of {name}")

    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": lambda *a: Stream(),
        "stream": lambda s: inside("side stream"),
        "graph": lambda g: inside("capture"),
        "synchronize": lambda *a: log.append("sync"),
        "reset_peak_memory_stats": lambda: log.append("reset"),
        "memory_allocated": lambda: next(memory),
        "max_memory_allocated": lambda: next(memory),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_a_run_is_warmed_up_aside_and_captured_once(cuda):
    replay = Gpu().captured(lambda: cuda.append("run"))
    assert cuda == [
        "into side stream",
        "run",
        "run",
        "out of side stream",
        "into capture",
        "run",
        "out of capture",
    ]
    before = Graph.replays
    replay()
    assert Graph.replays == before + 1 and cuda.count("run") == 3


def test_events_are_milliseconds_and_times_microseconds(cuda):
    def run():
        Event.now += 0.25

    assert Gpu().elapsed(run) == pytest.approx(250.0)


def test_the_peak_is_what_a_call_needs_beyond_what_was_there(cuda):
    assert Gpu().peak(lambda: cuda.append("run")) == 800
    assert cuda == ["run", "sync", "reset", "run", "sync"]


def test_aside_gives_the_result_back(cuda):
    assert Gpu().aside(lambda: 7) == 7 and cuda == ["into side stream", "out of side stream"]


def test_what_nvidia_smi_says(monkeypatch):
    answer = SimpleNamespace(returncode=0, stdout="1980, 3201, 41, 250.50, [N/A]\n")
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    asked = []
    monkeypatch.setattr(
        devices.subprocess, "run", lambda command, **named: (asked.append(command), answer)[1]
    )
    assert Gpu().clocks() == {
        "clocks.sm": 1980.0,
        "clocks.mem": 3201.0,
        "temperature.gpu": 41.0,
        "power.draw": 250.5,
    }
    assert all(word.startswith(("--query-gpu=", "--format=")) for word in asked[0][1:]), (
        "clocks are read, never set"
    )
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert Gpu().clocks() == {} and Cpu().clocks() == {}


def test_memory_is_poisoned_and_given_back():
    before = torch.empty
    with poisoned():
        assert torch.empty(3).isnan().all() and (torch.empty(2, dtype=torch.int32) == 2**31 - 1).all()
        assert torch.empty(2, device="meta").is_meta
    assert torch.empty is before
