"""Who is measured. A provider turns a case and a mode into a function without arguments that does the job once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from torch import Tensor

from ..case import Case

MODES = ("fwd", "fwd_bwd", "frozen_head")
"""fwd: log-prob and entropy of every token. fwd_bwd: policy loss and both gradients. frozen_head: d_hidden only."""

Results = dict[str, Tensor]
"""What a run yields: some of logp, entropy, loss, d_hidden, d_weight, to be held against the truth."""


@dataclass(frozen=True)
class Provider:
    """One way to do the job.

    Attributes:
        name: ours start with ``eapo``; the floor is ``bare_gemms``.
        job: what it computes, in words, where it is not the whole job.
        prepare: (case, mode) -> function that runs once and returns its results.
        modes: those it can do.
    """

    name: str
    job: str
    prepare: Callable[[Case, str], Callable[[], Results]]
    modes: tuple[str, ...] = field(default=MODES)


def load_providers() -> list[Provider]:
    """All providers, the floor first."""
    return [p for name in ("bare_gemms", "eager", "eapo") for p in import_module(f"{__name__}.{name}").PROVIDERS]
