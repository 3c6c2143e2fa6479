"""TensorBoard and Weights & Biases, switched on in the section ``log``."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from .. import ranks
from ..config import Config
from ..errors import ConfigError


class Tracker(Protocol):
    """Receives metrics by step."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step's finite metrics."""

    def close(self) -> None:
        """Flush what is buffered."""


class Trackers:
    """The trackers that ``config.log`` asks for; none by default. Only rank 0 logs.

    Args:
        directory: of the run; the files of TensorBoard and wandb go below it.
        step: steps done before: 0 starts a new record, more continues the existing one.

    Raises:
        ConfigError: the package of a tracker is not installed.
    """

    def __init__(self, config: Config, directory: Path, step: int = 0) -> None:
        self.trackers: list[Tracker] = []
        if not ranks.is_main():
            return
        if config.log.tensorboard:
            self.trackers.append(TensorBoard(directory / "tensorboard", step))
        if config.log.wandb:
            self.trackers.append(WeightsAndBiases(config, directory, step))

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Log the metrics that are finite."""
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
        # Hides what an interrupted run wrote after its last checkpoint.
        self.writer = writer(str(directory), purge_step=step + 1 if step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A wandb run with the run's name and configuration. Its id is kept in the run's directory, so
    that a resumed run continues it.

    WANDB_MODE=offline writes to the directory only.
    """

    def __init__(self, config: Config, directory: Path, step: int) -> None:
        wandb = _package("wandb", "log.wandb")
        kept = directory / "wandb_id"
        if not step or not kept.exists():
            kept.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=config.log.wandb_project, name=config.name, id=kept.read_text(), resume="allow", dir=str(directory),
            config=config.model_dump(),
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()
