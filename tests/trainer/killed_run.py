"""``python killed_run.py CASES.json``: for every case train without interruption, then again with
kills and resumptions.

The process of every attempt is forked from this one: starting Python takes seconds. CASE:
{"through": recipe, "killed": recipe, "metrics": file of the killed run, "seed": int, "by_time":
number of kills at a random moment, "in_save": number of kills at a random point of a save}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import without_report

from trainer import loop
from trainer.config.settings import parse_config
from trainer.runs import checkpoint


def kill_at(point: int) -> None:
    """Send SIGKILL to this process at call number ``point`` of the functions that a save writes,
    syncs, renames and removes with.
    """
    left = point

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    places: list[tuple[Any, str]] = [(checkpoint, "_sync"), (checkpoint.shutil, "rmtree")]
    for place, name in [*places, (dcp, "save"), (os, "fsync"), (Path, "rename")]:
        setattr(place, name, counted(getattr(place, name)))


def slow_disk() -> None:
    """Slow down syncs, so that kills at random moments hit them."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(0.01)
        real(descriptor)

    os.fsync = fsync


def wait_for_steps(metrics: Path, steps: int, child: int) -> None:
    """Return when the run has logged ``steps`` more steps, or has ended."""
    begun = logged(metrics)
    while logged(metrics) < begun + steps and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)


def logged(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def attempt(recipe: str, resume: str, *, metrics: Path | None = None, steps: int = 0, wait: float = 0, point: int = 0) -> int:
    """Fork a process that trains, and kill it after ``steps`` steps and ``wait`` seconds or at
    ``point`` of its saves. Returns its wait status.
    """
    child = os.fork()
    if child == 0:
        if point:
            kill_at(point)
        if metrics:
            slow_disk()
        status = 1
        try:
            torch.set_num_threads(1)
            status = 0 if loop.train(parse_config(["--config", recipe, "--resume", resume])) else 130
        finally:
            sys.stdout.flush()
            os._exit(status)
    if metrics:
        wait_for_steps(metrics, steps, child)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status


def main(case: dict[str, Any]) -> None:
    without_report(pytest.MonkeyPatch())
    choose = random.Random(case["seed"])
    assert attempt(case["through"], "") == 0
    metrics = Path(case["metrics"])
    kills = [{"point": choose.randrange(17, 36)} for _ in range(case["in_save"])]  # the second save of a process
    kills += [
        {"metrics": metrics, "steps": choose.randrange(3), "wait": choose.uniform(0, 0.3)} for _ in range(case["by_time"])
    ]
    ends = [attempt(case["killed"], "auto", **kill) for kill in kills]
    assert set(ends) <= {0, signal.SIGKILL}, ends
    assert attempt(case["killed"], "auto") == 0


if __name__ == "__main__":
    for case in json.loads(Path(sys.argv[1]).read_text()):
        main(case)
