"""``python -m trainer compare``: every arm with every seed, each run a process of its own.

A run that is finished is kept and one that was cut off goes on from its last checkpoint, so the same command continues a
comparison that was stopped, and a larger one (more seeds, arms or steps) only adds what is missing. A failed run is reported
and the others go on.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from ..config import Config
from ..config.settings import parse_config, to_toml
from ..errors import ConfigError, DataError, Interrupted
from ..runs.console import Console, duration
from ..runs.interrupt import StopRequest
from ..runs.resume import check_settings, settings_of
from ..runs.rundir import RunDirectory, read
from .arms import planned
from .comparison_page import write_comparison

POLL_SECONDS = 0.5
"""Between two looks at the running processes."""

GRACE_SECONDS = 60.0
"""How long a run may take to stop at a safe point."""


@dataclass
class _Job:
    config: Config
    path: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int


def compare(config: Config, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> int:
    """Train what is missing of the comparison, ``jobs`` runs at a time (0: see ``default_jobs``), and draw it.

    Returns:
        Exit code: 0 all runs are finished, 1 a run failed, 130 interrupted.

    Raises:
        ConfigError: an unknown arm, a run of another recipe in the way, or the comparison is being run already.
    """
    runs = planned(config, arms, seeds)
    directory = Path(config.out) / config.name
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory) as lock, StopRequest() as stop, Console(stop, silence=60.0) as console:
        missing = [run for run in runs if not is_finished(run)]
        jobs = min(jobs or default_jobs(config, len(missing)), max(1, len(missing)))
        console.line(
            f"comparison {directory}: {len(runs)} runs of {config.steps} steps, {len(runs) - len(missing)} finished already, "
            f"{jobs} at a time"
        )
        failed: list[str] = []
        try:
            _run_all(missing, runs, jobs, lock, console, failed)
        except Interrupted:
            console.line("interrupted: the same command continues")
            return 130
        finally:
            with suppress(DataError):  # nothing is finished yet
                for path in write_comparison(directory):
                    console.line(str(path))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def default_jobs(config: Config, runs: int) -> int:
    """One run at a time for each GPU, or for each core: processes of one thread waste least of a core."""
    return max(1, min(_gpus(config) or cores(), runs))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _gpus(config: Config) -> int:
    return torch.cuda.device_count() if config.model.device == "auto" else int(config.model.device.startswith("cuda"))


def job_environment(config: Config, slot: int, jobs: int, gpus: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the run in ``slot``: its share of the cores, and with ``model.device`` "auto" one of the GPUs."""
    threads = str(max(1, cores() // jobs))
    changes = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if gpus and config.model.device == "auto":
        visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        changes["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    # Threads that sleep while they wait leave their core to the other runs.
    return {**environment, "OMP_WAIT_POLICY": environment.get("OMP_WAIT_POLICY", "PASSIVE"), **changes}


def is_finished(config: Config) -> bool:
    """Whether the run's directory holds this run, trained and evaluated to its end.

    Raises:
        ConfigError: it holds results of another recipe, or of more steps (and ``overwrite`` is off).
    """
    path = Path(config.out) / config.name
    if config.overwrite or not steps_done(path):
        return False
    check_settings(path, settings_of(parse_config([], recipe=path / "config.toml")), config)
    found = RunDirectory(config).finished()
    if found is not None and found > config.steps:
        raise ConfigError(f"steps: expected at least the {found} that {path} has finished, got {config.steps}")
    return found == config.steps


def steps_done(path: Path) -> int:
    """Logged steps of a run."""
    file = path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@contextmanager
def _alone(directory: Path) -> Iterator[int]:
    """A lock on the comparison, as a file descriptor: processes that inherit it hold it too, also when this one is killed."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{directory}: expected no other process at work on this comparison, got one") from None
        yield file.fileno()


def _run_all(
    missing: Sequence[Config], runs: Sequence[Config], jobs: int, lock: int, console: Console, failed: list[str]
) -> None:
    running: list[_Job] = []
    waiting, slots = list(missing), list(range(jobs))
    gpus, total = _gpus(runs[0]), sum(run.steps for run in runs)
    with console.phase("training") as tick:
        try:
            while waiting or running:
                while waiting and slots:
                    running.append(_start(waiting.pop(0), slots.pop(0), jobs, gpus, lock))
                    console.line(f"started {running[-1].path.name}")
                with suppress(subprocess.TimeoutExpired):
                    running[0].process.wait(POLL_SECONDS)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    slots.append(job.slot)
                    job.log.close()
                    if job.process.returncode or not is_finished(replace(job.config, overwrite=False)):
                        failed.append(f"{job.path.name}, exit code {job.process.returncode}: {_last_line(job.path)}")
                        console.line(failed[-1])
                    else:
                        console.line(f"finished {_summary(job.path)}")
                tick(sum(steps_done(Path(run.out) / run.name) for run in runs), total)
        finally:
            _stop(running)


def _start(config: Config, slot: int, jobs: int, gpus: int, lock: int) -> _Job:
    """Begin a run, or go on with one that was cut off, from its last checkpoint."""
    path = Path(config.out) / config.name
    path.mkdir(parents=True, exist_ok=True)
    recipe = path / "config.toml"
    recipe.write_text(to_toml(config))
    log = (path / "train.log").open("ab")
    how = ["--overwrite", "True"] if config.overwrite else ["--resume", "auto"]
    # In a session of its own a run gets no SIGINT from the terminal but only ours, once.
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", "--config", str(recipe), *how],
        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(lock,),
        env=job_environment(config, slot, jobs, gpus, os.environ),
    )  # fmt: skip
    return _Job(config, path, process, log, slot)


def _stop(jobs: Sequence[_Job]) -> None:
    """Let the runs stop at a safe point; kill what does not."""
    for job in jobs:
        job.process.send_signal(signal.SIGINT)
    for job in jobs:
        try:
            job.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
        job.log.close()


def _last_line(path: Path) -> str:
    lines = (path / "train.log").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "(no output)")


def _summary(path: Path) -> str:
    rows = read(path, "metrics")
    seconds = sum(value for row in rows for name, value in row.items() if name.startswith("seconds/"))
    last = rows[-1]
    return f"{path.name}: reward {last['reward/mean']:.3f}, entropy {last['eapo/entropy']:.3f}, {duration(seconds)} in steps"
