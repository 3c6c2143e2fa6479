"""Measuring on a tiny shape: rows, gate, clock, result files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.case import MODES, Case, Reference, Results, make_case, reference_of
from benchmarks.measure import CpuClock, Job, Limits, gate, label, measure, sweep, time_interleaved
from benchmarks.providers import Provider, load_providers
from benchmarks.results import ResultFile, by_date, environment, load, parse_telemetry

NAMES = ("bare_gemms", "bare_logits", "unfused_eager", "eapo_torch_one_pass", "eapo_torch_op")
SHAPE = {"N": 64, "D": 16, "V": 500, "dtype": "float32"}


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Case, Reference]]:
    case = make_case(64, 16, 500, torch.float32)
    return {mode: (case.for_mode(mode), reference_of(case.for_mode(mode))) for mode in MODES}


@pytest.fixture(scope="module")
def providers() -> list[Provider]:
    return [p for p in load_providers() if p.name in NAMES]


def _provider(name: str, run: Callable[[Case, str], Callable[[], Results]], **options: Any) -> Provider:
    return Provider(name, "a job", run, **options)


def _raises(case: Case, mode: str) -> Callable[[], Results]:
    raise NotImplementedError("V = 500 is not\na multiple of 128")


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_every_mode(cases: dict[str, tuple[Case, Reference]], providers: list[Provider], mode: str) -> None:
    case, reference = cases[mode]
    verdict, rows = measure(case, reference, providers, mode, CpuClock(), rounds=2)
    assert verdict == {"green": True, "red": []}
    assert [row["provider"] for row in rows] == [p.name for p in providers if mode in p.modes]
    for row in rows:
        assert row["shape"] == SHAPE
        assert (row["inputs"], row["mode"], row["rounds"], row["error"]) == ("peaked", mode, 2, None)
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert set(row["time_over"]) == {"bare_gemms", "unfused_eager"}
        assert row["tflops_useful"] * row["ms"]["p50"] * 1e9 == pytest.approx(case.useful_flops(mode))
        if not row["provider"].startswith("bare_"):
            assert row["errors"]
            assert row["peak_bytes"] > 0
    assert {row["provider"]: row["time_over"] for row in rows}["bare_gemms"]["bare_gemms"] == 1.0


def test_a_provider_that_raises_has_a_row_and_the_others_are_timed(
    cases: dict[str, tuple[Case, Reference]], providers: list[Provider]
) -> None:
    absent = _provider("absent", _raises, unavailable=lambda device: f"absent does not run on {device}")
    broken = _provider("broken", _raises)
    verdict, rows = measure(*cases["fwd"], [*providers, absent, broken], "fwd", CpuClock(), rounds=1)
    assert verdict["green"]
    by_name = {row["provider"]: row for row in rows}
    assert by_name["absent"]["error"] == "absent does not run on cpu"
    assert by_name["broken"]["error"] == "NotImplementedError: V = 500 is not"
    for name in ("absent", "broken"):
        assert (by_name[name]["ms"], by_name[name]["rounds"], by_name[name]["errors"]) == (None, 0, {})
        assert by_name[name]["peak_bytes"] is None
    assert by_name["unfused_eager"]["ms"]
    assert by_name["eapo_torch_op"]["ms"]


def test_a_wrong_provider_of_ours_turns_the_gate_red_and_none_is_timed(
    cases: dict[str, tuple[Case, Reference]], providers: list[Provider]
) -> None:
    case, reference = cases["fwd"]
    wrong = _provider("eapo_wrong", lambda c, m: lambda: {"logp": reference.logp + 0.01})
    verdict, rows = measure(case, reference, [*providers, wrong], "fwd", CpuClock(), rounds=1)
    assert not verdict["green"]
    assert len(verdict["red"]) == 1
    assert verdict["red"][0].startswith("eapo_wrong: logp error")
    assert {row["error"] for row in rows} == {"not timed: the gate is red"}
    assert not any(row["ms"] for row in rows)


def test_ours_raising_is_red_unless_it_was_not_to_run_here(cases: dict[str, tuple[Case, Reference]]) -> None:
    broken = _provider("eapo_broken", _raises)
    verdict, rows = measure(*cases["fwd"], [broken], "fwd", CpuClock(), rounds=1)
    assert verdict == {"green": False, "red": ["eapo_broken: NotImplementedError: V = 500 is not"]}
    assert rows[0]["error"] == "NotImplementedError: V = 500 is not"
    absent = _provider("eapo_absent", _raises, unavailable=lambda device: "no GPU")
    assert measure(*cases["fwd"], [absent], "fwd", CpuClock(), rounds=1)[0]["green"]


def test_a_provider_that_raises_while_timed_leaves_the_others_alone(
    cases: dict[str, tuple[Case, Reference]], providers: list[Provider]
) -> None:
    case, reference = cases["fwd"]
    calls: list[int] = []

    def fourth_fails() -> Results:
        calls.append(len(calls) + 1)
        if calls[-1] == 4:
            raise RuntimeError("out of luck")
        return {"logp": reference.logp}

    tired = _provider("tired", lambda c, m: fourth_fails)
    verdict, rows = measure(case, reference, [*providers, tired], "fwd", CpuClock(), rounds=5)
    assert verdict == {"green": True, "red": []}
    assert calls == [1, 2, 3, 4], "it is not called again"
    by_name = {row["provider"]: row for row in rows}
    failed = by_name.pop("tired")
    assert failed["error"].startswith("while timed: RuntimeError: out of luck")
    assert (failed["ms"], failed["rounds"], failed["time_over"]) == (None, 0, {})
    for row in by_name.values():
        assert (row["rounds"], row["error"]) == (5, None)


def test_ours_with_nothing_compared_is_red(cases: dict[str, tuple[Case, Reference]]) -> None:
    silent = _provider("eapo_silent", lambda c, m: lambda: {})
    verdict, rows = measure(*cases["fwd"], [silent], "fwd", CpuClock(), rounds=1)
    assert verdict == {"green": False, "red": ["eapo_silent: nothing was compared"]}
    assert rows[0]["error"] == "not timed: the gate is red"
    assert gate({"peer": {}}, torch.float32)["green"]


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 8e-3)], ids=str)
def test_the_gate_has_a_bound_for_every_error(dtype: torch.dtype, gradient: float) -> None:
    bounds = {"logp": 5e-5, "entropy": 5e-5, "loss": 1e-3, "d_hidden": gradient, "d_weight": gradient}
    assert gate({"eapo_x": bounds}, dtype) == {"green": True, "red": []}
    for name, bound in bounds.items():
        red = gate({"unfused_eager": {name: 1.0}, "eapo_x": bounds | {name: 1.1 * bound}}, dtype)["red"]
        assert red == [f"eapo_x: {name} error {1.1 * bound:.2e}, allowed {bound:.0e}"]


def test_the_gate_judges_ours_alone_and_nan_is_red() -> None:
    assert gate({"eapo_x": {"logp": 1e-6}, "peer": {"logp": 1.0}}, torch.float32)["green"]
    assert not gate({"eapo_x": {"logp": float("nan")}}, torch.float32)["green"]


def test_interleaving_runs_all_in_every_round() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = time_interleaved(runs, 4, CpuClock())
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_interleaving_stops_after_three_rounds_when_time_is_up() -> None:
    times = time_interleaved({"a": lambda: None, "b": lambda: None}, 50, CpuClock(), seconds=0.0)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_telemetry_leaves_out_what_the_gpu_does_not_say() -> None:
    assert parse_telemetry("1980, 3201, 689.41, 700.00, 61\n") == {
        "sm_mhz": 1980.0,
        "memory_mhz": 3201.0,
        "power_w": 689.41,
        "power_limit_w": 700.0,
        "temperature_c": 61.0,
    }
    assert parse_telemetry("1980, [N/A], [Not Supported], 700.00, 61") == {
        "sm_mhz": 1980.0,
        "power_limit_w": 700.0,
        "temperature_c": 61.0,
    }
    assert parse_telemetry("") == {}


def test_result_files_accumulate_and_are_written_atomically(
    cases: dict[str, tuple[Case, Reference]], providers: list[Provider], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ResultFile(environment("cpu"))
    for mode in ("fwd", "frozen_head"):
        case, reference = cases[mode]
        verdict, rows = measure(case, reference, providers, mode, CpuClock(), rounds=1)
        result.add(label(case, mode), verdict, rows)
    path = result.save(tmp_path / "new" / "folder")
    first = load(path)
    assert [row["mode"] for row in first["rows"]] == ["fwd"] * 3 + ["frozen_head"] * 4
    assert list(first["gate"]["cases"]) == [
        "fwd peaked N=64 D=16 V=500 dtype=float32",
        "frozen_head peaked N=64 D=16 V=500 dtype=float32",
    ]
    assert path.name.startswith("cpu-")

    write_text = Path.write_text

    def torn(self: Path, text: str) -> int:
        write_text(self, text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="disk full"):
        result.save(path.parent)
    assert load(path) == first
    assert list(path.parent.glob("*.json")) == [path]


def test_a_copy_without_history_is_known_by_name_or_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without git."""
    monkeypatch.setattr(results.shutil, "which", lambda program: None)
    monkeypatch.setenv(results.COMMIT, "abc1234")
    assert environment("cpu")["commit"] == "abc1234"
    monkeypatch.delenv(results.COMMIT)
    made = environment("cpu")["commit"]
    assert re.fullmatch(r"[\w.]+\+[0-9a-f]{8}", made)
    assert made == environment("cpu")["commit"]
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert environment("cpu")["commit"] != made
    assert results.telemetry("cuda") == {}


def test_result_files_turn_red_for_good_and_are_refused(tmp_path: Path) -> None:
    result = ResultFile(environment("cpu"))
    result.add("a", {"green": False, "red": ["eapo_x: logp error"]}, [])
    result.add("b", {"green": True, "red": []}, [{"value": float("nan")}])
    path = result.save(tmp_path)
    assert json.loads(path.read_text())["rows"] == [{"value": "nan"}]
    with pytest.raises(ValueError, match="expected a green gate, got eapo_x: logp error"):
        load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected environment, gate and rows"):
        load(path)


def test_a_red_file_has_its_own_name_and_replaces_no_green_one(tmp_path: Path) -> None:
    made = {"gpu": "NVIDIA H200", "date": "2026-01-02 00:00 UTC", "commit": "abc"}
    green = ResultFile(made, rows=[{"run": 1}])
    kept = green.save(tmp_path)
    before = kept.read_bytes()
    second = ResultFile(made, rows=[{"run": 2}])
    assert second.save(tmp_path) == kept, "green so far"
    second.redden(["eapo_x: logp error"])
    red = second.save(tmp_path)
    assert red.name == "h200-2026-01-02-abc.red.json"
    assert kept.read_bytes() == before
    assert by_date("gpu", tmp_path) == [load(kept)]
    with pytest.raises(ValueError, match="expected a green gate"):
        load(red)

    alone = ResultFile(made)
    path = alone.save(tmp_path / "alone")
    alone.redden(["eapo_x: logp error"])
    alone.save(path.parent)
    assert [p.name for p in path.parent.iterdir()] == [red.name]
    assert by_date("gpu", path.parent) == []


def test_results_come_by_date_of_one_kind(tmp_path: Path) -> None:
    assert by_date("gpu", tmp_path) == []
    for gpu, date in (("NVIDIA H200", "2026-01-03"), ("NVIDIA A100", "2026-01-02"), ("CPU (x, 2 threads)", "2026-01-04")):
        ResultFile({"gpu": gpu, "date": f"{date} 00:00 UTC", "commit": "abc"}).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a100-2026-01-02-abc.json",
        "cpu-2026-01-04-abc.json",
        "h200-2026-01-03-abc.json",
    ]
    assert [result["environment"]["gpu"] for result in by_date("gpu", tmp_path)] == ["NVIDIA A100", "NVIDIA H200"]


def test_a_sweep_says_what_it_left_out(providers: list[Provider], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ResultFile(environment("cpu"))
    job = Job(32, 16, 300, torch.float32, modes=("fwd",))
    sweep([job], providers, result, tmp_path, "cpu", Limits(rounds=1, until=0.0))
    assert result.rows == []
    assert "left out, time is up: peaked N=32 D=16 V=300 float32 fwd" in capsys.readouterr().out
    sweep([job], providers, result, tmp_path, "cpu", Limits(rounds=1))
    assert "unfused_eager" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert {row["provider"] for row in load(path)["rows"]} == {"bare_gemms", "unfused_eager", "eapo_torch_op"}
