"""Who is measured: one small file each. A provider turns a case and a mode into a function that does the job once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from ..case import MODES, Case
from ..truth import Results

_FILES = (
    "bare_gemms",
    "eager",
    "compiled",
    "eapo",
    "torch_lce",
    "liger",
    "trl",
    "verl",
    "cut_cross_entropy",
    "quack",
    "unsloth",
)


def _always(device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to do the job.

    Attributes:
        name: ours start with ``eapo``; the floor is ``bare_gemms``.
        job: what it computes, in words.
        prepare: (case, mode) -> function without arguments that does the job once and returns its results. The import of a peer
            and everything that its users do once belongs here, outside what is timed. May raise: the reason goes into the row.
        modes: those it can do.
        objective: the loss that its gradients belong to, see ``truth.OBJECTIVES``.
        unavailable: device type -> why it cannot run here at all, or None when it can.
        settings: where they differ from what its users get by default, and why; else "defaults".
    """

    name: str
    job: str
    prepare: Callable[[Case, str], Callable[[], Results]]
    modes: tuple[str, ...] = field(default=MODES)
    objective: str = "policy"
    unavailable: Callable[[str], str | None] = _always
    settings: str = "defaults"


def load_providers() -> list[Provider]:
    """All providers, the floor first. Importing them imports no peer."""
    return [p for name in _FILES for p in import_module(f"{__name__}.{name}").PROVIDERS]


def chosen(only: list[str] | None, without: list[str]) -> list[Provider]:
    """Those whose names begin with one of ``only`` (None: all) and with none of ``without``."""
    able = [p for p in load_providers() if only is None or p.name.startswith(tuple(only))]
    return [p for p in able if not p.name.startswith(tuple(without))]
