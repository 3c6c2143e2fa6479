"""Compiles launches side by side before the first of them runs, instead of each where it runs.

Triton compiles a kernel at its first launch, which waits: a loss at D = 4096 waits for seven, one after
the other. Most of that is C++ that holds no lock of Python's, so threads overlap it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .common import Launch

logger = logging.getLogger("eapo_kernels")

MOST_THREADS = 8
"""Threads that compile at most."""

waiting: ContextVar[list[Launch] | None] = ContextVar("waiting", default=None)
"""Launches of this thread that wait for the end of a ``compiled_together``, or None: they run at once."""


@contextlib.contextmanager
def compiled_together(*, launch: bool) -> Iterator[None]:
    """Launches of this thread wait until the end of the block: they are compiled side by side, and
    then run in order, or with launch=False not at all.

    So all else in the block sees outputs that no launch has written yet. No effect inside another
    such block. Interpreted kernels do not wait.
    """
    if waiting.get() is not None:
        yield
        return
    launches: list[Launch] = []
    token = waiting.set(launches)
    try:
        yield
    finally:
        waiting.reset(token)
    _compile(launches)
    if launch:
        for one in launches:
            one()


def _compile(launches: list[Launch]) -> None:
    """Compile on threads. Launches of one variant share a thread: the second finds the first's code.

    A kernel that does not compile says so where it is launched.
    """
    variants: dict[tuple[Any, ...], list[Launch]] = {}
    for one in launches:
        variants.setdefault(_variant(one), []).append(one)
    if not variants:
        return
    threads = min(len(variants), os.cpu_count() or 1, MOST_THREADS)
    names = Counter(kernel.__name__.removesuffix("_kernel") for kernel, *_ in variants)
    what = ", ".join(name if count == 1 else f"{count} {name}" for name, count in names.items())
    logger.info("compiling for %s on %d threads, or loading from Triton's cache: %s", launches[0].device, threads, what)
    with ThreadPoolExecutor(threads) as pool:
        for same in variants.values():
            pool.submit(_compile_in_turn, same)


def _variant(launch: Launch) -> tuple[Any, ...]:
    """The kernel, and what tells most of its compiled forms apart: constants, missing arguments, options."""
    fixed = {name: value for name, value in launch.arguments.items() if value is None or name.isupper()}
    return launch.kernel, launch.device, frozenset((fixed | launch.options).items())


def _compile_in_turn(launches: list[Launch]) -> None:
    for one in launches:
        with torch.cuda.device(one.device):
            one.kernel.warmup(*one.values, grid=(one.grid,), **one.options)
