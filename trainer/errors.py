"""Errors of the trainer. All extend ``EapoError``; the command line prints each as one line."""

from __future__ import annotations

from eapo_kernels import EapoError


class ConfigError(EapoError):
    """A recipe or an override is wrong; the message names the key, what was expected and what was
    given.
    """


class DataError(EapoError):
    """A data file is missing, empty or lacks a column."""


class ModelError(EapoError):
    """A model cannot be found, loaded or used by this trainer."""


class RewardError(EapoError):
    """A reward function cannot be imported, breaks its contract, or leaves nothing to train on."""


class DivergenceError(EapoError):
    """The loss or the gradient norm is not finite; the optimizer step was not taken."""


class Interrupted(Exception):
    """Raised at a safe point after the first SIGINT or SIGTERM."""


class CheckpointError(EapoError):
    """A checkpoint is damaged, or does not belong to this run."""


class RemoteRankError(EapoError):
    """Another rank failed with an ``EapoError`` and reports it; this rank ends without a message."""


class RemoteCrash(Exception):
    """Another rank failed with another error and reports it; this rank ends without a message."""
