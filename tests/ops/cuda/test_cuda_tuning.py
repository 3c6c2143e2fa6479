"""The CUDA kernels' entries in the benchmarks' table, on the emulator: right for every tile, and a
wrong result is seen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import compiled_code, kernels
from benchmarks.kernels import Check
from benchmarks.tune import KernelContest, Search
from eapo_kernels.ops.cuda.build import BuildError
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.cuda.tiles import TILES, Build

pytestmark = [pytest.mark.csrc, pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run")]

KERNELS = [name for backend, name in kernels.KERNELS if backend == "cuda"]
CHECKS = [
    c for c in kernels.checks("cuda", "") if c.dtype == torch.bfloat16 or (c.kernel, c.tile) == ("scaled_exp_gemm", TILES[0])
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: str(check).replace(" ", "-"))
def test_the_compiled_kernels_are_right(check: Check) -> None:
    """With all switches off and on; tests/ops/cuda/test_cuda_backend.py has those between."""
    run = check._run(kernels.SHAPES[1], "cpu")
    assert run.launch.build == check.cuda_build()
    assert check.why_wrong(kernels.SHAPES[1], "cpu") is None


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_is_right_and_a_wrong_one_is_found(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search("cuda", kernel, "sm90", 150, 72, 600)
    contest = KernelContest(search, "cpu", budget=2**20)
    for tile in search.candidates():
        assert contest.check(tile) is None, tile
    run, state = Launch.__call__, SimpleNamespace(runs=0, every=1)
    monkeypatch.setattr(Launch, "__call__", lambda one: None)
    assert "off by nan" in contest.check(TILES[0]), "nothing ran, and what stood there before does not count"

    def spoiled(one: Launch) -> None:
        run(one)
        state.runs += 1
        if state.runs % state.every == 0:
            one.tensors["sums"][0, 0, 7] += 1

    monkeypatch.setattr(Launch, "__call__", spoiled)
    assert "off by" in contest.check(TILES[0])
    state.runs, state.every = 0, 2
    assert "the second run differs" in contest.check(TILES[0])


@pytest.mark.usefixtures("emulated")
def test_what_compiled_badly_is_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = KernelContest(Search("cuda", "stream_statistics", "sm90", 16, 64, 300), "cpu")
    asked: list[Build] = []

    def usage(build: Build) -> SimpleNamespace:
        asked.append(build)
        spills = 4 if build.bias else 0
        return SimpleNamespace(spills=spills, stack=2 * spills)

    monkeypatch.setattr(compiled_code, "cuda_usage", usage)
    assert contest.prepare(TILES[0])() is None
    assert contest.flaw_with_every_switch(TILES[0]) == "4 spills, 8 bytes of stack"
    assert [(b.bias, b.second_moments) for b in asked] == [(False, False), (True, True)]

    def broken(build: Build) -> SimpleNamespace:
        raise BuildError("stream_statistics shared: expected to compile\nmore")

    monkeypatch.setattr(compiled_code, "cuda_usage", broken)
    assert contest.prepare(TILES[0])() == "BuildError of the compiler"
