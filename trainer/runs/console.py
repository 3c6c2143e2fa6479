"""Progress output, and the end of a run at a safe point after SIGINT or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from .. import ranks
from ..errors import Interrupted
from ..records import Tick

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a scheduler that ends the job
LINE = {
    "reward/mean": "reward", "eapo/entropy": "entropy", "eapo/positive_weight": "weight", "reward/flat_groups": "flat",
    "response/truncated": "truncated", "grad_norm": "grad",
}  # fmt: skip
"""Metrics on the line of a step -> their label there."""


class Console:
    """Shows phases and steps: a live line on a terminal, a line for each step elsewhere.

    Within its context the first signal sets ``stopping``, and the next tick of a phase raises
    ``Interrupted``. A second signal ends the process at once.

    Args:
        heartbeat: without a terminal, seconds of silence after which a phase prints where it is; 0
            for never.
        rich: where to print; standard output when not given.

    Attributes:
        seconds: phase name -> time spent in it; the caller clears it.
    """

    def __init__(self, heartbeat: float = 60.0, rich: RichConsole | None = None) -> None:
        self.heartbeat, self.stopping = heartbeat, False
        self.rich = rich or RichConsole(highlight=False, soft_wrap=True, quiet=not ranks.is_main())
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", table_column=Column(no_wrap=True)), BarColumn(20),
            MofNCompleteColumn(), TimeElapsedColumn(), console=self.rich, transient=True,
        )  # fmt: skip
        self.seconds: dict[str, float] = {}
        self._durations = deque[float](maxlen=10)
        self._run: TaskID | None = None
        self._status = ""
        self._since = self._spoke = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> Console:
        self._handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}
        if self.rich.is_terminal:
            self._progress.start()
        elif self.heartbeat:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._progress.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        if self.stopping:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stopping = True
        # The handler may interrupt a write of the progress display; only a raw write is safe here.
        if ranks.is_main():
            os.write(2, b"\nstopping at the next safe point; once more to stop at once\n")

    def line(self, text: str) -> None:
        """Print a permanent line."""
        self._spoke = time.monotonic()
        self.rich.print(text, markup=False)
        sys.stdout.flush()

    def step(self, metrics: dict[str, float], steps: int, evaluations: float = 0.0) -> None:
        """Print the line of a finished step, and after the first one how long the run will take.

        evaluations: seconds that the evaluations to come will take. The time left is that and the
        mean of the last ten steps for each step to come.
        """
        step = int(metrics["step"])
        self._durations.append(sum(self.seconds.values()))
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
        """A phase of work; yields the function to call with (done, total), which raises
        ``Interrupted`` after a stop request to any rank.

        alone: each rank ticks independently and follows its own stop request only; the caller then
        informs the other ranks (``ranks.all_gather``). Otherwise all ranks tick equally often.
        """

        def check(alone: bool) -> None:
            if self.stopping if alone else ranks.any_rank(self.stopping):
                raise Interrupted

        def tick(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)
            self._status = f"{name} {done}/{total}"
            check(alone)

        task = self._progress.add_task(name, total=None)
        self._status, self._since = name, time.monotonic()
        try:
            check(alone=False)
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
