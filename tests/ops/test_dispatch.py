"""Choosing a backend: what "auto" is, and that a name takes that backend or raises with the reason."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eapo_kernels import BackendUnavailable, EapoError, available_backends, token_stats
from eapo_kernels.ops import dispatch, torch_backend
from eapo_kernels.ops.lm_head import Projection

TENSOR = torch.zeros(2, 8)


def test_auto_is_torch_on_a_cpu() -> None:
    assert dispatch.resolve("auto", Projection(TENSOR, TENSOR)) is torch_backend.BACKEND


def test_the_environment_variable_pins_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    projection = Projection(TENSOR, TENSOR)
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(BackendUnavailable, match="EAPO_KERNELS_BACKEND 'cuda': cpu tensors"):
        dispatch.resolve("auto", projection)
    assert dispatch.resolve("torch", projection).name == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.resolve("auto", projection).name == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(EapoError, match="EAPO_KERNELS_BACKEND: expected one of auto, cuda, triton, torch, got 'fast'"):
        dispatch.resolve("auto", projection)


def test_available_backends_gives_a_reason_for_each_refusal() -> None:
    answer = available_backends("cpu")
    assert set(answer) == {"cuda", "torch", "triton"}
    assert answer["torch"] is None


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = replace(torch_backend.BACKEND, supports=lambda projection: "only on Sundays")
    monkeypatch.setattr(torch_backend, "BACKEND", picky)
    with pytest.raises(BackendUnavailable, match="backend 'torch': only on Sundays"):
        token_stats(TENSOR, TENSOR, torch.tensor([0, 1]), backend="torch")


@pytest.mark.parametrize(
    ("missing", "backends"), [("triton", ("triton", "cuda")), ("cuda", ("cuda",)), ("cuda.core", ("cuda",))]
)
def test_without_a_package_the_torch_backend_works_and_the_others_say_so(missing: str, backends: tuple[str, ...]) -> None:
    code = (
        f"import sys; sys.modules['{missing}'] = None; import torch; "
        "from eapo_kernels import available_backends, token_stats; "
        "h = torch.zeros(2, 8); token_stats(h, h, torch.tensor([0, 1])); found = available_backends(); "
        f"[print(found[name]) for name in {backends}]"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    for backend, said in zip(backends, out.stdout.splitlines(), strict=True):
        assert said.startswith(f"backend '{backend}': it needs ")
        assert f"eapo-kernels[{backend}]" in said
        assert missing in said.split(": ", 2)[2], "and what the import said"
