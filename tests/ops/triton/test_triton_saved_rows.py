"""Rows that the forward saves for the backward, from chunks of logits and of scaled
exponentials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import compare_saved

from eapo_kernels.testing import make_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned", "narrow_fp16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, about overflow before rows are rescued
]

N, D, V = 70, 32, 300


@pytest.mark.parametrize("budget", [2**24, 40 * 2 * 2 * 304 * 64, 2**14], ids=["all", "some", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients(budget: int, dtype: torch.dtype, device: str) -> None:
    compare_saved(make_inputs(N, D, V, dtype=dtype, bias=True, device=device), budget, backend="triton")


@pytest.mark.parametrize("transform", [{"softcap": 5.0}, {"logit_scale": 0.5, "inv_temperature": 1.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transforms_and_masks(transform: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    mask = torch.rand(N, generator=torch.Generator().manual_seed(1)) > 0.3
    compare_saved(make_inputs(N, D, V, dtype=dtype, device=device), 2**24, backend="triton", mask=mask.to(device), **transform)
