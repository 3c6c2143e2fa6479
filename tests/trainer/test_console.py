"""Progress output at regular intervals, and a stop request at every tick."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console as RichConsole

from trainer.errors import Interrupted
from trainer.runs.console import Console, duration
from trainer.runs.interrupt import StopRequest


def test_a_long_phase_without_a_terminal_speaks_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(StopRequest(), silence=0.2) as console, console.phase("thinking") as tick:
        tick(1, 3)
        time.sleep(1.2)
    assert "... thinking 1/3 (" in capsys.readouterr().out
    assert console.seconds["thinking"] > 1


def test_a_stop_request_leaves_at_the_next_tick(capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    console = Console(stop)
    with console.phase("work") as tick:
        tick(0, 2)
        stop.requested = True
        with pytest.raises(Interrupted):
            tick(1, 2)


def test_the_live_line_shows_the_step() -> None:
    terminal = RichConsole(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    console = Console(StopRequest(), rich=terminal)
    with console:
        with console.phase("rollouts") as tick:
            tick(1, 2)
        console.step({"step": 1, "reward/mean": 0.25, "eapo/entropy": 2.0, "tokens_per_second": 10.0}, steps=4)
    assert "step 1/4  reward 0.250  entropy 2.000  10 tok/s  eta 0s" in terminal.file.getvalue()


def test_the_live_line_has_the_numbers_and_a_time_that_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.runs.console.time.monotonic", lambda: now[0])
    terminal = RichConsole(file=io.StringIO(), force_terminal=True, width=160, highlight=False)
    console = Console(StopRequest(), rich=terminal)
    with console.phase("update"):
        now[0] = 30.0
    metrics = {"step": 1, "reward/mean": 0.25, "eapo/entropy": 2.0, "eapo/positive_weight": 0.9, "tokens_per_second": 10.0}
    console.step(metrics, steps=4)

    def shown() -> str:
        terminal.file = io.StringIO()
        terminal.print(console._progress.get_renderable())
        return terminal.file.getvalue()

    for text in ("reward 0.250  entropy 2.000  weight 0.900  10 tok/s", "1/4", "eta 1m30s"):
        assert text in shown()
    now[0] = 75.0
    assert "eta 45s" in shown()


def test_duration() -> None:
    assert [duration(s) for s in (5.4, 65, 3600 * 2 + 60)] == ["5s", "1m05s", "2h01m"]
