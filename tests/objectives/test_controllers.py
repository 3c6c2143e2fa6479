"""Controllers: what they compute, their bounds and their checkpoints."""

from __future__ import annotations

import math

import pytest
import torch

from eapo_kernels import EapoError, EntropyRatio, make_controller
from eapo_kernels.objectives.controllers import CONTROLLERS, build_controller


def test_ratio_of_sums() -> None:
    w = EntropyRatio()
    assert w.weight == 1
    assert w.initial_entropy.isnan()
    assert w.update(300.0, 100) == 1
    assert w.initial_entropy == 3
    assert w.update(torch.tensor(150.0), torch.tensor(100)) == 0.5
    assert w.update(900.0, 200) == 1.5
    assert w.initial_entropy == 3
    assert w.ratio == 1.5


@pytest.mark.parametrize(("settings", "entropies", "weight"), [
    ({"kappa": 2.0, "scale": 0.5}, (2.0, 1.0), 0.5 * 0.25),  # entropy falls
    ({"kappa": 2.0, "scale": 0.5}, (2.0, 1.0, 4.0), 0.5 * 4),  # and rises
    ({"low": 0.8, "high": 1.1}, (1.0, 0.1), 0.8),
    ({"low": 0.8, "high": 1.1}, (1.0, 9.0), 1.1),
    ({"kappa": 0.0, "scale": 0.3}, (1.0, 0.1), 0.3),
    ({"ema": 0.75}, (2.0, 1.0), (0.75 * 2 + 0.25 * 1) / 2),
], ids=str)  # fmt: skip
def test_weight(settings: dict[str, float], entropies: tuple[float, ...], weight: float) -> None:
    """E9: clamp(scale (H_k / H_0)^kappa, low, high), H_k an exponential moving average."""
    w = EntropyRatio(**settings)
    assert [w.update(h, 1) for h in entropies][-1] == pytest.approx(weight)
    assert w.initial_entropy == entropies[0]


def test_anchor_of_several_steps() -> None:
    """H_0 is the mean of the first steps, in which the weight does not move; smoothing starts from it."""
    w = EntropyRatio(scale=0.5, ema=0.75, anchor_steps=3)
    assert [float(w.update(h, 1)) for h in (2.0, 1.0, 3.0)] == [0.5, 0.5, 0.5]
    assert w.initial_entropy == 2
    assert w.update(1.0, 1) == pytest.approx(0.5 * (0.75 * 2 + 0.25 * 1) / 2)
    again = EntropyRatio(scale=0.5, ema=0.75, anchor_steps=3)
    again.update(2.0, 1)
    resumed = EntropyRatio(scale=0.5, ema=0.75, anchor_steps=3)
    resumed.load_state_dict(again.state_dict())
    for h in (1.0, 3.0, 1.0):
        resumed.update(h, 1)
    assert resumed.values() == w.values()


def test_state_of_other_settings_is_refused() -> None:
    with pytest.raises(EapoError, match=r"EntropyRatio settings: expected .*'kappa': 2.0.* got .*'kappa': 1.0"):
        EntropyRatio(kappa=2.0).load_state_dict(EntropyRatio().state_dict())
    with pytest.raises(EapoError, match="EntropyRatio state: expected keys"):
        EntropyRatio().load_state_dict({"weight": 1.0})
    with pytest.raises(EapoError, match="EntropyRatio state: expected finite numbers, entropies and a weight >= 0"):
        EntropyRatio().load_state_dict(EntropyRatio().state_dict() | {"weight": math.nan})


@pytest.mark.parametrize(
    ("entropy", "count", "message"),
    [
        (1.0, 0, "token_count: expected a positive number, got 0.0"),
        (math.nan, 1, "entropy_sum: expected a positive finite number of nats, got nan"),
        (0.0, 1, "entropy_sum: expected a positive finite number of nats, got 0.0"),
        (torch.tensor(math.inf), 1, "got inf"),
        (torch.tensor([1.0]), 1, r"entropy_sum: expected a number or a 0-dim tensor, got float32 \[1\] cpu"),
        ("3", 1, "entropy_sum: expected a number or a 0-dim tensor, got '3'"),
    ],
)
def test_bad_updates(entropy: float, count: int, message: str) -> None:
    with pytest.raises(EapoError, match=message):
        EntropyRatio().update(entropy, count)


@pytest.mark.parametrize("settings", [
    {"kappa": math.nan}, {"kappa": "1"}, {"low": math.inf}, {"scale": -1.0},
    {"low": -0.1}, {"low": 2.0, "high": 1.0}, {"ema": 1.0},
    {"anchor_steps": 0}, {"anchor_steps": 1.5}, {"anchor_steps": math.inf},
], ids=str)  # fmt: skip
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(EapoError, match="expected"):
        EntropyRatio(**settings)


def test_proportional_integral() -> None:
    """EntroPIC: alpha = kp (H - H*) + what ki (H - H*) of the steps before have added up to."""
    c = build_controller("proportional_integral", {"target": 0.5, "kp": 2.0, "ki": 0.1})
    assert c.values()["alpha"] == 0
    assert c.update(90.0, 100) == pytest.approx(2 * 0.4)
    assert c.update(20.0, 100) == pytest.approx(2 * -0.3 + 0.1 * 0.4)
    assert c.update(50.0, 100) == pytest.approx(0.1 * 0.4 - 0.1 * 0.3)


def test_proportional_integral_of_the_authors() -> None:
    """The released recursion: alpha = last + (H - H*), last <- alpha - 0.99 (H - H*)."""
    c, last = build_controller("proportional_integral", {"target": 0.7}), 0.0
    for entropy in (1.0, 0.6, 0.2, 0.9):
        alpha = last + (entropy - 0.7)
        last = alpha - 0.99 * (entropy - 0.7)
        assert c.update(entropy, 1) == pytest.approx(alpha)


def test_history_counts_every_step_the_same() -> None:
    c = build_controller("entropy_history", {})
    assert c.values()["history"].isnan()
    assert c.update(200.0, 100) == 2
    assert c.update(10.0, 10) == 1.5
    assert c.update(3.0, 1) == 2


def test_anchor_keeps_the_first_step_or_the_given_number() -> None:
    c = build_controller("anchor", {})
    assert c.values()["anchor"].isnan()
    assert [float(c.update(h, 1)) for h in (0.7, 0.2)] == [0.7, 0.7]
    assert build_controller("anchor", {"anchor": 1.5}).update(0.1, 1) == 1.5


def test_trend_is_against_the_average_before() -> None:
    c = build_controller("entropy_trend", {"memory": 0.5})
    assert c.update(2.0, 1) == 0
    assert c.update(1.0, 1) == -0.5
    assert c.values()["average"] == 1.5
    assert c.update(3.0, 1) == 1.0


def test_target_switch() -> None:
    """arXiv 2510.08141: hot at or below the target, cool above."""
    c = build_controller("target_switch", {"target": 0.5})
    assert c.values()["temperature"] == 1.2
    for entropy, temperature, above in ((0.4, 1.2, 0), (0.5, 1.2, 0), (0.6, 0.8, 1)):
        assert c.update(entropy, 1) == pytest.approx(temperature)
        assert c.values()["above"] == above
    assert c.values()["target"] == 0.5


def test_doubling() -> None:
    """arXiv 2603.11682: zeta doubles below H* and halves above, within two bounds, and turns at the lower one."""
    c = build_controller("doubling", {"zeta": 3e-4, "high": 1e-3})
    assert c.update(2.0, 1) == 3e-4, "the first step's entropy is the target"
    found = [float(c.update(h, 1)) for h in (1.9, 1.9, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.0, 1.9, 1.9, 1.9, 1.9)]
    expected = [6e-4, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 1e-4, -1e-4, -2e-4, -2e-4, -1e-4, 1e-4, 2e-4, 4e-4]
    assert found == pytest.approx(expected)
    assert c.values()["target"] == 2
    assert build_controller("doubling", {"target": 0.3}).update(0.2, 1) == 2e-3
    with pytest.raises(EapoError, match=r"Doubling state: expected 0-dim numbers, low <= \|zeta\| <= high"):
        c.load_state_dict(c.state_dict() | {"zeta": torch.tensor(0.0)})


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_resumes_from_its_checkpoint(name: str, tmp_path) -> None:
    settings = dict.fromkeys(list(_settings(name))[:1], 0.4)
    c, fresh = build_controller(name, settings), build_controller(name, settings)
    for entropy in (0.9, 0.3):
        c.update(entropy, 1)
    torch.save(c.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert fresh.values().keys() == c.values().keys()
    assert fresh.update(0.5, 1) == c.update(0.5, 1)
    assert {k: float(v) for k, v in fresh.values().items()} == {k: float(v) for k, v in c.values().items()}
    assert all(v.dim() == 0 for v in c.metrics().values())
    with pytest.raises(EapoError, match=f"{type(c).__name__} state: expected keys"):
        fresh.load_state_dict({"settings": {}})
    if settings:
        with pytest.raises(EapoError, match=f"{type(c).__name__} settings: expected"):
            build_controller(name, {}).load_state_dict(c.state_dict())


def _settings(name: str) -> dict[str, object]:
    return build_controller(name, {}).state_dict()["settings"]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_bad_entropy_is_refused_and_changes_nothing(name: str) -> None:
    c = build_controller(name, {})
    c.update(0.8, 1)
    before = {k: float(v) for k, v in c.values().items()}
    for total, count in ((math.nan, 1), (-1.0, 1), (1.0, 0)):
        with pytest.raises(EapoError, match=r"expected a (positive )?(finite )?number"):
            c.update(total, count)
    for entropy in (math.nan, -1.0, math.inf):  # on an accelerator update does not read it
        c._advance(torch.tensor(entropy, dtype=torch.float64))
    assert {k: float(v) for k, v in c.values().items()} == before


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("proportional_integral", {"kp": -1}, "kp: expected a finite number >= 0, got -1"),
        ("entropy_trend", {"memory": 1}, r"memory: expected a number in \[0, 1\), got 1"),
        ("target_switch", {"low": 0}, "low, high: expected 0 < low <= high, got low=0, high=1.2"),
        ("anchor", {"anchor": "first"}, "anchor: expected a finite number >= 0, got 'first'"),
        ("entropy_history", {"ema": 0.5}, "controller_settings: expected names among , got ema"),
    ],
)
def test_bad_settings_of_the_others(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(EapoError, match=message):
        build_controller(name, settings)


@pytest.mark.parametrize(
    "change", [{"entropy": -5.0}, {"initial_entropy": math.inf}, {"steps": -3}, {"weight": math.inf}], ids=str
)
def test_impossible_states_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(EapoError, match="EntropyRatio state: expected finite numbers, entropies and a weight >= 0"):
        EntropyRatio().load_state_dict(EntropyRatio().state_dict() | change)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(EapoError, match="EntropyRatio state: expected what state_dict"):
        EntropyRatio().load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(EapoError, match="EntropyRatio weight: expected a number or a 0-dim tensor, got 'x'"):
        EntropyRatio().load_state_dict(EntropyRatio().state_dict() | {"weight": "x"})
    with pytest.raises(EapoError, match=r"method: expected a Method, such as get_method\(name\), got 'eapo'"):
        make_controller("eapo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "entropy", "weight"),
    [({"kappa": 400.0}, 1e3, 1e30), ({"kappa": -400.0}, 1e-3, 1e30), ({"kappa": 400.0, "scale": 0.0}, 1e3, 0.0)],
    ids=str,
)
def test_a_power_beyond_every_number_is_bounded(settings: dict[str, float], entropy: float, weight: float) -> None:
    controller = EntropyRatio(**settings)
    controller.update(1.0, 1)
    assert float(controller.update(entropy, 1)) == weight


@pytest.mark.parametrize(("total", "count"), [(1e308, 1e-300), (5e-324, 1e9), (1.0, math.inf)])
def test_a_mean_out_of_range_is_refused(total: float, count: float) -> None:
    """The sum alone is in range."""
    with pytest.raises(EapoError, match=r"(entropy_sum|token_count): expected a positive"):
        EntropyRatio().update(total, count)
