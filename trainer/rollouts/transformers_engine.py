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
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .. import ranks
from ..models.policy import Policy
from ..models.sharding import unsharded
from ..records import Rollouts, Sampling, Support, Tick, derive_seed

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
        columns = zip(*(found[index] for index in range(len(repeated))), strict=True)
        tokens, logp, truncated, support, entropy = map(list, columns)
        cut = sampling.filtered and not sampling.support  # the loss is on the whole vocabulary, the entropy is not
        supports, entropies = support if sampling.support else None, None if cut else entropy
        return Rollouts(repeated, tokens, logp, truncated, supports, entropies)

    def _complete(
        self, prompts: Sequence[list[int]], indices: Sequence[int], sampling: Sampling, tick: Tick
    ) -> dict[int, tuple[list[int], Tensor, bool, Support | None, Tensor]]:
        """Index -> tokens, their log-probs, whether the completion was truncated, its support, and
        entropies, for the completions ``indices``.
        """
        result = {}
        starts = range(0, len(indices), self.batch)
        total = len(starts) * sampling.max_new_tokens
        for number, start in enumerate(starts):
            done = number * sampling.max_new_tokens

            def tick_token(tokens: int, done: int = done) -> None:
                tick(done + tokens, total)

            chunk = indices[start : start + self.batch]
            tokens, logp, supports, entropy = self._sample([prompts[i] for i in chunk], chunk, sampling, tick_token)
            found = zip(chunk, tokens.tolist(), logp, supports, entropy, strict=True)
            for index, row, row_logp, support, row_entropy in found:
                length = next((i + 1 for i, token in enumerate(row) if token in self.policy.eos_ids), None)
                kept = None if support is None else support.first(length or len(row))
                own = slice(length)
                result[index] = (row[own], row_logp[own].clone(), length is None, kept, row_entropy[own].clone())
        return result

    @torch.no_grad()
    def _sample(
        self, prompts: list[list[int]], indices: Sequence[int], sampling: Sampling, tick: _TokenTick
    ) -> tuple[Tensor, Tensor, Sequence[Support | None], Tensor]:
        """Sampled tokens, their log-probs, b supports of T tokens, and entropies; tensors are [b, T]
        CPU. Entries after an end-of-sequence token are undefined.
        """
        policy = self.policy
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left padding, as generation needs it
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        seeds = [derive_seed(sampling.seed, index) for index in indices]
        sampler = _Sampler(seeds, policy.device, tick, support=sampling.support)
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k > 0:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            warpers.append(MinPLogitsWarper(sampling.min_p))
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
        logp, entropy = torch.cat(sampler.logp, 1).cpu(), torch.stack(sampler.entropy, 1).cpu()
        return sequences[:, width:].cpu(), logp, sampler.supports(), entropy


class _Sampler(LogitsProcessor):
    """Draws a token for every completion, records its log-prob and the entropy, and masks all other
    tokens.

    The draw uses exponential variables E_v: argmin of E_v / p_v is v with probability p_v. Each
    completion has a generator of its own.

    support: also record the tokens from which it draws, those with a finite score.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, tick: _TokenTick, *, support: bool) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.tick, self.support = tick, support
        self.logp: list[Tensor] = []  # for each token [b, 1]
        self.entropy: list[Tensor] = []  # for each token [b]
        self._ids: list[Tensor] = []  # for each token [E] int32: the ids of the first completion, of the second, ...
        self._counts: list[Tensor] = []  # for each token [b] int32
        self._times: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tick(len(self.logp))
        logp = scores.float().log_softmax(-1)  # [b, V]
        times = self._times = torch.empty_like(logp) if self._times is None else self._times
        for row, generator in zip(times, self.generators, strict=True):
            row.exponential_(generator=generator)
        drawn = (logp - times.clamp_min(torch.finfo(times.dtype).tiny).log_()).argmax(-1, keepdim=True)
        self.logp.append(logp.gather(1, drawn))
        self.entropy.append(-(logp.exp() * logp.clamp_min_(torch.finfo(logp.dtype).min)).sum(-1))  # 0 where p is 0
        if self.support:
            kept = scores > -torch.inf
            self._ids.append(kept.nonzero()[:, 1].int().cpu())
            self._counts.append(kept.sum(1).int().cpu())
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def supports(self) -> Sequence[Support | None]:
        """b supports of all T tokens; None where they are not recorded."""
        if not self.support:
            return [None] * len(self.generators)
        counts = torch.stack(self._counts)  # [T, b]
        completions = torch.arange(counts.shape[1]).repeat(counts.shape[0]).repeat_interleave(counts.flatten())
        ids = torch.cat(self._ids)[completions.argsort(stable=True)]
        return [Support(*own) for own in zip(ids.split(counts.sum(0).tolist()), counts.t(), strict=True)]


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
