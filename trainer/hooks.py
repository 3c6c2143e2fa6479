"""Methods that also change how answers are sampled: before the step's rollouts, and with what came of them.

A hook is chosen by the method's name and its numbers are keys of ``[loss]`` like the method's own. What it samples goes through
the same engine, rewards and metrics as everything else. Random choices are functions of the seed that it is handed.
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

from eapo_kernels.checks import require_number
from eapo_kernels.errors import require

from .records import Rollouts, Sampled, Sampling


class Source(Protocol):
    """What a hook may ask for: the first half of a step (``rollouts.source``).

    Attributes:
        step_questions: the configured number of questions of a step.
        tokenizer: the policy's.
    """

    step_questions: int
    tokenizer: Any

    def questions(self) -> tuple[list[list[int]], dict[str, list[Any]]]: ...

    def draw(
        self, prompts: Sequence[list[int]], columns: dict[str, list[Any]], group_ids: Sequence[int], sampling: Sampling
    ) -> Sampled: ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Rollouts: ...

    def score(self, rollouts: Rollouts, columns: dict[str, list[Any]], group_ids: list[int]) -> Sampled: ...

    def entropies(self, sampled: Sampled) -> list[Tensor]: ...

    def advantages(self, sampled: Sampled) -> Tensor: ...


@dataclass
class RolloutHook:
    """Nothing but the ordinary rollouts. Subclasses change one of the three."""

    def responses(self, wanted: int) -> int:
        """Answers to sample for each question, where a group of ``wanted`` is configured; refuses what cannot be."""
        return wanted

    def before(self, sampling: Sampling) -> Sampling:
        """How the step's answers are sampled."""
        return replace(sampling, responses=self.responses(sampling.responses))

    def after(self, sampled: Sampled, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int) -> Sampled:
        """The answers that are learned from.

        Args:
            sampled: what was sampled as ``before`` said, whole groups with all their rewards.
            sampling: the configured sampling, with the step's seed.
            source: samples, scores and measures more.
            state: the controller's numbers before this step.
            seed: of the hook's own random choices.
        """
        return sampled

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""


@dataclass
class SpreadRollouts(RolloutHook):
    """DAPO (arXiv 2503.14476): groups without spread teach nothing and give way to other questions.

    Attributes:
        rounds: most further draws of as many questions as a step has; 0 only leaves flat groups out. A step without any other
            stays as it is.
    """

    rounds: int = 2

    def __post_init__(self) -> None:
        require(isinstance(self.rounds, int) and self.rounds >= 0, "rounds", "an int >= 0", repr(self.rounds))

    def after(self, sampled: Sampled, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int) -> Sampled:
        result, wanted = _with_spread(sampled, len(sampled)), source.step_questions
        first = max(sampled.group_ids) + 1
        for number in range(self.rounds):
            missing = wanted - len(result.groups())
            if missing <= 0:
                break
            prompts, columns = source.questions()
            groups = range(first, first := first + len(prompts))
            more = source.draw(prompts, columns, groups, replace(sampling, seed=seed + number))
            result = result.joined(_with_spread(more.chosen(more.whole()), missing))
        return result if len(result) else sampled


def _with_spread(sampled: Sampled, most: int) -> Sampled:
    """The first ``most`` groups whose rewards are not all equal."""
    spread = [group for group in sampled.groups() if sampled.scores.total[group].unique().numel() > 1]
    return sampled.chosen([i for group in spread[:most] for i in group])


@dataclass
class TargetRollouts(RolloutHook):
    """AEPO (arXiv 2510.08141): correct answers sampled hotter or cooler take the place of ordinary ones.

    A share of the questions is sampled again at the controller's temperature; of those answers the ones with a positive
    advantage are marked "reinforce" and replace ordinary answers, drawn at random; the others keep the advantages of their
    whole groups.

    Attributes:
        resampled_share: share of the questions that are sampled again.
        positive_above: smallest advantage that counts as positive.
        replaced_share: most answers of the step that are replaced; half as many while the entropy is above its target (the
            authors replace 60 and 30).
    """

    resampled_share: float = 0.25
    positive_above: float = 0.05
    replaced_share: float = 0.125

    def __post_init__(self) -> None:
        require_number("resampled_share", self.resampled_share, 0, 1)
        require_number("positive_above", self.positive_above)
        require_number("replaced_share", self.replaced_share, 0, 1)

    def after(self, sampled: Sampled, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int) -> Sampled:
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
        return sampled.chosen(left).joined(replace(again, advantages=advantages).chosen(good).marked("reinforce"))


@dataclass
class CutRollouts(RolloutHook):
    """CURE (arXiv 2508.11016): answers are cut at one of their most uncertain tokens and continued anew.

    Of a group of n answers n / (1 + continuations) are sampled from the question; each is cut in front of a token drawn from
    the ``top`` of highest entropy whose text is longer than one character, and continued so often. All n form the group.

    Attributes:
        continuations: new answers from each cut.
        top: number of tokens to draw the cut from.
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

    def after(self, sampled: Sampled, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int) -> Sampled:
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
        parents = [i for i in range(len(sampled)) for _ in range(self.continuations)]
        for number, i in enumerate(parents):
            room = sampling.max_new_tokens - cuts[i]
            ids, logp = continued.completion_ids[number], continued.logp[number]
            continued.prompt_ids[number] = rollouts.prompt_ids[i]
            continued.truncated[number] = continued.truncated[number] or len(ids) > room
            continued.completion_ids[number] = prefixes[i] + ids[:room]
            continued.logp[number] = torch.cat([rollouts.logp[i][: cuts[i]], logp[:room]])
        columns = {name: [column[i] for i in parents] for name, column in sampled.columns.items()}
        return sampled.joined(source.score(continued, columns, [sampled.group_ids[i] for i in parents]))


@dataclass
class OversampledRollouts(RolloutHook):
    """T1 (arXiv 2501.11651): many answers at a high temperature, of which the best and the worst of each group are kept.

    The paper samples 64 at a high temperature; which are kept, and the numbers, are ours.

    Attributes:
        oversample: answers sampled for each that is kept.
        hotter: factor on the sampling temperature; the loss stays at the configured one.
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

    def after(self, sampled: Sampled, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int) -> Sampled:
        kept: list[int] = []
        for group in sampled.groups():
            order = sorted(group, key=lambda i: (-float(sampled.scores.total[i]), i))
            best = -(-sampling.responses // 2)
            kept += sorted(order[:best] + order[len(order) - (sampling.responses - best) :])
        return sampled.chosen(kept)


@dataclass
class ReplayRollouts(RolloutHook):
    """SPEAR (arXiv 2509.22601): good answers of earlier steps are learned from again, marked "replayed".

    Answers with an advantage above ``good_above`` enter a buffer. What is replayed is measured against the median of the recent
    rewards; how much of it counts, and Clip-Cov on it, are the method's. The buffer lives as long as the run.

    Attributes:
        buffer: most answers kept, the oldest leave.
        recent: most rewards that the median is taken of.
        good_above: advantage above which an answer is kept.
        replayed_share: most answers replayed in a step, as a share of the fresh ones (ours).
    """

    buffer: int = 2048
    recent: int = 10240
    good_above: float = 1.0
    replayed_share: float = 0.5
    answers: deque[Sampled] = field(default_factory=deque, init=False, repr=False)
    rewards: deque[float] = field(default_factory=deque, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("buffer", "recent"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, "a positive int", repr(value))
        require_number("good_above", self.good_above)
        require_number("replayed_share", self.replayed_share, 0)
        self.answers, self.rewards = deque(maxlen=self.buffer), deque(maxlen=self.recent)

    def after(self, sampled: Sampled, sampling: Sampling, source: Source, state: Mapping[str, Tensor], seed: int) -> Sampled:
        fresh = replace(sampled, advantages=source.advantages(sampled))
        assert fresh.advantages is not None
        count = min(len(self.answers), int(self.replayed_share * len(fresh)))
        result = fresh
        if count:
            median = float(np.median(self.rewards))
            chosen = np.random.default_rng(seed).choice(len(self.answers), count, replace=False).tolist()
            first = max(fresh.group_ids) + 1
            for number, i in enumerate(chosen):
                old = self.answers[i]
                result = result.joined(replace(old, group_ids=[first + number], advantages=old.scores.total - median))
        self.rewards.extend(fresh.scores.total.tolist())
        for i in (fresh.advantages > self.good_above).nonzero().flatten().tolist():
            self.answers.append(fresh.chosen([i]).marked("replayed"))
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"answers": [answer.state_dict() for answer in self.answers], "rewards": list(self.rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.answers = deque((Sampled.from_state(answer) for answer in state["answers"]), self.buffer)
        self.rewards = deque(state["rewards"], self.recent)


HOOKS: MappingProxyType[str, type[RolloutHook]] = MappingProxyType(
    {"dapo": SpreadRollouts, "aepo": TargetRollouts, "cure": CutRollouts, "t1": OversampledRollouts, "spear": ReplayRollouts}
)
"""Method -> its hook; the others have none."""


def hook_numbers(method: str) -> list[str]:
    """The names of a method's hook's numbers."""
    hook = HOOKS.get(method, RolloutHook)
    return [name for name, item in hook.__dataclass_fields__.items() if item.init]
