"""The benchmark's commands from end to end, on shapes of no interest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import cpu, gpu, real_rows
from benchmarks.case import MODES, make_case
from benchmarks.gate import Gate
from benchmarks.results import load

ONLY = ["--only", "bare_gemms", "unfused_eager", "eapo_torch", "cce"]
NAMES = {"bare_gemms", "bare_gemms_whole", "unfused_eager", "eapo_torch_op", "eapo_torch_one_pass", "eapo_torch_autograd"}
WITHOUT = ["--without", "cce_torch"]


def _timed(result: dict) -> set[str]:
    return {row["provider"] for row in result["rows"] if row["ms"]}


def test_gpu_tiny_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--tiny", "--rounds", "1", "--out", str(tmp_path), *ONLY, *WITHOUT]) == 0
    (path,) = tmp_path.glob("*.json")
    result = load(path)
    assert result["gate"]["tests"]["passed"] > 100
    assert result["gate"]["tests"]["failed"] == 0
    assert len(result["gate"]["cases"]) == len(MODES) + 1
    assert _timed(result) >= NAMES
    absent = {row["provider"]: row["error"] for row in result["rows"] if row["error"]}
    if not torch.cuda.is_available():
        assert absent["cce"] == "cut-cross-entropy needs a CUDA device"
    out = capsys.readouterr().out
    assert "tests: " in out
    assert f"wrote {path}" in out


def test_gpu_without_a_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith("expected a CUDA device, got none; --tiny tries the command on the CPU, benchmarks.cpu measures there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [(["--quick"], ["-m", "not slow"]), (["--full"], []), (["--full", "--not-slow"], ["-m", "not slow"])],
)
def test_gpu_runs_slow_tests_when_asked_to(
    flags: list[str], left_out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_gate(*args: object, **options: object) -> Gate:
        asked.append((options["only"], options["arguments"], options["log"]))
        return Gate(failed=1, failures=["stop here"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: {"gpu": "a GPU", "date": "2026-01-01", "commit": "abc"})
    monkeypatch.setattr(gpu, "print_missing", lambda providers, device: None)
    monkeypatch.setattr(gpu, "run_gate", run_gate)
    assert gpu.main([*flags, "--tests", "tests/ops", "tests/gpu", "--out", str(tmp_path)]) == 1
    assert asked == [(["tests/ops", "tests/gpu"], left_out, tmp_path / "gate.log")]


def test_gpu_measures_nothing_behind_a_red_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        gpu, "run_gate", lambda *args, **options: Gate(passed=3, failed=1, failures=["tests.a::b: assert 1 == 2"])
    )
    command = ["--tiny", "--rounds", "1", "--out", str(tmp_path), *ONLY, *WITHOUT]
    assert gpu.main(command) == 1
    assert "gate red: tests.a::b: assert 1 == 2" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    with pytest.raises(ValueError, match=r"expected a green gate, got tests\.a::b"):
        load(path)
    assert '"rows": []' in path.read_text()
    assert gpu.main([*command, "--despite-red"]) == 1
    assert '"provider": "unfused_eager"' in path.read_text()
    with pytest.raises(ValueError, match="expected a green gate"):
        load(path)


def test_gpu_without_tests_is_refused_by_the_report(tmp_path: Path) -> None:
    assert gpu.main(["--tiny", "--no-tests", "--rounds", "1", "--out", str(tmp_path), *ONLY, *WITHOUT]) == 1
    (path,) = tmp_path.glob("*.json")
    with pytest.raises(ValueError, match="the tests were not run"):
        load(path)


def test_cpu_writes_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path), "--rounds", "1", "--shape", "32", "16", "300", "--modes", "fwd", "fwd_bwd", *ONLY[:-1]]
    assert cpu.main(command) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    result = load(path)
    assert {row["mode"] for row in result["rows"]} == {"fwd", "fwd_bwd"}
    assert _timed(result) == NAMES
    out = capsys.readouterr().out
    assert "not here: eapo_triton" not in out
    assert "unfused_eager" in out
    assert f"wrote {path}" in out


def test_real_rows_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_rows, "PATH", real_rows.FOLDER / "data" / "nowhere.safetensors")
    with pytest.raises(
        ValueError,
        match=r"inputs 'real': expected benchmarks/data/nowhere.safetensors, got none; run python -m benchmarks.real_rows",
    ):
        make_case(32, 16, 300, torch.float32, inputs="real")


def test_real_rows_become_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, generator = tmp_path / "rows.safetensors", torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(48, 16, generator=generator).bfloat16(), torch.randn(300, 16, generator=generator).bfloat16()
    targets = torch.randint(300, (48,), generator=generator)
    save_file({"hidden": hidden, "weight": weight, "targets": targets}, path)
    monkeypatch.setattr(real_rows, "PATH", path)
    case = make_case(32, 16, 300, torch.float32, inputs="real")
    assert torch.equal(case.hidden, hidden[:32].float())
    assert torch.equal(case.weight, weight.float())
    assert torch.equal(case.targets, targets[:32])
    assert case.inputs_name == "real"
    with pytest.raises(ValueError, match="expected N <= 48, D = 16, V = 300, got N = 64, D = 16, V = 300"):
        make_case(64, 16, 300, torch.float32, inputs="real")


def test_a_job_on_real_rows_takes_the_sizes_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_rows, "PATH", tmp_path / "rows.safetensors")
    job = gpu.Job(4096, 576, 49152, inputs="real")
    assert gpu._with_real_shape(job) is None
    assert gpu._with_real_shape(gpu.Job(32, 8, 64)) == gpu.Job(32, 8, 64)
    tensors = {"hidden": torch.zeros(40, 6), "weight": torch.zeros(9, 6), "targets": torch.zeros(40, dtype=torch.int64)}
    save_file(tensors, real_rows.PATH)
    assert gpu._with_real_shape(job) == gpu.Job(32, 6, 9, inputs="real")
