"""The life of a verdict: asked once per process, node and class of shapes, kept, told, and agreed on by ranks.

A patched function describes a fake GPU. A fake child is a small program that ends in one of the ways a real one can end.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eapo_kernels import token_stats
from eapo_kernels.ops import dispatch, torch_backend, verdicts
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.verdicts import MARK, Question, Verdict

CPU = torch.device("cpu")
GPU = {"gpu": "NVIDIA H200", "capability": "9.0", "driver": "12080"}
HEAD = Projection(torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(512, 64, dtype=torch.bfloat16))
QUESTION = Question.about("triton", HEAD)
RIGHT = f"print('noise'); print({MARK!r} + '" + '{"outcome": "right", "detail": "", "ratio": 0.5}' + "')"
WRONG = RIGHT.replace("right", "wrong").replace('"detail": ""', '"detail": "d_weight is off by 3"')


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU, an empty cache and a temporary folder of this test alone."""
    monkeypatch.setattr(verdicts, "describe_gpu", lambda device: dict(GPU))
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts.tempfile, "gettempdir", lambda: str(tmp_path))
    verdicts._log_once.cache_clear()
    return tmp_path


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Sets the program that the child runs; returns a file with one line per start."""
    starts = tmp_path / "starts"
    starts.touch()

    def set_program(program: str) -> Path:
        counted = f"open({str(starts)!r}, 'a').write('started\\n'); {program}"
        monkeypatch.setattr(verdicts, "command", lambda question, device: [sys.executable, "-c", counted])
        return starts

    return set_program


def starts(file: Path) -> int:
    return len(file.read_text().splitlines())


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr(verdicts, "_known", {})


def test_right_is_asked_once_and_read_by_the_next_process(
    child: Callable[[str], Path], machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = child(RIGHT)
    with caplog.at_level(logging.INFO, "eapo_kernels"):
        assert verdicts.is_right("triton", HEAD)
        assert verdicts.is_right("triton", HEAD)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("checking the triton kernels on NVIDIA H200 once, about 20 s")
    assert said[1].startswith("the triton kernels on NVIDIA H200 (bfloat16, D=64 V<=512 V%256): right (")
    forget(monkeypatch)
    assert verdicts.is_right("triton", HEAD)
    assert starts(file) == 1
    (kept,) = (machine / "cache/eapo_kernels").iterdir()
    content = json.loads(kept.read_text())
    assert content["verdict"] == {
        "outcome": "right",
        "detail": "",
        "ratio": 0.5,
        "seconds": content["verdict"]["seconds"],
        "path": "",
    }
    assert {"gpu", "capability", "driver", "torch", "triton", "sources", "dtype", "shapes", "form"} <= set(content["key"])


@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        (WRONG, "wrong", "d_weight is off by 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "SIGSEGV"),
        ("import sys; sys.stderr.write('an illegal access'); import os; os.abort()", "crashed", "SIGABRT: an illegal access"),
        ("import time; time.sleep(60)", "timed out", "did not end within 1 s"),
    ],
    ids=["wrong", "crashed", "aborted", "hanging"],
)
def test_bad_news_is_kept_and_told_once(
    program: str, outcome: str, detail: str, child: Callable[[str], Path], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = child(program)
    monkeypatch.setattr(verdicts, "TIME_LIMIT", 1.0 if outcome == "timed out" else 30.0)
    with pytest.warns(RuntimeWarning) as told:
        assert not any(verdicts.is_right("triton", HEAD) for _ in range(2))
    assert len(told) == 1
    message = str(told[0].message)
    (kept,) = (machine / "cache/eapo_kernels").iterdir()
    for part in (
        f"NVIDIA H200 (bfloat16, D=64 V<=512 V%256): {outcome}",
        detail,
        str(kept),
        "python -m eapo_kernels selftest --backend",
    ):
        assert part in message, message
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match=outcome):
        assert not verdicts.is_right("triton", HEAD)
    assert starts(file) == 1, "bad news is kept"


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("print('garbage')", "no answer (exit code 0)"),
        (f"print({MARK!r} + '[1, 2')", "no answer"),
        ("raise ImportError('no torch here')", "ImportError: no torch here"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
        (RIGHT.replace("right", "unknown").replace('"detail": ""', '"detail": "busy"'), "busy"),
    ],
    ids=["garbage", "cut short", "not importable", "killed", "said unknown"],
)
def test_no_answer_is_unknown_and_the_next_process_tries_again(
    program: str, detail: str, child: Callable[[str], Path], machine: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    file = child(program)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "eapo_kernels"):
        warnings.simplefilter("error")
        assert not verdicts.is_right("triton", HEAD)
        assert not verdicts.is_right("triton", HEAD)
    assert len(caplog.records) == 1
    assert detail in caplog.text
    assert "could not be checked" in caplog.text
    assert not (machine / "cache/eapo_kernels").exists()
    forget(monkeypatch)
    child(RIGHT)
    assert verdicts.is_right("triton", HEAD)
    assert starts(file) == 2


def test_an_interpreter_that_cannot_be_started_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert verdicts.find_or_check(QUESTION, CPU).outcome == "unknown"


def test_slower_than_torch_is_right_and_not_taken(child: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    child(RIGHT.replace("0.5", "1.4"))
    with caplog.at_level(logging.INFO, "eapo_kernels"):
        assert not verdicts.is_right("triton", HEAD)
    assert "right, but 1.40 times as slow as the torch backend, which is used" in caplog.text
    assert Verdict("right", ratio=1.2).usable


def test_each_part_of_the_key_asks_anew(child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file, wide = child(RIGHT), HEAD.hidden
    changes: list[Callable[[], Projection]] = [
        lambda: HEAD,
        lambda: replace(HEAD, softcap=30.0),
        lambda: Projection(wide.half(), HEAD.weight.half()),
        lambda: Projection(wide, torch.zeros(1024, 64, dtype=torch.bfloat16)),
        lambda: Projection(wide, torch.zeros(511, 64, dtype=torch.bfloat16)),
        lambda: Projection(torch.zeros(4, 60, dtype=torch.bfloat16), torch.zeros(512, 60, dtype=torch.bfloat16)),
        lambda: Projection(torch.zeros(4, 48, dtype=torch.bfloat16), torch.zeros(512, 48, dtype=torch.bfloat16)),
        lambda: Projection(wide, torch.zeros(512, 65, dtype=torch.bfloat16)[:, :64]),
    ]  # fmt: skip
    for number, projection in enumerate(changes, 1):
        assert verdicts.is_right("triton", projection())
        assert starts(file) == number
    for name, value in (("gpu", "NVIDIA H100"), ("driver", "12090"), ("capability", "10.0")):
        forget(monkeypatch)
        monkeypatch.setattr(verdicts, "describe_gpu", lambda device, name=name, value=value: GPU | {name: value})
        assert verdicts.is_right("triton", HEAD)
    assert starts(file) == len(changes) + 3
    forget(monkeypatch)
    monkeypatch.setattr(verdicts, "sources", lambda backend: "other sources")
    assert verdicts.is_right("triton", HEAD)
    assert starts(file) == len(changes) + 4


def test_shapes_of_one_class_share_a_verdict(child: Callable[[str], Path]) -> None:
    file = child(RIGHT)
    for rows, vocab in ((4, 512), (300, 512), (4, 256 + 256)):
        assert verdicts.is_right("triton", Projection(torch.zeros(rows, 64), torch.zeros(vocab, 64)))
    assert verdicts.is_right("triton", Projection(torch.zeros(4, 64), torch.zeros(768, 64)))
    assert verdicts.is_right("triton", Projection(torch.zeros(4, 64), torch.zeros(1024, 64)))
    assert starts(file) == 2


def test_the_hash_covers_the_kernels(tmp_path: Path) -> None:
    assert len(verdicts.sources("triton")) == 16
    assert verdicts.sources("triton") != verdicts.sources("cuda")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": 1}', '{"key": KEY, "verdict": {"outcome": "perfect"}}'])
def test_a_file_that_is_not_ours_is_asked_again(content: str, child: Callable[[str], Path], machine: Path) -> None:
    file, key = child(RIGHT), verdicts.identity(QUESTION, CPU)
    path = machine / "cache/eapo_kernels" / verdicts._file_name(key)
    path.parent.mkdir(parents=True)
    path.write_text(content.replace("KEY", json.dumps(key)))
    assert verdicts.is_right("triton", HEAD)
    assert starts(file) == 1
    assert json.loads(path.read_text())["verdict"]["outcome"] == "right"


def test_a_read_only_home_uses_the_temporary_folder_then_memory(
    child: Callable[[str], Path], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = child(RIGHT)
    (machine / "cache").write_text("a file where the folder should be")
    assert verdicts.is_right("triton", HEAD)
    (kept,) = machine.glob("eapo_kernels-*/verdict-*.json")
    forget(monkeypatch)
    assert verdicts.is_right("triton", HEAD)
    assert starts(file) == 1
    kept.unlink()
    monkeypatch.setattr(verdicts.tempfile, "gettempdir", lambda: str(machine / "cache"))
    forget(monkeypatch)
    for _ in range(2):
        assert verdicts.is_right("triton", HEAD)
    assert starts(file) == 2, "kept in memory"


def _ask(home: str, answers: Any) -> None:
    """Another process of the node."""
    os.environ["XDG_CACHE_HOME"] = home + "/cache"
    verdicts.tempfile.gettempdir = lambda: home  # type: ignore[assignment]
    verdicts.describe_gpu = lambda device: dict(GPU)
    slow = f"import time; open({home!r} + '/starts', 'a').write('started\\n'); time.sleep(2); {RIGHT}"
    verdicts.command = lambda question, device: [sys.executable, "-c", slow]
    answers.put(verdicts.is_right("triton", HEAD))


def test_of_several_processes_one_checks_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_ask, args=(str(tmp_path), answers)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=120) for _ in processes] == [True] * 3
    for process in processes:
        process.join()
    assert starts(tmp_path / "starts") == 1


HIDDEN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "EAPO_KERNELS_BACKEND",
)  # fmt: skip


def test_a_child_sees_one_gpu_and_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*HIDDEN, "KEEP"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"1234-{index}"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    variables = verdicts.environment(torch.device("cuda", 2))
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-1234-2"
    assert variables["KEEP"] == "3"
    assert not {*HIDDEN} & set(variables)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,MIG-77")
    assert verdicts.environment(torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "MIG-77"
    assert Path(variables["PYTHONPATH"].split(os.pathsep)[0], "eapo_kernels").is_dir()


def test_no_room_on_the_gpu_is_unknown(child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = child(RIGHT)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 2**20, 80 * 2**30))
    verdict = verdicts._check(QUESTION, torch.device("cuda", 0))
    assert (verdict.outcome, verdict.detail) == ("unknown", "100 MiB of GPU memory are free, the check needs 1024")
    assert starts(file) == 0


def posing(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" looks for kernels on CPU tensors, and a backend of the name "triton" takes them."""
    kernels = replace(torch_backend.BACKEND, name="triton")
    load = dispatch.load
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(dispatch, "load", lambda name: kernels if name == "triton" else load(name))


def test_auto_takes_what_is_right(child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    posing(monkeypatch)
    child(RIGHT)
    assert dispatch.resolve("auto", HEAD).name == "triton"
    assert verdicts.used() == {f"bfloat16 {QUESTION.shape_class}": "triton (triton is right)"}


@pytest.mark.parametrize("pin", ["torch", "triton"])
def test_a_pinned_backend_is_not_checked(pin: str, child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    posing(monkeypatch)
    file = child(WRONG)
    monkeypatch.setenv(dispatch.VARIABLE, pin)
    assert dispatch.resolve("auto", HEAD).name == pin
    assert dispatch.resolve("triton", HEAD).name == "triton"
    assert starts(file) == 0


def test_traces_captures_and_backward_passes_only_look_up(
    child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    posing(monkeypatch)
    file = child(RIGHT)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Projection(mode.from_tensor(HEAD.hidden), mode.from_tensor(HEAD.weight))
        assert dispatch.resolve("auto", fake).name == "torch"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.resolve("auto", HEAD).name == "torch"
    monkeypatch.undo()
    assert starts(file) == 0


def test_a_backward_pass_does_not_start_a_check(child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    posing(monkeypatch)
    file = child(RIGHT)
    names: list[str] = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            names.append(dispatch.resolve("auto", HEAD).name)
            return grad

    Ask.apply(torch.ones(1, requires_grad=True)).backward()
    assert names == ["torch"]
    assert starts(file) == 0
    assert dispatch.resolve("auto", HEAD).name == "triton"
    Ask.apply(torch.ones(1, requires_grad=True)).backward()
    assert names == ["torch", "triton"]


def test_one_call_asks_once_and_its_backward_takes_the_same(
    child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict that changes between the forward and the backward changes nothing."""
    posing(monkeypatch)
    child(RIGHT)
    hidden = torch.randn(4, 64, requires_grad=True)
    stats = token_stats(hidden, torch.randn(512, 64), torch.arange(4))
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts, "is_right", lambda *arguments: pytest.fail("asked again in the backward"))
    stats.logp.sum().backward()
    assert hidden.grad is not None


def _rank(rank: int, home: str, answers: Any) -> None:
    """A rank of a split head: rank 1 finds the kernels wrong."""
    from eapo_kernels import VocabShard

    verdicts.tempfile.gettempdir = lambda: f"{home}/{rank}"  # type: ignore[assignment]
    os.environ["XDG_CACHE_HOME"] = f"{home}/{rank}"
    Path(home, str(rank)).mkdir()
    verdicts.describe_gpu = lambda device: dict(GPU)
    verdicts.command = lambda question, device: [sys.executable, "-c", WRONG if rank else RIGHT]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{home}/store", rank=rank, world_size=2)
    kernels, load = replace(torch_backend.BACKEND, name="triton"), dispatch.load
    dispatch.on_gpu = lambda tensor: True
    dispatch.load = lambda name: kernels if name == "triton" else load(name)
    weight = torch.zeros(300 - rank, 64)
    shard = VocabShard.of(dist.group.WORLD, weight)
    alone = dispatch.resolve("auto", Projection(torch.zeros(4, 64), torch.zeros(512, 64))).name
    split = [dispatch.resolve("auto", Projection(torch.zeros(4, 64), weight, shard=shard)).name for _ in range(2)]
    answers.put((rank, alone, split))
    dist.destroy_process_group()


def test_ranks_that_disagree_take_torch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path), answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    assert found == [(0, "triton", ["torch", "torch"]), (1, "torch", ["torch", "torch"])]


def test_a_killed_check_leaves_no_process(child: Callable[[str], Path], tmp_path: Path) -> None:
    """A hanging child may have started a compiler."""
    pid = tmp_path / "pid"
    program = (
        f"import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    verdict = verdicts.run_child([sys.executable, "-c", program], dict(os.environ), limit=3.0)
    assert verdict.outcome == "timed out"
    time.sleep(0.2)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
