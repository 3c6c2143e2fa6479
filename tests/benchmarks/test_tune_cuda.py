"""The tuner for the CUDA kernels with injected times: what is raced, written and read back by ``cuda_tiles.find``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune
from benchmarks.tuning.cuda_candidates import CLUSTERS, GROUPS, KERNELS, STAGGERS, CudaSearch
from benchmarks.tuning.table import CUDA
from eapo_kernels.ops.cuda import tiles as cuda_tiles
from eapo_kernels.ops.cuda.tiles import TILES, Tile

MADE = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "today", "clocks": {}}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the package looks for measured lines."""
    monkeypatch.setattr(cuda_tiles, "MEASURED", tmp_path / "measured.json")
    cuda_tiles.measured.cache_clear()
    yield tmp_path / "measured.json"
    cuda_tiles.measured.cache_clear()


class FakeClock:
    def time(self, run: Callable[[], float]) -> float:
        return run()


class FakeContest:
    """Tiles are as slow as ``cost`` says; those in ``spilling`` spill with every switch."""

    def __init__(self, cost: Callable[[Tile], float], spilling: frozenset[Tile] = frozenset()) -> None:
        self.cost, self.spilling = cost, spilling

    def prepare(self, tile: Tile) -> Callable[[], str | None]:
        return lambda: None

    def check(self, tile: Tile) -> str | None:
        return "logp: off by 1" if isinstance(tile, Tile) and tile.group_n == 16 else None

    def runner(self, tile: Tile) -> Callable[[], float]:
        return lambda: self.cost(tile)

    def spills_with_every_switch(self, tile: Tile) -> str | None:
        return "2 spills" if tile in self.spilling else None


def narrow_is_fast(tile: Tile) -> float:
    return tile.block_v / 128 + abs(tile.group_n - 8) + 0.1 * (tile.cluster == 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [100, 4096])
def test_candidates_start_from_the_tile_of_today_and_every_one_can_be_read_back(kernel: str, rows: int, path: Path) -> None:
    search = CudaSearch(kernel, rows, 4096, 131072)
    tiles = search.candidates()
    assert tiles[0] == search.current() == TILES[rows <= 128]
    assert len(set(tiles)) == len(tiles) == len(CLUSTERS) * len(GROUPS) * (len(STAGGERS) + 1)
    assert set(TILES) <= set(tiles)
    lines = [{"kernel": kernel, "dim": 1, "rows": n, "tile": asdict(tile)} for n, tile in enumerate(tiles, 1)]
    path.write_text(json.dumps({"environment": {}, "lines": lines}))
    cuda_tiles.measured.cache_clear()
    assert [entry.tile for entry in cuda_tiles.measured(path)] == tiles


def test_every_line_is_searched_once_and_only_in_the_kernels_asked_for() -> None:
    jobs = tune.cuda_searches(["scaled_exp_gemm", "finalize"], [(4096, 4096, 131072), (512, 4096, 131072)])
    assert [job.key for job in jobs] == [("scaled_exp_gemm", 4096, 4096), ("scaled_exp_gemm", 4096, 512)]
    assert len(tune.cuda_searches(["finalize"], [(1, 2, 3)])) == 0
    assert {job.kernel for job in tune.cuda_searches(list(KERNELS), [(1, 2, 3)])} == set(KERNELS)


def test_what_was_measured_is_what_is_used(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = tune.cuda_searches(["scaled_exp_gemm"], [(8192, 1024, 151936), (4096, 4096, 131072)])
    open_contest = lambda job: FakeContest(narrow_is_fast)  # noqa: E731
    assert tune.tune(jobs, open_contest, FakeClock(), 4.0, path, MADE, table=CUDA) == 2
    content = json.loads(path.read_text())
    assert [(line["dim"], line["rows"], line["commit"]) for line in content["lines"]] == [
        (1024, 8192, "abc"),
        (4096, 4096, "abc"),
    ]
    assert cuda_tiles.find("scaled_exp_gemm", 3000, 1024) == TILES[2]
    assert cuda_tiles.find("stream_statistics", 3000, 1024) == TILES[0], "not measured"
    out = capsys.readouterr().out
    assert "24 tried, refused: none" in out
    assert out.count("wrong: Tile(") == 2 * 8
    assert CUDA.read(path) == content

    # Measured again: the line is replaced, and what spills with other switches is not taken.
    again = FakeContest(narrow_is_fast, frozenset({TILES[2]}))
    assert tune.tune(jobs[:1], lambda job: again, FakeClock(), 2.0, path, MADE | {"commit": "def"}, table=CUDA) == 1
    assert cuda_tiles.find("scaled_exp_gemm", 3000, 1024) == Tile(**asdict(TILES[2]) | {"name": "pingpong_alone", "cluster": 1})
    assert [line["commit"] for line in json.loads(path.read_text())["lines"]] == ["def", "abc"]


def test_the_command_races_both_backends_into_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a pretended Hopper GPU; every tile of a CUDA kernel is tried however little time there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "available_backends", lambda device: {"cuda": None})
    monkeypatch.setattr(tune, "environment", lambda device: MADE)
    monkeypatch.setattr(tune, "make_clock", lambda device: FakeClock())
    for module, name in (("cuda_problems", "CudaProblem"), ("problems", "Problem")):
        fake = SimpleNamespace(**{name: lambda job, device: FakeContest(lambda tile: 1.0 + tile.block_v)})
        monkeypatch.setitem(sys.modules, f"benchmarks.tuning.{module}", fake)
    shape = [
        "--kernel",
        "scaled_exp_gemm",
        "row_offsets",
        "--shape",
        "4096",
        "4096",
        "131072",
        "--seconds",
        "0",
        "--workers",
        "2",
    ]
    assert tune.main([*shape, "--out", str(tmp_path / "out")]) == 0
    written = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/measured.json")}
    assert [line["kernel"] for line in written["cuda"]["lines"]] == ["scaled_exp_gemm"]
    assert [line["kernel"] for line in written["triton"]["lines"]] == ["scaled_exp_gemm", "row_offsets"]
    out = capsys.readouterr().out
    assert "24 tried" in out.splitlines()[0]
    assert f"wrote 3 lines to {tmp_path / 'out'}" in out
    monkeypatch.setattr(tune, "available_backends", lambda device: {"cuda": "no bindings"})
    assert tune.main([*shape, "--backend", "cuda", "--out", str(tmp_path / "other")]) == 1
    assert "not here: the cuda backend: no bindings" in capsys.readouterr().out
