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
    """Generates with the learner's own module, so no weights are copied.

    Every completion has a random generator of its own, seeded by the call's seed and the number of
    the completion. It depends neither on the batch nor on the rank that generates it (up to
    rounding in the model). Ranks share the completions. During the call each rank holds all
    weights, because ranks generate different numbers of tokens.

    ``batch`` is the largest number of completions that a rank generates at once.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self.policy, self.batch = policy, batch

    def sync_weights(self, policy: Policy) -> None:
        self.policy = policy

    def close(self) -> None:
        """Nothing to free: the module belongs to the learner."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts:
        repeated = [prompt for prompt in prompts for _ in range(sampling.responses)]
        own = range(ranks.rank(), len(repeated), ranks.size())
        with unsharded(self.policy):
            shares = ranks.all_gather(lambda: self._complete(repeated, own, sampling, tick))
        found = {index: completion for share in shares for index, completion in share.items()}
        tokens, logp, truncated = zip(*(found[index] for index in range(len(repeated))), strict=True)
        return Rollouts(repeated, list(tokens), list(logp), list(truncated))

    def _complete(
        self, prompts: Sequence[list[int]], indices: Sequence[int], sampling: Sampling, tick: Tick
    ) -> dict[int, tuple[list[int], Tensor, bool]]:
        """Index -> tokens, their log-probs and whether the completion was truncated, for the
        completions ``indices``.
        """
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
        """Sampled tokens and their log-probs, both [b, T] CPU; entries after an end-of-sequence
        token are undefined.
        """
        policy = self.policy
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left padding, as generation needs it
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampler = _Sampler([derive_seed(sampling.seed, index) for index in indices], policy.device, tick)
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        config = GenerationConfig(
            do_sample=False,  # the sampler masks all tokens but the one it drew
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
                synced_gpus=False,  # otherwise transformers synchronizes the ranks at every token of a sharded model
            )
        return sequences[:, width:].cpu(), torch.cat(sampler.logp, 1).cpu()


class _Sampler(LogitsProcessor):
    """Draws a token for every completion, records its log-prob, and masks all other tokens.

    The draw uses exponential variables E_v: argmin of E_v / p_v is v with probability p_v. Each
    completion has a generator of its own.
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
    """Remove the model's generation config, from which ``generate`` would fill unset fields (a
    repetition penalty, for example).
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
