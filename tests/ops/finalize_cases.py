"""What the tests of every finalize kernel share: sums of known rows, and a surrogate's equation typed again in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eapo_kernels.ops.dispatch import RowStatistics, SurrogateTerms
from eapo_kernels.ops.triton.online_softmax import PartialSums

B = 7


def sums_with_logp(logp: Tensor, splits: int = 3) -> PartialSums:
    """Partial sums of a two-column vocabulary in which the target has this log-prob, the other column in the last range."""
    n = logp.numel()
    values = logp.new_zeros(4, splits, n)
    values[0] = -math.inf
    values[0, -1] = torch.log(-torch.expm1(logp.double())).float()  # z of the other column
    values[1, 0] = logp  # z of the target
    values[2, -1] = 1.0
    return PartialSums(values, entropy=True, second_moments=False)


def partial_sums(z: Tensor, targets: Tensor, splits: int) -> Tensor:
    """[7, splits, N] fp32, ``PartialSums`` of logits [N, V] float64 cut into ranges; a range's maximum is a number of fp32."""
    others = z.scatter(1, targets.unsqueeze(1), -math.inf)
    values = torch.zeros(7, splits, z.shape[0], dtype=torch.float64)
    for k, part in enumerate(others.tensor_split(splits, 1)):
        if not part.shape[1]:
            values[0, k] = -math.inf
            continue
        values[0, k] = part.amax(1).float()
        x = part - values[0, k].clamp_min(-1e30).unsqueeze(1)
        e = x.exp()
        x = torch.where(e > 0, x, 0.0)
        values[2:, k] = torch.stack([e.sum(1), (x * e).sum(1), (e * e).sum(1), (x * e * e).sum(1), (x * x * e).sum(1)])
    values[1, splits // 2] = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    return values.float()


def exact_statistics(z: Tensor, targets: Tensor) -> RowStatistics:
    """E2 to E4 of logits [N, V] float64, with p log p = 0 at p = 0."""
    log_p = z.log_softmax(1)
    p = log_p.exp()
    weighted = torch.where(p > 0, p * log_p, 0.0)
    logp, lse, row_max = log_p.gather(1, targets.unsqueeze(1)).squeeze(1), z.logsumexp(1), z.amax(1)
    entropy = -weighted.sum(1)
    spread = torch.where(p > 0, weighted * log_p, 0.0).sum(1) - entropy**2
    log_sum = lse - row_max
    moments = (p * p).sum(1), (p * weighted).sum(1), spread.clamp_min(0)
    return RowStatistics(logp, entropy, lse, row_max, log_sum, log_sum - entropy, *moments)


def make_terms(n: int, device: str, seed: int = 0) -> SurrogateTerms:
    """Both signs of advantage, rewards above, below and exactly at their threshold, and an advantage of zero."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 2.0, -1.0, 0.25])
    thresholds = torch.tensor([0.5, 0.5, 0.5, 0.25, 1.0, 1.0, 0.25])
    terms = SurrogateTerms(
        sequence_ids=torch.randint(B, (n,), generator=g),
        old_logp=-3 * torch.rand(n, generator=g) - 0.05,
        scale=torch.rand(n, generator=g) / n,
        advantages=torch.tensor([1.3, -0.7, 0.0, 0.4, 1.1, -1.9, -0.3]),
        rewards=rewards,
        thresholds=thresholds,
        positive_weight=torch.tensor(0.6),
        negative_weight=1.25,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=None,
    )
    return terms._replace(**{k: v.to(device) for k, v in terms._asdict().items() if isinstance(v, Tensor)})


def typed_again(logp: Tensor, entropy: Tensor, t: SurrogateTerms) -> tuple[Tensor, Tensor]:
    """(sums, d loss / d logp) of E9 and E10 in float64 by autograd; PPO arXiv 1707.06347, dual clip arXiv 1912.09729."""
    logp = logp.double().detach().requires_grad_()
    i, old = t.sequence_ids, t.old_logp.double()
    w = torch.where(t.rewards[i] > t.thresholds[i], t.positive_weight.double(), t.negative_weight)
    advantage = t.advantages.double()[i]
    log_ratio = (logp - old).clamp(-60, 60)
    ratio = log_ratio.exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - t.clip_low, 1 + t.clip_high) * advantage
    clipped = bounded < free
    term = torch.where(clipped, bounded.detach(), free)
    if t.dual_clip is not None:
        under = (advantage < 0) & (term < t.dual_clip * advantage)
        term, clipped = torch.where(under, t.dual_clip * advantage, term), clipped | under
    loss = -(t.scale.double() * w * term).sum()
    (gradient,) = torch.autograd.grad(loss, [logp])
    gap = (old - logp.detach()).clamp(-60, 60)
    values = [loss.detach(), entropy.double().sum(), ratio.sum(), clipped.sum(), (torch.expm1(gap) - gap).sum(), loss * 0]
    return torch.stack([v.detach().double() for v in values]), gradient
