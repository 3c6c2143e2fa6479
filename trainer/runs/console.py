"""Progress output: a live line on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from .. import ranks
from ..records import Tick
from .interrupt import StopRequest

LINE = {
    "reward/mean": "reward", "eapo/entropy": "entropy", "eapo/positive_weight": "weight", "reward/flat_groups": "flat",
    "response/truncated": "truncated", "grad_norm": "grad",
}  # fmt: skip
"""Metrics on the line of a step -> their label there."""


class Console:
    """Shows phases and steps, and checks for a stop request at every tick.

    Args:
        stop: checked at every tick.
        heartbeat: without a terminal, seconds of silence after which a phase prints where it is; 0
            for never.
        rich: where to print; standard output when not given.

    Attributes:
        seconds: phase name -> time spent in it; the caller clears it.
    """

    def __init__(self, stop: StopRequest, heartbeat: float = 60.0, rich: RichConsole | None = None) -> None:
        self.stop, self.heartbeat = stop, heartbeat
        self.rich = rich or RichConsole(highlight=False, soft_wrap=True, quiet=not ranks.is_main())
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", table_column=Column(no_wrap=True)), BarColumn(20),
            MofNCompleteColumn(), TimeElapsedColumn(), console=self.rich, transient=True,
        )  # fmt: skip
        self.seconds: dict[str, float] = {}
        self._durations: list[float] = []
        self._run: TaskID | None = None
        self._status = ""
        self._since = self._spoke = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> Console:
        if self.rich.is_terminal:
            self._progress.start()
        elif self.heartbeat:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._progress.stop()

    def line(self, text: str) -> None:
        """Print a permanent line."""
        self._spoke = time.monotonic()
        self.rich.print(text, markup=False)
        sys.stdout.flush()

    def step(self, metrics: dict[str, float], steps: int, evaluations: float = 0.0) -> None:
        """Print the line of a finished step, after the first one how long the run will take, and on
        a terminal the live line of the run.

        evaluations: seconds that the evaluations to come will take. The time left is that and the
        mean of the last ten steps for each step to come.
        """
        step = int(metrics["step"])
        self._durations = [*self._durations, sum(self.seconds.values())][-10:]
        left = duration(sum(self._durations) / len(self._durations) * (steps - step) + evaluations)
        parts = [f"{label} {metrics[name]:.3f}" for name, label in LINE.items() if name in metrics]
        parts += [f"{metrics['tokens_per_second']:.0f} tok/s", f"eta {left}"]
        self.line("  ".join([f"step {step:>{len(str(steps))}}/{steps}", *parts]))
        if self._run is None:
            self._run = self._progress.add_task("", total=steps)
            if step < steps:
                self.line(f"about {left} for {steps - step} more steps, evaluations included")
        self._progress.update(self._run, description="  ".join(parts), completed=step)

    @contextmanager
    def phase(self, name: str, *, alone: bool = False) -> Iterator[Tick]:
        """A phase of work; yields the function to call with (done, total).

        alone: each rank ticks independently; otherwise all ranks tick equally often (see
        ``StopRequest.check``).
        """
        task = self._progress.add_task(name, total=None)
        self._status, self._since = name, time.monotonic()

        def tick(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)
            self._status = f"{name} {done}/{total}"
            self.stop.check(alone=alone)

        try:
            self.stop.check()
            yield tick
        finally:
            self._progress.remove_task(task)
            self._status = ""
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - self._since

    def _beat(self) -> None:
        while not self._closed.wait(min(0.5, self.heartbeat)):
            now = time.monotonic()
            if self._status and now - self._spoke >= self.heartbeat:
                self.line(f"  ... {self._status} ({duration(now - self._since)})")


def duration(seconds: float) -> str:
    """Seconds in readable form."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
