"""The interface of an engine that samples completions, its choice by ``rollout.engine``, and how
ranks share completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Protocol

from .. import ranks
from ..config import Config
from ..models.policy import Policy
from ..records import Rollouts, Sampling, Tick


class RolloutEngine(Protocol):
    """Samples completions from the weights of the latest ``sync_weights``. All ranks call its
    methods together, with equal arguments, and receive equal results.
    """

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts: ...

    def sync_weights(self, policy: Policy) -> None:
        """Use ``policy``'s present weights from now on."""

    def close(self) -> None:
        """Free the resources of the engine. It cannot generate afterwards."""


def make_engine(config: Config, policy: Policy) -> RolloutEngine:
    """An engine with ``policy``'s weights.

    Raises:
        TrainerError: it cannot run here; see ``VllmEngine``.
    """
    if config.rollout.engine == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(policy, config.rollout, config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    from .transformers_engine import TransformersEngine

    return TransformersEngine(policy, config.rollout.batch)


def share(completions: int, together: int = 1) -> range:
    """The completions of this rank, contiguous: so most of a prompt are on one rank, whose engine can compute the prompt once.
    together: consecutive ranks with the same share.
    """
    number, parts = ranks.rank() // together, ranks.size() // together
    return range(completions * number // parts, completions * (number + 1) // parts)


def sample_shares(
    prompts: Sequence[list[int]], sampling: Sampling, sample: Callable[[list[list[int]], range], Rollouts], together: int = 1
) -> Rollouts:
    """``sampling.responses`` completions of every prompt, of which each rank samples its share.

    Args:
        sample: receives the prompts and the numbers of this rank's completions (perhaps none) and
            samples them without a collective of all ranks.
        together: consecutive ranks that sample one share together and find the same completions.
    """
    repeated = [prompt for prompt in prompts for _ in range(sampling.responses)]
    own = share(len(repeated), together)
    work = partial(sample, [repeated[i] for i in own], own)
    if together > 1:  # a rank that fails must end at once: the others of its share wait for it, not for the exchange
        found = work()
        return reduce(Rollouts.concat, ranks.all_gather(lambda: found)[::together])
    return reduce(Rollouts.concat, ranks.all_gather(work))
