"""Rollouts with transformers ``generate`` inside the trainer's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from inspect import signature

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eapo_kernels.integrations.own_logits import backbone

from ..models.policy import Policy
from ..models.weights import unsharded
from ..records import Rollouts, Sampling, Support, Tick, derive_seed
from .engines import sample_shares

_TokenTick = Callable[[int], None]


class TransformersEngine:
    """Generates with the learner's own module, so no weights are copied.

    Every completion has a random generator of its own, seeded by the call's seed and the number of
    the completion. It depends neither on the batch nor on the rank that generates it (up to
    rounding in the model). Ranks share the completions. During the call each rank holds all
    weights, because ranks generate different numbers of tokens. A prompt of several completions in
    a batch is computed once, where the model continues from its cache as from the whole prompt.

    ``batch`` is the largest number of completions that a rank generates at once.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self.policy, self.batch = policy, batch

    def sync_weights(self, policy: Policy) -> None:
        self.policy = policy

    def close(self) -> None:
        """Nothing to free: the module belongs to the learner."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts:
        with unsharded(self.policy):
            return sample_shares(prompts, sampling, partial(self._complete, sampling=sampling, tick=tick))

    def _complete(self, prompts: list[list[int]], numbers: range, *, sampling: Sampling, tick: Tick) -> Rollouts:
        """The completions ``numbers``, one for each of ``prompts``, in batches."""
        starts, longest = range(0, len(prompts), self.batch), sampling.max_new_tokens
        cut = sampling.filtered and not sampling.support  # the loss is on the whole vocabulary, the entropy is not
        result = Rollouts([], [], [], [], [] if sampling.support else None, None if cut else [])
        for done, start in enumerate(starts):
            own = slice(start, start + self.batch)

            def tick_token(tokens: int, before: int = done * longest) -> None:
                tick(before + tokens, len(starts) * longest)

            result = result.concat(self._sample(prompts[own], numbers[own], sampling, tick_token))
        return result

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]], numbers: range, sampling: Sampling, tick: _TokenTick) -> Rollouts:
        policy = self.policy
        width = max(map(len, prompts))
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        ids = torch.full((len(places), width), policy.pad_id)
        mask = torch.zeros_like(ids)
        for prompt, place in places.items():  # left padding, as generation needs it
            ids[place, width - len(prompt) :] = torch.tensor(prompt)
            mask[place, width - len(prompt) :] = 1
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        rows = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=policy.device)
        seeds = [derive_seed(sampling.seed, number) for number in numbers]
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
            shared = len(places) < len(prompts) and width > 1 and self._continues
            sequences = policy.model.generate(
                input_ids=ids[rows],
                attention_mask=mask[rows],
                generation_config=config,
                logits_processor=LogitsProcessorList([*warpers, sampler]),
                synced_gpus=False,  # otherwise transformers synchronizes the ranks at every token of a sharded model
                **(self._begin(ids, mask, rows) if shared else {}),
            )
        tokens, support = sequences[:, width:].tolist(), sampler.supports()
        logp, entropy = torch.cat(sampler.logp, 1).cpu(), torch.stack(sampler.entropy, 1).cpu()
        ends = [next((i + 1 for i, token in enumerate(row) if token in policy.eos_ids), None) for row in tokens]
        return Rollouts(
            prompts,
            [row[:end] for row, end in zip(tokens, ends, strict=True)],
            [row[:end].clone() for row, end in zip(logp, ends, strict=True)],
            [end is None for end in ends],
            support and [own.first(end or len(own.counts)) for own, end in zip(support, ends, strict=True)],
            [row[:end].clone() for row, end in zip(entropy, ends, strict=True)],
        )

    def _forward(self, ids: Tensor, mask: Tensor, **cache: DynamicCache) -> Tensor:
        """Final hidden states of ``ids``, the last tokens of those that ``mask`` [b, L] covers."""
        model = backbone(self.policy.language_model)
        own = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]}  # as ``generate`` counts them
        own = own if "position_ids" in signature(model.forward).parameters else {}
        hidden: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=bool(cache), **own, **cache).last_hidden_state
        return hidden

    def _begin(self, ids: Tensor, mask: Tensor, rows: Tensor) -> dict[str, DynamicCache]:
        """An argument of ``generate``: keys and values of all but the last token of prompts [p, L], each
        computed once and repeated for its completions. rows: [b] the prompt of each completion.
        """
        model = backbone(self.policy.language_model)
        name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # in older transformers
        cache = DynamicCache(config=model.config)
        self._forward(ids[:, :-1], mask[:, :-1], **{name: cache})
        cache.batch_select_indices(rows)
        return {name: cache}

    @cached_property
    def _continues(self) -> bool:
        """Whether the model continues from ``_begin`` as from the whole prompts, tried once. Not so for a
        state that runs along the row.
        """
        policy = self.policy
        if getattr(policy.language_model, "_is_stateful", False):
            return False
        vocabulary = policy.language_model.config.get_text_config().vocab_size
        ids = torch.arange(1, 15, device=policy.device).view(2, 7) % vocabulary
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        rows = torch.tensor([1, 0, 0], device=policy.device)
        whole = self._forward(ids[rows], mask[rows])[:, -1]
        try:
            after = self._forward(ids[rows][:, -1:], mask[rows], **self._begin(ids, mask, rows))[:, -1]
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # a family with a cache of its own
        return policy.same_hidden(after, whole)


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

    def supports(self) -> list[Support] | None:
        """b supports of all T tokens, if they are recorded."""
        if not self.support:
            return None
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
