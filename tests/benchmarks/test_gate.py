"""The GPU gate on a project of its own: what it counts, what turns it red, what it stops."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gate as gate_module
from benchmarks.gate import Gate, read_report, run_gate, shards

PASSES = "def test_passes():\n    pass\n"
FAILS = "def test_fails():\n    assert 1 + 1 == 3\n"
SKIPS = "import pytest\n\n\ndef test_skips():\n    pytest.skip('needs a peer')\n"
NO_IMPORT = "import nowhere\n"
ENDLESS = """
import subprocess, sys, pathlib


def test_endless():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path("child.pid").write_text(str(child.pid))
    child.wait()
"""


def _project(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that nobody has waited for yet is still rescue_ids, as a zombie.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


class Patience:
    """A clock for the gate: time is up as soon as everyone but the endless shard is done, however long that takes.

    Attributes:
        said: when it did, by the real clock.
    """

    def __init__(self, endless: str, child: Path) -> None:
        self.endless, self.child = endless, child
        self.started: list[subprocess.Popen[bytes]] = []
        self.said = 0.0

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        self.started.append(subprocess.Popen(command, **options))
        return self.started[-1]

    def monotonic(self) -> float:
        if not self.started:
            return 0.0
        others = [process for process in self.started if process.args[-1] != self.endless]  # type: ignore[index]
        while any(process.poll() is None for process in others) or not (self.child.exists() and self.child.read_text()):
            time.sleep(0.05)
        self.said = self.said or time.monotonic()
        return 9.0


def test_counts_what_passed_failed_was_skipped_and_did_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "test_a.py": PASSES,
        "ops/test_b.py": FAILS,
        "test_c.py": SKIPS,
        "test_d.py": ENDLESS,
        "test_e.py": "import nowhere\n",
    }
    clock = Patience("tests/test_d.py", tmp_path / "child.pid")
    monkeypatch.setattr(gate_module, "time", clock)
    monkeypatch.setattr(gate_module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": clock.start}))
    gate = run_gate(8, 5, root=_project(tmp_path, files), log=tmp_path / "gate.log")
    assert time.monotonic() - clock.said < 30
    assert (gate.passed, gate.failed, gate.skipped) == (1, 2, 1)
    assert gate.unfinished == ["tests/test_d.py"]
    assert gate.stopped == ["tests/test_d.py::test_endless"]
    assert any("test_fails: assert (1 + 1) == 3" in line or "test_fails: AssertionError" in line for line in gate.failures)
    assert any("test_e" in line for line in gate.failures)
    assert gate.skips == ["tests.test_c::test_skips: needs a peer"]
    assert gate.red == [*gate.failures, "not finished in time: tests/test_d.py, in tests/test_d.py::test_endless"]
    assert gate.as_json()["failed"] == 2
    log = (tmp_path / "gate.log").read_text()
    assert all(f"######## tests/{name}\n" in log for name in files)
    assert "assert 1 + 1 == 3" in log
    deadline = time.monotonic() + 5
    child = int((tmp_path / "child.pid").read_text())
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child), "a test's own process outlived the gate"


def test_no_time_at_all_is_red(tmp_path: Path) -> None:
    start = time.monotonic()
    gate = run_gate(0, 1, root=_project(tmp_path, {"test_d.py": ENDLESS}))
    assert time.monotonic() - start < 60
    assert (gate.unfinished, gate.passed) == (["tests/test_d.py"], 0)
    assert gate.red[0] == "no test passed"


def test_one_green_file(tmp_path: Path) -> None:
    gate = run_gate(300, 3, root=_project(tmp_path, {"test_a.py": PASSES, "test_b.py": FAILS}), only=("tests/test_a.py",))
    assert (gate.passed, gate.failed, gate.red) == (1, 0, [])


def test_a_shard_goes_on_past_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    threads = "import os\n\n\ndef test_threads():\n    assert os.environ['OMP_NUM_THREADS'] == '2'\n"
    gate = run_gate(
        300, 1, root=_project(tmp_path, {"test_a.py": NO_IMPORT, "test_b.py": threads}), arguments=["-m", "not slow"]
    )
    assert (gate.passed, gate.failed, gate.unfinished) == (1, 1, [])
    assert "test_a" in gate.failures[0]
    assert gate.as_json()["arguments"] == ["-m", "not slow"]
    assert gate.as_json()["only"] == []


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("import os\n\n\ndef test_dies():\n    os._exit(0)\n", "0 and no report"),
        ("def test_passes():\n    pass\n\n\ndef test_leaves():\n    raise KeyboardInterrupt\n", "2"),
    ],
)
def test_a_shard_that_does_not_come_to_its_end_is_red(tmp_path: Path, text: str, end: str) -> None:
    gate = run_gate(300, 2, root=_project(tmp_path, {"test_a.py": PASSES, "test_b.py": text}), only=("tests/test_b.py",))
    assert gate.failures == [f"tests/test_b.py: pytest exited with {end}"]
    assert gate.red
    assert gate.as_json()["only"] == ["tests/test_b.py"]


def test_a_shard_without_a_chosen_test_is_no_failure(tmp_path: Path) -> None:
    gate = run_gate(300, 2, root=_project(tmp_path, {"test_a.py": PASSES, "test_b.py": SKIPS}), arguments=["-k", "passes"])
    assert (gate.passed, gate.red) == (1, [])


def test_no_test_at_all_is_red() -> None:
    assert Gate().red == ["no test passed"]
    assert Gate(skipped=4).red == ["no test passed"]


def test_shards_deal_every_file_once(tmp_path: Path) -> None:
    names = ["test_a.py", "ops/test_b.py", "ops/test_c.py", "gpu/test_d.py", "aot/test_e.py", "benchmarks/test_f.py"]
    dealt = shards(_project(tmp_path, dict.fromkeys(names, PASSES)), 2)
    families = ["sm80", "sm90", "sm100", "not sm80 and not sm90 and not sm100"]
    assert dealt[:5] == [*(["tests/aot", "-k", part] for part in families), ["tests/gpu/test_d.py"]]
    assert sorted(name for shard in dealt[5:] for name in shard) == [
        "tests/ops/test_b.py",
        "tests/ops/test_c.py",
        "tests/test_a.py",
    ]
    assert [len(shard) for shard in dealt[5:]] == [2, 1]


def test_only_files_and_folders_asked_for(tmp_path: Path) -> None:
    names = ["test_a.py", "ops/test_b.py", "ops/cuda/test_c.py", "gpu/test_d.py", "aot/test_e.py"]
    root = _project(tmp_path, dict.fromkeys(names, PASSES))
    alone, *dealt = shards(root, 2, ["tests/ops/", "tests/test_a.py"])
    assert alone == ["tests/ops/cuda/test_c.py"]
    assert sorted(dealt) == [["tests/ops/test_b.py"], ["tests/test_a.py"]]
    assert len(shards(root, 2, ["tests/aot"])) == 4
    assert shards(root, 2, ["tests/op"]) == []


def test_the_command_writes_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = _project(tmp_path / "project", {"test_a.py": PASSES, "test_b.py": FAILS}), tmp_path / "out"
    monkeypatch.setattr(gate_module.run_gate, "__kwdefaults__", gate_module.run_gate.__kwdefaults__ | {"root": root})
    assert gate_module.main(["--out", str(out), "--minutes", "5"]) == 1
    assert json.loads((out / "gate.json").read_text())["arguments"] == ["-m", "not slow"]
    assert "test_fails FAILED" in (out / "gate.log").read_text()
    assert "tests: 1 passed, 1 failed, 0 skipped" in capsys.readouterr().out
    assert gate_module.main(["tests", "--out", str(out), "--slow", "-k", "passes"]) == 0
    assert json.loads((out / "gate.json").read_text())["arguments"] == ["-k", "passes"]


@pytest.mark.parametrize("tag", ["failure", "error"])
def test_reports_of_failures_and_errors_count_alike(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        f'<testsuites><testsuite><testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two">'
        f'<{tag} message="first line&#10;second line">trace</{tag}></testcase></testsuite></testsuites>'
    )
    gate = Gate()
    read_report(path, gate)
    assert (gate.passed, gate.failed, gate.failures) == (1, 1, ["tests.a::two: first line"])
