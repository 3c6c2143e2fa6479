"""Where a run's checkpoints are. Without PyTorch, so that ``eval`` finds a misspelt setting at once."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError

NAME = re.compile(r"step-\d{6,}")


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first. A copy under another name is none."""
    return sorted((path for path in root.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path | None) -> int:
    """Number of steps done in a checkpoint; 0 for None."""
    return int(path.name.removeprefix("step-")) if path else 0


def locate(source: Path) -> tuple[Path, Path | None]:
    """The run that ``source`` belongs to, and its checkpoint; None for the run's saved model.

    Args:
        source: RUN, or RUN/checkpoints/NAME.

    Raises:
        ConfigError: there is no such run or checkpoint.
    """
    source = source.expanduser().resolve()
    of_checkpoint = source.parent.name == "checkpoints"
    run = source.parent.parent if of_checkpoint else source
    there = checkpoints(run / "checkpoints")
    if not (run / "config.toml").is_file() or (source not in there if of_checkpoint else not (run / "model").is_dir()):
        known = f" (there are {', '.join(path.name for path in there)})" if there else ""
        expected = f"a run with a saved model, or one of its checkpoints (RUN/checkpoints/step-...){known}"
        raise ConfigError(f"run: expected {expected}, got {source}")
    return run, source if of_checkpoint else None
