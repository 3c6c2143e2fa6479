"""A step captured once and replayed with other inputs, and no wait for the device on the way. On a
CPU the calls alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from jobs import JOBS, Job, job_inputs
from torch import Tensor

from eapo_kernels import Options, TokenBatch
from eapo_kernels.testing import Inputs, assert_no_worse_than

SMALL_BUDGET = {"cuda": 128 * 50257 * 16, "cpu": 10 * 301 * 16}
"""Several chunks and slabs."""


def captured(function: Callable[[], list[Tensor]], device: str) -> Callable[[], list[Tensor]]:
    """``function`` as a CUDA graph: a call replays it and returns the same tensors with new
    numbers. On a CPU the function."""
    if device == "cpu":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets the libraries allocate
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def overwrite(inputs: Inputs, batch: TokenBatch, new_inputs: Inputs, new_batch: TokenBatch) -> None:
    """New numbers in the old memory."""
    with torch.no_grad():
        for name in ("hidden", "weight", "targets"):
            getattr(inputs, name).copy_(getattr(new_inputs, name))
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                value.copy_(getattr(new_batch, name))


def check_replay(job: Job, device: str, options: Options, seeds: tuple[int, ...], masked: bool = False) -> None:
    """Every replay gives what an eager call with the same numbers gives, to the last rounding."""

    def made(seed: int) -> tuple[Inputs, TokenBatch]:
        inputs, batch = job_inputs(device, seed)
        if masked:
            batch = replace(batch, mask=torch.arange(batch.targets.numel(), device=device) % 3 != seed % 3)
        return inputs, batch

    inputs, batch = made(0)
    replay = captured(lambda: job(inputs, batch, options), device)
    for seed in seeds:
        fresh = made(seed)
        overwrite(inputs, batch, *fresh)
        got = [t.clone() for t in replay()]
        for number, (a, b) in enumerate(zip(got, job(*fresh, options), strict=True)):
            floor = 2e-6 if b.dtype == torch.float32 else torch.finfo(b.dtype).eps
            assert_no_worse_than(a, b, b, floor=floor, name=f"result {number}, seed {seed}")


@pytest.mark.parametrize("name", JOBS)
def test_a_replayed_step_is_the_eager_step(name: str, device: str) -> None:
    check_replay(JOBS[name], device, Options(), seeds=(1, 2, 1))


@pytest.mark.parametrize("name", ["torch-autograd", "torch-one_pass", "triton-autograd", "triton-one_pass"])
def test_other_rows_may_be_masked_in_a_replay(name: str, device: str) -> None:
    """The graph keeps every row, so the mask is an input like any other."""
    options = Options(memory_budget=SMALL_BUDGET[device], compact=False)
    check_replay(JOBS[name], device, options, seeds=(1, 2), masked=True)


@contextmanager
def synchronisations(device: str, mode: str) -> Iterator[list[str]]:
    """The calls in which PyTorch waits for the device, as messages; with mode "error" the first one
    raises."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            yield found
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found += [str(w.message) for w in caught if "synchronizing" in str(w.message)]


@pytest.mark.parametrize("name", JOBS)
def test_nothing_waits_for_the_device(name: str, device: str) -> None:
    """By default, without a mask."""
    inputs, batch = job_inputs(device)
    JOBS[name](inputs, batch, Options())
    with synchronisations(device, "error"):
        JOBS[name](inputs, batch, Options())


@pytest.mark.parametrize("name", [name for name in JOBS if "one_pass" in name or "autograd" in name])
def test_a_mask_costs_a_wait_a_direction(name: str, device: str) -> None:
    """For the number of rows, in the forward and, under autograd, in the backward. See
    ``Options.compact`` and tests/test_no_waits.py."""
    inputs, batch = job_inputs(device)
    batch = replace(batch, mask=torch.arange(batch.targets.numel(), device=device) % 3 > 0)
    JOBS[name](inputs, batch, Options())
    with synchronisations(device, "warn") as found:
        JOBS[name](inputs, batch, Options())
    assert len(found) <= (1 if "one_pass" in name else 3), found
