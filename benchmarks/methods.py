"""``python -m benchmarks.methods``: what every method of ``METHODS`` costs over plain GRPO, at one
shape, interleaved.

Two numbers a method: its loss, forward and backward, over GRPO's in the same round; and weighing
the tokens (``weight_tokens``), which happens once a step, over one such GRPO pass of all the step's
tokens. What a method asks the old policy for beyond log-prob and entropy (second moments, another
temperature, the nucleus) is named, not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_kernels import METHODS, Method, TokenStats, get_method, make_controller, policy_loss, weight_tokens
from eapo_kernels.objectives.token_weights.step import MARKS, STATISTICS

from .case import POSITIVE_WEIGHT, Case, make_case
from .measure import make_clock, time_interleaved
from .results import FOLDER, ResultFile, environment

BASE = "grpo"
_LENGTH = 64


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (8192, 2048, 151936) if device == "cuda" else (256, 576, 49152)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help=f"folder for the JSON (committed ones: {FOLDER.name}/methods)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--shape", type=int, nargs=3, default=shape, metavar=("N", "D", "V"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    case = make_case(*options.shape, torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    result = ResultFile(environment(device))
    result.rows = measure(case, options.rounds)
    for row in result.rows:
        print(f"{row['method']:20} loss {row['over_grpo']:.3f} of grpo, weights {row['weights_over_grpo']:.4f}")
    if options.out is not None:
        print(f"wrote {result.save(options.out)}")
    return 0


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row a method, in the registry's order."""
    jobs = {name: _jobs(method, case) for name, method in METHODS.items()}
    runs = {("loss", name): loss for name, (loss, _) in jobs.items()}
    runs |= {("weights", name): weigh for name, (_, weigh) in jobs.items() if weigh is not None}
    names = {f"{what} {name}": run for (what, name), run in runs.items()}
    times = time_interleaved(names, rounds, make_clock(case.hidden.device.type))
    base = times[f"loss {BASE}"]

    def over(what: str, name: str) -> float:
        own = times.get(f"{what} {name}")
        return statistics.median(a / b for a, b in zip(own, base, strict=True)) if own else 0.0

    return [
        {
            "method": name,
            "scope": method.scope,
            "needs": sorted(method.token_weighting.needs) if method.token_weighting else [],
            "shape": case.shape(),
            "rounds": len(base),
            "ms": statistics.median(times[f"loss {name}"]),
            "over_grpo": over("loss", name),
            "weights_over_grpo": over("weights", name),
        }
        for name, method in METHODS.items()
    ]


def _jobs(method: Method, case: Case) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """(loss forward and backward, weighing the tokens or None)."""
    if method.config.reduction == "fixed_length":
        method = get_method(method, fixed_length=_LENGTH)
    assert case.batch.rewards is not None
    batch = replace(case.batch, rewards=(case.batch.rewards > 0.5).float(), ref_logp=case.batch.old_logp)
    stats = _statistics(case)
    controller = make_controller(method)
    if controller is not None:
        controller.update(float(case.entropy.sum()), case.n)
    state = controller.values() if controller else {}
    extras = _extras(case, stats)

    def weigh() -> Any:
        return weight_tokens(method, batch, stats, state=state, extras=extras, progress=0.5)

    weighted = weigh()
    weight = POSITIVE_WEIGHT if method.positive_weight is None else None

    def loss() -> object:
        hidden, head = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
        value = policy_loss(hidden, head, weighted, method=method, positive_weight=weight).loss
        return torch.autograd.grad(value, [hidden, head])

    return loss, weigh if method.token_weighting else None


def _statistics(case: Case) -> TokenStats:
    """Made-up second moments beside the true log-probs and entropies: they cost the same whatever
    they are."""
    logp, entropy = case.logp.float(), case.entropy.float()
    return TokenStats(logp, entropy, case.lse.float(), (-entropy).exp(), -entropy * (-entropy).exp(), entropy)


def _extras(case: Case, stats: TokenStats) -> dict[str, Tensor]:
    """Everything a token weighting may read, in plausible numbers."""
    assert stats.entropy is not None
    n, device = case.n, case.hidden.device
    position = torch.arange(n, device=device)
    marked = position % 7 == 0
    known: dict[str, Tensor] = {
        "tempered_logp": stats.logp - 0.1,
        "nucleus_entropy": 0.8 * stats.entropy,
        "teacher_logp": stats.logp + 0.3,
        "answer": position % 2 == 0,
        "spans": marked,
        "turn_ids": position % (n // 16) // 8,
        "reinforce": case.batch.sequence_ids == 1,
        "replayed": case.batch.sequence_ids == 2,
    }
    return {name: known[name] for name in (*STATISTICS, *MARKS) if name in known}


if __name__ == "__main__":
    sys.exit(main())
