"""The calls on a lent machine, rehearsed: every command as it stands, its time, and what follows a kernel that hangs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import first_light, gate, measure, session
from benchmarks.measure import DeviceLost
from benchmarks.session import CALLS, Step

OUT = Path("somewhere")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Call 1 with steps of Python text; a step's last word is its text."""
    texts: dict[str, str] = {}
    run = session._run
    monkeypatch.setattr(
        session, "_run", lambda command, *rest: run([sys.executable, "-c", texts[command[2]], *command[3:]], *rest)
    )
    return texts


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("step", [step for steps in CALLS.values() for step in steps], ids=lambda step: step.name)
def test_every_command_is_understood(step: Step, hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser of its module, which is stopped right behind it."""

    class Understood(Exception):
        pass

    def stop(*args: object, **options: object) -> None:
        raise Understood

    module, *arguments = step.arguments(OUT, 100.0, hangs=hangs, tiny=False)
    if module == "eapo_kernels.ops.cuda":
        module = f"{module}.__main__"
        monkeypatch.setattr("eapo_kernels.ops.cuda.build.cubin", stop)
    main = importlib.import_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", stop)
    if hasattr(main, "run_gate"):
        monkeypatch.setattr(main, "run_gate", stop)
    with pytest.raises(Understood):
        main.main(arguments)
    assert not [word for word in arguments if "{" in word]


def test_steps_get_their_time_and_the_last_one_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        Step("slow", ("slow",), 0.1),
        Step("told", ("told", "{out}", "{minutes}", "{seconds}"), 1.0),
        Step("rest", ("rest", "{minutes}"), None),
    )
    monkeypatch.setattr(session, "CALLS", {1: steps})
    programs["slow"] = "import time; print('begun', flush=True); time.sleep(600)"
    programs["told"] = "import sys; print(sys.argv[1:]); sys.exit(5)"
    programs["rest"] = "import os, sys; print(sys.argv[1:], os.environ['BENCHMARK_COMMIT'])"
    codes = session.run(1, tmp_path, 1200, commit="abc")
    assert codes == {"slow": None, "told": 5, "rest": 0}
    log = (tmp_path / "session-1.log").read_text()
    assert "slow: out of time after" in log
    assert "begun" in log
    assert f"['{tmp_path}', '0.95', '57']" in log
    assert "['18." in log, "95 % of what six seconds and two short steps left of twenty minutes"
    assert "abc" in log
    assert capsys.readouterr().out.strip().splitlines()[-1] == "######## call 1: slow None, told 5, rest 0"


@pytest.mark.parametrize(("code", "without"), [(0, False), (1, False), (first_light.HANGS, True)])
def test_what_follows_a_kernel_that_hangs_does_without_the_backend(
    code: int, without: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]
) -> None:
    monkeypatch.setattr(
        session, "CALLS", {1: (session._LIGHT, Step("next", ("next",), None, without=("--without", "eapo_cuda")))}
    )
    programs |= {"benchmarks.first_light": f"import sys; sys.exit({code})", "next": "import sys; print(sys.argv[1:])"}
    session.run(1, tmp_path, 300)
    assert ("['--without', 'eapo_cuda']" in (tmp_path / "session-1.log").read_text()) == without


@pytest.mark.parametrize("seconds", [300, 40])
def test_a_provider_that_breaks_the_gpu_is_left_out_in_a_second_try(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]
) -> None:
    """With its words as ``benchmarks.measure`` has them, if there is time for it."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (_ for _ in ()).throw(RuntimeError("lost")))
    with pytest.raises(DeviceLost) as lost:
        measure._check_device("eapo_cuda_op", RuntimeError("illegal address"))
    step = Step("quick", ("quick", "{out}"), None, without=("--without", "eapo_cuda"))
    monkeypatch.setattr(session, "CALLS", {1: (session._LIGHT, step)})
    programs["benchmarks.first_light"] = f"import sys; sys.exit({first_light.HANGS})"
    programs["quick"] = f"import sys; print(sys.argv[1:]); sys.exit(len(sys.argv) < 6 and print({str(lost.value)!r}) or 3)"
    codes = session.run(1, tmp_path, seconds)
    again = f"['{tmp_path}/again', '--without', 'eapo_cuda', '--no-tests', '--without', 'eapo_cuda_op', 'eapo_cuda']"
    assert (again in (tmp_path / "session-1.log").read_text()) == (seconds == 300)
    assert list(codes)[1:] == (["quick", "quick again"] if seconds == 300 else ["quick"])


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_tiny_calls_from_end_to_end(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there the calls themselves are made")
    monkeypatch.setenv("PYTHONPATH", str(session.ROOT))
    assert session.main([str(call), "--tiny", "--minutes", "20", "--out", str(tmp_path)]) == 1
    log = (tmp_path / f"session-{call}.log").read_text()
    assert [line.split(": ")[0] for line in log.splitlines() if line.startswith("########")] == [
        f"######## {step.name}" for step in CALLS[call]
    ]
    assert "the cuda backend: no CUDA device" in log
    if call == 1:
        assert json.loads((tmp_path / "gate.json").read_text())["failed"] == 0
    else:
        (path,) = tmp_path.glob("cpu-*.red.json")
        assert "the tests were not run" in path.read_text()


def test_the_tests_of_a_call_are_there() -> None:
    dealt = [name for shard in gate.shards(session.ROOT, 8, session._TESTS) for name in shard]
    assert {"tests/ops/cuda/test_cuda_backend.py", "tests/gpu/test_cuda_graphs.py", "tests/test_no_waits.py"} <= set(dealt)
    assert not [name for name in dealt if name.startswith(("tests/trainer", "tests/aot", "tests/emulator"))]
    for name in session._TESTS:
        assert (session.ROOT / name).exists()


def test_three_calls_and_their_starts_are_half_an_hour() -> None:
    start = 1.5
    assert sum(session.MINUTES.values()) + len(CALLS) * start <= 30
    for call, minutes in session.MINUTES.items():
        assert sum(step.minutes or 0.0 for step in CALLS[call]) < minutes - 1, "the last step has something left"
        assert minutes < 10
