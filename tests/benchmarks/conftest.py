"""Triton interpreted without a GPU; invented results of a GPU and of a CPU; a project whose
generated blocks are empty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import interpreted  # noqa: F401
import pytest
from invented_results import FACTORS, Result, make_case, make_result, make_row

from benchmarks import report


@pytest.fixture
def gpu_result() -> Result:
    rows = [
        *make_case("fwd", 4096, 4096, 131072, eapo_triton_op=1.02),
        *make_case("fwd_bwd", 4096, 4096, 131072),
        *make_case("fwd_bwd", 16384, 4096, 131072, eapo_triton_one_pass=1.10),
        *make_case("fwd_bwd", 4096, 4096, 131072, "steep"),
    ]
    return make_result("NVIDIA H200", "2026-02-03 10:00 UTC", rows, {"passed": 1100, "failed": 0, "skipped": 20})


@pytest.fixture
def cpu_result() -> Result:
    rows = [
        make_row(name, mode, n, 576, 49152, "peaked", FACTORS[name], {}) | {"memory_budget": budget}
        for n, budget in ((1024, None), (1536, 2**25))
        for mode in ("fwd", "fwd_bwd")
        for name in ("bare_gemms", "unfused_eager", "eapo_triton_op", "trl_fused_head")
    ]
    return make_result("CPU (x86_64, 2 threads)", "2026-02-04 10:00 UTC", rows)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README.md and docs/benchmarks.md with empty blocks, and an empty results folder."""
    (tmp_path / "docs").mkdir()
    readme, docs = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    marks = "".join(f"<!-- {mark} -->\n<!-- /{mark} -->\n\n" for mark in ("sparse", "errors"))
    readme.write_text(f"# Title\n\n<!-- benchmark -->\nold\n<!-- /benchmark -->\n\n{marks}tail\n")
    docs.write_text("# Benchmarks\n\n<!-- results -->\n<!-- /results -->\n")
    monkeypatch.setattr(report, "README", replace(report.README, path=readme))
    monkeypatch.setattr(report, "DOCS", replace(report.DOCS, path=docs))
    methods = tmp_path / "docs" / "methods.md"
    methods.write_text("<!-- methods -->\nNo result is committed yet.\n<!-- /methods -->\n")
    monkeypatch.setattr(report, "OVERHEAD", replace(report.OVERHEAD, path=methods))
    sparse = tmp_path / "docs" / "sparse.md"
    sparse.write_text("# Sparse\n\n<!-- sparse -->\n<!-- /sparse -->\n")
    monkeypatch.setattr(report, "SPARSE", replace(report.SPARSE, path=sparse))
    monkeypatch.setattr(report, "README_SPARSE", replace(report.README_SPARSE, path=readme))
    monkeypatch.setattr(report, "README_ERRORS", replace(report.README_ERRORS, path=readme))
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    return tmp_path
