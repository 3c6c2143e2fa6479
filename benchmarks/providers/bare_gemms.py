"""The floor: the matrix products alone, in chunks of rows that would fit a quarter of a gigabyte, results thrown away."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import Case
from . import Provider, Results

_BYTES = 2**28


def prepare(case: Case, mode: str) -> Callable[[], Results]:
    hidden, weight = case.inputs.hidden, case.inputs.weight
    step = max(1, _BYTES // (case.v * hidden.element_size()))
    logits = torch.empty(min(step, case.n), case.v, dtype=case.dtype, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)

    def run() -> Results:
        for start in range(0, case.n, step):
            rows = slice(start, min(start + step, case.n))
            z = torch.mm(hidden[rows], weight.T, out=logits[: rows.stop - rows.start])
            if mode != "fwd":
                torch.mm(z, weight, out=d_hidden[rows])
            if mode == "fwd_bwd":
                torch.addmm(d_weight, z.T, hidden[rows], out=d_weight)
        return {}

    return run


PROVIDERS = [Provider("bare_gemms", "matrix products only", prepare)]
