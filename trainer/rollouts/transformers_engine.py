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

from ..models.policy import Policy
from .engine import Rollouts, Sampling, Tick, derive_seed

_TokenTick = Callable[[int], None]


class TransformersEngine:
    """Generates with the learner's own module, so that there are no weights to move.

    ``batch`` is the largest number of answers generated at once.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self.policy, self.batch = policy, batch

    def sync_weights(self, policy: Policy) -> None:
        self.policy = policy

    def close(self) -> None:
        """Nothing: the module is the learner's."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts:
        repeated = [prompt for prompt in prompts for _ in range(sampling.responses)]
        result = Rollouts(repeated, [], [], [])
        starts = range(0, len(repeated), self.batch)
        total = len(starts) * sampling.max_new_tokens
        for number, start in enumerate(starts):
            done = number * sampling.max_new_tokens

            def tick_token(tokens: int, done: int = done) -> None:
                tick(done + tokens, total)

            chunk = repeated[start : start + self.batch]
            tokens, logp = self._sample(chunk, sampling, derive_seed(sampling.seed, number), tick_token)
            for row, row_logp in zip(tokens.tolist(), logp, strict=True):
                length = next((i + 1 for i, token in enumerate(row) if token in self.policy.eos_ids), None)
                result.completion_ids.append(row[:length])
                result.logp.append(row_logp[:length].clone())
                result.truncated.append(length is None)
        return result

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]], sampling: Sampling, seed: int, tick: _TokenTick) -> tuple[Tensor, Tensor]:
        """Sampled tokens and their log-probs, both [b, T] CPU; what follows an end-of-sequence token means nothing."""
        policy = self.policy
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padding on the left: generation continues at the right edge
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        recorder = _LogpRecorder(tick)
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        config = GenerationConfig(
            do_sample=True,
            max_new_tokens=sampling.max_new_tokens,
            temperature=1.0,  # temperature and top-p are applied by the warpers, in front of the recorder
            top_p=1.0,
            top_k=0,
            eos_token_id=policy.eos_ids,
            pad_token_id=policy.pad_id,
        )
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _without_defaults(policy.language_model), policy.precision():
            torch.manual_seed(seed)
            sequences = policy.model.generate(
                input_ids=ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([*warpers, recorder]),
            )
        return sequences[:, width:].cpu(), recorder.finish(sequences)


class _LogpRecorder(LogitsProcessor):
    """Keeps the log-prob of every sampled token, and of the scores only those of one position.

    A processor sees a token only at the next position, as the last of ``input_ids``.
    """

    def __init__(self, tick: _TokenTick) -> None:
        self.tick = tick
        self.columns: list[Tensor] = []
        self.latest: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.latest = scores.float().log_softmax(-1)
        self.tick(len(self.columns))
        return scores

    def _take(self, input_ids: Tensor) -> None:
        if self.latest is not None:
            self.columns.append(self.latest.gather(1, input_ids[:, -1:]))

    def finish(self, sequences: Tensor) -> Tensor:
        self._take(sequences)
        return torch.cat(self.columns, 1).cpu()


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """``generate`` fills what its config leaves open (a repetition penalty, say) from the model's own config."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
