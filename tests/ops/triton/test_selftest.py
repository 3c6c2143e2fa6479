"""The self-check finds kernels that are broken on purpose, and their caller gets right numbers from the torch backend.

Each mistake is made in a copy of the package, which a real child process checks with interpreted kernels, as on a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import eapo_kernels
from eapo_kernels import TokenBatch, eapo_loss, reference, selftest
from eapo_kernels.ops import dispatch, verdicts
from eapo_kernels.selftest import CASES, check_case, checked_columns, make_problem
from eapo_kernels.testing import make_inputs

PACKAGE = Path(eapo_kernels.__file__).parent
CPU = torch.device("cpu")


class Mistake(NamedTuple):
    """In ``file`` replace ``right`` by ``wrong``; ``found`` are words of the verdict's detail."""

    file: str
    right: str
    wrong: str
    found: str
    outcome: str = "wrong"


EXP, SOFTMAX, GRAD = "ops/triton/scaled_exp.py", "ops/triton/online_softmax.py", "ops/triton/logit_grad.py"
ENTRIES = "ops/triton/sparse.py"
LAUNCH = "        launch()\n        last, final"
MISTAKES = {
    "the statistics drop the last column": Mistake(
        SOFTMAX, "is_target | (columns >= n_columns - first_column)", "is_target | (columns >= n_columns - 1 - first_column)",
        "statistics, without bias",
    ),
    "the exponentials drop the last column": Mistake(
        EXP, "(column >= n_columns - first_column)", "(column >= n_columns - 1 - first_column)", "autograd, saved, without bias"
    ),
    "a sum in bf16": Mistake(
        EXP, "sum_exp += tl.sum(e, 1)", "sum_exp += tl.sum(e.to(tl.bfloat16).to(tl.float32), 1)", "autograd, saved"
    ),
    "an offset that is off by a hundredth": Mistake(
        GRAD, "tl.fma(y, scale[:, None], -row_offset[:, None])", "tl.fma(y, scale[:, None], 1e-2 - row_offset[:, None])",
        "autograd, recomputed, without bias",
    ),
    "a field that is not written": Mistake(
        SOFTMAX, "tl.store(at + 3 * field, tl.where(empty, 0.0, x_exp * LN2), mask=mask)", "pass", "over NaN"
    ),
    "a swapped sign": Mistake(GRAD, "alpha -= a", "alpha += a", "autograd, recomputed, without bias"),
    "the rescue is skipped": Mistake(
        EXP, "rescue(projection, targets, self.sums, self._matrix)", "pass", "one pass, rescued rows"
    ),
    "sums in another order each time": Mistake(
        EXP, '"sums": sums.values, "offsets": sums.offsets, "n_tiles"',
        '"sums": sums.values * (1 + 1e-7 * torch.rand_like(sums.values)), "offsets": sums.offsets, "n_tiles"',
        "a second run gives other bits",
    ),
    "NaN in one row": Mistake(
        SOFTMAX, "factor = row_scale(row_inv_temperature, scale, safe_rows)\n    y_max",
        "factor = row_scale(row_inv_temperature, scale, tl.where(safe_rows == 77, safe_rows, safe_rows))\n"
        "    factor = tl.where(rows == 77, float('nan'), factor)\n    y_max",
        "statistics, without bias",
    ),
    "the target's entry of the gradient": Mistake(
        EXP, "factor * (sum_exp / total)", "factor * (sum_exp / total) * 1.02", "autograd, saved, without bias: d_|d_"
    ),
    "the bias is forgotten": Mistake(
        EXP, "y += tl.load(bias + target * bias_stride).to(tl.float32)", "y += 0.0", "with bias"
    ),
    "results depend on the other rows": Mistake(
        SOFTMAX, "logp = tl.where(top, -log_sum, x - log_sum)",
        "logp = tl.where(top, -log_sum, x - log_sum) * tl.where(n_rows > 1, 1.0000002, 1.0)", "other bits alone",
    ),
    "the last entries of a block are lost": Mistake(
        ENTRIES, "inside = (places < stop) &", "inside = (places < stop - 1) &", "d_hidden|d_weight"
    ),
    "an error of the driver": Mistake(
        SOFTMAX, LAUNCH, f'        raise RuntimeError("CUDA error: an illegal memory access")\n{LAUNCH}',
        "an illegal memory access", "crashed",
    ),
    "a crash": Mistake(
        SOFTMAX, LAUNCH, f"        import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n{LAUNCH}", "SIGSEGV", "crashed"
    ),
    "a hang": Mistake(SOFTMAX, LAUNCH, f"        while True: pass\n{LAUNCH}", "did not end within", "timed out"),
}  # fmt: skip


def broken_copy(mistake: Mistake, folder: Path) -> None:
    shutil.copytree(PACKAGE, folder / "eapo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "eapo_kernels" / mistake.file
    source = file.read_text()
    assert source.count(mistake.right) == 1, (
        f"expected {mistake.right!r} once in {mistake.file}, got {source.count(mistake.right)}"
    )
    file.write_text(source.replace(mistake.right, mistake.wrong))


@pytest.mark.parametrize("name", MISTAKES)
def test_broken_kernels_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mistake, environment = MISTAKES[name], verdicts.environment(CPU)
    broken_copy(mistake, tmp_path)
    monkeypatch.setattr(verdicts, "describe_gpu", lambda device: {"gpu": "a GPU", "capability": "9.0", "driver": "1"})
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        verdicts, "environment", lambda device: environment | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    )
    monkeypatch.setattr(verdicts, "TIME_LIMIT", 15.0 if mistake.outcome == "timed out" else 300.0)
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)

    inputs = make_inputs(12, 64, 300, dtype=torch.bfloat16)
    hidden, weight = inputs.leaves()
    rewards, groups = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0, 0, 0])
    batch = TokenBatch(inputs.targets, torch.arange(12) // 4, rewards, groups, old_logp=torch.full((12,), -2.0))
    with pytest.warns(RuntimeWarning, match=f"{mistake.outcome}.*{mistake.found}"):
        loss = eapo_loss(hidden, weight, batch, positive_weight=0.7).loss
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("auto", dispatch.Projection(hidden, weight)).name == "torch"

    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logp = reference.token_stats(*leaves, inputs.targets).logp
    exact = reference.eapo_loss(logp, batch.old_logp, batch.sequence_ids, rewards, groups, positive_weight=0.7)
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    for mine, right in zip((hidden, weight), leaves, strict=True):
        assert (mine.grad.double() - right.grad).abs().max() <= 2**-7 * right.grad.abs().max()


@pytest.mark.parametrize("flags", [["--softcap"], ["--dtype", "fp32"], ["--dtype", "fp16", "--strided"]], ids=" ".join)
def test_the_command_finds_the_kernels_right(flags: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "eapo_kernels",
        "selftest",
        "--device",
        "cpu",
        "--backend",
        "triton",
        "--dim",
        "64",
        "--vocab",
        "300",
    ]
    out = subprocess.run(
        [*command, *flags, "--json"], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert out.returncode == 0, out.stdout + out.stderr
    report = json.loads(out.stdout)
    assert report["verdict"]["outcome"] == "right"
    assert len(report["rows"]) == 2 * len(CASES)
    assert all(0 < row["error"] <= 1 for row in report["rows"])


def test_the_command_prints_a_table_and_exit_codes() -> None:
    command = [sys.executable, "-m", "eapo_kernels", "selftest", "--device", "cpu", "--dim", "32", "--vocab", "100"]
    good = subprocess.run([*command, "--backend", "torch"], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "error/allowed" in good.stdout
    assert good.stdout.rstrip().splitlines()[-1].startswith("torch: right in ")
    none = subprocess.run([*command, "--backend", "cuda"], capture_output=True, text=True)
    assert none.returncode == 2, none.stdout + none.stderr
    assert "needs an NVIDIA GPU" in none.stdout


@pytest.mark.parametrize("vocab", [50257, 128256, 151936, 32000, 129280, 100, 7])
def test_the_vocabulary_that_is_checked_is_of_the_same_class(vocab: int) -> None:
    import math

    small = checked_columns(vocab)
    assert math.gcd(small, 256) == math.gcd(vocab, 256)
    assert min(vocab, selftest.COLUMNS) <= small <= max(selftest.COLUMNS + 512, 512)


def test_a_result_that_is_all_zero_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute tolerance of 2e-2 would pass a gradient of zeros."""
    problem = make_problem(verdicts.Question("torch", dim=64, vocab=300), CPU, full=False)
    for case in CASES[1:]:
        zeros = case._replace(
            run=lambda p, b, case=case: {k: v * 0 if k == "d_weight" else v for k, v in case.run(p, b).items()}
        )
        row = check_case(problem, zeros, "torch", full=False)
        assert row.outcome == "wrong"
        assert "d_weight" in row.detail


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dim", "0"], "--dim: expected a positive whole number, got '0'"),
        (["--tune", "--strided", "--device", "cpu"], "--tune: expected operands that can be described"),
        (["--device", "cuda:7"], "--device: expected one of"),
        (
            ["--tune", "--device", "cpu"],
            "--tune: expected a device for the triton backend, got CPU tensors without the interpreter",
        ),
    ],
)
def test_bad_arguments_of_the_command(flags: list[str], said: str) -> None:
    interpreted = "--strided" in flags
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    out = subprocess.run(
        [sys.executable, "-m", "eapo_kernels", "selftest", *flags], capture_output=True, text=True, env=environment
    )
    assert out.returncode == 2
    assert said in out.stderr
    assert "Traceback" not in out.stderr
