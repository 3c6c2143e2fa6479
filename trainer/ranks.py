"""Several processes that train one model: who this one is, and what they exchange.

Without a process group every function here is that of the only process. Values that decide anything go through here: what one
rank alone knows (a failure, a stop request, its answers) becomes what all ranks know, so that they never part ways.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eapo_kernels import EapoError

from .errors import FailedElsewhere, Interrupted, ModelError

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=1)
"""Longest wait for the other ranks, of which one may be asking a slow judge. A rank that dies is noticed at once."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that prints and writes the run's files."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that torchrun started (nccl on ``cuda:LOCAL_RANK``, else gloo); nothing without torchrun.

    Of several ranks that fail, within it, only the first says why; the others raise ``FailedElsewhere``.

    Args:
        device: the setting ``model.device``.

    Raises:
        ModelError: a numbered device, or fewer GPUs than processes.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    cuda = device != "cpu" and torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"model.device: expected auto, cpu or cuda under torchrun (a GPU for each process), got {device!r}")
    if cuda:
        if local >= torch.cuda.device_count():
            raise ModelError(f"model.device: expected a GPU for each process, got {torch.cuda.device_count()} for {local + 1}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    except (FailedElsewhere, Interrupted):
        raise
    except BaseException as error:
        if _failed_before():
            raise FailedElsewhere("another rank failed first") from error
        error.add_note(f"(rank {rank()} of {size()})")
        raise
    dist.barrier()
    dist.destroy_process_group()


def _failed_before() -> bool:
    """Whether another rank was here first. A store that is gone went with the rank that failed."""
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) > 1
    except RuntimeError:
        return True


def gather(work: Callable[[], T]) -> list[T]:
    """Call ``work`` on every rank and give all of them all results, in the order of ranks.

    ``work`` must not exchange anything itself. An ``EapoError`` or a stop on any rank ends it on all: each raises its own, or
    ``FailedElsewhere``, or ``Interrupted``.
    """
    if size() == 1:
        return [work()]
    mine: tuple[str, Any]
    own: Exception | None = None
    try:
        mine = ("done", work())
    except Interrupted:
        mine = ("stopped", None)
    except EapoError as error:
        mine, own = ("failed", None), error
    everyone: list[Any] = [None] * size()
    dist.all_gather_object(everyone, mine)
    ends = [how for how, _ in everyone]
    if own is not None:
        raise own
    if "failed" in ends:
        raise FailedElsewhere(f"rank {ends.index('failed')} failed")
    if "stopped" in ends:
        raise Interrupted
    return [result for _, result in everyone]


def on_first(work: Callable[[], T]) -> T:
    """What ``work`` returns on the first rank, which alone calls it; errors as in ``gather``."""
    return gather(lambda: work() if first() else None)[0]  # type: ignore[return-value]


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if size() == 1:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def add_up(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def shares(costs: list[int], indices: list[int]) -> list[list[int]]:
    """Spread ``indices`` over the ranks so that the sums of their costs are close: dearest first, to who has least."""
    loads, result = [0] * size(), [[] for _ in range(size())]  # type: list[int], list[list[int]]
    for index in sorted(indices, key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        result[least].append(index)
    return result
