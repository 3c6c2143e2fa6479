"""The table of kernels, interpreted: every launch beside float64, and a wrong result is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels import KERNELS, TABLE, Check
from eapo_kernels.ops.triton.common import Launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there python -m benchmarks.gpu launches them")

CHECKS = kernels.checks("triton", "interpreter")
OUTPUTS = {
    **dict.fromkeys(("row_maxima", "row_offsets"), "offsets"),
    **dict.fromkeys(("scaled_exp_gemm", "scaled_exp_rescue"), "matrix"),
    **dict.fromkeys(("stream_statistics", "row_statistics"), "sums"),
    "collect_rescue_ids": "n_rescue",
}
"""Arguments that are spoiled, by kernel; "out" of the others."""


def test_every_kernel_of_the_table_of_tiles_has_an_entry() -> None:
    assert {name for backend, name in KERNELS if backend == "triton"} == {entry.kernel for entry in TABLE}
    for family in ("sm80", "sm90", "sm100", "interpreter"):
        assert {check.kernel for check in kernels.checks("triton", family)} == {entry.kernel for entry in TABLE}


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_kernel_matches_float64(check: Check) -> None:
    assert check.why_wrong(kernels.TOY[0], "cpu") is None


@pytest.mark.parametrize("every", [1, 2], ids=["wrong", "nondeterministic"])
@pytest.mark.parametrize("name", sorted({check.kernel for check in CHECKS}))
def test_a_wrong_or_nondeterministic_kernel_is_reported(name: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is changed after every launch, or after every second one."""
    check = next(c for c in CHECKS if c.kernel == name)
    run = check._run(kernels.TOY[0], "cpu")
    launches = 0

    def spoiled() -> None:
        nonlocal launches
        run.launch()
        launches += 1
        if launches % every == 0:
            output = OUTPUTS.get(name, "out")
            value = run.launch.arguments[output]
            tensor = value.base if hasattr(value, "base") else value
            tensor[..., 0] += 1 if name == "collect_rescue_ids" else 0.5 + tensor[..., 0].abs()

    assert isinstance(run.launch, Launch)
    with torch.no_grad():
        wrong = kernels.why_wrong(replace(run, launch=spoiled))
    assert wrong is not None
    assert ("the second run differs" if every == 2 else "off by") in wrong


def test_nan_and_what_is_not_written_are_wrong() -> None:
    got = torch.tensor([1.0, torch.nan])
    assert kernels.difference("logp", got, torch.ones(2, dtype=torch.float64)) == "logp: off by nan, allowed 2.00e-05"
    check = next(c for c in CHECKS if c.kernel == "finalize")
    with torch.no_grad():
        run = check._run(kernels.TOY[0], "cpu")
        assert "off by nan" in kernels.why_wrong(replace(run, launch=lambda: None))
