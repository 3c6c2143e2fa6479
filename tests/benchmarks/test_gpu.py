"""The GPU command, rehearsed: all stages at toy sizes, and what it says of a case that is wrong,
crashes or hangs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Plan, Verdict
from benchmarks.measure import DeviceLost
from eapo_kernels import selftest

PLAN = Plan(Path(), "cpu", rehearse=True, peers=False, full=False, rounds=1)

PROGRAMS = {
    "good": "print('begin good 1'); print('a warning: here'); print('right good 1')",
    "wrong": "print('begin wrong 1'); print('wrong wrong 1: logp: off by 3'); print('begin wrong 2'); print('right wrong 2')",
    "crash": "print('begin crash 1'); print('right crash 1'); print('begin crash 2'); raise RuntimeError('CUDA driver: no')",
    "early": "import nowhere",
    "hang": "import time; print('begin hang 1', flush=True); time.sleep(600)",
}


def test_all_stages_run_at_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there the command itself runs")
    command = ["--rehearse", "--device", "cpu", "--full", "--tune", "--rounds", "1", "--out", str(tmp_path)]
    assert gpu.main(command) == 0, capsys.readouterr().out
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert list(stages) == ["build", "kernels", "selftest", "tests", "speed", "tune"]
    assert all(stage["right"] and not stage["wrong"] for stage in stages.values())
    assert stages["selftest"]["right"] == 2 * 2 * len(selftest.CASES), "torch and triton, without and with bias"
    (path,) = tmp_path.glob("cpu-*.json")
    result = json.loads(path.read_text())
    assert result["gate"]["green"]
    assert result["gate"]["tests"]["passed"] == stages["tests"]["right"]
    assert {row["provider"] for row in result["rows"] if row["ms"]} >= {"bare_gemms", "unfused_eager", "eapo_triton_one_pass"}
    assert json.loads((tmp_path / "measured" / "triton" / "measured.json").read_text())["lines"][0]["kernel"] == "finalize"
    out = capsys.readouterr().out
    assert (tmp_path / "gpu.log").read_text() == out
    assert "triton scaled_exp_rescue" in out


def test_a_case_that_is_wrong_crashes_or_hangs_is_named() -> None:
    commands = {name: [sys.executable, "-u", "-c", text] for name, text in PROGRAMS.items()}
    found = gpu.watch({name: commands[name] for name in PROGRAMS if name != "hang"}, 60, 2)
    assert found["good"].right == 1
    assert found["good"].wrong == []
    assert (found["wrong"].right, found["wrong"].wrong) == (1, ["wrong 1: logp: off by 3"])
    assert found["crash"].wrong == ["crash 2: ended with 1: RuntimeError: CUDA driver: no"]
    assert found["early"].wrong == ["early, outside a case: ended with 1: ModuleNotFoundError: No module named 'nowhere'"]
    assert gpu.watch({"hang": commands["hang"]}, 2, 1)["hang"].wrong == ["hang 1: hangs"]


def test_a_wrong_result_of_the_selftest_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = replace(PLAN, out=tmp_path)
    ((name, check), *_) = gpu.selftest_cases(plan, "torch bfloat16 32")
    assert name == "torch bfloat16 32 statistics, without bias"
    assert check() is None
    right = selftest.token_stats
    monkeypatch.setattr(selftest, "token_stats", lambda *a, **k: (s := right(*a, **k))._replace(lse=s.lse * (1 + 1e-3)))
    wrong = check()
    assert wrong is not None
    assert wrong.startswith("lse at [")
    rows = json.loads((tmp_path / "selftest-torch-bfloat16-32.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["right", "wrong"]


def test_a_failed_stage_keeps_no_other_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was wrong turns the result red, and the backend is not timed; a provider that breaks the
    GPU is left out."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (_ for _ in ()).throw(RuntimeError("lost")))
    with pytest.raises(DeviceLost) as lost:
        gpu.sweep.__globals__["_check_device"]("eapo_cuda_op", RuntimeError("illegal address"))
    calls: list[tuple[str, list[str]]] = []

    def run_stage(name: str, plan: Plan, seconds: float, child: list[str]) -> tuple[Verdict, str]:
        calls.append((name, child))
        wrong = {"kernels": ["triton finalize: hangs"], "speed": [str(lost.value)] if len(calls) == 3 else []}.get(name, [])
        return Verdict(right=1, wrong=list(wrong)), name

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    verdicts = gpu.run(replace(PLAN, out=tmp_path), {"build": 9.0, "kernels": 9.0, "speed": 99.0}, ["python"])
    assert [name for name, _ in calls] == ["build", "kernels", "speed", "speed"]
    assert calls[-1][1] == ["python", "--without", "eapo_cuda_op"]
    assert verdicts["speed"].wrong == ["eapo_cuda_op left the GPU unusable"]
    assert json.loads((tmp_path / "stages.json").read_text())["broken"] == ["triton"]


def test_rows_behind_a_wrong_stage_are_red(tmp_path: Path) -> None:
    stages = {"kernels": vars(Verdict(right=3, wrong=["triton finalize: hangs"]))}
    (tmp_path / "stages.json").write_text(json.dumps({"broken": ["triton"], "stages": stages}))
    verdict = gpu.measure_speed(replace(PLAN, out=tmp_path), 60.0)
    assert verdict.wrong == [], "the stage itself was right"
    (path,) = tmp_path.glob("cpu-*.red.json")
    result = json.loads(path.read_text())
    assert result["gate"]["red"] == ["kernels: triton finalize: hangs"]
    assert not any(row["provider"].startswith("eapo_triton") for row in result["rows"])


def test_a_test_file_that_fails_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "test_a.py": "import pytest\n\n\ndef test_one():\n    pass\n\n\ndef test_two():\n    assert 1 == 2\n\n\n"
        "def test_three():\n    pytest.skip('no')\n",
        "gpu/test_b.py": "import os\n\n\ndef test_dies():\n    os._exit(3)\n",
    }
    for name, text in files.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    verdict = gpu.run_tests(replace(PLAN, rehearse=False, out=tmp_path / "out"), 120.0)
    assert (verdict.right, verdict.skipped) == (1, 1)
    failed, died = sorted(verdict.wrong)
    assert failed.startswith("tests.test_a::test_two: ")
    assert died == "tests/gpu/test_b.py: pytest exited with 3"


@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"]], ids=["no GPU", "no rehearsal"])
def test_without_a_gpu_it_says_so(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plain_call_fits_nine_minutes() -> None:
    assert sum(gpu.SECONDS.values()) <= 8.5 * 60
