"""What measuring needs of a machine: a GPU by events, graphs and the profiler, or a CPU by its clock, with
the same words.

Everything above this file runs the same on both, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Run = Callable[[], object]
# the least that inputs are rotated through when the cache is to be cold, in sizes of the last-level cache
ROTATED = 3
QUERY = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"


class Device(Protocol):
    kind: str

    def facts(self) -> dict[str, Any] | None: ...

    def clocks(self) -> dict[str, float]: ...

    def sync(self) -> None: ...

    def elapsed(self, run: Run) -> float: ...

    def captured(self, run: Run) -> Run: ...

    def aside(self, run: Run) -> object: ...

    def launches(self, run: Run) -> int | None: ...

    def peak(self, run: Run) -> int | None: ...

    def cache(self) -> int: ...

    def memory(self) -> int: ...

    def poison(self) -> None: ...


class Cpu:
    """The processor: a clock, no graphs, nothing asynchronous."""

    kind = "cpu"

    def facts(self) -> None:
        return None

    def clocks(self) -> dict[str, float]:
        return {}

    def sync(self) -> None:
        return

    def elapsed(self, run: Run) -> float:
        """Microseconds."""
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6

    def captured(self, run: Run) -> Run:
        run()
        return run

    def aside(self, run: Run) -> object:
        return run()

    def launches(self, run: Run) -> int | None:
        return None

    def peak(self, run: Run) -> int | None:
        return None

    def cache(self) -> int:
        return 1 << 16

    def memory(self) -> int:
        return 4 << 30

    def poison(self) -> None:
        return


class Gpu:
    """The current CUDA device; its clocks are read, never set."""

    kind = "cuda"

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(0)
        return {
            "name": found.name,
            "driver": smi("driver_version").get("driver_version", "unknown"),
            "sm": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory": found.total_memory,
            "l2": self.cache(),
        }

    def clocks(self) -> dict[str, float]:
        return {
            name: float(value) for name, value in smi(QUERY).items() if value.replace(".", "", 1).isdigit()
        }

    def sync(self) -> None:
        torch.cuda.synchronize()

    def elapsed(self, run: Run) -> float:
        """Microseconds between two events around `run`."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def captured(self, run: Run) -> Run:
        """A graph's replay; `run` is warmed up on a stream of its own first."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def aside(self, run: Run) -> object:
        """On a stream that is not the default one."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = run()
        side.synchronize()
        return result

    def launches(self, run: Run) -> int:
        """Kernels of one call, by the profiler; copies and fills count too, for they are launches."""
        run()
        self.sync()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        ) as seen:
            run()
            self.sync()
        return kernels(seen.events())

    def peak(self, run: Run) -> int:
        """Bytes that one call needs beyond what was allocated before it."""
        run()
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.sync()
        return torch.cuda.max_memory_allocated() - before

    def cache(self) -> int:
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20))

    def memory(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def poison(self) -> None:
        """Fill free memory that the allocator hands out next with NaN: what a kernel does not write is
        seen.
        """
        blocks = [
            torch.full((size,), math.nan, device="cuda")
            for size in (1 << 6, 1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)
        ]
        del blocks


def device(kind: str) -> Device:
    return Gpu() if kind == "cuda" else Cpu()


def kernels(events: Any) -> int:
    """How many of a profiler's events ran on the GPU."""
    return sum(
        1 for e in events if "CUDA" in str(e.device_type) and not getattr(e, "is_user_annotation", False)
    )


def smi(query: str) -> dict[str, str]:
    """nvidia-smi's answer, {} where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    try:
        said = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = said.stdout.splitlines()[:1]
    return (
        dict(zip(query.split(","), (v.strip() for v in values[0].split(","))))
        if said.returncode == 0 and values
        else {}
    )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (the largest number for integers)."""
    empty = torch.empty

    def full(*size: Any, **named: Any) -> torch.Tensor:
        t = empty(*size, **named)
        if t.device.type == "meta":
            return t
        return t.fill_(
            math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max if t.dtype != torch.bool else True
        )

    torch.empty = full  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty
