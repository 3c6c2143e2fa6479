"""The report on invented results: a GPU's and a CPU's. Every number below is made up to be recognised again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods, report
from benchmarks.reporting import blocks, plots
from benchmarks.reporting.bars import BARS, bars_table
from benchmarks.reporting.groups import groups, unique
from benchmarks.reporting.tables import absent, environment_line, result_section, settings
from benchmarks.results import ResultFile, load
from eapo_kernels import METHODS

Result = dict[str, Any]

FACTORS = {
    "bare_gemms": 1.0,
    "unfused_eager": 2.5,
    "unfused_compile": 2.0,
    "eapo_triton_one_pass": 1.05,
    "eapo_triton_op": 1.30,
    "liger_flce": 2.3,
    "liger_scaled_ce": 1.40,
    "verl_torch": 3.1,
    "trl_fused_head": 2.7,
    "cce": 1.8,
}
"""Time over the floor in every case, unless a case says otherwise."""

FORWARD_TOO = ("bare_gemms", "unfused_eager", "unfused_compile", "eapo_triton_op", "liger_scaled_ce", "verl_torch", "cce")
CLOCKS = {"sm_mhz": 1755.0, "power_w": 689.4, "power_limit_w": 700.0, "temperature_c": 61.0}
MIB = 2**20


def _row(provider: str, mode: str, n: int, d: int, v: int, inputs: str, factor: float, clocks: dict[str, float]) -> Result:
    floor = n * d * v / 1e11
    ms = factor * floor
    steep = {"uniform": 0.5, "peaked": 1.0, "steep": 2.0}[inputs]
    errors = {"logp": 1e-5 * factor * steep, "entropy": 2e-5} if provider.endswith(("_op", "_ce", "eager", "compile")) else {}
    if mode != "fwd":
        errors = {**errors, "d_hidden": 3e-3 * steep, "d_weight": 4e-3 * steep}
    return {
        "provider": provider,
        "mode": mode,
        "job": "mean cross-entropy" if provider == "liger_flce" else "log-prob, entropy, policy loss",
        "objective": "cross_entropy" if provider == "liger_flce" else "policy",
        "settings": "reduction none" if provider == "cce" else "defaults",
        "shape": {"N": n, "D": d, "V": v, "dtype": "bfloat16"},
        "inputs": inputs,
        "mean_entropy_nats": 5.94,
        "largest_logit": 16.0 * steep,
        "errors": {} if provider == "bare_gemms" else errors,
        "peak_bytes": round(n * factor) * MIB,
        "ms": {"p20": 0.98 * ms, "p50": ms, "p80": 1.03 * ms},
        "rounds": 20,
        "tflops_useful": 600 / factor,
        "time_over": {"bare_gemms": factor, "unfused_eager": factor / 2.5},
        "clocks": clocks,
        "error": None,
    }


def _failed(row: Result, reason: str) -> Result:
    return row | {
        "errors": {},
        "peak_bytes": None,
        "ms": None,
        "rounds": 0,
        "tflops_useful": None,
        "time_over": {},
        "error": reason,
    }


def _result(gpu: str, date: str, rows: list[Result], tests: Result | None = None) -> Result:
    on_gpu = not gpu.startswith("CPU")
    environment = {
        "gpu": gpu,
        "driver": "580.1" if on_gpu else None,
        "cuda": "13.0" if on_gpu else None,
        "torch": "2.13.0",
        "python": "3.11.7",
        "liger-kernel": "0.8.5",
        "trl": None,
        "commit": "abc1234",
        "date": date,
        "clocks": CLOCKS if on_gpu else {},
    }
    keys = unique(f"{row['mode']} {row['inputs']} {row['shape']}" for row in rows)
    gate = {"green": True, "red": [], "tests": tests, "cases": {key: {"green": True, "red": []} for key in keys}}
    return {"environment": environment, "gate": gate, "rows": rows}


def _case(mode: str, n: int, d: int, v: int, inputs: str = "peaked", **factors: float) -> list[Result]:
    names = FORWARD_TOO if mode == "fwd" else tuple(FACTORS)
    rows = [_row(name, mode, n, d, v, inputs, factors.get(name, FACTORS[name]), CLOCKS) for name in names]
    missing = _row("verl_triton", mode, n, d, v, inputs, 1.0, CLOCKS)
    return [*rows, _failed(missing, "verl is not installed"), _failed(missing | {"provider": "quack"}, "no module named quack")]


@pytest.fixture
def gpu_result() -> Result:
    rows = [
        *_case("fwd", 4096, 4096, 131072, eapo_triton_op=1.02),
        *_case("fwd_bwd", 4096, 4096, 131072),
        *_case("frozen_head", 4096, 4096, 131072, eapo_triton_one_pass=1.07),
        *_case("half_zero_rows", 4096, 4096, 131072),
        *_case("fwd_bwd", 16384, 4096, 131072, eapo_triton_one_pass=1.10),
        *_case("fwd_bwd", 8192, 4096, 32000),
        *_case("fwd_bwd", 8192, 4096, 128256),
        *_case("fwd_bwd", 4096, 4096, 131072, "steep"),
        *_case("fwd_bwd", 4096, 4096, 131072, "uniform"),
    ]
    half = [row for row in rows if row["mode"] == "half_zero_rows" and row["ms"]]
    for row in half:
        row["ms"] = {name: value * (0.55 if row["provider"].startswith("eapo") else 1.0) for name, value in row["ms"].items()}
    return _result("NVIDIA H200", "2026-02-03 10:00 UTC", rows, {"passed": 1100, "failed": 0, "skipped": 20})


@pytest.fixture
def cpu_result() -> Result:
    rows = [
        _row(name, mode, 1024, 576, 49152, "peaked", FACTORS[name], {})
        for mode in ("fwd", "fwd_bwd")
        for name in ("bare_gemms", "unfused_eager", "eapo_triton_op", "trl_fused_head")
    ]
    return _result("CPU (x86_64, 2 threads)", "2026-02-04 10:00 UTC", rows)


def _save(result: Result, folder: Path) -> Path:
    return ResultFile(result["environment"], result["gate"], result["rows"]).save(folder)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table of a text as rows of cells, the rule left out."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return [[_cells(line) for line in table.splitlines() if not line.startswith("| ---")] for table in found]


def test_gpu_tables(gpu_result: Result) -> None:
    text = result_section(gpu_result)
    assert text.startswith("## NVIDIA H200, 2026-02-03\n")
    head, *body = _tables(text)[2]
    assert head == [
        "provider", "job", "time / floor", "time / unfused", "ms (p20-p80)", "TFLOP/s", "peak MiB",
        "logp error", "entropy error", "d_hidden error", "d_weight error", "rounds",
    ]  # fmt: skip
    assert [row[0].strip("*`") for row in body] == sorted(FACTORS, key=lambda name: FACTORS[name])
    assert body[1] == [
        "**`eapo_triton_one_pass`**", "logp, entropy, policy loss", "1.05", "0.42", "23.09 (22.63-23.78)", "571", "4301",
        "-", "-", "3.0e-03", "4.0e-03", "20",
    ]  # fmt: skip
    assert next(row for row in body if row[0] == "`liger_flce`")[1] == "mean CE"
    assert "### `fwd_bwd`, loss and both gradients: peaked N=4096 D=4096 V=131072 bfloat16" in text
    assert "Mean entropy 5.94 nats, largest |logit| 16.0; after the last round SM clock 1755 MHz, 689 of 700 W, 61 °C." in text


def test_environment_line(gpu_result: Result, cpu_result: Result) -> None:
    assert environment_line(gpu_result) == (
        "NVIDIA H200, driver 580.1, CUDA 13.0, torch 2.13.0, liger-kernel 0.8.5, Python 3.11.7, commit abc1234, "
        "2026-02-03 10:00 UTC, before the first run SM clock 1755 MHz, 689 of 700 W, 61 °C. "
        "Correctness gate green: 1100 tests passed, 20 skipped, 9 cases and modes within the bounds."
    )
    assert environment_line(cpu_result) == (
        "CPU (x86_64, 2 threads), torch 2.13.0, liger-kernel 0.8.5, Python 3.11.7, commit abc1234, 2026-02-04 10:00 UTC. "
        "Correctness gate green: 2 cases and modes within the bounds."
    )


def test_cpu_reports_no_absolute_times(cpu_result: Result) -> None:
    for text in (result_section(cpu_result), blocks.README.block([cpu_result]), blocks.DOCS.block([cpu_result])):
        assert "1.30" in text
        assert not re.search(r"\bms\b|TFLOP|Bars|°C", text)
        times = [f"{row['ms']['p50']:.{digits}f}" for row in cpu_result["rows"] for digits in (1, 2, 3)]
        assert not any(re.search(rf"(?<![\d.]){re.escape(time)}(?!\d)", text) for time in times if float(time) > 10)


def test_who_could_not_run_and_other_settings(gpu_result: Result) -> None:
    found = groups(gpu_result)
    assert absent(found) == ["- verl is not installed: `verl_triton`", "- no module named quack: `quack`"]
    assert settings(found) == ["- `cce`: reduction none"]
    once = next(row for row in gpu_result["rows"] if row["provider"] == "cce")
    once |= _failed(once, "out of memory")
    other = next(row for row in gpu_result["rows"] if row["provider"] == "trl_fused_head")
    other |= _failed(other, "out of memory")
    assert absent(groups(gpu_result))[0] == (
        "- out of memory: `cce` (1 of 9 cases and modes), `trl_fused_head` (1 of 8 cases and modes)"
    )


def _bar(result: Result, what: str, mode: str) -> list[str]:
    lines = [_cells(line) for line in bars_table(groups(result))[2:]]
    assert len(lines) == len(BARS)
    (line,) = [line for line in lines if line[0] == what and line[1] == f"`{mode}`"]
    return line[2:]


def test_bars_met_and_not_met(gpu_result: Result) -> None:
    assert _bar(gpu_result, "ours / matrix products, D >= 3584", "fwd") == [
        "<= 1.05", "1.02", "`eapo_triton_op` / `bare_gemms`", "peaked N=4096 D=4096 V=131072 bfloat16", "yes, 1 of 1",
    ]  # fmt: skip
    # The worst of six cases decides, and is named.
    assert _bar(gpu_result, "ours in one pass / matrix products, D >= 3584, N >= 4096", "fwd_bwd") == [
        "<= 1.06", "1.10", "`eapo_triton_one_pass` / `bare_gemms`", "peaked N=16384 D=4096 V=131072 bfloat16", "**no**, 5 of 6",
    ]  # fmt: skip
    assert _bar(gpu_result, "`liger_scaled_ce` / ours in one pass", "fwd_bwd")[:2] == [">= 1.25", "1.27"]
    assert _bar(gpu_result, "`liger_flce` / ours in one pass, N = 4096, V >= 128000", "fwd_bwd")[-1] == "**no**, 0 of 3"
    assert _bar(gpu_result, "`cce` / ours in one pass, peaked or real", "fwd_bwd")[-1] == "yes, 4 of 4"
    assert _bar(gpu_result, "our op / matrix products, logits up to 1 GiB", "fwd_bwd")[-1] == "**no**, 0 of 4"
    assert _bar(gpu_result, "every other / ours", "frozen_head")[1:3] == ["1.31", "`liger_scaled_ce` / `eapo_triton_one_pass`"]


def test_bars_of_masked_rows_compare_with_the_own_dense_time(gpu_result: Result) -> None:
    ours = _bar(gpu_result, "ours / own dense time", "half_zero_rows")
    assert ours[:2] == ["<= 0.60", "0.55"]
    assert ours[-1] == "yes, 1 of 1"
    assert _bar(gpu_result, "every other / own dense time", "half_zero_rows")[1] == "1.00"
    gpu_result["rows"] = [row for row in gpu_result["rows"] if row["mode"] == "half_zero_rows"]
    assert _bar(gpu_result, "ours / own dense time", "half_zero_rows")[-1] == "not measured: no dense time"


def test_bars_without_a_provider_or_a_case(gpu_result: Result) -> None:
    assert _bar(gpu_result, "`verl_triton` / ours", "fwd")[-1] == "not measured: `verl_triton` did not run"
    assert _bar(gpu_result, "ours / matrix products, D < 2048", "fwd")[-1] == "not measured: no such case"
    gpu_result["rows"] = [row for row in gpu_result["rows"] if not row["provider"].startswith(("eapo", "bare"))]
    assert _bar(gpu_result, "ours / matrix products, D >= 3584", "fwd")[-1] == (
        "not measured: ours and matrix products did not run"
    )
    gpu_result["rows"] = []
    assert {_cells(line)[-1] for line in bars_table(groups(gpu_result))[2:]} == {"not measured: no such case"}


def test_plots_are_drawn_where_there_are_two_points(gpu_result: Result, cpu_result: Result, tmp_path: Path) -> None:
    paths = plots.draw(gpu_result, tmp_path / "gpu")
    assert [path.stem for path in paths] == [plot.name for plot in plots.PLOTS]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        width, height = (int.from_bytes(path.read_bytes()[place : place + 4]) for place in (16, 20))
        assert 800 <= width <= 2500
        assert 500 <= height <= 4000
        assert 10_000 < path.stat().st_size < 1_000_000
        svg = path.with_suffix(".svg").read_text()
        assert "<svg" in svg
        assert 10_000 < len(svg) < 2_000_000
    assert plots.draw(cpu_result, tmp_path / "cpu") == []
    assert not (tmp_path / "cpu").exists()


def test_panels_hold_the_fastest_variant_of_each_family(gpu_result: Result) -> None:
    found = {plot.name: plots.panels(plot, groups(gpu_result)) for plot in plots.PLOTS}
    (panel,) = found["time_over_n"]
    assert panel.title == "fwd_bwd peaked D=4096 V=131072 bfloat16"
    assert panel.lines["eapo_triton_one_pass"] == [(4096, 1.05), (16384, 1.10)]
    assert {"eapo_triton_op", "liger_flce", "bare_gemms"}.isdisjoint(panel.lines)
    assert "liger_scaled_ce" in panel.lines
    assert [panel.title for panel in found["time_over_v"]] == ["fwd_bwd peaked N=8192 D=4096 bfloat16"]
    (errors,) = found["logp_error_over_logit"]
    assert "liger_scaled_ce" in errors.lines
    gpu_result["rows"] = [row for row in gpu_result["rows"] if row["provider"] != "liger_scaled_ce"]
    (gradients,) = plots.panels(plots.PLOTS[4], groups(gpu_result))
    assert "liger_flce" not in gradients.lines, "another objective"
    assert dict(errors.lines["eapo_triton_op"]) == pytest.approx({8.0: 6.5e-6, 16.0: 1.3e-5, 32.0: 2.6e-5})


def test_labels_keep_their_distance_and_order() -> None:
    moved = plots._apart({"a": 0.5, "b": 0.51, "c": 0.98, "d": 0.99, "e": 1.0}, 0.05)
    places = [moved[name] for name in "abcde"]
    assert all(high - low >= 0.05 - 1e-9 for low, high in pairwise(places))
    assert places[-1] <= 1.0


def test_report_is_written_with_its_pictures(gpu_result: Result, cpu_result: Result, tmp_path: Path) -> None:
    files = [str(_save(result, tmp_path / "in")) for result in (gpu_result, cpu_result)]
    assert report.main(["--result", *files, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("## NVIDIA H200") < text.index("## CPU (x86_64")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == len(plots.PLOTS)
    assert all((tmp_path / "out" / name).exists() for name in pictures)


def test_without_options_the_tables_are_printed(cpu_result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--result", str(_save(cpu_result, tmp_path))]) == 0
    assert capsys.readouterr().out.strip() == result_section(cpu_result)


def test_a_red_gate_is_refused(gpu_result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_result["gate"] |= {"green": False, "red": ["eapo_triton_op: logp error 1.00e-01, unfused 1.00e-03"]}
    path = _save(gpu_result, tmp_path)
    assert report.main(["--result", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "expected a green gate, got eapo_triton_op: logp error" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert blocks.newest_results(tmp_path) == []
    path.rename(tmp_path / "h200-renamed.json")
    with pytest.raises(ValueError, match="expected a green gate"):
        blocks.newest_results(tmp_path)


def test_files_of_another_schema_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu-old.json"
    path.write_text(json.dumps({"environment": {}, "gate": {"fwd": {"green": True}}, "rows": []}))
    assert report.main(["--result", str(path)]) == 1
    assert "expected gate.green" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"expected gate\.green"):
        load(path)


def test_a_missing_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--result", str(tmp_path / "nowhere.json")]) == 1
    assert "nowhere.json" in capsys.readouterr().err


def test_matplotlib_missing_is_said(
    gpu_result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(report.sys.modules, "matplotlib.figure", None)
    assert report.main(["--result", str(_save(gpu_result, tmp_path)), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "plots: expected matplotlib, got none; pip install '.[train]'\n"


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


@pytest.mark.parametrize("kinds", [(), ("cpu",), ("gpu",), ("gpu", "cpu")], ids=lambda kinds: "+".join(kinds) or "none")
def test_blocks_are_renewed_and_checked(
    project: Path,
    kinds: tuple[str, ...],
    gpu_result: Result,
    cpu_result: Result,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in kinds:
        _save({"gpu": gpu_result, "cpu": cpu_result}[kind], project / "results")
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().err == (
        "README.md, benchmarks.md: not what benchmarks/results says; run python -m benchmarks.report --docs --readme\n"
    )
    assert report.main(["--docs"]) == 0
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("README.md: not what")
    assert report.main(["--readme"]) == 0
    assert report.main(["--check"]) == 0
    readme, docs = (project / "README.md").read_text(), (project / "docs" / "benchmarks.md").read_text()
    assert readme.startswith("# Title\n\n<!-- benchmark -->\n")
    assert readme.endswith("<!-- /benchmark -->\n\ntail\n")
    for text in (readme, docs):
        assert ("NVIDIA H200" in text) == ("gpu" in kinds)
        assert ("CPU (x86_64" in text) == ("cpu" in kinds)
        assert ("No GPU result is committed yet." in text) == (kinds == ("cpu",))
        assert ("No result is committed yet." in text) == (kinds == ())


def test_readme_block_is_short_and_names_the_fastest_variants(gpu_result: Result) -> None:
    text = blocks.README.block([gpu_result])
    ((head, *body),) = _tables(text)
    assert 6 <= len(body) <= 10
    assert head[-3:] == ["ms (p20-p80)", "peak MiB", "gradient error"]
    # Forward by the op, with gradients in one pass: two providers of ours, both named.
    assert body[0] == [
        "**`eapo_triton_op`, `eapo_triton_one_pass`**", "logp, entropy, policy loss", "1.02", "0.41", "1.05", "0.42",
        "23.09 (22.63-23.78)", "4301", "4.0e-03",
    ]  # fmt: skip
    by_name = {row[0]: row[2:6] for row in body}
    assert by_name["`liger_scaled_ce`"] == ["1.40", "0.56", "1.40", "0.56"]
    assert by_name["`trl_fused_head`"] == ["-", "-", "2.70", "1.08"]
    assert not any("bare" in name or "verl_triton" in name for name in by_name)


def test_marks_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md: expected <!-- benchmark --> and <!-- /benchmark -->"):
        replace(blocks.README, path=tmp_path / "README.md").write([])


def test_the_newest_cannot_be_chosen_for_the_blocks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(["--result", "x.json", "--readme"])
    assert stopped.value.code == 2


def test_committed_blocks_are_current() -> None:
    assert report.main(["--check"]) == 0


def test_what_a_method_costs(project: Path, cpu_result: Result) -> None:
    rows = [
        {"method": name, "scope": "token", "needs": needs, "shape": {"N": 64, "D": 8, "V": 99, "dtype": "float32"}, "rounds": 3,
         "ms": 5.0, "over_grpo": over, "weights_over_grpo": weights}
        for name, needs, over, weights in (("grpo", [], 1.0, 0.0), ("clip_v", ["second_moments"], 1.02, 0.004))
    ]  # fmt: skip
    _save({**cpu_result, "rows": rows}, project / "results" / "methods")
    assert report.main(["--docs"]) == 0
    text = (project / "docs" / "methods.md").read_text()
    assert "| `grpo` | token | - | 1.00 | - |" in text
    assert "| `clip_v` | token | second moments | 1.02 | 0.004 |" in text


def test_methods_command(tmp_path: Path) -> None:
    assert methods.main(["--shape", "32", "8", "64", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["over_grpo"] > 0 for row in rows)
    assert {row["method"] for row in rows if row["weights_over_grpo"]} == {m.name for m in METHODS.values() if m.shaper}
