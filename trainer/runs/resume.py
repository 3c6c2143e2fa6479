"""Which checkpoint a run resumes from, and whether its settings allow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import CheckpointError, ConfigError
from .checkpoint import checkpoints, verify
from .console import Console
from .rundir import RunDirectory

MAY_CHANGE = ("name", "out", "overwrite", "resume", "steps", "samples_per_step", "checkpoint.", "log.", "model.cache")
"""Settings (or prefixes of their names) that may differ on resume, because they do not change a
step. More steps rescale what depends on the fraction of the run that is done: the cosine schedule
and some methods."""


def choose(config: Config, run: RunDirectory, console: Console) -> Path | None:
    """The verified checkpoint that ``resume`` asks for; None for a new run. Changes nothing.

    Raises:
        ConfigError: no checkpoint of this run at that path, ``resume`` together with ``overwrite``,
            or results under the name of a new run.
        CheckpointError: it is damaged; with "auto", all of them are.
    """
    if not config.resume:
        run.check_free(replace=config.overwrite)
        return None
    if config.overwrite:
        raise ConfigError("overwrite: expected False together with resume, got True")
    there = checkpoints(run.checkpoints)
    if config.resume == "auto":
        chosen = _latest_valid(there, console)
        if chosen is None and run.finished() is not None:
            raise ConfigError(f"resume: expected a checkpoint of the finished run {run.path} to resume from, got none")
        if chosen is None:
            run.check_free(replace=True)
    else:
        chosen = Path(config.resume).resolve()
        if chosen not in [path.resolve() for path in there]:
            names = ", ".join(path.name for path in there) or "none"
            raise ConfigError(f"resume: expected auto or a checkpoint in {run.checkpoints} ({names}), got {config.resume!r}")
        verify(chosen)
    return chosen


def _latest_valid(there: list[Path], console: Console) -> Path | None:
    problems = []
    for path in reversed(there):
        try:
            verify(path)
        except CheckpointError as error:
            console.line(f"refused: {error}")
            problems.append(path.name)
        else:
            return path
    if problems:
        expected = "expected one valid checkpoint, or none (remove the directory to start a new run)"
        raise CheckpointError(f"{there[0].parent}: {expected}, got only damaged ones: {', '.join(problems)}")
    return None


def settings_of(config: Config) -> dict[str, Any]:
    """The settings as a flat table with dotted names."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, table: dict[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                visit(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    visit("", config.model_dump())
    return flat


def check_settings(path: Path, before: dict[str, Any], config: Config) -> None:
    """Refuse to resume when settings differ from ``before``, those of the checkpoint ``path``.

    Raises:
        ConfigError: with every differing setting and both values.
    """
    now, default = settings_of(config), settings_of(Config())
    differing = [
        f"{key}: expected {before.get(key, default.get(key))!r}, got {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key, default.get(key)) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise ConfigError(f"resume: {path} was written with other settings; {'; '.join(differing)}")
