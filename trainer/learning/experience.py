"""From a step's completions and the statistics of the old policy to token weights, which are fixed
once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eapo_kernels import Method, TokenBatch, diagnostics, observed_entropy, weight_tokens
from eapo_kernels.objectives.controllers import Controller

from ..config import Config, DataConfig
from ..dataset import Prompt, encode, fill
from ..models.policy import Policy
from ..records import Rollouts, ScoredRollouts, Tick
from .measure import Measurement, measure


@dataclass(frozen=True)
class Experience:
    """The completions that a step trains on.

    Attributes:
        completions: B completions.
        batch: their T tokens with the method's weights; ``batch.select(tokens)`` is any part of
            them. Their support stays with the completions: micro-batches carry it.
        old: statistics under the policy before the first update of the step.
        positive_weight: 0-dim, the controller's weight; None for a method with a weight of its own.
    """

    completions: Rollouts
    batch: TokenBatch
    old: Measurement
    positive_weight: Tensor | None

    def diagnose(self, method: Method) -> dict[str, float]:
        """Predicted entropy change of the step's first update, and the contributions to it
        (``eapo_kernels.diagnostics``).
        """
        found = diagnostics.diagnose_batch(method, self.batch, self.old.stats(), positive_weight=self.positive_weight)
        return {name: value.item() for name, value in found.items()}

    def masked(self, left_out: Sequence[bool]) -> Experience:
        """The same with some of the B completions left out of the loss and its denominator, while
        rewards, entropy and weights keep counting them.
        """
        kept = per_token(~torch.tensor(left_out), self.completions).to(self.old.logp.device)
        own = self.batch.mask
        return replace(self, batch=replace(self.batch, mask=kept if own is None else kept & own))


def weigh(
    method: Method,
    completions: Rollouts,
    rewards: Tensor,
    group_ids: Tensor,
    old: Measurement,
    *,
    controller: Controller | None = None,
    ref_logp: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    progress: float = 0.0,
    seed: int = 0,
) -> Experience:
    """Update the controller and compute the weights of all tokens of the step.

    Args:
        rewards: [B] fp64, finite.
        group_ids: [B] int64; completions with equal numbers form a group.
        ref_logp: [T] fp32, for a KL penalty.
        extras: [T] each, as in ``weight_tokens``.
        progress, seed: as in ``weight_tokens``.
    """
    device = old.logp.device
    targets = torch.tensor([token for ids in completions.completion_ids for token in ids], device=device)
    batch = TokenBatch(
        targets=targets,
        sequence_ids=per_token(torch.arange(len(completions)), completions).to(device),
        rewards=rewards.to(device),
        group_ids=group_ids.to(device),
        old_logp=None if old.on_policy else old.logp,
        ref_logp=ref_logp,
        rollout_logp=torch.cat(completions.logp).to(device),
    )
    measured = {"tempered_logp": old.tempered_logp, "nucleus_entropy": old.nucleus_entropy}
    extras = {**(extras or {}), **{name: value for name, value in measured.items() if value is not None}}
    output = None
    if controller is not None:
        output = controller.update(*observed_entropy(method, batch, old.stats(), extras=extras))
    weighted = weight_tokens(
        method,
        batch,
        old.stats(),
        state=controller.values() if controller else None,
        extras=extras,
        progress=progress,
        seed=seed,
    )
    return Experience(completions, weighted, old, output if method.positive_weight is None else None)


def per_token(per_answer: Tensor, completions: Rollouts) -> Tensor:
    """[T] from [B], one value a completion repeated for each of its tokens, on the CPU."""
    return per_answer.repeat_interleave(torch.tensor([len(ids) for ids in completions.completion_ids]))


def final_answer(completions: Rollouts, marker: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[T] bool CPU: the tokens after the one that completes ``marker`` in the decoded text; none
    where the marker does not occur.
    """
    flags: list[bool] = []
    for ids in completions.completion_ids:
        low, high = 0, len(ids) + 1  # the shortest prefix that holds the marker; len + 1: none does
        while low < high:
            middle = (low + high) // 2
            if middle > len(ids) or marker in tokenizer.decode(ids[:middle]):
                high = middle
            else:
                low = middle + 1
        flags += [place >= low for place in range(len(ids))]
    return torch.tensor(flags)


def teacher_prompts(
    config: DataConfig, prompts: Sequence[Prompt], answers: Sequence[object], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of the prompts in ``data.teacher_prompt``, with their reference answers."""
    asked = [fill(config.teacher_prompt, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return encode(asked, tokenizer, config)


def extra_statistics(
    config: Config, method: Method, policy: Policy, sampled: ScoredRollouts, completions: Rollouts, tick: Tick
) -> dict[str, Tensor]:
    """The extras of ``weight_tokens`` that are not measured on the policy's own completions, [T]
    each: answer mask, teacher log-probs.

    The teacher is the policy itself, prompted with the reference answer as well
    (``data.teacher_prompt``).
    """
    needs = frozenset() if method.token_weighting is None else method.token_weighting.needs
    extras: dict[str, Tensor] = {}
    if "answer" in needs:
        extras["answer"] = final_answer(completions, config.data.answer_marker, policy.tokenizer)
    if "teacher_logp" in needs:
        taught = teacher_prompts(config.data, sampled.columns["prompt"], sampled.columns["answer"], policy.tokenizer)
        shown = replace(completions, prompt_ids=taught)
        temperature, budget = config.rollout.temperature, config.optim.micro_batch_tokens
        extras["teacher_logp"] = measure(policy, shown, temperature=temperature, budget=budget, tick=tick).logp
    return {name: values.to(policy.device) for name, values in extras.items()}
