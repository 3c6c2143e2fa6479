"""From a step's answers and the old policy's statistics to what the learner slices: every token's weight fixed, once a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eapo_kernels import Method, TokenBatch, diagnostics, observed_entropy, weight_tokens
from eapo_kernels.objectives.controllers import Controller

from ..config import Config
from ..dataset import encode_prompt, teacher_prompt
from ..models.policy import Policy
from ..records import Sampled, Tick
from .batching import Answers
from .measure import Measurement, measure


@dataclass(frozen=True)
class Experience:
    """The answers of a step that are learned from.

    Attributes:
        answers: B answers.
        batch: their T tokens as the method weighs them; any part of them is ``batch.select(tokens)``.
        old: statistics under the policy before this step's first update.
        positive_weight: 0-dim, the controller's weight; None for a method that brings its own.
    """

    answers: Answers
    batch: TokenBatch
    old: Measurement
    positive_weight: Tensor | None

    def diagnose(self, method: Method) -> dict[str, float]:
        """What the step's first update will do to the entropy, and which tokens pull on it (``eapo_kernels.diagnostics``)."""
        found = diagnostics.diagnose_batch(method, self.batch, self.old.stats(), positive_weight=self.positive_weight)
        return {name: value.item() for name, value in found.items()}


def weigh(
    method: Method,
    answers: Answers,
    rewards: Tensor,
    group_ids: Tensor,
    old: Measurement,
    *,
    controller: Controller | None = None,
    advantages: Tensor | None = None,
    ref_logp: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    progress: float = 0.0,
    seed: int = 0,
) -> Experience:
    """Update the controller, fix the weights of all tokens of the step, and say what to learn from.

    Args:
        rewards: [B] fp32, finite.
        group_ids: [B] int64, equal for answers that are compared with each other.
        advantages: [B] fp32 in the place of the method's own, or None.
        ref_logp: [T] fp32, for a KL penalty.
        extras: [T] each, as in ``weight_tokens``.
        progress, seed: as in ``weight_tokens``.
    """
    device = old.logp.device
    targets = torch.tensor([token for ids in answers.completion_ids for token in ids], device=device)
    batch = TokenBatch(
        targets=targets,
        sequence_ids=per_token(torch.arange(len(answers)), answers).to(device),
        rewards=rewards.to(device),
        group_ids=group_ids.to(device),
        old_logp=old.logp,
        ref_logp=ref_logp,
        rollout_logp=answers.rollout_logp.to(device),
        advantages=None if advantages is None else advantages.to(device),
        token_advantages=None if advantages is None else False,
    )
    measured = {"tempered_logp": old.tempered_logp, "nucleus_entropy": old.nucleus_entropy}
    extras = {**(extras or {}), **{name: value for name, value in measured.items() if value is not None}}
    output = None
    if controller is not None:
        output = controller.update(*observed_entropy(method, batch, old.stats(), extras=extras))
    shaped = weight_tokens(
        method,
        batch,
        old.stats(),
        state=controller.values() if controller else None,
        extras=extras,
        progress=progress,
        seed=seed,
    )
    return Experience(answers, shaped, old, output if method.positive_weight is None else None)


def per_token(per_answer: Tensor, answers: Answers) -> Tensor:
    """[T] from [B], on the CPU."""
    return per_answer.repeat_interleave(torch.tensor([len(ids) for ids in answers.completion_ids]))


def final_answer(answers: Answers, marker: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[T] bool CPU: the tokens behind the one that completes ``marker`` in the answer's text; none where it does not occur."""
    flags: list[bool] = []
    for ids in answers.completion_ids:
        low, high = 0, len(ids) + 1  # the shortest prefix that holds the marker; len + 1: none does
        while low < high:
            middle = (low + high) // 2
            if middle > len(ids) or marker in tokenizer.decode(ids[:middle]):
                high = middle
            else:
                low = middle + 1
        flags += [place >= low for place in range(len(ids))]
    return torch.tensor(flags)


def extra_statistics(
    config: Config, method: Method, policy: Policy, sampled: Sampled, answers: Answers, tick: Tick
) -> dict[str, Tensor]:
    """What ``weight_tokens`` takes as extras beside the measured statistics, [T] each: marks, answer mask, teacher's log-probs.

    The teacher is the policy itself, asked with the reference answer before its eyes (``data.teacher_prompt``).
    """
    needs = frozenset() if method.token_weighting is None else method.token_weighting.needs
    extras = {name: per_token(torch.tensor(flags), answers) for name, flags in sampled.marks.items()}
    if "answer" in needs:
        extras["answer"] = final_answer(answers, config.data.answer_marker, policy.tokenizer)
    if "teacher_logp" in needs:
        asked = zip(sampled.columns["prompt"], sampled.columns["answer"], strict=True)
        prompts = [
            encode_prompt(teacher_prompt(prompt, answer, config.data.teacher_prompt), policy.tokenizer, config.data)
            for prompt, answer in asked
        ]
        shown = replace(answers, prompt_ids=prompts)
        temperature, budget = config.rollout.temperature, config.optim.micro_batch_tokens
        extras["teacher_logp"] = measure(policy, shown, temperature=temperature, budget=budget, tick=tick).logp
    return {name: values.to(policy.device) for name, values in extras.items()}
