"""Statistics of a policy at every token of a step's completions, from which methods compute token
weights before the first update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eapo_kernels import Method, TokenStats, nucleus_entropy, token_stats

from .. import ranks
from ..config import OptimConfig
from ..models.policy import Policy
from ..records import Rollouts, Tick
from .batching import MicroBatch, collate, plan_shares


@dataclass(frozen=True)
class Measurement:
    """Statistics of every completion token, [T] fp32 each (in nats except p2); None where not
    requested.

    Attributes:
        logp, entropy: of the sampled distribution, at the sampling temperature and over the
            support of the completions.
        lse, p2, p2_logp, varentropy: see ``TokenStats``, over the support too. Without lse, log-prob
            and entropy are the engine's.
        tempered_logp: log-prob of the token at another temperature, over the same support.
        nucleus_entropy: entropy of the renormalised nucleus of the whole vocabulary.
    """

    logp: Tensor
    entropy: Tensor
    lse: Tensor | None = None
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    varentropy: Tensor | None = None
    tempered_logp: Tensor | None = None
    nucleus_entropy: Tensor | None = None

    @property
    def on_policy(self) -> bool:
        """Whether the step's one update takes the ratio to its own log-probs, which is exactly 1."""
        return self.lse is None

    def stats(self) -> TokenStats:
        """The statistics as ``weight_tokens`` and the diagnostics take them."""
        return TokenStats(**{name: getattr(self, name) for name in TokenStats._fields})


def wanted_by(method: Method, *, tempered: float, diagnose: bool) -> dict[str, Any]:
    """The statistics that ``method`` needs besides log-prob and entropy, and with ``diagnose`` those of
    its diagnostics, as keywords of ``measure``.

    tempered: the temperature factor, for a method that needs log-probs at another temperature.
    """
    needs = frozenset() if method.token_weighting is None else method.token_weighting.needs
    found = {
        "second_moments": diagnose or "second_moments" in needs,
        "tempered": tempered if "tempered_logp" in needs else None,
        "top_p": method.config.entropy_top_p if "nucleus_entropy" in needs else None,
    }
    return {name: value for name, value in found.items() if value}


def recorded(
    completions: Rollouts, method: Method, optim: OptimConfig, wanted: Mapping[str, Any], device: torch.device
) -> Measurement | None:
    """What the engine measured while it sampled ``completions`` from the present policy, where a step
    needs no more: one update, and a method that weighs responses, not tokens. Else None.
    """
    off_policy = optim.old_logp == "always" or optim.minibatches * optim.epochs > 1 or method.config.importance_cap is not None
    if completions.entropy is None or off_policy or method.token_weighting is not None or wanted:
        return None
    return Measurement(*(torch.cat(column).to(device) for column in (completions.logp, completions.entropy)))


@torch.no_grad()
def measure(
    policy: Policy, completions: Rollouts, *, temperature: float, budget: int, tick: Tick,
    second_moments: bool = False, tempered: float | None = None, top_p: float | None = None,
) -> Measurement:  # fmt: skip
    """Teacher-forced statistics of ``completions`` at the sampling temperature, in micro-batches of
    ``budget`` tokens. Every rank measures a share and receives the statistics of all completions.

    Args:
        second_moments: also measure p2, p2_logp and varentropy.
        tempered: also the log-prob at another temperature, a factor on the sampling temperature.
        top_p: also the entropy of the nucleus with this probability mass.
    """
    columns: dict[str, Tensor] = {}
    groups, repeated = plan_shares(completions, range(len(completions)), budget, policy.packed)

    for number, group in enumerate(groups + repeated):
        tick(number, len(groups + repeated))
        batch = collate(completions, group, policy.device, policy.packed)

        def head(hidden: Tensor, weight: Tensor, batch: MicroBatch = batch, **options: Any) -> dict[str, Tensor | None]:
            targets, support = batch.targets, batch.support
            found = token_stats(
                hidden, weight, targets, inv_temperature=1 / temperature, entropy="nograd",
                second_moments=second_moments, support=support, **options,
            )._asdict()  # fmt: skip
            if tempered is not None:
                other = 1 / (temperature * tempered)
                found["tempered_logp"] = token_stats(
                    hidden, weight, targets, inv_temperature=other, entropy="none", support=support, **options
                ).logp
            if top_p is not None:
                found["nucleus_entropy"] = nucleus_entropy(
                    hidden, weight, top_p=top_p, inv_temperature=1 / temperature, **options
                )
            return found

        for name, values in policy(batch.input_ids, batch.attention_mask, batch.rows, head, batch.lengths).items():
            if values is not None:
                column = columns.setdefault(name, torch.zeros(completions.tokens, device=policy.device))
                if number < len(groups):
                    column[batch.tokens] = values.float()
    return Measurement(
        **{name: ranks.all_reduce_sum(column) for name, column in columns.items()}
    )  # each token is measured by one rank and 0 on the others
