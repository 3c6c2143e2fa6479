"""The first look at the kernels on a GPU, rehearsed: it launches what is right, and names what hangs, crashes or is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import first_light, launches
from eapo_kernels.ops.cuda import tiles
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.cuda.tiles import Build

pytestmark = [pytest.mark.csrc, pytest.mark.skipif(torch.cuda.is_available(), reason="there it looks at the kernels")]

PROGRAMS = {
    "good": "print('good 1: ', end='', flush=True); print('right'); print('good 2: right')",
    "wrong": "print('wrong 1: logp: off by 3.0e-01, allowed 1.0e-05'); print('wrong 2: right')",
    "crash": "print('crash 1: right'); print('crash 2: ', end='', flush=True); raise RuntimeError('CUDA driver: no')",
    "early": "import nowhere",
    "hang": "import time; print('hang 1: right'); print('hang 2: ', end='', flush=True); time.sleep(600)",
}


SOME = [
    item
    for item in first_light.builds()
    if (item.operand == "bf16" or (item.kernel, item.tile.name) == ("scaled_exp_gemm", "shared"))
    and item.bias == item.entropy
    and item.second_moments == (item.entropy and item.kernel == "stream_statistics")
]
"""Every kernel and tile with all switches off and on; tests/emulator/test_products.py has those between."""


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("item", SOME, ids=lambda item: str(item).replace(" ", "-"))
def test_the_compiled_kernels_are_right(item: Build) -> None:
    assert launches.check(item, first_light.SHAPES[1], "cpu") is None


@pytest.mark.usefixtures("emulated")
def test_a_wrong_or_an_unsteady_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = Launch.__call__, SimpleNamespace(runs=0, every=1)

    def spoiled(one: Launch) -> None:
        run(one)
        state.runs += 1
        if state.runs % state.every == 0:
            one.tensors["sums"][-1, 0, 5] *= 1.01

    monkeypatch.setattr(Launch, "__call__", spoiled)
    for item in (next(b for b in tiles.builds() if b.kernel == kernel) for kernel in ("stream_statistics", "scaled_exp_gemm")):
        state.runs, state.every = 0, 1
        assert "off by" in launches.check(item, first_light.SHAPES[1], "cpu")
        state.runs, state.every = 0, 2
        assert "of the second run: off by" in launches.check(item, first_light.SHAPES[1], "cpu")


@pytest.mark.usefixtures("emulated")
def test_what_tools_watch_is_every_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(first_light, "SHAPES", ((16, 8, 64), (20, 16, 72)))
    monkeypatch.setattr(first_light, "builds", lambda: SOME[:6])
    first_light.run_all("cpu")
    assert capsys.readouterr().out.split() == [str(item).replace(" ", "-") for item in SOME[:6]]


def test_builds_share_a_process_by_kernel_and_tile() -> None:
    found = first_light.names()
    assert len(found) == 2 * len(tiles.TILES)
    dealt = [str(item) for shared in found.values() for item in shared]
    assert sorted(dealt) == sorted(map(str, first_light.builds()))
    assert all(len({(item.kernel, item.tile) for item in shared}) == 1 for shared in found.values())


def test_what_hangs_crashes_or_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes by a clock on which only the last program's wait takes time."""
    commands = {name: [sys.executable, "-c", text] for name, text in PROGRAMS.items()}
    ticks = iter([0.0] * len(PROGRAMS) + [117.0])
    monkeypatch.setattr(first_light, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    right, wrong = first_light.watch(commands, 120)
    assert right == ["good 1", "good 2", "wrong 2", "crash 1", "hang 1"]
    assert wrong == {
        "wrong 1": "logp: off by 3.0e-01, allowed 1.0e-05",
        "crash 2": "ended with 1: RuntimeError: CUDA driver: no",
        "early, outside a case": "ended with 1: ModuleNotFoundError: No module named 'nowhere'",
        "hang 2": "hangs",
    }


def test_the_command_writes_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_light.main(["--out", str(tmp_path)]) == 2
    assert "the cuda backend: no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(first_light, "available_backends", lambda device: {"cuda": None})
    monkeypatch.setattr(first_light, "watch", lambda commands, seconds: (list(commands), {}))
    assert first_light.main(["--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "first_light.json").read_text())["wrong"] == {}
    monkeypatch.setattr(first_light, "watch", lambda commands, seconds: ([], {"scaled_exp_gemm shared": "hangs"}))
    assert first_light.main([]) == first_light.HANGS
    assert "scaled_exp_gemm shared: hangs" in capsys.readouterr().out
    monkeypatch.setattr(first_light, "watch", lambda commands, seconds: ([], {"scaled_exp_gemm shared": "E: off by 1"}))
    assert first_light.main([]) == 1
