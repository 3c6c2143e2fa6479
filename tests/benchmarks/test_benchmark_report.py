"""The report's command, its tables and plots, and the blocks that it renews, on invented
results."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from invented_results import FACTORS, Result, failed_row, save, tables

from benchmarks import plots, report
from benchmarks.case import SPARSE_MODES
from benchmarks.report import absent, environment_line, groups, result_section, settings


def test_gpu_tables(gpu_result: Result) -> None:
    text = result_section(gpu_result)
    assert text.startswith("## NVIDIA H200, 2026-02-03\n")
    head, *body = tables(text)[1]
    assert head == [
        "implementation", "job", "time / floor", "time / unfused", "ms (p20-p80)", "TFLOP/s", "peak MiB",
        "logp error", "entropy error", "d_hidden error", "d_weight error", "rounds",
    ]  # fmt: skip
    assert [row[0].strip("*`") for row in body] == sorted(FACTORS, key=lambda name: FACTORS[name])
    assert body[1] == [
        "**`eapo_triton_one_pass`**", "logp, entropy, policy loss", "1.05", "0.42", "23.09 (22.63-23.78)", "571", "4301",
        "-", "-", "3.0e-03", "4.0e-03", "20",
    ]  # fmt: skip
    assert next(row for row in body if row[0] == "`liger_flce`")[1] == "mean CE"
    assert "### `fwd_bwd`, loss and both gradients: peaked N=4096 D=4096 V=131072 bfloat16\n" in text
    assert "Mean entropy 5.94 nats, largest |logit| 16.0; after the last round SM clock 1755 MHz, 689 of 700 W, 61 °C." in text


def test_environment_line(gpu_result: Result, cpu_result: Result) -> None:
    gpu_result["gate"]["stages"] = {"build": 9, "kernels": 152}
    assert environment_line(gpu_result) == (
        "NVIDIA H200, driver 580.1, CUDA 13.0, torch 2.13.0, liger-kernel 0.8.5, Python 3.11.7, commit abc1234, "
        "2026-02-03 10:00 UTC, before the first run SM clock 1755 MHz, 689 of 700 W, 61 °C. "
        "Correctness gate green: 1100 tests passed, 20 skipped, 152 comparisons of kernels with float64, "
        "4 cases and modes within the bounds."
    )
    assert environment_line(cpu_result).endswith("10:00 UTC. Correctness gate green: 4 cases and modes within the bounds.")


def test_cpu_reports_no_absolute_times(cpu_result: Result) -> None:
    for text in (result_section(cpu_result), report.README.block([cpu_result]), report.DOCS.block([cpu_result])):
        assert "1.30" in text
        assert not re.search(r"\bms\b|TFLOP|°C", text)
        times = [f"{row['ms']['p50']:.{digits}f}" for row in cpu_result["rows"] for digits in (1, 2, 3)]
        assert not any(re.search(rf"(?<![\d.]){re.escape(time)}(?!\d)", text) for time in times if float(time) > 10)


def test_a_case_with_a_memory_budget_has_tables_of_its_own(cpu_result: Result) -> None:
    case = "peaked N=1536 D=576 V=49152 bfloat16, memory budget 32 MiB, logits 4.5 times as large"
    assert f"### `fwd_bwd`, loss and both gradients: {case}\n" in result_section(cpu_result)
    text = report.README.block([cpu_result])
    assert f"The same at {case}:" in text
    first, second = tables(text)
    assert first[0] == second[0]
    assert first[1][-2] == "1331"
    assert second[1][-2] == "1997"


def test_what_could_not_run_and_other_settings(gpu_result: Result) -> None:
    found = groups(gpu_result)
    assert absent(found) == ["- verl is not installed: `verl_triton`", "- no module named quack: `quack`"]
    assert settings(found) == ["- `cce`: reduction none"]
    for name in ("cce", "trl_fused_head"):
        once = next(row for row in gpu_result["rows"] if row["provider"] == name)
        once |= failed_row(once, "out of memory")
    assert absent(groups(gpu_result))[0] == (
        "- out of memory: `cce` (1 of 4 cases and modes), `trl_fused_head` (1 of 3 cases and modes)"
    )


def test_panels_need_two_cases_and_show_the_fastest_variant(gpu_result: Result) -> None:
    time = plots.PLOTS[0]
    (title,) = plots.panels(time, groups(gpu_result))
    assert title == "mode=fwd_bwd inputs=peaked d=4096 v=131072 dtype=bfloat16"
    lines = plots.panels(time, groups(gpu_result))[title]
    assert lines["eapo_triton_one_pass"] == [(4096, 1.05), (16384, 1.10)]
    assert "eapo_triton_op" not in lines
    assert "bare_gemms" not in lines
    gpu_result["rows"] = [row for row in gpu_result["rows"] if row["shape"]["N"] == 4096]
    assert plots.panels(time, groups(gpu_result)) == {}


def test_report_is_written_with_its_pictures(gpu_result: Result, cpu_result: Result, tmp_path: Path) -> None:
    files = [str(save(result, tmp_path / "in")) for result in (gpu_result, cpu_result)]
    assert report.main(["--result", *files, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("## NVIDIA H200") < text.index("## CPU (x86_64")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == len(plots.PLOTS), "of the GPU; the CPU's cases differ in more than one axis"
    assert all((tmp_path / "out" / name).exists() for name in pictures)


def test_without_options_the_tables_are_printed(cpu_result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--result", str(save(cpu_result, tmp_path))]) == 0
    assert capsys.readouterr().out.strip() == result_section(cpu_result)


def test_a_red_gate_is_refused(gpu_result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_result["gate"] |= {"green": False, "red": ["eapo_triton_op: logp error 1.00e-01, unfused 1.00e-03"]}
    path = save(gpu_result, tmp_path)
    assert report.main(["--result", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "expected a green gate, got eapo_triton_op: logp error" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert report.newest_results(tmp_path) == []
    path.rename(tmp_path / "h200-renamed.json")
    with pytest.raises(ValueError, match="expected a green gate"):
        report.newest_results(tmp_path)


def test_the_newest_of_each_machine_is_shown(gpu_result: Result, cpu_result: Result, tmp_path: Path) -> None:
    wanted = []
    for result, gpu, dates in (
        (gpu_result, "H200", (1,)),
        (cpu_result, "CPU (x, AVX2)", (2, 1)),
        (cpu_result, "CPU (x, AVX512)", (1,)),
    ):
        for date in dates:
            result["environment"] |= {"gpu": gpu, "date": f"2026-01-0{date} 00:00 UTC", "commit": gpu[-4:-1]}
            save(result, tmp_path)
        wanted.append((gpu, f"2026-01-0{dates[0]} 00:00 UTC"))
    found = [(r["environment"]["gpu"], r["environment"]["date"]) for r in report.newest_results(tmp_path)]
    assert found[0] == wanted[0]
    assert sorted(found) == sorted(wanted)


def test_files_of_another_schema_missing_files_and_missing_matplotlib_are_reported(
    gpu_result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu-old.json"
    path.write_text(json.dumps({"environment": {}, "gate": {"fwd": {"green": True}}, "rows": []}))
    assert report.main(["--result", str(path)]) == 1
    assert "expected gate.green" in capsys.readouterr().err
    assert report.main(["--result", str(tmp_path / "nowhere.json")]) == 1
    assert "nowhere.json" in capsys.readouterr().err
    monkeypatch.setitem(report.sys.modules, "matplotlib.figure", None)
    assert report.main(["--result", str(save(gpu_result, tmp_path)), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "plots: expected matplotlib, got none; pip install '.[train]'\n"


@pytest.mark.parametrize("kinds", [(), ("cpu",), ("gpu",), ("gpu", "cpu")], ids=lambda kinds: "+".join(kinds) or "none")
def test_blocks_are_renewed_and_checked(
    project: Path,
    kinds: tuple[str, ...],
    gpu_result: Result,
    cpu_result: Result,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in kinds:
        save({"gpu": gpu_result, "cpu": cpu_result}[kind], project / "results")
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().err == (
        "README.md, benchmarks.md, sparse.md: not what benchmarks/results says; "
        "run python -m benchmarks.report --docs --readme\n"
    )
    assert report.main(["--docs"]) == 0
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("README.md: not what")
    assert report.main(["--readme"]) == 0
    assert report.main(["--check"]) == 0
    readme, docs = (project / "README.md").read_text(), (project / "docs" / "benchmarks.md").read_text()
    assert readme.startswith("# Title\n\n<!-- benchmark -->\n")
    others = "".join(f"<!-- {mark} -->\nNo result is committed yet.\n<!-- /{mark} -->\n\n" for mark in ("sparse", "errors"))
    assert readme.endswith(f"<!-- /benchmark -->\n\n{others}tail\n")
    for text in (readme.removesuffix(f"{others}tail\n"), docs):
        assert ("NVIDIA H200" in text) == ("gpu" in kinds)
        assert ("CPU (x86_64" in text) == ("cpu" in kinds)
        assert ("No GPU result is committed yet." in text) == (kinds == ("cpu",))
        assert ("No result is committed yet." in text) == (kinds == ())


def test_readme_block_is_short_and_names_the_fastest_variants(gpu_result: Result) -> None:
    ((head, *body),) = tables(report.README.block([gpu_result]))
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


def test_marks_must_be_there_and_the_newest_cannot_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md: expected <!-- benchmark --> and <!-- /benchmark -->"):
        replace(report.README, path=tmp_path / "README.md").write([])
    with pytest.raises(SystemExit) as stopped:
        report.main(["--result", "x.json", "--readme"])
    assert stopped.value.code == 2


def test_sparse_modes_have_a_table_and_a_picture(project: Path, cpu_result: Result) -> None:
    like = cpu_result["rows"][0]
    times = {"bare_gemms": 1.0, "unfused_eager": 1.6, "eapo_torch_one_pass": 0.6, "eapo_torch_exact": 1.1}
    kept = {"sparse/kept_per_row": 37.2, "sparse/dense_share": 0.052}
    for entropy in (0.5, 1.5):
        for mode in SPARSE_MODES:
            for provider, time in times.items():
                sparse = mode == "sparse_gradient" and provider == "eapo_torch_one_pass"
                errors = {} if provider == "bare_gemms" else {"d_hidden": 1.5e-3, "d_weight": 4e-4}
                row = {"provider": provider, "mode": mode, "inputs": f"real_{entropy}", "mean_entropy_nats": entropy,
                       "errors": errors, "time_over": {"bare_gemms": time}}  # fmt: skip
                cpu_result["rows"].append(like | row | ({"metrics": kept} if sparse else {}))
    save(cpu_result, project / "results" / "sparse")
    assert report.main(["--docs", "--readme"]) == 0
    assert report.main(["--check"]) == 0
    text = (project / "docs" / "sparse.md").read_text()
    assert "| `sparse_gradient` | 0.50 | 37 | 5.2 % | 0.60 | 1.10 | 1.60 `unfused_eager` | 1.5e-03 | 4.0e-04 |" in text
    assert "| `sampling_mask` | 1.50 | 50 | - | 0.60 | 1.10 | 1.60 `unfused_eager` |" in text
    assert (project / "docs" / "sparse.png").stat().st_size > 10_000
    readme = (project / "README.md").read_text()
    assert text.split("<!-- sparse -->")[1].rstrip() == readme.split("<!-- sparse -->")[1].split("<!-- errors -->")[0].rstrip()


def test_the_largest_errors_have_a_table(project: Path, cpu_result: Result) -> None:
    for row in cpu_result["rows"]:
        row["largest_errors"] = {}
        if row["provider"] in ("unfused_eager", "eapo_triton_op"):
            row["largest_errors"] = {"logp": 1e-6 if "eapo" in row["provider"] else 2e-2, "entropy": 3e-6, "d_hidden": 4e-3}
    cpu_result["rows"] = [row for row in cpu_result["rows"] if row["mode"] == "fwd_bwd"]
    save(cpu_result, project / "results" / "errors")
    assert report.main(["--readme"]) == 0
    ((_, *body),) = tables((project / "README.md").read_text().split("<!-- errors -->")[1])
    assert body == [["`eapo_triton_op`", "1.0e-06", "3.0e-06", "4.0e-03"], ["`unfused_eager`", "2.0e-02", "3.0e-06", "4.0e-03"]]


def test_committed_blocks_are_current() -> None:
    assert report.main(["--check"]) == 0


def test_what_a_method_costs(project: Path, cpu_result: Result) -> None:
    rows = [
        {"method": name, "scope": "token", "needs": needs, "shape": {"N": 64, "D": 8, "V": 99, "dtype": "float32"}, "rounds": 3,
         "ms": 5.0, "over_grpo": over, "weights_over_grpo": weights}
        for name, needs, over, weights in (("grpo", [], 1.0, 0.0), ("clip_v", ["second_moments"], 1.02, 0.004))
    ]  # fmt: skip
    save({**cpu_result, "rows": rows}, project / "results" / "methods")
    assert report.main(["--docs"]) == 0
    text = (project / "docs" / "methods.md").read_text()
    assert "| `grpo` | token | - | 1.00 | - |" in text
    assert "| `clip_v` | token | second moments | 1.02 | 0.004 |" in text
