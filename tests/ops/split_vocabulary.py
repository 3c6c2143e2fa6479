"""A head split over processes: the calls, what a rank computes of its shard, and what one process computes of the full head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from comparison import cotangents, policy_batch
from torch import Tensor

from eapo_kernels import METHODS, EAPOConfig, Options, TokenSupport, policy_loss, token_stats
from eapo_kernels.testing import Inputs, make_inputs

N, D, V = 200, 24, 211
SIZES = {2: (160, 51), 3: (3, 150, 58)}
"""Rows of the head on each rank: uneven, one of them tiny."""

CHUNKS = Options(memory_budget=62_000)
"""Three chunks of the 160 or so rows that count, in fp32 on any backend and any number of ranks."""


@dataclass(frozen=True)
class Case:
    """A call on inputs of its own.

    Attributes:
        call: "stats" with all cotangents, "logp" with that of the log-probs alone, or a method's name.
        arguments: for the call; ``main=True``: with a ``main_grad``; ``old``: added to the old log-probs.
        dtype: of the inputs.
        change: what is done to the inputs.
        frozen: the head needs no gradient.
        gathers, reductions: collectives of forward and backward together, on every rank.
        exponentials: the triton backend takes the scaled-exponential form for it.
    """

    call: str
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs
    frozen: bool = False
    gathers: int = 1
    reductions: int = 1
    exponentials: bool = False

    def inputs(self) -> Inputs:
        """The same on every rank."""
        return self.change(make_inputs(N, D, V, seed=5, bias=True)).to(self.dtype)


def _steep(inputs: Inputs) -> Inputs:
    """Columns from 130 on lie 300 nats below the others, some targets with them; and in some rows it is the other way round."""
    assert inputs.bias is not None
    bias, weight = inputs.bias.clone(), inputs.weight.clone()
    hidden = inputs.hidden.clone()
    weight[:, 0] = torch.where(torch.arange(V) < 130, 1.0, -1.0)
    hidden[:, 0] = torch.where(torch.arange(N) % 3 == 0, -150.0, 150.0)
    return replace(inputs, hidden=hidden, weight=weight, bias=bias)


def _removed(inputs: Inputs) -> Inputs:
    """No column from 150 on is left: the last shard has none, another one loses some."""
    assert inputs.bias is not None
    bias = inputs.bias.clone()
    bias[150:] = -torch.inf
    return replace(inputs, bias=bias, targets=inputs.targets % 150)


_ROWS = torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.5
_MASK = torch.rand(N, generator=torch.Generator().manual_seed(2)) > 0.3
_EVERYTHING = {"softcap": 9.0, "logit_scale": 1.3, "inv_temperature": _ROWS, "mask": _MASK, "second_moments": True}
_BAD_GUESS = torch.linspace(-90, 90, N)
_EAPO = {"positive_weight": 0.7, "schedule": "one_pass"}
_BONUS = EAPOConfig(entropy_coef=0.05, dual_clip=3.0)
_OTHERS = torch.rand(N, V, generator=torch.Generator().manual_seed(3)) < torch.linspace(0, 0.2, N)[:, None]
_SUPPORT = TokenSupport.from_lists(
    [torch.cat([row.nonzero()[:, 0], target[None]]).unique()
     for row, target in zip(_OTHERS, make_inputs(N, D, V, seed=5, bias=True).targets, strict=True)]
)  # fmt: skip
_WITH_FULL_ENTROPY = TokenSupport(_SUPPORT.ids, _SUPPORT.offsets, full_entropy=True)

CASES = {
    "exact_statistics": Case("stats", _EVERYTHING, torch.float64),
    "exact_saved": Case("logp", {"entropy": "nograd"}, torch.float64),
    "exact_one_pass": Case("eapo", _EAPO, torch.float64),
    "statistics": Case("stats", _EVERYTHING),
    "slabs": Case("stats", {"options": CHUNKS}),
    "saved": Case("logp", {"entropy": "nograd", "mask": _MASK}),
    "nothing_saved": Case("logp", {"entropy": "none", "options": Options(plan="recompute")}),
    "uncompacted": Case("logp", {"entropy": "nograd", "mask": _MASK, "options": Options(compact=False)}),
    "one_pass": Case("eapo", _EAPO | {"inv_temperature": _ROWS}),
    "chunks": Case("eapo", _EAPO | {"options": CHUNKS}, gathers=3, reductions=3),
    "autograd": Case("eapo", _EAPO | {"schedule": "autograd"}),
    "bonus": Case("eapo", _EAPO | {"config": _BONUS, "options": CHUNKS}, gathers=3, reductions=3),
    "bonus_softcap": Case("grpo", {"config": _BONUS, "softcap": 7.0, "schedule": "one_pass"}),
    "main_grad": Case("eapo", _EAPO | {"main": True, "options": CHUNKS}, gathers=3, reductions=3),
    "frozen": Case("eapo", _EAPO, frozen=True),
    "sequence_ratio": Case("gspo", {"schedule": "autograd"}),
    "sequence_ratio_main_grad": Case("gspo", {"main": True, "options": CHUNKS}, gathers=4, reductions=3),
    "steep": Case("logp", {"entropy": "nograd"}, change=_steep),
    "steep_statistics": Case("stats", change=_steep),
    "removed": Case("eapo", _EAPO, change=_removed),
    "removed_statistics": Case("stats", {"second_moments": True}, change=_removed),
    "exact_support": Case("stats", _EVERYTHING | {"support": _SUPPORT}, torch.float64),
    "support": Case("stats", _EVERYTHING | {"support": _SUPPORT}),
    "support_full_entropy": Case("stats", {"support": _WITH_FULL_ENTROPY}, gathers=2, reductions=2),
    "support_one_pass": Case("eapo", _EAPO | {"support": _SUPPORT}),
    "support_autograd": Case("grpo", {"support": _SUPPORT, "config": _BONUS, "schedule": "autograd"}),
    "support_main_grad": Case("eapo", _EAPO | {"support": _SUPPORT, "main": True}),
    "bfloat16_support": Case("eapo", _EAPO | {"support": _SUPPORT}, torch.bfloat16),
    "nothing_counts": Case("stats", {"mask": torch.zeros(N, dtype=torch.bool)}, gathers=0, reductions=0),
    "bfloat16": Case("stats", {"inv_temperature": 0.8}, torch.bfloat16),
    "bfloat16_saved": Case("logp", {"entropy": "nograd"}, torch.bfloat16, exponentials=True),
    "bfloat16_one_pass": Case("eapo", _EAPO | {"options": CHUNKS}, torch.bfloat16, gathers=3, reductions=3, exponentials=True),
    "bfloat16_steep": Case("logp", {"entropy": "nograd"}, torch.bfloat16, _steep, exponentials=True),
    "bfloat16_removed": Case("eapo", _EAPO | {"inv_temperature": _ROWS}, torch.bfloat16, _removed, exponentials=True),
    "bfloat16_bad_guess": Case("eapo", _EAPO | {"old": _BAD_GUESS}, torch.bfloat16, exponentials=True),
    "bfloat16_removed_bad_guess": Case("eapo", _EAPO | {"old": _BAD_GUESS}, torch.bfloat16, _removed, exponentials=True),
    "float16_one_pass": Case("eapo", _EAPO, torch.float16, exponentials=True),
    "float16_saved": Case("logp", {"entropy": "nograd"}, torch.float16, exponentials=True),
    "float16_steep": Case("logp", {"entropy": "nograd"}, torch.float16, _steep, exponentials=True),
    "float16_removed_bad_guess": Case("eapo", _EAPO | {"old": _BAD_GUESS / 10}, torch.float16, _removed, exponentials=True),
}


def run(case: Case, inputs: Inputs, rows: slice, backend: str, group: Any) -> dict[str, Tensor]:
    """Results of a call on some rows of the head, and the gradients (those of the head: of these rows)."""
    assert inputs.bias is not None
    leaves = {"hidden": inputs.hidden, "weight": inputs.weight[rows], "bias": inputs.bias[rows]}
    leaves = {name: t.clone().requires_grad_(name == "hidden" or not case.frozen) for name, t in leaves.items()}
    given: dict[str, Any] = {"bias": leaves["bias"], "process_group": group, "backend": backend} | case.arguments
    if case.call in ("stats", "logp"):
        stats = token_stats(leaves["hidden"], leaves["weight"], inputs.targets, **given)
        weights = cotangents(N, "all" if case.call == "stats" else "logp").to(stats.logp.dtype)
        loss = (weights[0] * stats.logp).sum()
        if case.call == "stats":
            assert stats.entropy is not None
            loss = loss + (weights[1] * stats.entropy + weights[2] * stats.lse).sum()
        results = {name: value.detach() for name, value in stats._asdict().items() if value is not None}
    else:
        method = METHODS[case.call]
        method = replace(method, config=given.pop("config", method.config))
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        main = torch.zeros_like(leaves["weight"], dtype=wide) if given.pop("main", False) else None
        batch = replace(policy_batch(inputs, "cpu"), support=given.pop("support", None))
        if "old" in given:
            batch = replace(batch, old_logp=batch.old_logp + given.pop("old"))
        out = policy_loss(leaves["hidden"], leaves["weight"], batch, method=method, main_grad=main, **given)
        loss, results = out.loss, {"loss": out.loss.detach(), "entropy": out.metrics["eapo/entropy"]}
        if main is not None:
            results["d_weight"] = main
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused="d_weight" in results)
    return results | {f"d_{name}": g for name, g in zip(wanted, gradients, strict=True) if g is not None}


def rows_of(rank: int, world: int) -> slice:
    start = sum(SIZES[world][:rank])
    return slice(start, start + SIZES[world][rank])


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the collectives of this process."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
