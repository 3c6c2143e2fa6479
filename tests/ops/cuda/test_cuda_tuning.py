"""The tuner's problem for the CUDA kernels: what it launches is right for every tile, and a wrong result is seen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.tuning.cuda_candidates import KERNELS, CudaSearch
from benchmarks.tuning.cuda_problems import CudaProblem
from eapo_kernels.ops.cuda import report
from eapo_kernels.ops.cuda.build import BuildError
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.cuda.tiles import TILES, Build

pytestmark = [pytest.mark.csrc, pytest.mark.skipif(torch.cuda.is_available(), reason="there the tuner runs the kernels")]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_agrees_with_the_torch_backend(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search = CudaSearch(kernel, 150, 72, 600)
    problem = CudaProblem(search, "cpu", budget=2**20)
    for tile in search.candidates():
        assert problem.check(tile) is None, tile
    run = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda one: None)
    assert "off by nan" in problem.check(TILES[0]), "nothing ran, and what stood there before does not count"

    def spoiled(one: Launch) -> None:
        run(one)
        one.tensors["sums"][0, 0, 7] += 1

    monkeypatch.setattr(Launch, "__call__", spoiled)
    assert "off by" in problem.check(TILES[0])


@pytest.mark.usefixtures("emulated")
def test_what_is_timed_is_the_launch() -> None:
    problem = CudaProblem(CudaSearch("scaled_exp_gemm", 130, 72, 515), "cpu")
    runner = problem.runner(TILES[2])
    problem.matrix.fill_(torch.nan)
    runner()
    assert not problem.matrix.isnan().any()


@pytest.mark.usefixtures("emulated")
def test_what_compiled_badly_is_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CudaProblem(CudaSearch("stream_statistics", 16, 64, 300), "cpu")
    asked: list[Build] = []

    def usage(build: Build) -> SimpleNamespace:
        asked.append(build)
        spills = 4 if build.bias else 0
        return SimpleNamespace(code=SimpleNamespace(spills=spills, stack=2 * spills))

    monkeypatch.setattr(report, "usage", usage)
    assert problem.prepare(TILES[0])() is None
    assert problem.spills_with_every_switch(TILES[0]) == "4 spills, 8 bytes of stack"
    assert [(b.bias, b.second_moments) for b in asked] == [(False, False), (True, True)]

    def broken(build: Build) -> SimpleNamespace:
        raise BuildError("stream_statistics shared: expected to compile\nmore")

    monkeypatch.setattr(report, "usage", broken)
    assert problem.prepare(TILES[0])() == "compiler: stream_statistics shared: expected to compile"
