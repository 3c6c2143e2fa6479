"""The same bits in every run, on any stream and whatever device is current."""

from __future__ import annotations

import pytest
import torch
from jobs import JOBS, job_inputs

from eapo_kernels import Options

CHUNKED = {"cuda": Options(memory_budget=200 * 50257 * 16), "cpu": Options(memory_budget=10 * 301 * 16)}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("chunked", [False, True], ids=["one_chunk", "chunked"])
def test_run_to_run_bitwise(name: str, chunked: bool, device: str) -> None:
    inputs, batch = job_inputs(device)
    options = CHUNKED[device] if chunked else Options()
    first, *others = (JOBS[name](inputs, batch, options) for _ in range(3))
    for other in others:
        for number, (a, b) in enumerate(zip(first, other, strict=True)):
            assert torch.equal(a, b), f"result {number}"


@pytest.mark.parametrize("name", JOBS)
def test_work_is_queued_on_the_current_stream(name: str, device: str) -> None:
    """On a second stream the inputs arrive late: whatever ran on another stream would read the
    numbers from before."""
    inputs, batch = job_inputs(device, seed=1)
    late, _ = job_inputs(device, seed=2)
    old, new = inputs.hidden.detach().clone(), late.hidden.detach().clone()
    expected = [t.clone() for t in JOBS[name](late, batch, Options())]
    with torch.no_grad():
        inputs.weight.copy_(late.weight)
        inputs.hidden.copy_(old)
    side = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(side):  # nothing without a stream
        if side is not None:
            side.wait_stream(torch.cuda.default_stream())
            torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            inputs.hidden.copy_(new)
        results = JOBS[name](inputs, batch, Options(compact=False))
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
    for number, (a, b) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, n=number: f"result {n}: {m}")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", JOBS)
def test_the_current_device_need_not_be_the_tensors(name: str) -> None:
    with torch.cuda.device(1):
        inputs, batch = job_inputs("cuda")
        expected = [t.cpu() for t in JOBS[name](inputs, batch, Options())]
    with torch.cuda.device(0):
        got = [t.cpu() for t in JOBS[name](inputs, batch, Options())]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
