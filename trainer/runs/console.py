"""Progress output: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from .. import ranks
from ..records import Tick
from .interrupt import StopRequest

LINE = {"reward/mean": "reward", "eapo/entropy": "entropy", "eapo/positive_weight": "weight", "grad_norm": "grad"}
"""Metrics on the line of a step -> their label there."""


class Console:
    """Shows phases and steps, and checks for a stop request at every tick.

    Args:
        stop: checked at every tick.
        silence: without a terminal, seconds after which a progress line is printed.
        rich: where to print; standard output when not given.

    Attributes:
        seconds: phase name -> time spent in it; the caller clears it.
    """

    def __init__(self, stop: StopRequest, silence: float = 5.0, rich: RichConsole | None = None) -> None:
        self.stop, self.silence = stop, silence
        self.rich = rich or RichConsole(highlight=False, soft_wrap=True, quiet=not ranks.is_main())
        self.live = self.rich.is_terminal
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", table_column=Column(no_wrap=True)), BarColumn(20),
            MofNCompleteColumn(), TimeElapsedColumn(), _TimeLeft(), console=self.rich, transient=True,
        )  # fmt: skip
        self.seconds: dict[str, float] = {}
        self._durations: list[float] = []
        self._run: TaskID | None = None
        self._status = ""
        self._since = self._spoke = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> Console:
        if self.live:
            self._progress.start()
        else:
            threading.Thread(target=self._heartbeat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self.live:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Print a permanent line."""
        self._spoke = time.monotonic()
        self.rich.print(text, markup=False)
        sys.stdout.flush()

    def step(self, metrics: dict[str, float], steps: int) -> None:
        """Print the line of a finished step, and on a terminal the live line of the run with a bar
        and the time left.
        """
        step = int(metrics["step"])
        self._durations.append(sum(self.seconds.values()))
        pace = sum(self._durations[-10:]) / len(self._durations[-10:])
        left = pace * (steps - step)
        parts = [f"{label} {metrics[name]:.3f}" for name, label in LINE.items() if name in metrics]
        parts.append(f"{metrics['tokens_per_second']:.0f} tok/s")
        self.line("  ".join([f"step {step:>{len(str(steps))}}/{steps}", *parts, f"eta {duration(left)}"]))
        if self._run is None:
            self._run = self._progress.add_task("", total=steps)
        self._progress.update(self._run, description="  ".join(parts), completed=step, ends=time.monotonic() + left)

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

    def _heartbeat(self) -> None:
        while not self._closed.wait(0.5):
            now = time.monotonic()
            if self._status and now - self._spoke >= self.silence:
                self.line(f"  ... {self._status} ({now - self._since:.0f} s)")


class _TimeLeft(ProgressColumn):
    """The estimated time left of the run; empty for a phase."""

    def render(self, task: Task) -> Text:
        ends = task.fields.get("ends")
        return Text("" if ends is None else f"eta {duration(max(0.0, ends - time.monotonic()))}")


def duration(seconds: float) -> str:
    """Seconds in readable form."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
