"""A step for the tests of methods: its dense float64 statistics, and one comparison of loss and gradients.

The old policy is the head before an update, the new policy the head after it. ``compare`` weighs the tokens
as a trainer does, splits the batch into micro-batches, and compares the sum of their losses and gradients
with a loss that the test types out itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from eapo_kernels import Method, TokenBatch, TokenStats, policy_loss, weight_tokens

SIZES = (9, 14, 3, 11, 8, 12, 10, 13)  # tokens of the responses; two groups of four


@dataclass(frozen=True)
class Step:
    """hidden [N, D], weight [V, D] (new policy), the batch, and the old policy's statistics. float64 but for the batch.

    ``valid`` leaves out a few tokens. ``old`` holds logp, entropy, p2, p2_logp, varentropy [N] and p, log_p [N, V].
    """

    hidden: Tensor
    weight: Tensor
    batch: TokenBatch
    stats: TokenStats
    old: dict[str, Tensor]

    @property
    def valid(self) -> Tensor:
        assert self.batch.mask is not None
        return self.batch.mask

    @property
    def ids(self) -> Tensor:
        return self.batch.sequence_ids

    def logp(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[N] log-probs of the targets, dense and differentiable."""
        return torch.log_softmax(hidden @ weight.T, -1).gather(1, self.batch.targets[:, None])[:, 0]

    def entropy(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[N] entropies, dense and differentiable."""
        log_p = torch.log_softmax(hidden @ weight.T, -1)
        return -(log_p.exp() * log_p).sum(-1)


@cache
def make_step(seed: int = 0, *, binary: bool = False) -> Step:
    """Random, the same object for the same seed: do not change it in place. ``binary``: rewards are 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    n, d, v = sum(SIZES), 7, 23
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64)
    old_weight = torch.randn(v, d, generator=g, dtype=torch.float64)
    weight = old_weight + 0.15 * torch.randn(v, d, generator=g, dtype=torch.float64)
    log_p = torch.log_softmax(hidden @ old_weight.T, -1)
    p = log_p.exp()
    targets = torch.multinomial(p, 1, generator=g)[:, 0]
    ids = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    mask = torch.rand(n, generator=g) > 0.1
    mask[0] = True
    rewards = torch.rand(len(SIZES), generator=g)
    if binary:
        rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    logp, entropy = log_p.gather(1, targets[:, None])[:, 0], -(p * log_p).sum(1)
    p2, p2_logp = p.square().sum(1), (p.square() * log_p).sum(1)
    batch = TokenBatch(
        targets,
        ids,
        rewards,
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        old_logp=logp.float(),
        mask=mask,
        denominator=int(mask.sum()),
    )
    stats = TokenStats(logp.float(), entropy.float(), torch.zeros(n), p2.float(), p2_logp.float())
    varentropy = (p * log_p.square()).sum(1) - entropy.square()
    old = {"logp": logp, "entropy": entropy, "p2": p2, "p2_logp": p2_logp, "varentropy": varentropy, "p": p, "log_p": log_p}
    return Step(hidden, weight, batch, stats, old)


def counted(batch: TokenBatch, method: Method) -> TokenBatch:
    """The batch with the global counts that the method's reduction divides by, of the tokens that its mask leaves."""
    assert batch.mask is not None
    lengths = torch.zeros(len(SIZES)).index_add_(0, batch.sequence_ids, batch.mask.float())
    count = lengths.sum() if method.config.reduction == "token_mean" else (lengths > 0).sum()
    return replace(batch, denominator=int(count), sequence_lengths=lengths)


def compare(
    step: Step,
    method: Method,
    expected: Callable[[Tensor, Tensor], Tensor],
    *,
    state: Mapping[str, Tensor] | None = None,
    extras: Mapping[str, Tensor] | None = None,
    progress: float = 0.0,
    seed: int = 0,
    tolerance: float = 2e-5,
) -> TokenBatch:
    """Assert that loss and gradients of ``method`` are those of ``expected(hidden, weight)``; returns the weighted batch.

    expected: the whole loss in float64 from dense logits, a mean over the valid tokens where the method has
    a token mean. The autograd schedule takes the whole batch; three micro-batches go through the one-pass
    schedule where the loss has it, else through autograd.
    """
    weighted = weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=progress, seed=seed)
    weighted = counted(weighted, method)
    hidden, weight = step.hidden.clone().requires_grad_(), step.weight.clone().requires_grad_()
    exact_loss = expected(hidden, weight)
    exact_grads = torch.autograd.grad(exact_loss, [hidden, weight])
    assert exact_grads[0].abs().max() > 1e-6, "the test's own loss has no gradient"
    one_pass = method.config.scope == "token" and method.config.entropy_top_p is None
    thirds = [step.ids < 3, (step.ids >= 3) & (step.ids < 4), step.ids >= 4]
    for schedule, parts in (("autograd", [slice(None)]), ("one_pass" if one_pass else "autograd", thirds)):
        h, w = step.hidden.clone().requires_grad_(), step.weight.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            loss = policy_loss(h[part], w, weighted.select(part), method=method, schedule=schedule).loss
            loss.backward()
            total = total + loss.detach()
        torch.testing.assert_close(total, exact_loss.detach(), rtol=tolerance, atol=tolerance * 0.1)
        for ours, exact in zip((h.grad, w.grad), exact_grads, strict=True):
            torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    return weighted


def scalars(**values: float) -> dict[str, Tensor]:
    """A controller's state: 0-dim float64 tensors by name."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def state_of(method: Method) -> dict[str, Tensor]:
    """Numbers for everything that the method's token weighting reads of a controller."""
    return scalars(**dict.fromkeys(() if method.token_weighting is None else method.token_weighting.state, 0.9))


def extras_of(step: Step, method: Method) -> dict[str, Tensor]:
    """Every further tensor that the method's token weighting reads."""
    if method.token_weighting is None:
        return {}
    n, wanted = len(step.ids), method.token_weighting.needs | method.token_weighting.uses
    coin = torch.rand(2, n, generator=torch.Generator().manual_seed(7)) > 0.5
    extras = {
        "tempered_logp": step.stats.logp - 0.1,
        "nucleus_entropy": 0.8 * step.stats.entropy,
        "teacher_logp": step.stats.logp + 0.3,
        "answer": coin[0],
        "spans": coin[1],
        "turn_ids": torch.arange(n) % 5 // 3,
        "reinforce": step.ids == 1,
        "replayed": step.ids == 2,
    }
    return {name: value for name, value in extras.items() if name in wanted}


def irregular(step: Step) -> Step:
    """The step with group ids out of order, and without the tokens of its third response."""
    groups = torch.tensor([9, 4, 4, 4, 9, 9, 4, 4])
    return replace(step, batch=replace(step.batch, group_ids=groups, mask=step.valid & (step.ids != 2)))


def base_advantages(step: Step) -> Tensor:
    """[N] float32 group-normalised advantages of the tokens' responses, 0 where a token does not count."""
    return torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)


def group_normalised(step: Step, rewards: Tensor | None = None) -> Tensor:
    """[B] float64 (r - mean) / (std + 1e-6) in the group, typed out; 0 in a group of one."""
    r = (step.batch.rewards if rewards is None else rewards).double()
    out = torch.zeros_like(r)
    for group in step.batch.group_ids.unique():
        own = step.batch.group_ids == group
        if own.sum() > 1:
            out[own] = (r[own] - r[own].mean()) / (r[own].std() + 1e-6)
    return out


def by_response(step: Step, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """[B] float64: ``function`` of each response's valid values [N], one response at a time."""
    parts = [values[step.valid & (step.ids == i)].double() for i in range(len(SIZES))]
    return torch.stack([function(part) for part in parts])


def of_policy(
    step: Step,
    advantages: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    bonus: Tensor | float = 0.0,
    keep: Tensor | None = None,
    mean: str = "tokens",
) -> Callable[[Tensor, Tensor], Tensor]:
    """The clipped policy loss of advantages [N] minus an entropy bonus [N], as ``expected`` of ``compare``.

    mean: over all "tokens" that count, or over "responses" of the mean over their tokens.
    """
    ok = step.valid if keep is None else step.valid & keep
    lengths = torch.zeros(len(SIZES), dtype=torch.float64).index_add_(0, step.ids, ok.double())
    share = 1 / ok.sum() if mean == "tokens" else 1 / (lengths.clamp_min(1)[step.ids] * (lengths > 0).sum())

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        terms = -clipped(ratio, advantages.double(), low, high) - bonus * step.entropy(hidden, weight)
        return (share * terms * torch.ones_like(ratio))[ok].sum()

    return loss


def clipped(ratio: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """PPO's surrogate, typed out."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
