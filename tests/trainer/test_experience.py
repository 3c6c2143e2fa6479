"""Statistics, masks and teacher log-probs before the token weights are fixed, against dense logits
and plain search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer, no_tick

from eapo_kernels import TokenStats, diagnostics, get_method, make_controller, observed_entropy, weight_tokens
from trainer.config import Config, OptimConfig
from trainer.dataset import fill
from trainer.learning.experience import extra_statistics, final_answer, per_token, weigh
from trainer.learning.measure import measure, recorded, wanted_by
from trainer.loop import train
from trainer.models.policy import Policy
from trainer.models.weights import Reference
from trainer.records import Rollouts, Sampling, ScoredRollouts, Scores
from trainer.rollouts.transformers_engine import TransformersEngine
from trainer.runs.rundir import read

Change = Callable[..., Config]
TEMPERATURE = 0.8
PROMPTS = [[5, 6, 7, 12, 8], [9], [10, 11, 12]]


@pytest.fixture
def completions(policy: Policy) -> Rollouts:
    return TransformersEngine(policy, 64).generate(PROMPTS, Sampling(4, 9, TEMPERATURE, 1.0, seed=2), no_tick)


def dense(policy: Policy, completions: Rollouts) -> torch.Tensor:
    """[T, V] float64 raw logits, one completion at a time."""
    rows = []
    for prompt, completion in zip(completions.prompt_ids, completions.completion_ids, strict=True):
        with torch.no_grad():
            rows.append(policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double())
    return torch.cat(rows)


@pytest.mark.parametrize("budget", [30, 1000])
def test_everything_that_methods_read(policy: Policy, completions: Rollouts, budget: int) -> None:
    wanted: dict[str, Any] = {"second_moments": True, "tempered": 1.5, "top_p": 0.7}
    found = measure(policy, completions, temperature=TEMPERATURE, budget=budget, tick=no_tick, **wanted)
    z, targets = dense(policy, completions), torch.tensor([token for ids in completions.completion_ids for token in ids])
    log_p = (z / TEMPERATURE).log_softmax(-1)
    p = log_p.exp()
    ordered = p.sort(-1, descending=True).values
    inside = (ordered.cumsum(-1) - ordered) < 0.7
    q = torch.where(inside, ordered, 0.0)
    q = q / q.sum(-1, keepdim=True)
    expected = {
        "logp": log_p.gather(1, targets[:, None])[:, 0],
        "entropy": -(p * log_p).sum(-1),
        "lse": (z / TEMPERATURE).logsumexp(-1),
        "p2": p.square().sum(-1),
        "p2_logp": (p.square() * log_p).sum(-1),
        "tempered_logp": (z / (1.5 * TEMPERATURE)).log_softmax(-1).gather(1, targets[:, None])[:, 0],
        "nucleus_entropy": -(q * torch.where(inside, q, 1.0).log()).sum(-1),
    }
    if "varentropy" in TokenStats._fields:
        expected["varentropy"] = (p * (log_p + expected["entropy"][:, None]).square()).sum(-1)
    assert expected.keys() == {name for name, values in vars(found).items() if values is not None}
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(found, name).double(), values, atol=3e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_only_what_is_wanted_is_measured(policy: Policy, completions: Rollouts) -> None:
    plain = measure(policy, completions, temperature=TEMPERATURE, budget=1000, tick=no_tick)
    assert plain.p2 is None
    assert plain.tempered_logp is None
    assert plain.nucleus_entropy is None
    assert wanted_by(get_method("grpo"), tempered=1.2, diagnose=False) == {}
    assert wanted_by(get_method("clip_v"), tempered=1.2, diagnose=False) == {"second_moments": True}
    assert wanted_by(get_method("dcpo"), tempered=1.2, diagnose=True) == {"second_moments": True, "tempered": 1.2}
    assert wanted_by(get_method("siren"), tempered=1.2, diagnose=False) == {"top_p": 0.8}


def test_the_final_answer_follows_the_marker() -> None:
    tokenizer = make_tokenizer()
    n1, n2, n3 = tokenizer.convert_tokens_to_ids(["n1", "n2", "n3"])
    completions = [[n1, n2, n3, 1], [n3, n3], [n2], [n1, n1, n2], [n2, n1, n2]]
    completions = Rollouts([[5]] * 5, completions, [torch.zeros(len(c)) for c in completions], [False] * 5)
    found = final_answer(completions, "n2", tokenizer)
    assert found.tolist() == [False, False, True, True] + [False] * 2 + [False] + [False] * 3 + [False, True, True]
    assert not final_answer(completions, "n1 n3", tokenizer).any()
    assert per_token(torch.tensor([1, 2, 3, 4, 5]), completions).tolist() == [1] * 4 + [2] * 2 + [3] + [4] * 3 + [5] * 3


def test_the_teacher_is_the_policy_that_sees_the_answer(policy: Policy, config: Config, completions: Rollouts) -> None:
    assert fill("{prompt} is {answer}", "what ?", "n1") == "what ? is n1"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "what ?"}]
    assert fill("{answer} {prompt}", messages, 3)[1] == {"role": "user", "content": "3 what ?"}
    columns = {"prompt": ["what is n1 ?"] * 12, "answer": ["n2 n3"] * 12}
    scores = Scores(torch.zeros(12), {}, [])
    rollouts = Rollouts(completions.prompt_ids, completions.completion_ids, [torch.zeros(1)] * 12, [False] * 12)
    sampled = ScoredRollouts(rollouts, [""] * 12, columns, scores, [0] * 12)
    config = config.replace(rollout={"temperature": TEMPERATURE})
    found = extra_statistics(config, get_method("trace"), policy, sampled, completions, no_tick)
    text = "user: what is n1 ?\n\nA correct answer: n2 n3\n\n assistant:"
    prompt = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = replace(completions, prompt_ids=[prompt] * 12)
    targets = torch.tensor([token for ids in completions.completion_ids for token in ids])
    expected = (dense(policy, shown) / TEMPERATURE).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found["teacher_logp"].double(), expected, atol=3e-5, rtol=0)
    assert set(extra_statistics(config, get_method("pear"), policy, sampled, completions, no_tick)) == {"answer"}


def test_the_predicted_change_has_the_sign_of_a_small_steps(policy: Policy, completions: Rollouts) -> None:
    """A gradient step on the loss in logit space, applied to the policy's own logits."""
    method = get_method("w_reinforce")
    wanted: dict[str, Any] = {"second_moments": True}
    old = measure(policy, completions, temperature=1.0, budget=1000, tick=no_tick, **wanted)
    rewards = (torch.arange(12) % 3 == 0).float()
    experience = weigh(method, completions, rewards, torch.arange(12) // 4, old)
    found = experience.diagnose(method)["dynamics/predicted_entropy_change"]
    z, targets = dense(policy, completions), experience.batch.targets
    weights = diagnostics.token_weights(method, experience.batch).logp.double()
    score = torch.nn.functional.one_hot(targets, z.shape[1]) - z.softmax(-1)

    def total(z: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Categorical(logits=z).entropy().sum()

    step = 1e-4 * weights[:, None] * score
    assert found == pytest.approx(((total(z + step) - total(z - step)) / 2e-4).item(), rel=1e-3)


def test_the_controllers_number_reaches_the_loss(policy: Policy, completions: Rollouts) -> None:
    method = get_method("eapo")
    controller = make_controller(method)
    assert controller is not None
    old = measure(policy, completions, temperature=TEMPERATURE, budget=1000, tick=no_tick)
    rewards, groups = torch.arange(12.0), torch.arange(12) // 4
    first = weigh(method, completions, rewards, groups, old, controller=controller)
    half = replace(old, entropy=old.entropy / 2)
    second = weigh(method, completions, rewards, groups, half, controller=controller)
    assert first.positive_weight is not None
    assert second.positive_weight is not None
    assert (first.positive_weight.item(), second.positive_weight.item()) == pytest.approx((1.0, 0.5))


def test_a_reference_stays_or_follows(policy: Policy) -> None:
    start = [p.detach().clone() for p in policy.trainable()]
    fixed, moving = Reference(policy.trainable(), 1.0), Reference(policy.trainable(), 0.75)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(1.0)
    for reference in (fixed, moving):
        with reference.installed():
            assert all(torch.equal(p, w) for p, w in zip(policy.trainable(), start, strict=True))
        assert all(torch.equal(p, w + 1) for p, w in zip(policy.trainable(), start, strict=True))
        reference.follow()
    assert all(torch.equal(w, s) for w, s in zip(fixed.weights, start, strict=True))
    for w, s in zip(moving.weights, start, strict=True):
        torch.testing.assert_close(w, s + 0.25)


def test_a_kl_penalty_is_measured_against_the_first_policy(changed: Change) -> None:
    config = changed(data={"eval": ""}, loss={"method": "grpo", "kl_coef": 0.1})
    assert train(config)
    kl = [row["kl"] for row in read(Path(config.out) / config.name, "metrics")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-4
    still = changed(data={"eval": ""}, loss={"method": "grpo", "kl_coef": 0.1, "reference_ema": 0.0}, name="still")
    assert train(still)
    assert all(abs(row["kl"]) < 1e-6 for row in read(Path(still.out) / "still", "metrics"))


def test_diagnostics_can_be_left_out(changed: Change) -> None:
    config = changed(data={"eval": ""}, diagnose_every=2)
    assert train(config)
    rows = read(Path(config.out) / config.name, "metrics")
    assert [any(name.startswith("dynamics/") for name in row) for row in rows] == [True, False, True]


def test_models_differ() -> None:
    """The tiny model is not uniform, so mistakes show in the tests above."""
    z = dense(Policy(make_model(), make_tokenizer()), Rollouts([[5]], [[6, 7]], [torch.zeros(2)], [True]))
    assert z.std() > 0.3


def test_weights_are_those_of_weight_tokens(policy: Policy, completions: Rollouts) -> None:
    """The controller is updated with the statistic it observes before its state is read; progress
    and seed are passed on.
    """
    rewards, groups = torch.arange(12.0) % 5, torch.arange(12) // 4
    for name, wanted in {"siren": {"top_p": 0.8}, "entrocraft": {}, "clip_cov": {}, "epo": {}}.items():
        changes = {"clip_cov": {"ratio": 0.2, "low": 0.01, "high": 9.0}, "entrocraft": {"low_first": 0.1, "high_first": 0.2}}
        method = get_method(name, fixed_length=9, **changes.get(name, {}))
        controller, twin = make_controller(method), make_controller(method)
        old = measure(policy, completions, temperature=TEMPERATURE, budget=1000, tick=no_tick, **wanted)
        experience = weigh(method, completions, rewards, groups, old, controller=controller, progress=0.75, seed=11)
        extras = {} if old.nucleus_entropy is None else {"nucleus_entropy": old.nucleus_entropy}
        plain = replace(experience.batch, advantages=None, token_advantages=None, entropy_coef=None, mask=None)
        if twin is not None:
            assert controller is not None
            twin.update(*observed_entropy(method, plain, old.stats(), extras=extras))
            assert controller.values() == twin.values()
        state = twin.values() if twin else None
        expected = weight_tokens(method, plain, old.stats(), state=state, extras=extras, progress=0.75, seed=11)
        for field in ("advantages", "entropy_coef", "mask"):
            ours, theirs = getattr(experience.batch, field), getattr(expected, field)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs), (name, field)


def test_what_the_loop_hands_over(changed: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fraction of the run that is done, and a new seed each step."""
    seen: list[dict[str, Any]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append({**options, "completions": len(arguments[1]), "rewards": arguments[2]})
        return weigh(*arguments, **options)

    monkeypatch.setattr("trainer.loop.weigh", spy)
    assert train(changed(data={"eval": ""}, steps=4, loss={"method": "spear"}))
    assert [call["progress"] for call in seen] == [0.0, 0.25, 0.5, 0.75]
    assert len({call["seed"] for call in seen}) == 4
    for call in seen:
        assert call["rewards"].shape == (call["completions"],)
        assert call["rewards"].isfinite().all()


def test_a_step_without_the_measurement_is_the_step_with_it(changed: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """H from the engine, the ratio to the update's own log-probs: every number is the same up to
    rounding, with one completion of each group measured instead of all.
    """
    tokens: list[int] = []

    def spy(policy: Policy, completions: Rollouts, **options: Any) -> Any:
        tokens.append(len(completions))
        return measure(policy, completions, **options)

    monkeypatch.setattr("trainer.loop.measure", spy)
    cut = {"top_p": 0.9, "temperature": TEMPERATURE}
    for number, (loss, rollout) in enumerate([({}, {}), ({}, cut), ({"method": "grpo", "kl_coef": 0.1}, cut)]):
        both = []
        for old_logp in ("auto", "always"):
            config = changed(
                name=f"{old_logp}-{number}", data={"eval": ""}, loss=loss, rollout=rollout, diagnose_every=0,
                optim={"old_logp": old_logp}, steps=4,
            )  # fmt: skip
            tokens.clear()
            assert train(config)
            reference = [12] if loss else []
            assert tokens == [3 if old_logp == "auto" else 12, *reference] * 4
            both.append(read(Path(config.out) / config.name, "metrics"))
        for ours, theirs in zip(*both, strict=True):
            assert ours["ratio_mean"] == 1
            assert ours["rollout/logp_gap_max"] < 1e-4
            others = ("seconds/", "share/", "tokens", "memory/", "rollout/", "old_kl")
            for name, value in theirs.items():
                if not name.startswith(others) and not name.endswith("/seconds"):
                    assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize(
    ("method", "optim", "wanted"),
    [
        ("grpo", {"minibatches": 2}, {}),
        ("grpo", {"epochs": 2}, {}),
        ("grpo", {"old_logp": "always"}, {}),
        ("grpo", {}, {"second_moments": True}),
        ("epo", {}, {}),
    ],
)
def test_what_needs_the_measurement_has_it(
    policy: Policy, completions: Rollouts, method: str, optim: dict[str, Any], wanted: dict[str, Any]
) -> None:
    built, settings, device = get_method(method), OptimConfig(**optim), torch.device("cpu")
    assert recorded(completions, built, settings, wanted, device) is None
    assert recorded(completions, get_method("grpo", importance_cap=2.0), OptimConfig(), {}, device) is None
    assert recorded(replace(completions, entropy=None), get_method("grpo"), OptimConfig(), {}, device) is None
    assert recorded(completions, get_method("grpo"), OptimConfig(), {}, device) is not None
