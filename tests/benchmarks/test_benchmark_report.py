"""The report's command and the blocks that it renews, on invented results."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from invented_results import Result, save, tables

from benchmarks import methods, report
from benchmarks.reporting import blocks, plots
from benchmarks.reporting.tables import result_section
from benchmarks.results import load
from eapo_kernels import METHODS


def test_report_is_written_with_its_pictures(gpu_result: Result, cpu_result: Result, tmp_path: Path) -> None:
    files = [str(save(result, tmp_path / "in")) for result in (gpu_result, cpu_result)]
    assert report.main(["--result", *files, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("## NVIDIA H200") < text.index("## CPU (x86_64")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == len(plots.PLOTS)
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
    ((head, *body),) = tables(text)
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
    save({**cpu_result, "rows": rows}, project / "results" / "methods")
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
    assert {row["method"] for row in rows if row["weights_over_grpo"]} == {
        m.name for m in METHODS.values() if m.token_weighting
    }
