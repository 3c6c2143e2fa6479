"""Progress output at regular intervals, and a stop request at every tick."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console as RichConsole

from trainer.errors import Interrupted
from trainer.runs.console import Console, duration


@pytest.mark.parametrize("heartbeat", [0.2, 5.0, 0.0])
def test_a_long_phase_without_a_terminal_speaks_by_itself(capsys: pytest.CaptureFixture[str], heartbeat: float) -> None:
    with Console(heartbeat) as console, console.phase("thinking") as tick:
        tick(1, 3)
        time.sleep(1.2)
    assert ("... thinking 1/3 (" in capsys.readouterr().out) == (heartbeat == 0.2)
    assert console.seconds["thinking"] > 1


def test_a_stop_request_leaves_at_the_next_tick(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.phase("work") as tick:
        tick(0, 2)
        console.stopping = True
        with pytest.raises(Interrupted):
            tick(1, 2)


METRICS = {
    "reward/mean": 0.25, "eapo/entropy": 2.0, "eapo/positive_weight": 0.9, "reward/flat_groups": 0.5,
    "response/truncated": 0.125, "grad_norm": 0.3, "tokens_per_second": 10.0,
}  # fmt: skip
LINE = "reward 0.250  entropy 2.000  weight 0.900  flat 0.500  truncated 0.125  grad 0.300  10 tok/s"


def test_the_first_line_of_a_step_is_followed_by_a_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.runs.console.time.monotonic", lambda: now[0])
    out = RichConsole(file=io.StringIO(), width=160, highlight=False)
    console = Console(rich=out)
    for step, seconds in ((1, 30.0), (2, 10.0)):
        console.seconds.clear()
        with console.phase("update"):
            now[0] += seconds
        console.step({"step": step, **METRICS}, steps=4, evaluations=100.0)
    assert out.file.getvalue().splitlines() == [
        f"step 1/4  {LINE}  eta 3m10s",
        "about 3m10s for 3 more steps, evaluations included",
        f"step 2/4  {LINE}  eta 2m20s",
    ]


def test_the_live_line_shows_the_step() -> None:
    terminal = RichConsole(file=io.StringIO(), force_terminal=True, width=160, highlight=False)
    console = Console(rich=terminal)
    with console:
        with console.phase("rollouts") as tick:
            tick(1, 2)
        console.step({"step": 1, **METRICS}, steps=4)
        terminal.print(console._progress.get_renderable())
    shown = terminal.file.getvalue()
    assert f"step 1/4  {LINE}  eta 0s" in shown
    assert shown.count(LINE) > 1, "the line of the step and the live line"
    assert "1/4" in shown.split("about 0s for 3 more steps")[1]


def test_duration() -> None:
    assert [duration(s) for s in (5.4, 65, 3600 * 2 + 60)] == ["5s", "1m05s", "2h01m"]
