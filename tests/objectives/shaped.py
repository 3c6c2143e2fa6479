"""A step for the tests of shaped methods: its dense float64 statistics, and one comparison of loss and gradients.

The old policy is the head before an update, the new policy the head after it. ``compare`` shapes the batch as a trainer does,
cuts it into micro-batches, and holds the sum of their losses and gradients against a loss that a test types out itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eapo_kernels import Method, TokenBatch, TokenStats, policy_loss, shape_batch

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


def make_step(seed: int = 0, *, binary: bool = False) -> Step:
    """Random, the same for the same seed. ``binary``: rewards are 0 or 1."""
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


def with_denominator(step: Step, method: Method) -> Step:
    """The step with the global count that the method's reduction divides by."""
    count = int(step.valid.sum()) if method.config.reduction == "token_mean" else len(SIZES)
    return replace(step, batch=replace(step.batch, denominator=count))


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
    """Assert that loss and gradients of ``method`` are those of ``expected(hidden, weight)``; returns the shaped batch.

    expected: the whole loss in float64 from dense logits, mean over the valid tokens where the method has a token mean. Checked
    on each schedule that the loss has, whole and in three micro-batches.
    """
    step = with_denominator(step, method)
    shaped = shape_batch(method, step.batch, step.stats, state=state, extras=extras, progress=progress, seed=seed)
    hidden, weight = step.hidden.clone().requires_grad_(), step.weight.clone().requires_grad_()
    truth = expected(hidden, weight)
    truths = torch.autograd.grad(truth, [hidden, weight])
    assert truths[0].abs().max() > 1e-6, "the test's own loss has no gradient"
    lengths = torch.zeros(len(SIZES)).index_add_(0, step.ids, step.valid.float())
    schedules = (
        ["autograd", "one_pass"] if method.config.scope == "token" and method.config.entropy_top_p is None else ["autograd"]
    )
    for schedule in schedules:
        for cuts in ([slice(None)], [step.ids < 3, (step.ids >= 3) & (step.ids < 4), step.ids >= 4]):
            h, w = step.hidden.clone().requires_grad_(), step.weight.clone().requires_grad_()
            total = torch.zeros((), dtype=torch.float64)
            for cut in cuts:
                part = replace(shaped.select(cut), sequence_lengths=lengths)
                loss = policy_loss(h[cut], w, part, method=method, schedule=schedule).loss
                loss.backward()
                total = total + loss.detach()
            torch.testing.assert_close(total, truth.detach(), rtol=tolerance, atol=tolerance * 0.1)
            for ours, exact in zip((h.grad, w.grad), truths, strict=True):
                torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    return shaped


def group_normalised(step: Step, rewards: Tensor | None = None) -> Tensor:
    """[B] float64 (r - mean) / (std + 1e-6) in the group, typed out."""
    r = (step.batch.rewards if rewards is None else rewards).double()
    out = torch.zeros_like(r)
    for group in range(2):
        own = step.batch.group_ids == group
        out[own] = (r[own] - r[own].mean()) / (r[own].std() + 1e-6)
    return out


def clipped(ratio: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """PPO's surrogate, typed out."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
