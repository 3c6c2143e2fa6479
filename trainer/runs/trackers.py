"""TensorBoard and Weights & Biases, beside the run's own files; both are switches of the section ``log``."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from .. import ranks
from ..config import Config
from ..errors import ConfigError


class Tracker(Protocol):
    """Something that shows numbers by step."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take one step's finite numbers."""

    def close(self) -> None:
        """Write what is left."""


class Trackers:
    """Those that ``config.log`` asks for; none is the default and does nothing. Of several processes the first one alone logs.

    Args:
        directory: the run's; TensorBoard's and wandb's files go below it.
        step: steps done before: 0 starts anew, more continues the same record.

    Raises:
        ConfigError: a tracker's package is not installed.
    """

    def __init__(self, config: Config, directory: Path, step: int = 0) -> None:
        self.trackers: list[Tracker] = []
        if not ranks.first():
            return
        if config.log.tensorboard:
            self.trackers.append(TensorBoard(directory / "tensorboard", step))
        if config.log.wandb:
            self.trackers.append(WeightsAndBiases(config, directory, step))

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Pass on the numbers that are finite."""
        finite = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(finite, step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _package(module: str, key: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = key.removeprefix("log.")
        raise ConfigError(f"{key}: expected the package {package} (pip install '.[track]'), got {error}") from None


class TensorBoard:
    """Event files in ``directory``; ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, directory: Path, step: int) -> None:
        writer = _package("torch.utils.tensorboard", "log.tensorboard").SummaryWriter
        if not step:
            shutil.rmtree(directory, ignore_errors=True)
        # What an interrupted run wrote after its last checkpoint is hidden, not shown twice.
        self.writer = writer(str(directory), purge_step=step + 1 if step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A wandb run of the same name and configuration. Its id is kept in the run's directory: a resumed run goes on in it.

    WANDB_MODE=offline writes to the directory alone.
    """

    def __init__(self, config: Config, directory: Path, step: int) -> None:
        wandb = _package("wandb", "log.wandb")
        kept = directory / "wandb_id"
        if not step or not kept.exists():
            kept.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=config.log.wandb_project, name=config.name, id=kept.read_text(), resume="allow", dir=str(directory),
            config=asdict(config),
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()
