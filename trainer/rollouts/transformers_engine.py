"""Rollouts with transformers ``generate`` inside the trainer's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .. import ranks
from ..models.policy import Policy
from ..models.sharding import unsharded
from ..records import Rollouts, Sampling, Tick, derive_seed

_TokenTick = Callable[[int], None]


class TransformersEngine:
    """Generates with the learner's own module, so that there are no weights to move.

    Every answer draws from a generator of its own, seeded by the call's seed and the answer's number: it does not depend on
    what it is batched with, nor on the rank that generates it (up to rounding in the model). Ranks share the answers; during
    the call each of them holds all weights, because they generate different numbers of tokens.

    ``batch`` is the largest number of answers that a rank generates at once.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self.policy, self.batch = policy, batch

    def sync_weights(self, policy: Policy) -> None:
        self.policy = policy

    def close(self) -> None:
        """Nothing: the module is the learner's."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts:
        repeated = [prompt for prompt in prompts for _ in range(sampling.responses)]
        own = range(ranks.rank(), len(repeated), ranks.size())
        with unsharded(self.policy):
            shares = ranks.gather(lambda: self._answer(repeated, own, sampling, tick))
        found = {index: answer for share in shares for index, answer in share.items()}
        tokens, logp, truncated = zip(*(found[index] for index in range(len(repeated))), strict=True)
        return Rollouts(repeated, list(tokens), list(logp), list(truncated))

    def _answer(
        self, prompts: Sequence[list[int]], indices: Sequence[int], sampling: Sampling, tick: Tick
    ) -> dict[int, tuple[list[int], Tensor, bool]]:
        """Number -> tokens, their log-probs and whether the answer was cut off, for the answers ``indices`` of all."""
        result = {}
        starts = range(0, len(indices), self.batch)
        total = len(starts) * sampling.max_new_tokens
        for number, start in enumerate(starts):
            done = number * sampling.max_new_tokens

            def tick_token(tokens: int, done: int = done) -> None:
                tick(done + tokens, total)

            chunk = indices[start : start + self.batch]
            tokens, logp = self._sample([prompts[i] for i in chunk], chunk, sampling, tick_token)
            for index, row, row_logp in zip(chunk, tokens.tolist(), logp, strict=True):
                length = next((i + 1 for i, token in enumerate(row) if token in self.policy.eos_ids), None)
                result[index] = (row[:length], row_logp[:length].clone(), length is None)
        return result

    @torch.no_grad()
    def _sample(
        self, prompts: list[list[int]], indices: Sequence[int], sampling: Sampling, tick: _TokenTick
    ) -> tuple[Tensor, Tensor]:
        """Sampled tokens and their log-probs, both [b, T] CPU; what follows an end-of-sequence token means nothing."""
        policy = self.policy
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padding on the left: generation continues at the right edge
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampler = _Sampler([derive_seed(sampling.seed, index) for index in indices], policy.device, tick)
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        config = GenerationConfig(
            do_sample=False,  # the sampler leaves nothing but the token that it drew
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=policy.eos_ids,
            pad_token_id=policy.pad_id,
        )
        with _without_defaults(policy.language_model), policy.precision():
            sequences = policy.model.generate(
                input_ids=ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([*warpers, sampler]),
                synced_gpus=False,  # transformers would see a sharded model and wait for the other ranks at every token
            )
        return sequences[:, width:].cpu(), torch.cat(sampler.logp, 1).cpu()


class _Sampler(LogitsProcessor):
    """Draws a token for every answer, keeps its log-prob, and leaves it the only one with a score.

    The draw is a race: of exponential times E_v / p_v the smallest is v's with probability p_v. One generator for each answer.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, tick: _TokenTick) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.tick = tick
        self.logp: list[Tensor] = []
        self._times: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tick(len(self.logp))
        logp = scores.float().log_softmax(-1)  # [b, V]
        times = self._times = torch.empty_like(logp) if self._times is None else self._times
        for row, generator in zip(times, self.generators, strict=True):
            row.exponential_(generator=generator)
        drawn = (logp - times.clamp_min(torch.finfo(times.dtype).tiny).log_()).argmax(-1, keepdim=True)
        self.logp.append(logp.gather(1, drawn))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """``generate`` fills what its config leaves open (a repetition penalty, say) from the model's own config."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
