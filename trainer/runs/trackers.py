"""TensorBoard and Weights & Biases, switched on in the section ``log``."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import ranks
from ..config import Config
from ..errors import ConfigError


class Trackers:
    """The trackers that ``config.log`` asks for; none by default. Only rank 0 logs. As a context it ends
    their records, at wandb with exit code 1 where the run ends with an error.

    Raises:
        ConfigError: the package of a tracker is not installed.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._writer: Any = None
        self._run: Any = None
        board, wandb = (ranks.is_main() and wanted for wanted in (config.log.tensorboard, config.log.wandb))
        self._tensorboard: Any = _package("torch.utils.tensorboard", "tensorboard") if board else None
        self._wandb: Any = _package("wandb", "wandb") if wandb else None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()
        if self._run:
            self._run.finish(exit_code=int(error is not None))

    def start(self, directory: Path, step: int) -> None:
        """Open the records below the run's ``directory``: new ones at step 0, else continued.
        TensorBoard hides what an interrupted run wrote after its last checkpoint. wandb finds its
        run by the id kept in the directory; WANDB_MODE=offline writes to the directory only.
        """
        if self._wandb:
            directory.mkdir(parents=True, exist_ok=True)
            kept = directory / "wandb_id"
            known = kept.read_text() if step and kept.exists() else secrets.token_hex(4)
            self._run = self._wandb.init(
                project=self.config.log.wandb_project, name=self.config.name, id=known, resume="allow",
                dir=str(directory), config=self.config.model_dump(),
            )  # fmt: skip
            kept.write_text(known)
        if self._tensorboard:
            for earlier in () if step else (directory / "tensorboard").glob("events.out.tfevents.*"):
                earlier.unlink()
            self._writer = self._tensorboard.SummaryWriter(directory / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Log the metrics that are finite."""
        finite = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        if self._writer:
            for name, value in finite.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._run:
            self._run.log(finite, step=step)


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"log.{name}: expected the package {name} (pip install '.[track]'), got {error}") from None
