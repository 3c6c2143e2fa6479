"""The floor: the matrix products alone, together and each by itself, results thrown away.

Masked rows are left out. Chunks are cut as ours are: even, aligned, within the case's memory
budget. ``bare_gemms_whole`` makes all logits at once, in products as large as they can be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from eapo_kernels import Options
from eapo_kernels.ops.chunking import row_chunk, workspace_bytes

from ..case import MODES, SPARSE_MODES, Case, Results
from . import Provider

_WHOLE_BYTES = 2**33
_OF_MODE = {"fwd": ("logits",), "frozen_head": ("logits", "d_hidden")}
_ALL = ("logits", "d_hidden", "d_weight")


def _prepare(only: str | None = None, *, whole: bool = False) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        products = (only,) if only else _OF_MODE.get(mode, _ALL)
        hidden, weight = case.hidden[: case.n_valid], case.weight
        n_rows, row_bytes = len(hidden), case.v * hidden.element_size()
        if whole and n_rows * row_bytes > _WHOLE_BYTES:
            raise ValueError(f"logits: expected at most {_WHOLE_BYTES} bytes at once, got {n_rows * row_bytes}")
        step = n_rows if whole else row_chunk(n_rows, row_bytes, workspace_bytes(Options(case.memory_budget), hidden.device))
        # Not zeros: a GPU draws less power on them and clocks higher.
        matrix = torch.randn(min(step, n_rows), case.v, dtype=case.dtype, device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def run() -> Results:
            for start in range(0, n_rows, step):
                rows = slice(start, min(start + step, n_rows))
                z = matrix[: rows.stop - start]
                if "logits" in products:
                    torch.mm(hidden[rows], weight.T, out=z)
                if "d_hidden" in products:
                    torch.mm(z, weight, out=d_hidden[rows])
                if "d_weight" in products and start == 0:
                    torch.mm(z.T, hidden[rows], out=d_weight)
                elif "d_weight" in products:
                    torch.addmm(d_weight, z.T, hidden[rows], out=d_weight)
            return {}

        return run

    return prepare


PROVIDERS = [
    Provider(
        "bare_gemms",
        "matrix products only",
        _prepare(),
        (*MODES, *SPARSE_MODES),
        settings="even chunks of logits in our memory budget: by default 512 MiB on a CPU, up to 2 GiB on a GPU",
    ),
    Provider(
        "bare_gemms_whole", "matrix products only", _prepare(whole=True), MODES, settings="all logits at once, up to 8 GiB"
    ),
    *(Provider(f"bare_{name}", f"the {name} product only", _prepare(name), ("fwd_bwd",)) for name in _ALL),
]
