"""How a run shows itself: a live bar on a terminal, one line at its end elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressLine:
    """Steps, mean loss of late steps, steps and samples per second, time left; to stderr.

    Where stderr is no terminal (a log, a pipe) one line sums the run up at its end; with `log_every` > 0
    there is a line every so many steps before it. Nothing when `enabled` is false.
    """

    def __init__(self, title: str, total: int, start: int, log_every: int, enabled: bool) -> None:
        self.title, self.total, self.start, self.log_every, self.enabled = (
            title,
            total,
            start,
            log_every,
            enabled,
        )
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._mean: float | None = None
        # the step that was reached and what is said of it, for the line at the end
        self._reached = (start, "")
        self._began = time.perf_counter()

    def __enter__(self) -> ProgressLine:
        if self.enabled and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(
                *columns,
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, figures="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            return
        step, figures = self._reached
        if step > self.start:
            seconds = int(time.perf_counter() - self._began)
            self.say(f"{self.title} {step}/{self.total}  {figures}  in {seconds // 60}:{seconds % 60:02d}")

    def update(self, step: int, loss: float | None = None, samples: int = 0) -> None:
        """`step` steps are done, the last with this loss; so many samples went through since the start."""
        if not self.enabled:
            return
        seconds = max(1e-9, time.perf_counter() - self._began)
        rate = (step - self.start) / seconds
        figures = f"{samples / seconds:.1f} samples/s"
        if loss is not None:
            self._mean = loss if self._mean is None else 0.95 * self._mean + 0.05 * loss
            figures = f"loss {self._mean:.4f}  {rate:.2f} it/s  {figures}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif self._line_is_due(step):
            left = int((self.total - step) / max(rate, 1e-9))
            self.say(f"{self.title} {step}/{self.total}  {figures}  left {left // 60}:{left % 60:02d}")
        self._reached = (step, figures)

    def _line_is_due(self, step: int) -> bool:
        # a step may be of several units, so a multiple of log_every may be stepped over
        every = self.log_every
        return every > 0 and step < self.total and step // every > self._reached[0] // every

    def say(self, text: str) -> None:
        """One line of its own, above the bar."""
        if self.enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
