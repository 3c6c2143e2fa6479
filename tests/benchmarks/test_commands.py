"""The CPU benchmark and the methods' benchmark from end to end, on tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cpu, methods
from benchmarks.results import load
from eapo_kernels import METHODS

ONLY = ["--only", "bare_gemms", "unfused_eager", "eapo_torch"]
NAMES = {"bare_gemms", "bare_gemms_whole", "unfused_eager", "eapo_torch_op", "eapo_torch_one_pass", "eapo_torch_autograd"}


def test_cpu_writes_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path), "--rounds", "1", "--shape", "32", "16", "300", "--modes", "fwd", "fwd_bwd", *ONLY]
    assert cpu.main(command) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    result = load(path)
    assert {row["mode"] for row in result["rows"]} == {"fwd", "fwd_bwd"}
    assert {row["provider"] for row in result["rows"] if row["ms"]} == NAMES
    assert {row["memory_budget"] for row in result["rows"]} == {None}
    out = capsys.readouterr().out
    assert "unfused_eager" in out
    assert f"wrote {path}" in out


def test_a_memory_budget_bounds_the_peak_memory(tmp_path: Path) -> None:
    """Logits eight times as large as the budget: ours stays far below unfused PyTorch, which holds
    all of them."""
    n, d, v = 512, 8, 4096
    budget = n * v * 4 / 8 / 2**20
    command = ["--out", str(tmp_path), "--rounds", "1", "--shape", str(n), str(d), str(v), "--budget", str(budget)]
    assert cpu.main([*command, "--modes", "fwd_bwd", *ONLY]) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    result = load(path)
    assert list(result["gate"]["cases"]) == [f"fwd_bwd peaked N={n} D={d} V={v} dtype=float32 budget=1MiB"]
    peak = {row["provider"]: row["peak_bytes"] for row in result["rows"]}
    assert {row["memory_budget"] for row in result["rows"]} == {2**20}
    assert peak["eapo_torch_one_pass"] < 2**20 + 16 * d * (n + v) + 2**19
    assert peak["unfused_eager"] > 8 * 2**20


def test_a_case_of_the_cpu_benchmark_has_logits_of_eight_budgets() -> None:
    budgets = [one.n * one.v * 4 / one.memory_budget for one in cpu.CASES if one.memory_budget]
    assert max(budgets) >= 8
    with pytest.raises(SystemExit):
        cpu.main(["--budget", "3"])


def test_methods_command(tmp_path: Path) -> None:
    assert methods.main(["--shape", "32", "8", "64", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["over_grpo"] > 0 for row in rows)
    assert {row["method"] for row in rows if row["weights_over_grpo"]} == {
        m.name for m in METHODS.values() if m.token_weighting
    }
