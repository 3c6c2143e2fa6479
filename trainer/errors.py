"""Errors of the trainer; the command line prints each as one line.

They do not extend ``EapoError``, because importing the library, and torch with it, takes seconds
that a misspelt setting need not wait for.
"""

from __future__ import annotations


class TrainerError(ValueError):
    """Base of the trainer's own errors."""


class ConfigError(TrainerError):
    """A recipe or a flag is wrong; the message names the key, what was expected and what was given."""


class DataError(TrainerError):
    """A data file is missing, empty or lacks a column."""


class ModelError(TrainerError):
    """A model cannot be found, loaded or used by this trainer."""


class RewardError(TrainerError):
    """A reward function cannot be imported, breaks its contract, or leaves nothing to train on."""


class DivergenceError(TrainerError):
    """The loss or the gradient norm is not finite; the optimizer step was not taken."""


class Interrupted(Exception):
    """Raised at a safe point after the first SIGINT or SIGTERM."""


class CheckpointError(TrainerError):
    """A checkpoint is damaged, or does not belong to this run."""


class RemoteRankError(TrainerError):
    """Another rank failed with an error of the trainer or the library and reports it; this rank ends
    without a message.
    """


class RemoteCrash(Exception):
    """Another rank failed with another error and reports it; this rank ends without a message."""


def check(condition: bool, key: str, expected: str, got: object) -> None:
    """Raise ConfigError unless ``condition`` holds; in a section's validator ``key`` is relative."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")
