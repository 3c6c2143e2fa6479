"""Tables, bars and plots of invented results."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from invented_results import FACTORS, Result, cells, failed_row, make_row, tables

from benchmarks.reporting import blocks, plots
from benchmarks.reporting.bars import BARS, bars_table
from benchmarks.reporting.groups import groups
from benchmarks.reporting.tables import absent, environment_line, result_section, settings


def test_gpu_tables(gpu_result: Result) -> None:
    text = result_section(gpu_result)
    assert text.startswith("## NVIDIA H200, 2026-02-03\n")
    head, *body = tables(text)[2]
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
    once |= failed_row(once, "out of memory")
    other = next(row for row in gpu_result["rows"] if row["provider"] == "trl_fused_head")
    other |= failed_row(other, "out of memory")
    assert absent(groups(gpu_result))[0] == (
        "- out of memory: `cce` (1 of 9 cases and modes), `trl_fused_head` (1 of 8 cases and modes)"
    )


def _bar(result: Result, what: str, mode: str) -> list[str]:
    lines = [cells(line) for line in bars_table(groups(result))[2:]]
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
    assert {cells(line)[-1] for line in bars_table(groups(gpu_result))[2:]} == {"not measured: no such case"}


def test_bars_of_the_cuda_kernels(gpu_result: Result) -> None:
    gpu_result["rows"] += [make_row("eapo_cuda_op", "fwd", 4096, 4096, 131072, "peaked", 1.04, {})]
    gpu_result["rows"] += [make_row("eapo_cuda_one_pass", "fwd_bwd", 4096, 4096, 131072, "peaked", 1.0, {})]
    assert _bar(gpu_result, "ours in CUDA C++ / matrix products, D >= 3584", "fwd")[:2] == ["<= 1.03", "1.04"]
    assert _bar(gpu_result, "ours in CUDA C++ / matrix products, D = 1024", "fwd")[-1] == "not measured: no such case"
    assert _bar(gpu_result, "`liger_scaled_ce` / ours in CUDA C++", "fwd")[1] == "1.35"
    assert _bar(gpu_result, "ours in Triton / ours in CUDA C++", "fwd")[1:3] == ["0.98", "`eapo_triton_op` / `eapo_cuda_op`"]
    assert _bar(gpu_result, "ours in Triton / ours in CUDA C++", "fwd_bwd")[1] == "1.05"


def test_bars_of_memory_accuracy_and_few_tokens(gpu_result: Result) -> None:
    rows = gpu_result["rows"]
    ours = next(r for r in rows if (r["provider"], r["mode"]) == ("eapo_triton_one_pass", "fwd_bwd"))
    results = 2 * 4096 * (4096 + 131072)
    ours["peak_bytes"] = results + 3 * 2**28
    quack = ours | {"provider": "quack_base", "peak_bytes": results + 2**30}
    rows.append(quack)
    name = "memory without results: ours in one pass / `quack` or `quack_base`"
    assert _bar(gpu_result, name, "fwd_bwd")[1:] == [
        "0.75", "`eapo_triton_one_pass` / `quack_base`", "peaked N=4096 D=4096 V=131072 bfloat16", "**no**, 0 of 1",
    ]  # fmt: skip
    # The smallest error of everyone who computes the same objective.
    assert _bar(gpu_result, "logp error: 16-bit logits / ours, peaked or steep", "fwd")[1] == "1.96"
    ours["errors"]["d_hidden"] = 1e-3
    worst = _bar(gpu_result, "d_hidden error: ours in one pass / 16-bit logits, peaked or steep", "fwd_bwd")
    assert (worst[1], worst[-1]) == ("1.00", "**no**, 1 of 5")
    few = "time a token: ours in one pass / own time at N = 8192, N = 1024"
    assert _bar(gpu_result, few, "fwd_bwd")[-1] == "not measured: no such case"
    rows.append(make_row("eapo_triton_one_pass", "fwd_bwd", 1024, 4096, 128256, "peaked", 1.26, {}))
    assert _bar(gpu_result, few, "fwd_bwd")[:2] == ["<= 1.18", "1.20"]
    rows[:] = [row for row in rows if row["shape"]["N"] != 8192]
    assert _bar(gpu_result, few, "fwd_bwd")[-1] == "not measured: no time at N = 8192"


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
