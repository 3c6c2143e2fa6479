"""The runs of the comparison: arms, each a change to one recipe, trained in processes of their own.

All arms share surrogate, advantage, clip bounds, reduction and learning rate: they are EAPO's loss
(docs/math.md E9, E10) with another rule for the weight of the positive completions. A fixed weight
is the entropy ratio with exponent 0. A completion is positive when its reward is above the mean of
its group, so rewards may be graded; the methods of arXiv:2506.01347 themselves (``loss.method``
w_reinforce, nsr, psr) take rewards of 0 or 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.config import Config, EntropyWeightConfig
from trainer.config.settings import parse_config, to_toml
from trainer.errors import check
from trainer.runs.rundir import RunDirectory

FIXED_WEIGHTS: Mapping[str, tuple[float, float]] = {
    "grpo": (1.0, 1.0), "w_reinforce": (0.1, 1.0), "nsr": (0.0, 1.0), "psr": (1.0, 0.0)
}  # fmt: skip
"""Arm -> weight of the positive and of the negative completions."""

ARMS = ("eapo", *FIXED_WEIGHTS)

TRAIN = (sys.executable, "-m", "trainer", "train")


def arm_config(config: Config, arm: str, seed: int) -> Config:
    """The recipe of one run: ``config`` with the arm's weights and the seed, in the directory
    ``<out>/<name>``.

    Raises:
        ConfigError: an unknown arm, or a recipe whose method is not eapo.
    """
    check(arm in ARMS, "--arms", f"names among {', '.join(ARMS)}", arm)
    check(config.loss.method == "eapo", "loss.method", "'eapo' (the arms change its weights)", config.loss.method)
    loss, weight = config.loss, config.eapo
    if arm in FIXED_WEIGHTS:
        positive, negative = FIXED_WEIGHTS[arm]
        weight = EntropyWeightConfig(kappa=0.0, scale=positive, low=0.0)
        loss = loss.replace(negative_weight=negative)
    out = f"{config.out}/{config.name}"
    return config.replace(out=out, name=f"{arm}-seed{seed}", seed=seed, resume="auto", loss=loss, eapo=weight)


def is_finished(config: Config) -> bool:
    """Whether the run has been trained and evaluated to its end.

    Raises:
        ConfigError: its directory holds a finished run of another recipe.
    """
    run = RunDirectory(config)
    if run.finished() is None:
        return False
    same = parse_config([], recipe=run.path / "config.toml").replace(resume=config.resume) == config
    check(same, "out", "a directory for this recipe alone", f"{run.path}, which holds a run of another recipe")
    return True


def train(configs: Sequence[Config], jobs: int) -> list[str]:
    """Train the unfinished runs, ``jobs`` processes at a time, each with its share of the cores.

    A run that was interrupted resumes from its last checkpoint. SIGINT is passed on: every process
    saves a checkpoint and ends, and KeyboardInterrupt is raised. Output goes to train.log in the
    run's directory.

    Returns:
        A line for every run that failed.
    """
    waiting = [config for config in configs if not is_finished(config)]
    print(f"{len(configs)} runs of {configs[0].steps} steps, {len(configs) - len(waiting)} finished already", flush=True)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    running: dict[subprocess.Popen[bytes], Config] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config = waiting.pop(0)
                path = RunDirectory(config).path
                path.mkdir(parents=True, exist_ok=True)
                (path / "recipe.toml").write_text(to_toml(config))
                with (path / "train.log").open("ab") as log:
                    process = subprocess.Popen(
                        [*TRAIN, "--config", str(path / "recipe.toml")], env=environment, stdin=subprocess.DEVNULL,
                        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                running[process] = config
            for process in [process for process in running if process.poll() is not None]:
                config = running.pop(process)
                path = RunDirectory(config).path
                print(f"{config.name}: exit code {process.returncode}", flush=True)
                if process.returncode:
                    failed.append(f"{config.name}: {_last_line(path / 'train.log')}")
            time.sleep(0.05)
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
    return failed


def _last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "(no output)")
