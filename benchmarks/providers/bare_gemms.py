"""The floor: the matrix products alone, together and each by itself, results thrown away.

Rows that are masked are left out. Chunks of rows would fit a quarter of a gigabyte, as ours do by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..case import MODES, Case
from ..truth import Results
from . import Provider

_BYTES = 2**28
_OF_MODE = {"fwd": ("logits",), "frozen_head": ("logits", "d_hidden")}
_ALL = ("logits", "d_hidden", "d_weight")


def _prepare(only: str | None) -> Callable[[Case, str], Callable[[], Results]]:
    def prepare(case: Case, mode: str) -> Callable[[], Results]:
        products = (only,) if only else _OF_MODE.get(mode, _ALL)
        hidden, weight = case.hidden[: case.n_valid], case.weight
        step = max(1, _BYTES // (case.v * hidden.element_size()))
        # Not zeros: a GPU draws less power on them and clocks higher.
        matrix = torch.randn(min(step, len(hidden)), case.v, dtype=case.dtype, device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)

        def chunks() -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, len(hidden), step):
                rows = slice(start, min(start + step, len(hidden)))
                yield rows, matrix[: rows.stop - rows.start]

        def run() -> Results:
            for rows, z in chunks():
                if "logits" in products:
                    torch.mm(hidden[rows], weight.T, out=z)
                if "d_hidden" in products:
                    torch.mm(z, weight, out=d_hidden[rows])
                if "d_weight" in products:
                    torch.addmm(d_weight, z.T, hidden[rows], out=d_weight)
            return {}

        return run

    return prepare


PROVIDERS = [
    Provider("bare_gemms", "matrix products only", _prepare(None), MODES),
    *(Provider(f"bare_{name}", f"the {name} product only", _prepare(name), ("fwd_bwd",)) for name in _ALL),
]
