"""``token_stats``, ``nucleus_entropy`` and ``linear_cross_entropy`` on any head, against dense float64 formulas."""

from __future__ import annotations

from typing import Any

import torch
from heads import Head, close, close_gradients, heads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eapo_kernels import EapoError, Options, nucleus_entropy, token_stats
from eapo_kernels.integrations import linear_cross_entropy

OPTIONS = st.builds(
    Options,
    memory_budget=st.sampled_from([None, 1, 3000, 70_001]),
    compact=st.sampled_from(["auto", True, False]),
    plan=st.sampled_from(["auto", "recompute"]),
)


def call(function: Any, *arguments: Any, options: Options, **keywords: Any) -> Any:
    """The result, or None where the budget is below the workspace of a row."""
    try:
        return function(*arguments, options=options, **keywords)
    except EapoError as error:
        assert str(error).startswith("Options.memory_budget: expected at least "), error  # noqa: PT017
        assert options.memory_budget is not None
        return None


def dense(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy, lse [...], zeros where nothing counts."""
    z = head.logits()
    lse = z.logsumexp(-1)
    log_p = z - lse[..., None]
    logp = log_p.gather(-1, head.targets.clamp_min(0)[..., None])[..., 0]
    entropy = -(log_p.exp() * torch.where(log_p > -1e300, log_p, 0.0)).sum(-1)
    return tuple(torch.where(head.valid, value, 0.0) for value in (logp, entropy, lse))  # type: ignore[return-value]


def weighted(values: tuple[Tensor, ...], seed: int) -> Tensor:
    """A sum of the finite values with random factors: what gives every row a gradient."""
    g = torch.Generator().manual_seed(seed)
    return sum(
        (torch.where(v.isfinite(), v, 0.0) * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.dtype)).sum()
        for v in values
    )


@given(heads(), OPTIONS, st.sampled_from(["grad", "nograd", "none"]), st.booleans(), st.integers(0, 2**32))
def test_statistics_and_gradients(head: Head, options: Options, mode: str, moments: bool, seed: int) -> None:
    leaves = head.leaves()
    arguments = {"mask": head.mask, "entropy": mode, "second_moments": moments, "options": options, **head.options}
    stats = call(token_stats, head.hidden, head.weight, head.targets, **arguments)
    if stats is None:
        return
    logp, entropy, lse = dense(head)
    tolerance = head.tolerance()
    close(stats.logp, logp, tolerance)
    close(stats.lse, lse, tolerance)
    assert (stats.entropy is None) == (mode == "none")
    if stats.entropy is not None:
        close(stats.entropy, entropy, tolerance)
        assert (stats.entropy >= 0).all()
    if moments:
        p = (head.logits() - head.logits().logsumexp(-1, keepdim=True)).exp()
        close(stats.p2, torch.where(head.valid, p.square().sum(-1), 0.0), tolerance)
        assert (stats.varentropy >= 0).all()
    with_gradient = [0, 1, 2] if mode == "grad" else [0, 2]
    found = weighted(tuple(stats[i] for i in with_gradient), seed)
    if not call(lambda options: found.backward() or True, options=options):
        return
    copies = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    expected = torch.autograd.grad(weighted(tuple((logp, entropy, lse)[i] for i in with_gradient), seed), leaves)
    close_gradients(copies, list(expected), 8 * tolerance, head.floor())


@given(heads(), OPTIONS, st.sampled_from([0.01, 0.5, 0.9, 0.999]), st.integers(0, 2**32))
def test_entropies_of_a_nucleus(head: Head, options: Options, top_p: float, seed: int) -> None:
    leaves = head.leaves()
    found = call(nucleus_entropy, head.hidden, head.weight, top_p=top_p, mask=head.valid, options=options, **head.options)
    if found is None:
        return
    p = head.logits().softmax(-1)
    ordered = p.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    # Rounding may move a token whose mass ends at top_p, or exchange two that are equally probable.
    near = ((before + ordered - top_p).abs() < 1e-3).any(-1)
    inside = before < top_p
    ends = inside.sum(-1, keepdim=True) - 1
    tied = (ordered - ordered.gather(-1, ends)).abs() <= 1e-4 * ordered.gather(-1, ends)
    near |= (tied & ~inside).any(-1) | (head.tolerance() > 1e-3)
    q = torch.where(inside, ordered, 0.0)
    q = q / q.sum(-1, keepdim=True)
    entropy = torch.where(head.valid, -torch.where(q > 0, q * q.log(), 0.0).sum(-1), 0.0)
    assert found.isfinite().all()
    assert (found >= 0).all()
    close(torch.where(near, 0.0, found), torch.where(near, 0.0, entropy), 1e3 * head.tolerance())
    weighted((found,), seed).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@given(
    heads(),
    OPTIONS,
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([-100, 0, -1, 10**9]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.0, 1e-3]),
    st.tuples(st.booleans(), st.booleans(), st.integers(0, 2)),
    st.integers(0, 2**32),
)
def test_cross_entropy(
    head: Head, options: Options, reduction: str, ignored: int, smoothing: float, z_loss: float, how: tuple[Any, ...], seed: int
) -> None:
    """As ``torch.nn.functional.cross_entropy``, and what it does not have by the documented formula."""
    leaves, (weights, token_scaling, shift) = head.leaves(), how
    V, length = len(head.weight), head.targets.shape[-1] if head.targets.dim() else 0
    bias = head.options["bias"]
    removed = bias is not None and not bias.isfinite().all()
    smoothing, shift = 0.0 if removed else smoothing, min(shift, max(length - 1, 0))
    # Every class but the ignored one counts.
    valid = head.valid & (head.targets != ignored)
    targets = torch.where(valid, head.targets, ignored)
    head = Head(torch.where(valid[..., None], head.hidden, 0), head.weight, targets, None, valid, head.options)
    leaves[0] = head.hidden.detach().requires_grad_()
    classes = torch.rand(V, generator=torch.Generator().manual_seed(seed)) if weights else None
    found = call(
        linear_cross_entropy, leaves[0], head.weight, targets, reduction=reduction, ignore_index=ignored, shift=shift,
        label_smoothing=smoothing, z_loss=z_loss, token_scaling=token_scaling, class_weights=classes, options=options,
        **{**head.options, **_positive(head)},
    )  # fmt: skip
    if found is None:
        return
    head = Head(leaves[0], head.weight, targets, None, torch.ones_like(valid), {**head.options, **_positive(head)})
    z = head.logits()
    if shift:
        z, targets, valid = z[..., :-shift, :], targets[..., shift:], valid[..., shift:]
    lse = z.logsumexp(-1)
    log_p = z - lse[..., None]
    factors = torch.ones(V, dtype=torch.float64) if classes is None else classes.double()
    own = torch.where(valid, targets, 0)
    of_target = torch.where(valid, factors[own], 0.0)
    logp = log_p.gather(-1, own[..., None])[..., 0]
    loss = -(1 - smoothing) * of_target * torch.where(valid, logp, 0.0)
    if smoothing:
        loss = loss - smoothing / V * torch.where(valid, (factors * log_p).sum(-1), 0.0)
    penalty = z_loss * torch.where(valid, lse, 0.0).square()
    if token_scaling:
        probability = logp.detach().exp()
        loss, penalty = torch.where(probability > 0, loss * probability, 0.0), penalty * probability
    if reduction == "none":
        loss = loss + penalty
    elif reduction == "sum":
        loss = loss.sum() + penalty.sum()
    else:
        count = valid.sum().clamp_min(1)
        total = count if classes is None else of_target.sum() if valid.any() else 1
        loss = loss.sum() / total + penalty.sum() / count
    size = 1 + float(torch.where(valid, lse.detach(), 0.0).abs().max() if lse.numel() else 0)
    tolerance = 4 * head.tolerance() * (1 + z_loss * size) * (V if smoothing else 1) + 2e-7  # the mean's weights are fp32
    close(found, loss, tolerance)
    if not call(lambda options: weighted((found,), seed).backward() or True, options=options):
        return
    copies = [leaf.grad for leaf in leaves]
    floor = head.floor(cancels=smoothing > 0)
    close_gradients(copies, list(torch.autograd.grad(weighted((loss,), seed), leaves)), 8 * tolerance, floor)


def _positive(head: Head) -> dict[str, Any]:
    """Temperatures without the impossible ones of rows that do not count: targets that count may move there."""
    temperature = head.options["inv_temperature"]
    if not isinstance(temperature, Tensor) or temperature.shape != head.valid.shape:
        return {}
    return {"inv_temperature": torch.where(head.valid, temperature, 1)}
