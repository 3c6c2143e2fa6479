"""The benchmark's own logic on a small shape: rows, gate, README block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cpu, readme
from benchmarks.case import make_case
from benchmarks.measure import gate, measure, time_interleaved
from benchmarks.providers import MODES, Provider, load_providers


def test_rows_of_every_mode() -> None:
    case, truth = make_case(64, 16, 500, torch.float32)
    for mode in MODES:
        verdict, rows = measure(case, truth, load_providers(), mode, rounds=2)
        assert verdict == {"green": True, "red": []}
        assert {"bare_gemms", "unfused_eager", "eapo_torch_autograd"} <= {row["provider"] for row in rows}
        for row in rows:
            assert row["shape"] == {"N": 64, "D": 16, "V": 500, "dtype": "float32"}
            assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
            if row["provider"] != "bare_gemms":
                assert row["errors"]
                assert row["peak_bytes"] > 0


def test_a_wrong_provider_turns_the_gate_red_and_yields_no_rows() -> None:
    case, truth = make_case(64, 16, 500, torch.float32)
    eager = next(p for p in load_providers() if p.name == "unfused_eager")
    wrong = Provider("eapo_wrong", "", lambda c, m: lambda: {"logp": truth.logp + 0.01})
    verdict, rows = measure(case, truth, [eager, wrong], "fwd", rounds=1)
    assert not verdict["green"]
    assert verdict["red"][0].startswith("eapo_wrong: logp error")
    assert rows == []
    assert not gate({"unfused_eager": {"logp": 1e-7}, "eapo_x": {"logp": float("nan")}}, torch.float32)["green"]


def test_interleaving_runs_everyone_every_round() -> None:
    calls: list[str] = []
    times = time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_command_writes_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["--out", str(tmp_path), "--rounds", "1", "--shape", "32", "16", "300"]) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    result = json.loads(path.read_text())
    assert {"environment", "gate", "rows"} == set(result)
    assert "unfused_eager" in capsys.readouterr().out
    assert "unfused_eager" in readme.block(result)


def test_readme_shows_the_committed_numbers() -> None:
    assert readme.main(["--check"]) == 0
