"""Rollout hooks: methods that also change how completions are sampled or selected.

The name of the method selects the hook, and the hook's numbers are keys of ``[loss]``. Further
samples use the same engine, rewards and metrics. Random choices depend on the given seed alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eapo_kernels.errors import require, require_number

from .records import Rollouts, Sampling, ScoredRollouts


class Source(Protocol):
    """What a hook may call: sampling, scoring and measuring (``rollouts.source``).

    Attributes:
        step_prompts: the configured number of prompts of a step.
        tokenizer: the policy's.
    """

    step_prompts: int
    tokenizer: Any

    def next_prompts(self) -> tuple[list[list[int]], dict[str, list[Any]]]: ...

    def draw(
        self, prompts: Sequence[list[int]], columns: dict[str, list[Any]], group_ids: Sequence[int], sampling: Sampling
    ) -> ScoredRollouts: ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Rollouts: ...

    def score(self, rollouts: Rollouts, columns: dict[str, list[Any]], group_ids: list[int]) -> ScoredRollouts: ...

    def entropies(self, sampled: ScoredRollouts) -> list[Tensor]: ...

    def advantages(self, sampled: ScoredRollouts) -> Tensor: ...


@dataclass
class RolloutHook:
    """The ordinary rollouts, unchanged. Subclasses override one or more of the first three methods."""

    def responses(self, wanted: int) -> int:
        """Completions to sample for each prompt when groups of ``wanted`` are configured. Raises
        for a size that the hook cannot use.
        """
        return wanted

    def before(self, sampling: Sampling) -> Sampling:
        """The sampling parameters of the step's rollouts."""
        return replace(sampling, responses=self.responses(sampling.responses))

    def after(
        self, sampled: ScoredRollouts, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int
    ) -> ScoredRollouts:
        """The completions that are trained on.

        Args:
            sampled: the completions sampled as ``before`` returned, complete groups in which all
                have rewards.
            sampling: the configured sampling, with the step's seed.
            source: samples, scores and measures more.
            state: the controller's values before this step.
            seed: for the hook's own random choices.
        """
        return sampled

    def state_dict(self) -> dict[str, Any]:
        """State that the next step depends on, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""


@dataclass
class SpreadRollouts(RolloutHook):
    """DAPO (arXiv 2503.14476): groups whose rewards are all equal have no gradient and are replaced
    by groups of other prompts.

    Attributes:
        rounds: most additional draws, each of as many prompts as a step has. 0 only drops the flat
            groups. A step with no other group is kept as it is.
    """

    rounds: int = 2

    def __post_init__(self) -> None:
        require(isinstance(self.rounds, int) and self.rounds >= 0, "rounds", "an int >= 0", repr(self.rounds))

    def after(
        self, sampled: ScoredRollouts, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int
    ) -> ScoredRollouts:
        result, wanted = _with_spread(sampled, len(sampled)), source.step_prompts
        first = max(sampled.group_ids) + 1
        for number in range(self.rounds):
            missing = wanted - len(result.groups())
            if missing <= 0:
                break
            prompts, columns = source.next_prompts()
            groups = range(first, first := first + len(prompts))
            more = source.draw(prompts, columns, groups, replace(sampling, seed=seed + number))
            result = result.concat(_with_spread(more.take(more.fully_scored()), missing))
        return result if len(result) else sampled


def _with_spread(sampled: ScoredRollouts, most: int) -> ScoredRollouts:
    """The first ``most`` groups whose rewards are not all equal."""
    spread = [group for group in sampled.groups() if sampled.scores.total[group].unique().numel() > 1]
    return sampled.take([i for group in spread[:most] for i in group])


@dataclass
class TargetRollouts(RolloutHook):
    """AEPO (arXiv 2510.08141): correct completions sampled at another temperature replace ordinary
    ones.

    A share of the prompts is sampled again at the controller's temperature. The new completions
    with a positive advantage are marked "reinforce" and replace randomly chosen ordinary
    completions. The remaining ordinary completions keep the advantages of their complete groups.

    Attributes:
        resampled_share: share of the prompts that are sampled again.
        positive_above: an advantage above this counts as positive.
        replaced_share: largest share of the step's completions that are replaced; half of it while
            the entropy is above its target (the authors replace 60 and 30).
    """

    resampled_share: float = 0.25
    positive_above: float = 0.05
    replaced_share: float = 0.125

    def __post_init__(self) -> None:
        require_number("resampled_share", self.resampled_share, 0, 1)
        require_number("positive_above", self.positive_above)
        require_number("replaced_share", self.replaced_share, 0, 1)

    def after(
        self, sampled: ScoredRollouts, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int
    ) -> ScoredRollouts:
        factor = float(state["temperature"])
        sampled = replace(sampled, advantages=source.advantages(sampled))
        random, groups = np.random.default_rng(seed), sampled.groups()
        count = max(1, int(self.resampled_share * len(groups)))
        firsts = [groups[g][0] for g in sorted(random.choice(len(groups), count, replace=False).tolist())]
        again = source.draw(
            [sampled.rollouts.prompt_ids[i] for i in firsts],
            {name: [column[i] for i in firsts] for name, column in sampled.columns.items()},
            [max(sampled.group_ids) + 1 + i for i in range(count)],
            replace(sampling, temperature=sampling.temperature * factor, seed=seed),
        )
        share = self.replaced_share / 2 if float(state["above"]) else self.replaced_share
        advantages = source.advantages(again)
        good = (advantages > self.positive_above).nonzero().flatten().tolist()  # NaN is not
        good = good[: max(1, int(share * len(sampled)))]
        left = sorted(random.permutation(len(sampled))[len(good) :].tolist())
        return sampled.take(left).concat(replace(again, advantages=advantages).take(good).marked("reinforce"))


@dataclass
class CutRollouts(RolloutHook):
    """CURE (arXiv 2508.11016): completions are cut before an uncertain token and continued again.

    Of a group of n completions, n / (1 + continuations) are sampled from the prompt. Each is cut
    before a token drawn from the ``top`` tokens of highest entropy whose text is longer than one
    character, and continued ``continuations`` times. All n form the group.

    Attributes:
        continuations: new completions from each cut.
        top: number of tokens from which the cut is drawn.
    """

    continuations: int = 3
    top: int = 20

    def __post_init__(self) -> None:
        for name in ("continuations", "top"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, "a positive int", repr(value))

    def responses(self, wanted: int) -> int:
        each = self.continuations + 1
        require(wanted % each == 0, "responses", f"a multiple of {each} (1 + continuations) with method 'cure'", wanted)
        return wanted // each

    def after(
        self, sampled: ScoredRollouts, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int
    ) -> ScoredRollouts:
        random, rollouts, tokenizer = np.random.default_rng(seed), sampled.rollouts, source.tokenizer
        special = set(tokenizer.all_special_ids)
        cuts = []
        for ids, entropy in zip(rollouts.completion_ids, source.entropies(sampled), strict=True):
            words = [t not in special and len(tokenizer.decode([t]).strip()) > 1 for t in ids]
            order = entropy.argsort(descending=True, stable=True).tolist()
            candidates = [i for i in order if words[i]][: self.top] or order[: self.top]
            cuts.append(int(random.choice(candidates)))
        prefixes = [ids[:cut] for ids, cut in zip(rollouts.completion_ids, cuts, strict=True)]
        continued = source.generate(
            [prompt + prefix for prompt, prefix in zip(rollouts.prompt_ids, prefixes, strict=True)],
            replace(sampling, responses=self.continuations, max_new_tokens=sampling.max_new_tokens - min(cuts), seed=seed),
        )
        continued = replace(continued, entropy=None)
        parents = [i for i in range(len(sampled)) for _ in range(self.continuations)]
        for number, i in enumerate(parents):
            room = sampling.max_new_tokens - cuts[i]
            ids, logp = continued.completion_ids[number], continued.logp[number]
            continued.prompt_ids[number] = rollouts.prompt_ids[i]
            continued.truncated[number] = continued.truncated[number] or len(ids) > room
            continued.completion_ids[number] = prefixes[i] + ids[:room]
            continued.logp[number] = torch.cat([rollouts.logp[i][: cuts[i]], logp[:room]])
            if rollouts.support is not None and continued.support is not None:
                continued.support[number] = rollouts.support[i].first(cuts[i]).concat(continued.support[number].first(room))
        columns = {name: [column[i] for i in parents] for name, column in sampled.columns.items()}
        return sampled.concat(source.score(continued, columns, [sampled.group_ids[i] for i in parents]))


@dataclass
class OversampledRollouts(RolloutHook):
    """T1 (arXiv 2501.11651): many completions at a high temperature, of which the best and the
    worst of each group are kept.

    The paper samples 64 at a high temperature. The rule for which are kept, and the default
    numbers, are this trainer's.

    Attributes:
        oversample: completions sampled for each that is kept.
        hotter: factor on the sampling temperature; the loss uses the configured one.
    """

    oversample: int = 2
    hotter: float = 1.2

    def __post_init__(self) -> None:
        ok = isinstance(self.oversample, int) and self.oversample >= 1
        require(ok, "oversample", "a positive int", repr(self.oversample))
        require_number("hotter", self.hotter, 0)
        require(self.hotter > 0, "hotter", "a finite number > 0", self.hotter)

    def responses(self, wanted: int) -> int:
        return wanted * self.oversample

    def before(self, sampling: Sampling) -> Sampling:
        return replace(super().before(sampling), temperature=sampling.temperature * self.hotter)

    def after(
        self, sampled: ScoredRollouts, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int
    ) -> ScoredRollouts:
        kept: list[int] = []
        for group in sampled.groups():
            order = sorted(group, key=lambda i: (-float(sampled.scores.total[i]), i))
            best = -(-sampling.responses // 2)
            kept += sorted(order[:best] + order[len(order) - (sampling.responses - best) :])
        return sampled.take(kept)


@dataclass
class ReplayRollouts(RolloutHook):
    """SPEAR (arXiv 2509.22601): good completions of earlier steps are trained on again, marked
    "replayed".

    Completions with an advantage above ``good_above`` enter a buffer that is kept for the whole
    run. The advantage of a replayed completion is its reward minus the median of the recent
    rewards. Its weight in the loss, and Clip-Cov, are the method's.

    Attributes:
        buffer: most completions kept; the oldest are dropped.
        recent: number of recent rewards whose median is taken.
        good_above: advantage above which a completion is kept.
        replayed_share: most completions replayed in a step, as a share of the new ones (this
            trainer's choice).
    """

    buffer: int = 2048
    recent: int = 10240
    good_above: float = 1.0
    replayed_share: float = 0.5
    completions: deque[ScoredRollouts] = field(default_factory=deque, init=False, repr=False)
    rewards: deque[float] = field(default_factory=deque, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("buffer", "recent"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, "a positive int", repr(value))
        require_number("good_above", self.good_above)
        require_number("replayed_share", self.replayed_share, 0)
        self.completions, self.rewards = deque(maxlen=self.buffer), deque(maxlen=self.recent)

    def after(
        self, sampled: ScoredRollouts, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int
    ) -> ScoredRollouts:
        fresh = replace(sampled, advantages=source.advantages(sampled))
        assert fresh.advantages is not None
        count = min(len(self.completions), int(self.replayed_share * len(fresh)))
        result = fresh
        if count:
            median = float(np.median(self.rewards))
            chosen = np.random.default_rng(seed).choice(len(self.completions), count, replace=False).tolist()
            first = max(fresh.group_ids) + 1
            for number, i in enumerate(chosen):
                old = self.completions[i]
                result = result.concat(replace(old, group_ids=[first + number], advantages=old.scores.total - median))
        self.rewards.extend(fresh.scores.total.tolist())
        for i in (fresh.advantages > self.good_above).nonzero().flatten().tolist():
            self.completions.append(fresh.take([i]).marked("replayed"))
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"completions": [completion.state_dict() for completion in self.completions], "rewards": list(self.rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.completions = deque((ScoredRollouts.from_state(completion) for completion in state["completions"]), self.buffer)
        self.rewards = deque(state["rewards"], self.recent)


HOOKS: MappingProxyType[str, type[RolloutHook]] = MappingProxyType(
    {"dapo": SpreadRollouts, "aepo": TargetRollouts, "cure": CutRollouts, "t1": OversampledRollouts, "spear": ReplayRollouts}
)
"""Method -> its hook; the others have none."""

SAMPLES_OF_THE_POLICY = (RolloutHook, SpreadRollouts)
"""Hooks whose completions are all sampled from the present policy as ``rollout`` says."""


def hook_numbers(method: str) -> list[str]:
    """Names of the numbers of a method's hook."""
    hook = HOOKS.get(method, RolloutHook)
    return [name for name, item in hook.__dataclass_fields__.items() if item.init]
