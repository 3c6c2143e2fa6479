"""Invented results of a GPU and of a CPU, and a project whose generated blocks are empty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from invented_results import FACTORS, Result, make_case, make_result, make_row

from benchmarks import report
from benchmarks.reporting import blocks


@pytest.fixture
def gpu_result() -> Result:
    rows = [
        *make_case("fwd", 4096, 4096, 131072, eapo_triton_op=1.02),
        *make_case("fwd_bwd", 4096, 4096, 131072),
        *make_case("frozen_head", 4096, 4096, 131072, eapo_triton_one_pass=1.07),
        *make_case("half_zero_rows", 4096, 4096, 131072),
        *make_case("fwd_bwd", 16384, 4096, 131072, eapo_triton_one_pass=1.10),
        *make_case("fwd_bwd", 8192, 4096, 32000),
        *make_case("fwd_bwd", 8192, 4096, 128256),
        *make_case("fwd_bwd", 4096, 4096, 131072, "steep"),
        *make_case("fwd_bwd", 4096, 4096, 131072, "uniform"),
    ]
    half = [row for row in rows if row["mode"] == "half_zero_rows" and row["ms"]]
    for row in half:
        row["ms"] = {name: value * (0.55 if row["provider"].startswith("eapo") else 1.0) for name, value in row["ms"].items()}
    return make_result("NVIDIA H200", "2026-02-03 10:00 UTC", rows, {"passed": 1100, "failed": 0, "skipped": 20})


@pytest.fixture
def cpu_result() -> Result:
    rows = [
        make_row(name, mode, 1024, 576, 49152, "peaked", FACTORS[name], {})
        for mode in ("fwd", "fwd_bwd")
        for name in ("bare_gemms", "unfused_eager", "eapo_triton_op", "trl_fused_head")
    ]
    return make_result("CPU (x86_64, 2 threads)", "2026-02-04 10:00 UTC", rows)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README.md and docs/benchmarks.md with empty blocks, and an empty results folder."""
    (tmp_path / "docs").mkdir()
    readme, docs = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    readme.write_text("# Title\n\n<!-- benchmark -->\nold\n<!-- /benchmark -->\n\ntail\n")
    docs.write_text("# Benchmarks\n\n<!-- results -->\n<!-- /results -->\n")
    monkeypatch.setattr(report, "README", replace(blocks.README, path=readme))
    monkeypatch.setattr(report, "DOCS", replace(blocks.DOCS, path=docs))
    methods = tmp_path / "docs" / "methods.md"
    methods.write_text("<!-- methods -->\nNo result is committed yet.\n<!-- /methods -->\n")
    monkeypatch.setattr(report, "OVERHEAD", replace(blocks.OVERHEAD, path=methods))
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    return tmp_path
