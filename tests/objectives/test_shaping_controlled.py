"""Methods with a set point, a band or a target entropy, against their papers' equations typed out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from shaped import compare, group_normalised, make_step, of_policy

from eapo_kernels import EapoError, get_method, make_controller, observed_entropy, weight_tokens


def _state(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@pytest.mark.parametrize(("alpha", "bound", "used"), [(0.4, None, 0.4), (-0.3, None, -0.3), (1.7, None, 1.7), (1.7, 1.0, 1.0)])
def test_entropic(alpha: float, bound: float | None, used: float) -> None:
    """EntroPIC: (1 + alpha) A for A > 0, (1 - alpha) A for A < 0."""
    step, method = make_step(), get_method("entropic", bound=bound)
    a = group_normalised(step)[step.ids]
    a = torch.where(a > 0, (1 + used) * a, (1 - used) * a)
    compare(step, method, of_policy(step, a), state=_state(alpha=alpha))


def test_entropic_at_its_target_is_its_base() -> None:
    """The controller's own step: H = H* gives alpha = 0."""
    step = make_step()
    total, count = observed_entropy(get_method("entropic"), step.batch, step.stats)
    method = get_method("entropic", target=float(total / count))
    controller = make_controller(method)
    controller.update(total, count)
    shaped = weight_tokens(method, step.batch, step.stats, state=controller.values())
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(shaped.advantages, expected)


@pytest.mark.parametrize(("schedule", "progress", "done"), [
    ("linear", 0.25, 0.25), ("cosine", 0.25, 0.5 * (1 - math.cos(math.pi / 4))), ("linear", 1.0, 1.0)
])  # fmt: skip
@pytest.mark.parametrize("where", ["above", "inside", "below"])
def test_entrocraft(schedule: str, progress: float, done: float, where: str) -> None:
    """arXiv 2604.26326: m = [H > high] - [H < low]; a response stays where m A >= 0. The band's bounds move."""
    step = make_step()
    h, a = float(step.old["entropy"][step.valid].mean()), group_normalised(step)[step.ids]
    centre = {"above": h - 0.3, "inside": h, "below": h + 0.3}[where]  # of the band at this progress, 0.2 wide
    first, last = centre + 0.5 * done, centre - 0.5 * (1 - done)
    bounds = {"low_first": first - 0.1, "high_first": first + 0.1, "low_last": last - 0.1, "high_last": last + 0.1}
    method = get_method("entrocraft", schedule=schedule, **bounds)
    m = {"above": 1, "inside": 0, "below": -1}[where]
    keep = m * a >= 0
    shaped = compare(step, method, of_policy(step, a, keep=keep), progress=progress)
    assert int(shaped.mask.sum()) == int((keep & step.valid).sum())


@pytest.mark.parametrize("where", ["above", "inside", "below"])
def test_entrocraft_as_released(where: str) -> None:
    """The authors' code: max(r, 0) above the band, min(r, 0) below it, raw rewards; GRPO inside; nothing leaves the batch."""
    step = make_step(1)
    step = replace(step, batch=replace(step.batch, rewards=step.batch.rewards * 2 - 1))
    h, r = float(step.old["entropy"][step.valid].mean()), step.batch.rewards.double()
    low, high = {"above": (h - 2, h - 1), "inside": (h - 1, h + 1), "below": (h + 1, h + 2)}[where]
    low, high = max(low, 0.0), max(high, 0.0)
    a = {"above": r.clamp_min(0), "inside": group_normalised(step), "below": r.clamp_max(0)}[where]
    method = get_method("entrocraft", form="released", low_first=low, low_last=low, high_first=high, high_last=high)
    compare(step, method, of_policy(step, a[step.ids]))


def test_aepo() -> None:
    """arXiv 2510.08141: advantage 1 on the responses of the other temperature, GRPO on the rest."""
    step, method = make_step(2), get_method("aepo")
    marked = (step.ids == 1) | (step.ids == 6)
    groups = step.batch.group_ids.clone()
    groups[1], groups[6] = 7, 8  # the marked ones have groups of their own
    step = replace(step, batch=replace(step.batch, group_ids=groups))
    a = torch.where(marked, 1.0, group_normalised(step)[step.ids])
    compare(step, method, of_policy(step, a), extras={"reinforce": marked})


def test_aepo_without_marked_responses_is_grpo() -> None:
    step = make_step()
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(weight_tokens(get_method("aepo"), step.batch, step.stats).advantages, expected)
    none = {"reinforce": torch.zeros_like(step.valid)}
    torch.testing.assert_close(weight_tokens(get_method("aepo"), step.batch, step.stats, extras=none).advantages, expected)


@pytest.mark.parametrize(("gap", "used"), [(0.03, 0.03), (-0.5, 0.1)])
def test_dcpo(gap: float, used: float) -> None:
    """Beside arXiv 2510.08141: b = min(|H* - H|, 0.1) / share correct, a = b / (1 + b), (1 - a) A + a [correct] p_T / p."""
    step, method = make_step(binary=True), get_method("dcpo")
    h = float(step.old["entropy"][step.valid].mean())
    hot = torch.log_softmax(step.old["log_p"] / 1.2, -1).gather(1, step.batch.targets[:, None])[:, 0]
    correct = step.batch.rewards.double()
    b = used / float(correct.mean())
    a = b / (1 + b)
    factor = (hot - step.old["logp"]).exp()
    advantages = (1 - a) * group_normalised(step)[step.ids] + a * correct[step.ids] * factor
    compare(
        step, method, of_policy(step, advantages), state=_state(target=h + gap), extras={"tempered_logp": hot}, tolerance=5e-5
    )


def test_dcpo_without_a_correct_answer_or_at_its_target_is_grpo() -> None:
    step = make_step(binary=True)
    extras, h = {"tempered_logp": step.stats.logp + 0.1}, float(step.stats.entropy[step.valid].double().mean())
    wrong = replace(step.batch, rewards=torch.zeros_like(step.batch.rewards))
    shaped = weight_tokens(get_method("dcpo"), wrong, step.stats, state=_state(target=9.0), extras=extras)
    assert int(shaped.advantages.count_nonzero()) == 0
    shaped = weight_tokens(get_method("dcpo"), step.batch, step.stats, state=_state(target=h), extras=extras)
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(shaped.advantages, expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("entrocraft", {"low_first": 0.8}, "low_first, high_first, low_last, high_last: expected each low <= its high"),
        ("entrocraft", {"schedule": "step"}, "schedule: expected one of linear, cosine, got 'step'"),
        ("entrocraft", {"form": "code"}, "form: expected one of paper, released, got 'code'"),
        ("entropic", {"bound": -1}, "bound: expected a finite number >= 0, got -1"),
        ("entropic", {"target": -1}, "target: expected a finite number >= 0, got -1"),
        ("aepo", {"level": None}, "level: expected a finite number, got None"),
        ("dcpo", {"reach": -0.1}, "reach: expected a finite number >= 0, got -0.1"),
        ("dcpo", {"high": 0.5}, "low, high: expected 0 < low <= high, got low=0.8, high=0.5"),
    ],
)
def test_bad_numbers(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(EapoError, match=message):
        get_method(name, **change)
