"""The emulator finds deliberate mistakes in the kernels over rows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import emulated_cuda
import pytest
import torch
from finalize_cases import partial_sums
from ptx_machine import Fault, Kernel
from torch import Tensor

from eapo_kernels.ops.cuda import build, rows
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.projection import Projection
from eapo_kernels.ops.triton.offsets import ScaledExpSums
from eapo_kernels.ops.triton.sums import PartialSums

pytestmark = pytest.mark.csrc

SCHEDULES = [(seed, 0.5) for seed in range(4)]
N = 36
"""Rows: one program of 32, and one of which most rows do not exist."""


def finalize() -> tuple[Launch, Tensor]:
    g = torch.Generator().manual_seed(0)
    z, targets = torch.randn(N, 80, generator=g, dtype=torch.float64), torch.randint(80, (N,), generator=g)
    launch, _ = rows.finalize(PartialSums(partial_sums(z, targets, 40), entropy=True, second_moments=True))
    out = launch.tensors["out"]
    assert out is not None
    return launch, out


def row_offsets() -> tuple[Launch, Tensor]:
    """Rows of 44 numbers in room for 48, the rest NaN."""
    hidden = torch.randn(N, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[:, 44:] = math.nan
    p = Projection(hidden[:, :44], hidden[:, :44])
    sums = ScaledExpSums(torch.zeros(2, N), torch.zeros(1, 1, 1), 256, torch.zeros(1).int(), torch.zeros(1).int())
    return rows.row_offsets(p, torch.arange(N).flip(0), None, sums), sums.offsets


PROBLEMS = {"finalize": finalize, "row_offsets": row_offsets}
MISTAKES = {
    "parts are read before all warps have written": ("finalize", "rows.h", "    __syncthreads();", "    "),
    "a warp's parts are not merged": ("finalize", "rows.h", "distance = LINE_THREADS; distance", "distance = WARP; distance"),
    "rows behind the last are read": ("finalize", "finalize.cu", "if (begin < a.n_rows)", "if (begin >= 0)"),
    "rows behind the last are written": ("finalize", "finalize.cu", "inside = row < a.n_rows;", "inside = row >= 0;"),
    "numbers behind a row's end are read": ("row_offsets", "row_offsets.cu", "if (last < dim)", "if (last < dim + 4)"),
    "the last numbers of a row are not read": ("row_offsets", "row_offsets.cu", "if (last < dim)", "if (last < dim - 1)"),
    "rows that do not exist": ("row_offsets", "row_offsets.cu", "if (row >= a.n_rows) return;", ""),
}
"""The kernel, and in which file what is replaced by what."""


@pytest.mark.parametrize("name", [*PROBLEMS, *MISTAKES])
def test_only_mistakes_are_found(name: str, tmp_path: Path) -> None:
    kernel, file, right, wrong = MISTAKES.get(name, (name, "rows.h", "", ""))
    sources = Path(shutil.copytree(build.source_folder(), tmp_path / "csrc"))
    text = (sources / file).read_text()
    assert not right or text.count(right) == 1, "the sources have changed: write the mistake anew"
    (sources / file).write_text(text.replace(right, wrong) if right else text)
    launch, out = PROBLEMS[kernel]()
    emulated_cuda.run(launch)
    expected = out.clone()
    code = Kernel(build.ptx(launch.build, sources=sources, cache=tmp_path), launch.build.kernel)
    found = []
    for seed, lateness in SCHEDULES:
        out.fill_(math.nan)
        try:
            emulated_cuda.run(launch, code, seed=seed, lateness=lateness)
        except Fault as fault:
            found.append(str(fault))
        else:
            found += [] if torch.equal(out, expected) else ["wrong numbers"]
    assert bool(found) == (name in MISTAKES), found
