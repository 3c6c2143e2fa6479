"""The race of tiles: the fastest right one wins, is remembered for this GPU, and comes before the package's table."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eapo_kernels import EapoError, tune
from eapo_kernels.ops import dispatch, verdicts
from eapo_kernels.ops.triton import common, tiles
from eapo_kernels.ops.triton.tiles import Tile
from eapo_kernels.ops.verdicts import Question
from eapo_kernels.selftest import Row

CPU = torch.device("cpu")
QUESTION = Question("triton", dim=64, vocab=300)
CURRENT, RIVAL, OTHER = Tile(64, 2048, 128), Tile(32, 2048, 128), Tile(16, 2048, 128)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of this test alone, and nothing tuned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "_tuned", [])
    caches = (tiles.measured, tiles.find, verdicts.fastest, verdicts.sources, common.family)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def rigged(monkeypatch: pytest.MonkeyPatch, ms: dict[Tile, float], wrong: Tile | None = None) -> tune.Clock:
    """Three candidates a kernel, whose calls take the given time; one of them may be wrong."""
    now: list[Tile] = []
    monkeypatch.setattr(tiles, "candidates", lambda *a, **k: list(ms))
    monkeypatch.setattr(tune, "make_operands", lambda *a: None)
    monkeypatch.setattr(tune, "calls", lambda *a, **k: dict.fromkeys(tune.RACED, lambda: now.append(tiles.find("x", "", 2))))
    find = tiles.find

    def chosen(kernel: str, *a: object, **k: object) -> Tile:
        return next(iter(tiles._on_trial.values()), None) or find(kernel, *a, **k)

    chosen.cache_clear = find.cache_clear
    monkeypatch.setattr(tiles, "find", chosen)

    def case(problem: object, case: object, backend: str, *, full: bool) -> Row:
        bad = next(iter(tiles._on_trial.values())) == wrong
        return Row("one pass", "", full, "wrong" if bad else "right", 0.0, 0.0, "d_weight: off" if bad else "", 0.0)

    monkeypatch.setattr(tune, "check_case", case)

    def timed(call: Callable[[], object]) -> float:
        call()
        return ms[now[-1]]

    return timed


@pytest.mark.parametrize(
    ("times", "wrong", "chosen"),
    [
        ((1.0, 0.5, 0.7), None, RIVAL),
        ((1.0, 0.99, 1.5), None, CURRENT),
        ((1.0, 0.5, 0.7), RIVAL, OTHER),
        ((1.0, 0.5, 0.7), CURRENT, RIVAL),
    ],
    ids=["fastest", "tie", "wrong numbers never win", "the one in use is wrong"],
)
def test_the_fastest_right_tile_wins(
    times: tuple[float, ...], wrong: Tile | None, chosen: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = rigged(monkeypatch, dict(zip((CURRENT, RIVAL, OTHER), times, strict=True)), wrong)
    for one in tune.race(QUESTION, CPU, 0.0, timed):
        assert one.chosen == chosen
        assert one.milliseconds == dict(zip((CURRENT, RIVAL, OTHER), times, strict=True))[chosen]
        assert len(one.wrong) == (wrong is not None)
        assert wrong is None or "one pass, without bias: wrong d_weight: off" in one.wrong[0]
    assert tiles._on_trial == {}


def test_cuda_is_raced_against_the_chosen_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles are in use before the backends are timed, and the file then names the faster one."""
    seen: list[Tile] = []
    monkeypatch.setattr(tune, "race", lambda *a, **k: [tune.Race("logit_gradient", CURRENT, RIVAL, 2.0, 1.0, ())])

    def fastest(question: Question, *more: object) -> tuple[str, str]:
        seen.append(tiles.find("logit_gradient", common.family(CPU), 2, question.dim, question.vocab))
        return "cuda", "faster"

    monkeypatch.setattr(tune, "fastest_backend", fastest)
    tune.tune(QUESTION, CPU, 1.0)
    assert seen == [RIVAL]
    assert verdicts.fastest(CPU) == "cuda"


def test_without_a_right_tile_nothing_is_written(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    timed = rigged(monkeypatch, {CURRENT: 1.0}, CURRENT)
    with pytest.raises(EapoError, match="at least one right tile of scaled_exp_gemm, got Tile"):
        tune.race(QUESTION, CPU, 0.0, timed)
    assert not list(fresh.rglob("tiles-*.json"))


def test_what_is_written_comes_before_the_table_and_changes_the_key(fresh: Path) -> None:
    before = verdicts.sources("triton")
    races = [tune.Race("logit_gradient", CURRENT, RIVAL, 2.0, 1.0, ())]
    path = Path(tune.write(QUESTION, CPU, races, "triton"))
    assert path == fresh / "eapo_kernels/tiles-cpu.json"
    assert verdicts.sources("triton") != before, "the verdict is asked anew"
    family = common.family(CPU)
    assert tiles.find("logit_gradient", family, 2, 64, 300) == RIVAL
    tune.write(QUESTION, CPU, [races[0]._replace(chosen=OTHER)], "triton")
    assert tiles.find("logit_gradient", family, 2, 64, 300) == OTHER
    assert len(json.loads(path.read_text())["lines"]) == 1, "replaced, not added"
    tune.write(replace(QUESTION, dim=4096), CPU, races, "cuda")
    assert tiles.find("logit_gradient", family, 2, 64, 300) == OTHER
    assert tiles.find("logit_gradient", family, 2, 4096, 300) == RIVAL
    assert verdicts.fastest(CPU) == "cuda"


def test_a_faster_backend_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)
    kernels = replace(dispatch.load("torch"), name="any")
    monkeypatch.setattr(dispatch, "load", lambda name: kernels)
    monkeypatch.setattr(verdicts, "is_right", lambda name, projection: asked.append(name))
    tensor = torch.zeros(2, 8)
    dispatch.resolve("auto", dispatch.Projection(tensor, tensor))
    assert asked == ["triton"]
    tune.write(QUESTION, CPU, [], "cuda")
    dispatch.resolve("auto", dispatch.Projection(tensor, tensor))
    assert asked == ["triton", "cuda", "triton"]


@pytest.mark.parametrize("name", ["nonsense", "torch", 3, None])
def test_only_a_backend_with_kernels_of_its_own_is_tried_first(name: object, fresh: Path) -> None:
    path = fresh / "eapo_kernels/tiles-cpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"environment": {"backend": name}, "lines": []}))
    assert verdicts.fastest(CPU) == "triton"


def test_a_folder_that_cannot_be_read_is_no_error(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Path, **_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refused)
    tiles.use_tuned(fresh / "tiles-cpu.json")
    assert "tuned tiles are not used: [Errno 13] Permission denied" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"environment": {}, "lines": [{"kernel": 3}]}'])
def test_a_file_that_is_not_ours_is_left_out_with_a_warning(
    content: str, fresh: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fresh / "eapo_kernels/tiles-cpu.json"
    path.parent.mkdir()
    path.write_text(content)
    assert tiles.find("logit_gradient", common.family(CPU), 2) in [e.tile for e in tiles.TABLE]
    assert f"tuned tiles are not used: {path}" in caplog.text
    assert verdicts.fastest(CPU) == "triton"
    with pytest.raises(EapoError, match=r"tiles-cpu\.json"):
        tune.write(QUESTION, CPU, [], "triton")
    monkeypatch.setattr(tune, "race", lambda *a, **k: pytest.fail("raced, although the result cannot be written"))
    with pytest.raises(EapoError, match=r"tiles-cpu\.json"):
        tune.tune(QUESTION, CPU, 1.0)
    assert path.read_text() == content


def test_the_command_races_interpreted_kernels(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eapo_kernels", "selftest", "--device", "cpu", "--dim", "16", "--vocab", "40", "--tune"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}
    out = subprocess.run([*command, "--seconds", "1", "--json"], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stdout + out.stderr
    report = json.loads(out.stdout)
    assert [one["kernel"] for one in report["races"]] == list(tune.RACED)
    assert all(one["milliseconds"] <= one["milliseconds_before"] for one in report["races"])
    path = tmp_path / "eapo_kernels/tiles-cpu.json"
    assert [line["kernel"] for line in json.loads(path.read_text())["lines"]] == list(tune.RACED)
    assert report["tuned"] == {
        "backend": "triton", "reason": report["tuned"]["reason"], "path": str(path)
    }  # fmt: skip
    assert "NVIDIA GPU" in report["tuned"]["reason"]
    assert report["verdict"]["path"] == "", "a verdict is kept for a GPU alone"


@pytest.mark.parametrize(
    ("free", "dim", "vocab", "expected"),
    [
        (80, 4096, 151936, (4096, 32768)),
        (3.2, 4096, 151936, (4096, 32768)),
        (2, 4096, 151936, (4096, 16384)),
        (1.5, 4096, 151936, (2048, 8192)),
        (0.8, 4096, 151936, (1024, 4096)),
        (4, 16384, 151936, (2048, 8192)),
        (1.5, 1024, 7000, (4096, 7000)),
    ],
)
def test_a_race_takes_the_largest_sizes_that_fit(
    free: float, dim: int, vocab: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free GiB of a GPU whose budget of logits is 2 GiB."""
    monkeypatch.setattr(tune, "free_bytes", lambda device: int(free * 2**30))
    monkeypatch.setattr(tune.chunking, "workspace_bytes", lambda options, device: 2**31)
    question = Question("triton", dim=dim, vocab=vocab)
    assert tune.sizes(question, torch.device("cuda")) == expected


def test_a_gpu_without_memory_for_a_race_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "free_bytes", lambda device: 2**29)
    monkeypatch.setattr(tune.chunking, "workspace_bytes", lambda options, device: 2**28)
    with pytest.raises(EapoError, match="tune: expected 515 MiB of free GPU memory, got 512"):
        tune.sizes(QUESTION, torch.device("cuda"))


def test_memory_that_pytorch_keeps_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"memory_reserved": 7, "memory_allocated": 3, "mem_get_info": (100, 200)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert tune.free_bytes(torch.device("cuda")) == 104


@pytest.mark.parametrize("family", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("dim", [1024, 4096])
def test_candidates_begin_with_the_tile_in_use(family: str, dim: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    for kernel in tune.RACED:
        for descriptors in (True, False):
            found = tiles.candidates(kernel, family, 2, dim, 131072, descriptors=descriptors)
            assert found[0] == tiles.find(kernel, family, 2, dim, 131072, descriptors=descriptors)
            assert len(set(found)) == len(found)
            assert descriptors or not any(t.descriptors for t in found)
    if family == "sm90":
        wide = [t for t in tiles.candidates("scaled_exp_gemm", family, 2, 1024, 131072, descriptors=True) if t.block_v == 256]
        assert any(t.persistent for t in wide), "128x256 persistent is raced at D <= 2048"
