"""The tuner's logic with injected times: candidates, pruning, halving, merging, and what ``tiles.find`` reads back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.tuning import search as searching
from benchmarks.tuning.candidates import SPACES, UNTUNED, Search, candidates, flaw, misfit, register_cap
from benchmarks.tuning.table import TRITON
from eapo_kernels import EapoError
from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.tiles import PRODUCTS, Tile

ROOT = Path(__file__).parents[2]
MADE = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "today", "clocks": {}}
FORWARD = Search("stream_statistics", "sm90", 2, 4096, 4096, 131072, "bfloat16")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the package looks for measured lines."""

    def forget() -> None:
        tiles.entries.cache_clear()
        tiles.find.cache_clear()

    monkeypatch.setattr(tiles, "PATH", tmp_path / "measured.json")
    forget()
    yield tmp_path / "measured.json"
    forget()


class FakeClock:
    """``contest.runner(tile)`` returns the tile's milliseconds."""

    def __init__(self) -> None:
        self.timed: Counter[float] = Counter()

    def time(self, run: Callable[[], Any]) -> float:
        ms = run()
        self.timed[ms] += 1
        return ms


class FakeContest:
    """Tiles are as slow as ``cost`` says; reasons by tile for those that do not compile, are wrong, or spill elsewhere."""

    def __init__(self, cost: Callable[[Tile], float], **reasons: dict[Tile, str]) -> None:
        self.cost, self.reasons, self.ran = cost, reasons, []

    def prepare(self, tile: Tile) -> Callable[[], str | None]:
        return lambda: self.reasons.get("compile", {}).get(tile)

    def check(self, tile: Tile) -> str | None:
        self.ran.append(tile)
        return self.reasons.get("wrong", {}).get(tile)

    def runner(self, tile: Tile) -> Callable[[], float]:
        return lambda: self.cost(tile)

    def spills_with_every_switch(self, tile: Tile) -> str | None:
        return self.reasons.get("full", {}).get(tile)


def by_size(tile: Tile) -> float:
    return 1 + abs(tile.block_n - 64) + abs(tile.block_v - 64) + tile.stages / 100


def test_every_kernel_is_searched_or_has_a_reason() -> None:
    assert set(SPACES) | set(UNTUNED) == {entry.kernel for entry in tiles.TABLE}
    assert not set(SPACES) & set(UNTUNED)


@pytest.mark.parametrize("kernel", SPACES)
@pytest.mark.parametrize("family", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize(("itemsize", "d"), [(2, 4096), (2, 4097), (4, 2048)])
def test_candidates_start_from_the_tile_of_today(kernel: str, family: str, itemsize: int, d: int) -> None:
    itemsize = itemsize if kernel in (*PRODUCTS, "row_offsets") else 4
    one = Search(kernel, family, itemsize, 4096, d, 131072, "bfloat16")
    tiles = candidates(one)
    assert tiles[0] == one.current()
    assert len(set(tiles)) == len(tiles) > 10
    assert all(misfit(one, tile) is None for tile in tiles[1:])
    assert one.describable or not any(tile.descriptors for tile in tiles)
    changed = [sum(a != b for a, b in zip(vars(t).values(), vars(tiles[0]).values(), strict=True)) for t in tiles]
    assert changed == sorted(changed)
    assert tiles == candidates(one)
    assert tiles != candidates(one, seed=1)


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
    ranking = searching.halve({t: lambda t=t: cost[t] for t in tiles}, clock, 10.0)
    assert [ms for _, ms in ranking] == pytest.approx([1.0, 1.01, 1.02, 1.03])
    slow, fast = clock.timed[max(cost.values())], clock.timed[1.0]
    assert slow == searching.FIRST_ROUNDS + 1
    assert fast > searching.FINAL_ROUNDS
    assert searching.halve({}, clock, 1.0) == []


def test_a_search_times_only_what_is_sound_and_right() -> None:
    tiles = candidates(FORWARD)[:60]
    contest = FakeContest(
        by_size,
        compile=dict.fromkeys(tiles[:10], "14 spills, 40 bytes of stack"),
        wrong={tiles[20]: "logp: off by 1"},
    )
    outcome = searching.search(tiles, contest, FakeClock(), 20.0, workers=2)
    assert outcome.tried == 60
    assert outcome.refused == {"spills, bytes of stack": 10}
    assert len(outcome.wrong) == 1
    assert "logp: off by 1" in outcome.wrong[0]
    assert contest.ran == tiles[10:]
    best = min((t for t in tiles[10:] if t != tiles[20]), key=by_size)
    assert outcome.ranking[0] == (best, by_size(best))


def test_no_time_at_all_still_gives_an_answer() -> None:
    outcome = searching.search(candidates(FORWARD), FakeContest(by_size), FakeClock(), 0.0)
    assert 0 < outcome.tried < 10
    assert outcome.ranking


def test_measured_lines_are_written_merged_and_read_back(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiles.find("logit_gradient", "sm90", 2, 4096, 131072, descriptors=True)
    jobs = tune.searches(["stream_statistics", "finalize"], [(4096, 4096, 131072), (8192, 1024, 151936)], ["bfloat16"], "sm90")
    assert tune.tune(jobs, lambda job: FakeContest(by_size), FakeClock(), 4.0, path, MADE) == 4
    content = json.loads(path.read_text())
    assert content["environment"] == {k: v for k, v in MADE.items() if k != "clocks"}
    assert [(one["kernel"], one["dim"]) for one in content["lines"]] == [
        ("finalize", 1024), ("finalize", 4096), ("stream_statistics", 1024), ("stream_statistics", 4096),
    ]  # fmt: skip
    last = content["lines"][-1]
    assert last["shape"] == {"N": 4096, "D": 4096, "V": 131072, "dtype": "bfloat16"}
    assert last["commit"] == "abc"
    tile = tiles.find("stream_statistics", "sm90", 2, 4000, 128256, descriptors=True)
    assert tile == Tile(**last["tile"])
    assert last["ms"] == pytest.approx(by_size(tile))
    assert tiles.find("logit_gradient", "sm90", 2, 4096, 131072, descriptors=True) == before
    assert tiles.find("stream_statistics", "sm100", 2) in [e.tile for e in tiles.TABLE]

    # A second run on another GPU: its line replaces one of the same key, the rest stays.
    job = [one for one in jobs if one.key == ("stream_statistics", "sm90", 2, 4096, 131072)]
    slower = FakeContest(lambda t: 5000 - by_size(t))
    assert tune.tune(job, lambda _: slower, FakeClock(), 1.0, path, MADE | {"gpu": "another", "commit": "def"}) == 1
    again = json.loads(path.read_text())
    assert again["lines"][:-1] == content["lines"][:-1]
    assert again["lines"][-1]["gpu"] == "another"
    assert again["environment"]["gpu"] == "another"
    assert tiles.find("stream_statistics", "sm90", 2, 4096, 131072, descriptors=True) == Tile(**again["lines"][-1]["tile"])
    assert [p.name for p in path.parent.iterdir()] == ["measured.json"]
    assert "the tile of today" in capsys.readouterr().out


def test_a_tile_that_spills_with_other_switches_is_not_written(path: Path) -> None:
    ranking = searching.search(candidates(FORWARD)[:8], FakeContest(by_size), FakeClock(), 5.0).ranking
    first, second = ranking[0][0], ranking[1][0]
    contest = FakeContest(by_size, full={first: "2 spills"})
    contest.prepare = lambda tile: lambda: None if tile in (first, second) else "not asked for"  # type: ignore[method-assign]
    assert tune.tune([FORWARD], lambda _: contest, FakeClock(), 2.0, path, MADE) == 1
    assert tiles.find("stream_statistics", "sm90", 2, 4096, 131072, descriptors=True) == second


def test_nothing_right_writes_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contest = FakeContest(by_size)
    contest.check = lambda tile: "entropy: off by 3"  # type: ignore[method-assign]
    assert tune.tune([FORWARD], lambda _: contest, FakeClock(), 0.0, path, MADE) == 0
    assert not path.exists()
    assert "wrong: Tile(" in capsys.readouterr().out


def entry(tile: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    line = {"kernel": "stream_statistics", "family": "sm90", "itemsize": 2, "dim": 4096, "vocab": 131072, "ms": 1.0}
    return line | {"tile": {"block_n": 64, "block_v": 64, "block_d": 32} | (tile or {})} | changes


def test_lines_for_rows_that_no_descriptor_can_describe_stay_apart(path: Path) -> None:
    odd, even = entry({"stages": 2}, dim=4097), entry({"stages": 5})
    path.write_text(json.dumps({"environment": {}, "lines": [odd]}))
    assert tiles.find("stream_statistics", "sm90", 2, 4096, descriptors=True).descriptors, "the table's"
    assert tiles.find("stream_statistics", "sm90", 2, 4097).stages == 2
    TRITON.save(path, {"environment": {}, "lines": [odd, even]})
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
def test_a_malformed_file_is_named(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    for read in (lambda: tiles.find("stream_statistics", "sm90", 2), lambda: TRITON.read(path)):
        with pytest.raises(EapoError, match=message) as error:
            read()
        assert str(path) in str(error.value)


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == ["benchmarks.tune: expected a CUDA device to measure on, got none"]


def run(code: str, interpret: str) -> str:
    """A process of its own: whether Triton interprets is settled when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kernel_agrees_with_the_torch_backend_and_a_wrong_one_is_seen() -> None:
    code = """
from benchmarks.tuning.candidates import SPACES, Search
from benchmarks.tuning.problems import Problem
for kernel in SPACES:
    for itemsize, dtype in ((2, "bfloat16"), (4, "float32")):
        typed = kernel in ("stream_statistics", "logit_gradient", "scaled_exp_gemm", "row_offsets")
        search = Search(kernel, "interpreter", itemsize if typed else 4, 40, 24, 301, dtype)
        problem = Problem(search, "cpu", budget=2**20)
        assert problem.check(search.current()) is None, (search, problem.check(search.current()))
        problem.runner(search.current())()
wrong = Problem(Search("stream_statistics", "interpreter", 4, 40, 24, 301, "float32"), "cpu")
wrong.statistics.entropy[7] += 1
print(wrong.check(wrong.search.current()))
"""
    assert run(code, "1").startswith("entropy: off by 1.0")


def test_spilling_tiles_are_refused_by_a_real_compile() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from benchmarks.tuning.candidates import Search
from benchmarks.tuning.problems import Problem
search = Search("stream_statistics", "sm90", 2, 64, 128, 512, "bfloat16")
problem, good = Problem(search, "cpu"), search.current()
tiles = (good, replace(good, block_v=256, slices=1, max_registers=None, resident=1, warps=4))
with ThreadPoolExecutor(2) as pool:
    print(*pool.map(lambda job: job(), [problem.prepare(tile) for tile in tiles]), sep="; ")
print(problem.spills_with_every_switch(good))
"""
    plain, full = run(code, "0").splitlines()
    assert plain.startswith("None; ")
    assert "spills" in plain
    assert full == "None"
