"""The tuner's logic with injected times: candidates, pruning, halving, merging, and what the
package reads back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.kernels import KERNELS, PRODUCTS, Tile
from benchmarks.tune import Search, flaw, misfit, register_cap
from eapo_kernels import EapoError
from eapo_kernels.ops.cuda import tiles as cuda_tiles
from eapo_kernels.ops.triton import tiles

ROOT = Path(__file__).parents[2]
MADE = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "today", "clocks": {}}
FORWARD = Search("triton", "stream_statistics", "sm90", 4096, 4096, 131072)
TUNED = [key for key, kernel in KERNELS.items() if kernel.space]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the package looks for measured lines."""
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "triton" / "measured.json")
    monkeypatch.setattr(cuda_tiles, "MEASURED", tmp_path / "cuda" / "measured.json")
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """Clear the package's cache of the files."""
    for kept in (tiles.measured, cuda_tiles.measured, tiles.find):
        kept.cache_clear()


class FakeClock:
    """``contest.runner(tile)`` returns the tile's milliseconds."""

    def __init__(self) -> None:
        self.timed: Counter[float] = Counter()

    def time(self, run: Callable[[], Any]) -> float:
        ms = run()
        self.timed[ms] += 1
        return ms


class FakeContest:
    """Tiles are as slow as ``cost`` says; reasons by tile for those that do not compile, are wrong,
    or spill elsewhere."""

    def __init__(self, cost: Callable[[Any], float], **reasons: dict[Any, str]) -> None:
        self.cost, self.reasons, self.ran = cost, reasons, []

    def prepare(self, tile: Any) -> Callable[[], str | None]:
        return lambda: self.reasons.get("compile", {}).get(tile)

    def check(self, tile: Any) -> str | None:
        self.ran.append(tile)
        return self.reasons.get("wrong", {}).get(tile)

    def runner(self, tile: Any) -> Callable[[], float]:
        return lambda: self.cost(tile)

    def flaw_with_every_switch(self, tile: Any) -> str | None:
        return self.reasons.get("full", {}).get(tile)


def by_size(tile: Tile) -> float:
    return 1 + abs(tile.block_n - 64) + abs(tile.block_v - 64) + tile.stages / 100


def differences(tiles: list[Any]) -> list[int]:
    return [sum(a != b for a, b in zip(vars(t).values(), vars(tiles[0]).values(), strict=True)) for t in tiles]


@pytest.mark.parametrize("kernel", [name for backend, name in TUNED if backend == "triton"])
@pytest.mark.parametrize(
    ("family", "dtype", "d"), [("sm80", torch.float32, 2048), ("sm90", torch.bfloat16, 4096), ("sm100", torch.bfloat16, 4097)]
)
def test_candidates_start_from_the_tile_of_today(kernel: str, family: str, dtype: torch.dtype, d: int) -> None:
    one = Search("triton", kernel, family, 4096, d, 131072, dtype)
    tiles = one.candidates()
    assert tiles[0] == one.current()
    assert len(set(tiles)) == len(tiles) > 10
    assert all(misfit(one, tile) is None for tile in tiles[1:])
    assert one.describable or not any(tile.descriptors for tile in tiles)
    assert differences(tiles) == sorted(differences(tiles))
    assert tiles == one.candidates() != one.candidates(seed=1)


@pytest.mark.parametrize("kernel", [name for backend, name in TUNED if backend == "cuda"])
@pytest.mark.parametrize("rows", [100, 4096])
def test_every_candidate_of_a_cuda_kernel_can_be_read_back(kernel: str, rows: int, folder: Path) -> None:
    tiles = Search("cuda", kernel, "sm90", rows, 4096, 131072).candidates()
    assert tiles[0] == cuda_tiles.find(kernel, rows, 4096) == cuda_tiles.TILES[rows <= 128]
    assert len(set(tiles)) == len(tiles) == 24
    assert set(cuda_tiles.TILES) <= set(tiles)
    assert differences(tiles) == sorted(differences(tiles))
    lines = [{"kernel": kernel, "dim": 1, "rows": n, "tile": asdict(tile)} for n, tile in enumerate(tiles, 1)]
    cuda_tiles.MEASURED.parent.mkdir()
    cuda_tiles.MEASURED.write_text(json.dumps({"environment": {}, "lines": lines}))
    forget()
    assert [entry.tile for entry in cuda_tiles.measured(cuda_tiles.MEASURED)] == tiles


def test_every_line_is_searched_once_and_the_products_first() -> None:
    found = list(tune.searches(["torch", "triton", "cuda"], "sm90"))
    assert len({(one.backend, one.key) for one in found}) == len(found)
    assert {(one.backend, one.kernel) for one in found} == set(TUNED)
    assert [one.backend for one in found] == sorted(one.backend for one in found)
    products = [one.kernel in PRODUCTS for one in found if one.backend == "triton"]
    assert products == sorted(products, reverse=True)
    assert {one.n for one in found if one.backend == "cuda"} == {512, 4096, 8192}
    assert {one.kernel for one in tune.searches(["triton"], "sm90", ["finalize"])} == {"finalize"}


def test_what_cannot_fit_is_not_compiled() -> None:
    fine = FORWARD.current()
    assert misfit(FORWARD, fine) is None
    assert "shared memory" in misfit(FORWARD, replace(fine, block_d=128, stages=5))
    assert "registers" in misfit(FORWARD, replace(fine, warps=4, block_v=512))
    assert "no descriptor" in misfit(replace(FORWARD, d=4097), fine)
    assert "slices" in misfit(FORWARD, replace(fine, slices=32))
    assert "a thread" in misfit(replace(FORWARD, kernel="finalize"), Tile(16, 0, warps=8))
    assert register_cap(Tile(128, 128, warps=8, resident=2)) == 128
    assert register_cap(Tile(128, 128, warps=8)) is None


def test_what_compiled_badly_is_not_timed() -> None:
    good = {"spills": 0, "stack": 0, "shared": 1024, "tensor": {"HGMMA": 4}, "registers": 128, "threads": 256}

    def reason(tile: Tile | None = None, plain: bool = True, **changes: Any) -> str | None:
        return flaw(FORWARD, tile or FORWARD.current(), SimpleNamespace(**good | changes), plain=plain)

    assert reason() is None
    assert "2 spills" in reason(spills=2)
    assert "shared" in reason(shared=2**18)
    assert "tensor cores" in reason(tensor={})
    twice = replace(FORWARD.current(), resident=2)
    assert "registers" in reason(twice, registers=136)
    assert "together" in reason(twice, shared=2**17)
    assert reason(twice, registers=136, plain=False) is None


def test_halving_finds_the_fastest_and_drops_the_slow_early() -> None:
    tiles = [Tile(n, v) for n in range(1, 9) for v in range(1, 6)]
    cost = {tile: 1.0 + 0.01 * ((7 * place) % 40) for place, tile in enumerate(tiles)}
    clock = FakeClock()
    ranking = tune.halve({t: lambda t=t: cost[t] for t in tiles}, clock, 10.0)
    assert [ms for _, ms in ranking] == pytest.approx([1.0, 1.01, 1.02, 1.03])
    assert clock.timed[max(cost.values())] == tune.FIRST_ROUNDS + 1
    assert clock.timed[1.0] > tune.FINAL_ROUNDS
    assert tune.halve({}, clock, 1.0) == []
    slowest = max(tiles, key=cost.__getitem__)
    kept = tune.halve({t: lambda t=t: cost[t] for t in tiles}, clock, 10.0, keep=slowest)
    assert (kept[:4], kept[4:]) == (ranking, [(slowest, pytest.approx(cost[slowest]))]), "today's tile stays for comparison"


def test_a_search_times_only_what_compiled_well_and_is_right() -> None:
    tiles = FORWARD.candidates()[:60]
    contest = FakeContest(
        by_size, compile=dict.fromkeys(tiles[:10], "14 spills, 40 bytes of stack"), wrong={tiles[20]: "logp: off by 1"}
    )
    outcome = tune.search(tiles, contest, FakeClock(), 20.0, workers=2)
    assert (outcome.tried, outcome.refused) == (60, {"spills, bytes of stack": 10})
    assert len(outcome.wrong) == 1
    assert "logp: off by 1" in outcome.wrong[0]
    assert contest.ran == tiles[10:]
    best = min((t for t in tiles[10:] if t != tiles[20]), key=by_size)
    assert outcome.ranking[0] == (best, by_size(best))
    hurried = tune.search(FORWARD.candidates(), FakeContest(by_size), FakeClock(), 0.0)
    assert 0 < hurried.tried < 10
    assert hurried.ranking, "no time at all still gives an answer"


def test_measured_lines_are_written_merged_and_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiles.find("logit_gradient", "sm90", 2, 4096, 131072, descriptors=True)
    jobs = [
        Search("triton", kernel, "sm90", *shape) for kernel in ("stream_statistics", "finalize") for shape in tune.SHAPES[::2]
    ]
    assert tune.tune(jobs, lambda job: FakeContest(by_size), FakeClock(), 4.0, folder, MADE) == (4, [])
    content = json.loads(tiles.MEASURED.read_text())
    assert content["environment"] == {k: v for k, v in MADE.items() if k != "clocks"}
    assert [(one["kernel"], one["dim"]) for one in content["lines"]] == [
        ("finalize", 1024), ("finalize", 4096), ("stream_statistics", 1024), ("stream_statistics", 4096),
    ]  # fmt: skip
    last = content["lines"][-1]
    assert last["shape"] == {"N": 4096, "D": 4096, "V": 131072, "dtype": "bfloat16"}
    forget()
    tile = tiles.find("stream_statistics", "sm90", 2, 4000, 128256, descriptors=True)
    assert tile == Tile(**last["tile"])
    assert last["ms"] == pytest.approx(by_size(tile))
    assert tiles.find("logit_gradient", "sm90", 2, 4096, 131072, descriptors=True) == before

    # A second run on another GPU: its line replaces the one of the same key, the rest stays. A tile that spills with other
    # switches is not taken.
    slower, other = FakeContest(lambda t: 5000 - by_size(t)), MADE | {"gpu": "another", "commit": "def"}
    assert tune.tune([FORWARD], lambda _: slower, FakeClock(), 1.0, folder, other) == (1, [])
    first = Tile(**json.loads(tiles.MEASURED.read_text())["lines"][-1]["tile"])
    slower.reasons["full"] = {first: "2 spills"}
    assert tune.tune([FORWARD], lambda _: slower, FakeClock(), 1.0, folder, other) == (1, [])
    again = json.loads(tiles.MEASURED.read_text())
    assert again["lines"][:-1] == content["lines"][:-1]
    assert again["lines"][-1]["gpu"] == again["environment"]["gpu"] == "another"
    assert Tile(**again["lines"][-1]["tile"]) != first
    assert [p.name for p in tiles.MEASURED.parent.iterdir()] == ["measured.json"]
    assert "the tile of today" in capsys.readouterr().out


def test_what_was_measured_of_a_cuda_kernel_is_what_is_used(folder: Path) -> None:
    job = Search("cuda", "scaled_exp_gemm", "sm90", 8192, 1024, 151936)
    contest = FakeContest(lambda tile: tile.block_v / 128 + abs(tile.group_n - 8) + 0.1 * (tile.cluster == 1))
    assert tune.tune([job], lambda _: contest, FakeClock(), 2.0, folder, MADE) == (1, [])
    forget()
    assert cuda_tiles.find("scaled_exp_gemm", 3000, 1024) == cuda_tiles.TILES[2]
    assert cuda_tiles.find("stream_statistics", 3000, 1024) == cuda_tiles.TILES[0], "not measured"


def test_nothing_right_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contest = FakeContest(by_size)
    contest.check = lambda tile: "entropy: off by 3"  # type: ignore[method-assign]
    written, wrong = tune.tune([FORWARD], lambda _: contest, FakeClock(), 0.0, folder, MADE)
    assert written == 0
    assert wrong[0].startswith("triton stream_statistics: Tile(")
    assert not tiles.MEASURED.exists()
    assert "wrong: Tile(" in capsys.readouterr().out


def entry(tile: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    line = {"kernel": "stream_statistics", "family": "sm90", "itemsize": 2, "dim": 4096, "vocab": 131072, "ms": 1.0}
    return line | {"tile": {"block_n": 64, "block_v": 64, "block_d": 32} | (tile or {})} | changes


def test_lines_for_rows_that_no_descriptor_can_describe_are_separate(folder: Path) -> None:
    odd, even = entry({"stages": 2}, dim=4097), entry({"stages": 5})
    tiles.MEASURED.parent.mkdir()
    tiles.MEASURED.write_text(json.dumps({"environment": {}, "lines": [odd]}))
    assert tiles.find("stream_statistics", "sm90", 2, 4096, descriptors=True).descriptors, "the table's"
    assert tiles.find("stream_statistics", "sm90", 2, 4097).stages == 2
    tiles.MEASURED.write_text(json.dumps({"environment": {}, "lines": [odd, even]}))
    forget()
    assert tiles.find("stream_statistics", "sm90", 2, 4096, descriptors=True).stages == 5, "measured without descriptors"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "got a list"),
        ('{"lines": []}', r"got a dict of \['lines'\]"),
        (json.dumps({"environment": {}, "lines": [3]}), r"lines\[0\]: expected a line with a tile, got 3"),
        (json.dumps({"environment": {}, "lines": [entry(dim="wide")]}), r"lines\[0\]\.dim: expected a positive integer"),
        (json.dumps({"environment": {}, "lines": [entry(), entry(itemsize=True)]}), r"lines\[1\]\.itemsize: .* got True"),
        (json.dumps({"environment": {}, "lines": [entry({"block_q": 1})]}), r"tile: expected .* got .*'block_q'"),
        (json.dumps({"environment": {}, "lines": [entry(tile=None) | {"tile": {"block_n": 64}}]}), r"expected \['block_n'"),
        (json.dumps({"environment": {}, "lines": [entry({"descriptors": 1})]}), r"tile\.descriptors: expected bool, got 1"),
        (json.dumps({"environment": {}, "lines": [entry({"block_n": 48})]}), r"block_n: expected a power of two, got 48"),
        (json.dumps({"environment": {}, "lines": [entry({"stages": 0})]}), r"stages: expected a positive integer, got 0"),
    ],
)
def test_a_malformed_file_is_named(folder: Path, text: str, message: str) -> None:
    tiles.MEASURED.parent.mkdir()
    tiles.MEASURED.write_text(text)
    with pytest.raises(EapoError, match=message) as error:
        tiles.find("stream_statistics", "sm90", 2)
    assert str(tiles.MEASURED) in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets")
def test_a_contest_runs_the_kernel_and_sees_a_wrong_result() -> None:
    contest = tune.KernelContest(Search("triton", "scaled_exp_gemm", "interpreter", 40, 24, 301), "cpu", budget=2**20)
    tile = contest.search.current()
    assert contest.prepare(tile)() is None
    assert contest.check(tile) is None
    contest.operands.matrix.fill_(torch.nan)
    contest.runner(tile)()
    assert not contest.operands.matrix.isnan().any()
    contest.operands.expected["entropy"][7] += 1
    assert contest.check(tile).startswith("entropy: off by 1.0")


def test_spilling_tiles_are_refused_by_a_real_compile() -> None:
    """In a process of its own: importing Triton decides whether it interprets or compiles."""
    code = """
from dataclasses import replace
from benchmarks.tune import KernelContest, Search
contest = KernelContest(Search("triton", "stream_statistics", "sm90", 64, 128, 512), "cpu")
good = contest.search.current()
bad = replace(good, block_v=256, slices=1, max_registers=None, resident=1, warps=4)
print(contest.prepare(good)(), contest.prepare(bad)(), contest.flaw_with_every_switch(good), sep="; ")
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    plain, spilling, full = done.stdout.strip().split("; ")
    assert (plain, full) == ("None", "None")
    assert "spills" in spilling
