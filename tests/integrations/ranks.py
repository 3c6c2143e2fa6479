"""Run a function on gloo processes, with a time limit that dumps the stacks of all threads."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
LIMIT = 150.0  # seconds; starting the processes takes most of a run


def run_ranks(function: Callable[..., None], *args: Any, world: int = WORLD) -> None:
    """Call ``function(rank, *args)`` on each of ``world`` processes of one gloo group.

    Raises:
        TimeoutError: it took longer than LIMIT.
        ProcessRaisedException: one of them failed.
    """
    multiprocessing.set_forkserver_preload(["torch"])  # imported once by the server, not by every process
    with tempfile.TemporaryDirectory() as directory:
        started = (function, args, directory, world)
        context = mp.start_processes(_rank, args=started, nprocs=world, join=False, start_method="forkserver")
        end = time.monotonic() + LIMIT + 20
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__}: expected an end within {LIMIT} s on {world} processes, got none")


def _rank(rank: int, function: Callable[..., None], args: tuple[Any, ...], directory: str, world: int) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), world)
    limit = datetime.timedelta(seconds=LIMIT / 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
