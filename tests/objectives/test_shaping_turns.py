"""Methods on turns against their papers' equations typed out."""

from __future__ import annotations

import math

import pytest
import torch
from shaped import SIZES, Step, compare, group_normalised, make_step, of_policy

from eapo_kernels import EapoError, get_method, weight_tokens

TURNS = (0, 2, 5)  # the numbers of the turns: rising, not without gaps


def _turns(step: Step) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """turn_ids [N]: responses are cut in up to three turns; and (response, its tokens) turn by turn, in order."""
    turn_ids = torch.zeros_like(step.ids)
    parts = []
    for i in range(len(SIZES)):
        tokens = (step.ids == i).nonzero()[:, 0]
        for turn, piece in zip(TURNS, tokens.tensor_split(1 + i % 3), strict=False):
            turn_ids[piece] = turn
            piece = piece[step.valid[piece]]
            if len(piece):
                parts.append((i, piece))
    assert len(parts) > 10
    return turn_ids, parts


def test_aem() -> None:
    """arXiv 2605.00425: alpha = exp(-lambda h) / mean_G exp(-lambda h), h min-max scaled over the group's turns."""
    step, method = make_step(), get_method("aem", strength=1.7)
    turn_ids, parts = _turns(step)
    h, a = step.old["entropy"], group_normalised(step)[step.ids]
    for group in range(2):
        own = [(i, piece) for i, piece in parts if step.batch.group_ids[i] == group]
        means = torch.stack([h[piece].mean() for _, piece in own])
        scaled = (means - means.min()) / (means.max() - means.min() + 1e-8)
        alpha = (-1.7 * scaled).exp() / (-1.7 * scaled).exp().mean()
        for weight, (_, piece) in zip(alpha, own, strict=True):
            a[piece] *= weight
    compare(step, method, of_policy(step, a), extras={"turn_ids": turn_ids})


def test_empg() -> None:
    """arXiv 2509.09265, eqs. 7, 10-12: A g(h_t) + zeta f(h_{t+1}), minus its mean over the steps of the batch."""
    step, method = make_step(1), get_method("empg", k=1.3, k_future=0.7, zeta=0.2)
    turn_ids, parts = _turns(step)
    entropy, a = step.old["entropy"], group_normalised(step)
    means = torch.stack([entropy[piece].mean() for _, piece in parts])
    h = (means - means.min()) / (means.max() - means.min() + 1e-8)
    g = (-1.3 * h).exp() / ((-1.3 * h).exp().mean() + 1e-8)
    values = []
    for n, (i, _) in enumerate(parts):
        follows = n + 1 < len(parts) and parts[n + 1][0] == i
        values.append(a[i] * g[n] + (0.2 * math.exp(-0.7 * float(h[n + 1])) if follows else 0.0))
    mean = torch.stack(values).mean()
    per_token = torch.zeros_like(entropy)
    for value, (_, piece) in zip(values, parts, strict=True):
        per_token[piece] = value - mean
    compare(step, method, of_policy(step, per_token), extras={"turn_ids": turn_ids})


def test_without_turns_a_response_is_one() -> None:
    step = make_step()
    for name in ("aem", "empg"):
        alone = weight_tokens(get_method(name), step.batch, step.stats)
        zeros = weight_tokens(get_method(name), step.batch, step.stats, extras={"turn_ids": torch.zeros_like(step.ids)})
        torch.testing.assert_close(alone.advantages, zeros.advantages)


def test_switched_off_they_are_their_base() -> None:
    """strength 0: AEM weighs 1. k and zeta 0: EMPG is the advantage minus its mean over responses."""
    step = make_step(2)
    base = group_normalised(step).float()
    weighed = weight_tokens(get_method("aem", strength=0.0), step.batch, step.stats)
    torch.testing.assert_close(weighed.advantages, torch.where(step.valid, base[step.ids], 0.0))
    centred = weight_tokens(get_method("empg", k=0.0, zeta=0.0), step.batch, step.stats)
    expected = torch.where(step.valid, (base - base.mean())[step.ids], 0.0)
    torch.testing.assert_close(centred.advantages, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "number"), [("aem", "strength"), ("empg", "k"), ("empg", "k_future")])
def test_bad_numbers(name: str, number: str) -> None:
    with pytest.raises(EapoError, match=f"{number}: expected a finite number >= 0, got -1"):
        get_method(name, **{number: -1})
