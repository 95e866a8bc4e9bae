"""How a run shows itself: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressLine:
    """Step, mean loss of late steps, steps per second and time left; writes to stderr, nothing when `enabled` is false."""

    def __init__(self, title: str, total: int, start: int, log_every: int, enabled: bool) -> None:
        self.title, self.total, self.start, self.log_every, self.enabled = title, total, start, log_every, enabled
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._mean: float | None = None
        self._began = time.perf_counter()

    def __enter__(self) -> ProgressLine:
        if self.enabled and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, figures="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float) -> None:
        """`step` steps are done, the last with this loss."""
        if not self.enabled:
            return
        self._mean = loss if self._mean is None else 0.95 * self._mean + 0.05 * loss
        rate = (step - self.start) / max(1e-9, time.perf_counter() - self._began)
        figures = f"loss {self._mean:.4f}  {rate:.2f} it/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step % self.log_every == 0 or step == self.total:
            left = (self.total - step) / rate
            self.say(f"{self.title} {step}/{self.total}  {figures}  left {int(left // 60)}:{int(left % 60):02d}")

    def say(self, text: str) -> None:
        """One line of its own, above the bar."""
        if self.enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
