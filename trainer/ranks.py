"""Communication between the processes that train one model.

Without a process group every function behaves as on a single process. A value that only one rank
knows (a failure, a stop request, its completions) is exchanged here before any rank acts on it, so
that all ranks run the same sequence of collectives.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eapo_kernels import EapoError

from .errors import Interrupted, ModelError, RemoteCrash, RemoteRankError, TrainerError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(hours=1)
"""Timeout of a collective: another rank may be waiting for a slow judge. The death of a rank is
noticed at once."""
MEETING = datetime.timedelta(seconds=30)
"""How long a rank that failed waits for the others to fail at the same point."""
_exchanged: BaseException | None = None
"""The error of this rank that ``all_gather`` has made known to all ranks."""
_end = ExitStack()
at_end = _end.callback
"""Call a function when all ranks are done: it may destroy process groups, the default one too. It is
not called after an error."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0, which prints and writes the run's files."""
    return rank() == 0


@contextmanager
def init_distributed(device: str) -> Iterator[None]:
    """Initialize the process group of torchrun (nccl on ``cuda:LOCAL_RANK``, else gloo) for the
    duration of the context. Does nothing without torchrun.

    When several ranks fail, the first one raises its own error and the others raise
    ``RemoteRankError``.

    Args:
        device: the setting ``model.device``.

    Raises:
        ModelError: a numbered device, or fewer GPUs than processes.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"model.device: expected auto, cpu or cuda under torchrun (a GPU for each process), got {device!r}")
    local, gpus = int(os.environ["LOCAL_RANK"]), 0 if device == "cpu" else torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise ModelError(f"model.device: expected a GPU for each process, got {gpus} for {local + 1}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    try:
        yield
    except (RemoteRankError, RemoteCrash, Interrupted):
        raise
    except BaseException as error:
        if _failed_before():
            raise RemoteRankError("another rank failed first") from error
        error.add_note(f"(rank {rank()} of {size()})")
        raise
    dist.barrier()
    _end.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _store() -> Any:
    """The store of the process group. Its calls raise RuntimeError when the job has ended."""
    return dist.distributed_c10d._get_default_store()


def _failed_before() -> bool:
    """Whether another rank failed earlier."""
    try:
        return _store().add("failed", 1) > 1
    except RuntimeError:
        return True


def all_gather(work: Callable[[], T]) -> list[T]:
    """Call ``work`` on every rank and return all results on every rank, in the order of ranks.

    ``work`` must not call a collective. When it raises on any rank, this function raises on all: a
    rank's own error, else ``RemoteCrash``, ``RemoteRankError`` or ``Interrupted``.
    """
    global _exchanged
    if size() == 1:
        return [work()]
    try:
        result = work()
    except Interrupted:
        _exchange("stopped", None)
        raise
    except BaseException as error:
        _exchanged = error
        _exchange("failed" if isinstance(error, TrainerError | EapoError) else "crashed", None)
        raise
    return _exchange("done", result)


def _exchange(how: str, result: Any) -> list[Any]:
    results: list[Any] = [None] * size()
    dist.all_gather_object(results, (how, result))
    ends = [end for end, _ in results]
    if "crashed" in ends and how != "crashed":
        raise RemoteCrash(f"rank {ends.index('crashed')} failed")
    if "failed" in ends and how in ("done", "stopped"):
        raise RemoteRankError(f"rank {ends.index('failed')} failed")
    if "stopped" in ends and how == "done":
        raise Interrupted
    return [result for _, result in results]


def failed_together(error: BaseException) -> bool:
    """Whether all ranks left their work at the same point, so that collectives can still be called.
    Every rank calls it with the error that it is about to end with.

    An error of the trainer or the library in the loop is raised on all ranks, and so is one that
    ``all_gather`` has exchanged. With any other (one rank is out of memory within a forward pass) the
    other ranks are waiting in a collective, which fails when this process ends.
    """
    if size() == 1:
        return True
    shared = isinstance(error, TrainerError | EapoError | RemoteCrash) or error is _exchanged
    places = [f"left/{number}" for number in range(size())]
    try:
        _store().set(places[rank()], str(int(shared)))
        if shared:
            _store().wait(places, MEETING)
        return shared and all(_store().get(place) == b"1" for place in places)
    except RuntimeError:  # a rank did not come
        return False


def run_on_main(work: Callable[[], T]) -> T:
    """Call ``work`` on rank 0 and return its result on all ranks; errors as in ``all_gather``."""
    return all_gather(lambda: work() if is_main() else None)[0]  # type: ignore[return-value]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(all_reduce_sum(torch.tensor(int(flag))))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values
