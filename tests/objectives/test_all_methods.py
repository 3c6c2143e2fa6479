"""``METHODS``: every method is described, its settings can be changed, and a configuration is its paper's loss."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields, replace
from types import MappingProxyType

import pytest
import torch
from token_steps import (
    SIZES,
    base_advantages,
    clipped,
    compare,
    extras_of,
    group_normalised,
    make_step,
    of_policy,
    state_of,
)

from eapo_kernels import (
    METHODS,
    EAPOConfig,
    EapoError,
    Method,
    get_method,
    make_controller,
    observed_entropy,
    weight_tokens,
)
from eapo_kernels.objectives.controllers import CONTROLLERS
from eapo_kernels.objectives.semantic import semantic_rewards
from eapo_kernels.objectives.surrogates import ppo_clip
from eapo_kernels.objectives.token_weights.step import MARKS, STATISTICS

NAMES = """eapo grpo dr_grpo dapo gspo cispo psr nsr w_reinforce clip_cov kl_cov steer clip_b clip_v papo_like siren aepo dcpo
aepo_agentic aem empg epo canon spine pear entrocraft entropic tea_rl empo spear exchange_ppl exchange_position cure t1 trace
a3po repo_r hapo"""


def test_every_method_is_there_and_described() -> None:
    assert isinstance(METHODS, MappingProxyType)
    assert set(NAMES.split()) == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary.endswith(".")
        assert method.formula
        assert method.source[:4].isdigit() or method.source.startswith("EntroPIC")
        assert method.confidence in ("high", "medium", "low")
        if name.endswith("_like"):
            assert method.confidence == "low"
        if method.token_weighting is not None:
            assert method.token_weighting.scope in ("token", "sequence", "group", "batch")
            assert method.token_weighting.needs <= set(STATISTICS)
            assert method.token_weighting.uses <= set(MARKS)
            assert method.token_weighting.__doc__
            values = make_controller(method).values() if method.controller else {}
            assert method.token_weighting.state <= set(values)


BY_LEVEL = ("psr", "nsr", "w_reinforce", "aepo_agentic", "pear", "spine", "cure", "dcpo", "trace", "a3po")
"""Methods that may read the level of a reward (correct or not), not its place in the group alone."""


@pytest.mark.parametrize("name", METHODS)
def test_rewards_beyond_the_integers_of_fp32_keep_their_order(name: str) -> None:
    """1e9 + i in fp64 weights tokens as i does."""
    step, method = make_step(), METHODS[name]
    if method.config.reduction == "fixed_length":
        method = get_method(name, fixed_length=16)
    near = torch.tensor([0.0, 1, 2, 3, 4, 1, 1, 2], dtype=torch.float64)

    def weighted(rewards: torch.Tensor) -> torch.Tensor:
        batch = replace(step.batch, rewards=rewards)
        return weight_tokens(method, batch, step.stats, state=state_of(method), extras=extras_of(step, method)).advantages

    if method.config.advantage == "binary":
        return
    moved = weighted(near.float() + 8)
    if moved is not None and not torch.allclose(moved, weighted(near.float()), rtol=1e-4, atol=1e-6):
        assert name in BY_LEVEL
    torch.testing.assert_close(weighted(near + 1e9), moved, rtol=1e-4, atol=1e-6)


def _changed(value: object) -> object:
    """Another value that the numbers of all methods can take."""
    if isinstance(value, float) and value:
        return 0.95 * value
    return value + 1 if type(value) is int and value else 0.5


@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_changed_one_by_one(name: str) -> None:
    method = METHODS[name]
    for own in fields(method.token_weighting) if method.token_weighting is not None else ():
        value = getattr(method.token_weighting, own.name)
        if not isinstance(value, str):
            changed = get_method(name, **{own.name: _changed(value)})
            assert changed == replace(method, token_weighting=replace(method.token_weighting, **{own.name: _changed(value)}))
            assert get_method(changed, **{own.name: value}) == method
    for setting in inspect.signature(CONTROLLERS[method.controller]).parameters.values() if method.controller else ():
        changed = get_method(name, **{setting.name: _changed(setting.default)})
        assert changed.controller_settings == {setting.name: _changed(setting.default)}
        assert (changed.token_weighting, changed.config) == (method.token_weighting, method.config)
        assert make_controller(changed).state_dict()["settings"][setting.name] == _changed(setting.default)
    assert get_method(name, clip_high=0.123).config == replace(method.config, clip_high=0.123)
    assert get_method(name) is method


def test_no_number_has_two_owners() -> None:
    for method in METHODS.values():
        names = [f.name for f in fields(EAPOConfig)] + ["positive_weight"]
        names += [f.name for f in fields(method.token_weighting)] if method.token_weighting else []
        names += list(inspect.signature(CONTROLLERS[method.controller]).parameters) if method.controller else []
        assert len(names) == len(set(names)), method.name


def test_controller_settings() -> None:
    method = get_method("entropic", target=0.9, ki=0.0)
    controller = make_controller(method)
    assert controller.update(10.0, 10) == pytest.approx(0.1)
    assert make_controller(METHODS["grpo"]) is None
    with pytest.raises(EapoError, match=r"config: expected fields among .*target, kp, ki.*, got setpoint"):
        get_method("entropic", setpoint=0.9)
    with pytest.raises(EapoError, match=r"controller: expected one of entropy_ratio, .* got 'pid'"):
        make_controller(Method("mine", EAPOConfig(), controller="pid"))
    with pytest.raises(EapoError, match="controller_settings: expected names among target, kp, ki, got kd"):
        make_controller(Method("mine", EAPOConfig(), controller="proportional_integral", controller_settings={"kd": 1.0}))
    assert hash(METHODS["entropic"]) == hash(get_method("entropic"))


def test_get_method_changes_fields() -> None:
    method = get_method("dr_grpo", fixed_length=64, clip_high=0.3)
    assert (method.config.fixed_length, method.config.clip_high) == (64, 0.3)
    assert get_method("w_reinforce", positive_weight=0.5).positive_weight == 0.5
    assert METHODS["dr_grpo"].config.fixed_length is None
    with pytest.raises(EapoError, match=r"config: expected fields among .*clip_low.*, got clip_hgih"):
        get_method("grpo", clip_hgih=0.3)
    with pytest.raises(EapoError, match="method: expected a name or a Method, got 3"):
        get_method(3)  # type: ignore[arg-type]


def test_scope_follows_the_surrogate() -> None:
    """It is kept by copies, and is no setting."""
    config = replace(EAPOConfig(), surrogate="gspo")
    assert (EAPOConfig().scope, config.scope, replace(config, surrogate=ppo_clip).scope) == ("token", "sequence", "batch")
    assert pickle.loads(pickle.dumps(config)).scope == "sequence"
    with pytest.raises(EapoError, match="got scope"):
        get_method("grpo", scope="batch")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("surrogate", "trpo", "surrogate: expected one of reinforce, ppo_clip, .*, gspo or a function, got 'trpo'"),
        ("advantage", "gae", "advantage: expected one of group_norm"),
        ("split", "median", "split: expected one of group, batch, advantage, got 'median'"),
        ("reduction", "mean", "reduction: expected one of token_mean"),
        ("kl_estimator", "k4", "kl_estimator: expected one of k1, k2, k3"),
        ("clip_low", 1.5, r"clip_low: expected a finite number in \[0, 1\], got 1.5"),
        ("clip_high", -0.1, "clip_high: expected a finite number >= 0, got -0.1"),
        ("dual_clip", 0.5, "dual_clip: expected a finite number >= 1, got 0.5"),
        ("importance_cap", float("nan"), "importance_cap: expected a finite number >= 0, got nan"),
        ("kl_coef", "0.1", "kl_coef: expected a finite number >= 0, got '0.1'"),
        ("entropy_coef", float("inf"), "entropy_coef: expected a finite number, got inf"),
        ("dual_clip", 1.0, "dual_clip: expected a finite number > 1, got 1.0"),
        ("split", lambda *a: a, "split: expected one of group, batch, advantage, got <function"),
        ("drop_zero_weight", "no", "drop_zero_weight: expected True or False, got 'no'"),
        ("fixed_length", True, "fixed_length: expected a positive int, got True"),
        ("fixed_length", 0, "fixed_length: expected a positive int, got 0"),
        ("negative_weight", -1, "negative_weight: expected a finite number >= 0, got -1"),
    ],
)
def test_bad_config_fields(field: str, value: object, message: str) -> None:
    with pytest.raises(EapoError, match=message):
        EAPOConfig(**{field: value})


@pytest.mark.parametrize(("name", "change", "message"), [
    ("steer", {"lambda_min": 2}, r"lambda_min: expected a finite number in \[0, 1\], got 2"),
    ("steer", {"form": "paper"}, "form: expected one of theorem, released, got 'paper'"),
    ("epo", {"high": 0.5}, "high: expected a finite number >= 0.8, got 0.5"),
    ("exchange_ppl", {"low": 1.3}, "high: expected a finite number >= 1.3, got 1.2"),
    ("spear", {"low": 70.0}, "high: expected a finite number >= 70, got 60.0"),
    ("spine", {"share": 0}, r"share: expected a number in \(0, 1\], got 0"),
    ("papo_like", {"width": 0}, "width: expected a finite number > 0, got 0"),
    ("entropic", {"bound": -1}, "bound: expected a finite number >= 0, got -1"),
    ("aepo", {"level": None}, "level: expected a finite number, got None"),
    ("entrocraft", {"low_first": 0.8}, "low_first, high_first, low_last, high_last: expected each low <= its high"),
    ("dcpo", {"high": 0.5}, "low, high: expected 0 < low <= high, got low=0.8, high=0.5"),
    ("siren", {"anchor": -1}, "anchor: expected a finite number >= 0, got -1"),
    ("a3po", {"gone_at": 0}, r"gone_at: expected a number in \(0, 1\], got 0"),
    ("repo_r", {"zeta": 0.2}, r"low, zeta, high: expected 0 < low <= \|zeta\| <= high, got low=0.0001, zeta=0.2, high=0.05"),
    ("hapo", {"most": 0}, "most: expected a finite number > 0, got 0"),
])  # fmt: skip
def test_bad_settings(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(EapoError, match=message):
        get_method(name, **change)


def test_every_setting_is_checked() -> None:
    """A setting refuses what is no number, or what is none of its words."""
    for name, method in METHODS.items():
        for own in fields(method.token_weighting) if method.token_weighting is not None else ():
            for wrong in ("unknown", *(() if isinstance(own.default, str) else (float("nan"), True))):
                with pytest.raises(EapoError, match=f"{own.name}: expected .*, got {wrong!r}"):
                    get_method(name, **{own.name: wrong})


FLAT = {"entropy": 0.7, "logp": -1.0, "p2": 0.3, "p2_logp": -0.3}  # a step whose tokens are all alike


@pytest.mark.parametrize(("name", "settings", "stats"), [
    ("steer", {"lambda_min": 1.0}, {}),
    ("clip_b", {"mu": 0.0}, FLAT),
    ("clip_v", {"mu": 0.0}, FLAT),
    ("papo_like", {"gain": 0.0}, {}),
    ("aepo_agentic", {"strength": 0.0}, {}),
    ("spine", {"fork": "top", "share": 1.0, "beta_low": 0, "beta_high": 0}, {}),
    ("tea_rl", {"most": 0}, {}),
    ("exchange_ppl", {}, {"logp": -0.7}),
    ("exchange_position", {"alpha": 0}, {}),
    ("pear", {}, {"entropy": 0.0}),
    ("aem", {"strength": 0.0}, {}),
    ("aepo", {}, {}),
    ("spear", {"fresh_low": 5.0}, {}),
    ("trace", {"forward": 0.0}, {}),
    ("a3po", {"positive_scale": 1.0, "negative_scale": 1.0}, {}),
    ("repo_r", {}, {"logp": 0.0}),
], ids=str)  # fmt: skip
def test_without_its_effect_a_method_is_its_base(name: str, settings: dict[str, object], stats: dict[str, float]) -> None:
    """Every token has its response's advantage where a setting, or equal statistics, turn the weights off."""
    step, method = make_step(binary=True), get_method(name, **settings)
    flat = step.stats._replace(**{k: torch.full_like(step.stats.logp, v) for k, v in stats.items()})
    extras = {k: v for k, v in extras_of(step, method).items() if k not in ("reinforce", "replayed")}
    weighted = weight_tokens(method, step.batch, flat, state=state_of(method), extras=extras, progress=0.3)
    torch.testing.assert_close(weighted.advantages, base_advantages(step))
    assert torch.equal(weighted.mask, step.valid)
    assert weighted.entropy_coef is None or int(weighted.entropy_coef.count_nonzero()) == 0


def test_marks_without_a_marked_response_change_nothing() -> None:
    step = make_step()
    for name, mark, settings in (("aepo", "reinforce", {}), ("spear", "replayed", {"fresh_low": 5.0})):
        method, none = get_method(name, **settings), torch.zeros_like(step.valid)
        weighted = weight_tokens(method, step.batch, step.stats, extras={mark: none}, progress=0.3)
        torch.testing.assert_close(weighted.advantages, base_advantages(step))


def test_entropic_at_its_target_is_its_base() -> None:
    """H = H* gives alpha = 0."""
    step = make_step()
    total, count = observed_entropy(METHODS["entropic"], step.batch, step.stats)
    method = get_method("entropic", target=float(total / count))
    controller = make_controller(method)
    controller.update(total, count)
    weighted = weight_tokens(method, step.batch, step.stats, state=controller.values())
    torch.testing.assert_close(weighted.advantages, base_advantages(step))


def test_the_same_data_under_two_names_says_so() -> None:
    seen: dict[object, str] = {}
    for m in METHODS.values():
        data = (m.config, m.positive_weight, m.controller, tuple(m.controller_settings.items()), m.token_weighting)
        if data in seen:
            assert f"same data as `{seen[data]}`" in m.summary
        else:
            assert "same data" not in m.summary
        seen.setdefault(data, m.name)
    assert len(seen) == len(METHODS) - 2


def test_dapo() -> None:
    """arXiv 2503.14476: min(rho A, clip(rho, 0.8, 1.28) A), mean over tokens."""
    step = make_step()
    compare(step, METHODS["dapo"], of_policy(step, group_normalised(step)[step.ids], low=0.2, high=0.28))


def test_dapo_with_equal_bounds_is_grpo_with_a_token_mean() -> None:
    assert get_method("dapo", clip_high=0.2).config == get_method("grpo", reduction="token_mean").config


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.1, 0.1)])
def test_gspo(low: float, high: float) -> None:
    """arXiv 2507.18071: s_i = exp(mean_t log ratio), min(s A, clip(s, 1 - low, 1 + high) A), mean over responses."""
    step, method = make_step(1), get_method("gspo", clip_low=low, clip_high=high)
    assert (METHODS["gspo"].config.clip_low, METHODS["gspo"].config.clip_high) == (3e-4, 4e-4)
    a = group_normalised(step)

    def loss(hidden, weight):
        log_ratio = step.logp(hidden, weight) - step.old["logp"]
        s = torch.stack([log_ratio[step.valid & (step.ids == i)].mean().exp() for i in range(len(SIZES))])
        return -clipped(s, a, low, high).mean()

    compare(step, method, loss)


@pytest.mark.parametrize("high", [4.0, 0.02])
def test_cispo(high: float) -> None:
    """arXiv 2506.13585: sg(min(rho, 1 + high)) A log p, mean over all tokens; no token loses its gradient."""
    step, method = make_step(2), get_method("cispo", clip_high=high)
    a, ok = group_normalised(step)[step.ids], step.valid

    def loss(hidden, weight):
        logp = step.logp(hidden, weight)
        rho = (logp - step.old["logp"]).exp().detach()
        return -(rho.clamp(0, 1 + high) * a * logp)[ok].sum() / ok.sum()

    compare(step, method, loss)


def test_t1() -> None:
    """GRPO + kl k3(pi || ref) - c H (arXiv 2501.11651 names the terms; the coefficients are ours)."""
    step, method = make_step(3), get_method("t1", entropy_coef=0.2, kl_coef=0.3)
    assert METHODS["t1"].confidence == "low"
    reference = step.old["logp"] - 0.2
    step = replace(step, batch=replace(step.batch, ref_logp=reference))
    policy = of_policy(step, group_normalised(step)[step.ids], bonus=0.2, mean="responses")

    def loss(hidden, weight):
        delta = reference - step.logp(hidden, weight)
        k3, total = delta.exp() - 1 - delta, torch.zeros((), dtype=torch.float64)
        for i in range(len(SIZES)):
            total = total + k3[step.valid & (step.ids == i)].mean() / len(SIZES)
        return policy(hidden, weight) + 0.3 * total

    compare(step, method, loss)


def test_empo_is_grpo_on_semantic_rewards() -> None:
    """arXiv 2504.05812: r_i = size of i's cluster / G; then GRPO."""
    step, method = make_step(), get_method("empo")
    clusters = torch.tensor([3, 3, 1, 3, 0, 2, 2, 5])
    rewards = semantic_rewards(clusters, step.batch.group_ids)
    torch.testing.assert_close(rewards, torch.tensor([3, 3, 1, 3, 1, 2, 2, 1]) / 4)
    step = replace(step, batch=replace(step.batch, rewards=rewards))
    compare(step, method, of_policy(step, group_normalised(step)[step.ids], mean="responses"))
