"""Measurement against dense logits, independence of micro-batches, and a stop before an update that
is not finite.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import WORDS, make_model, make_tokenizer, no_tick
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eapo_kernels import METHODS, TokenSupport, get_method, idle_sequences, make_controller
from trainer.config import OptimConfig
from trainer.errors import DivergenceError, Interrupted
from trainer.learning.batching import collate, plan
from trainer.learning.experience import Experience, weigh
from trainer.learning.learner import Learner
from trainer.learning.measure import Measurement, measure
from trainer.models.policy import Policy
from trainer.records import Rollouts, Sampling
from trainer.rollouts.transformers_engine import TransformersEngine

TEMPERATURE = 0.8
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture
def rollouts(policy: Policy) -> Rollouts:
    prompts = [[5, 6, 7, 12, 8], [9], [10, 11, 12]]
    return TransformersEngine(policy, 64).generate(prompts, Sampling(4, 9, TEMPERATURE, 1.0, seed=2), no_tick)


@pytest.fixture
def cut(policy: Policy) -> Rollouts:
    """With a support: some 5 to 20 of the 49 tokens."""
    sampling = Sampling(4, 9, TEMPERATURE, 0.7, seed=2, top_k=20)
    return TransformersEngine(policy, 64).generate([[5, 6, 7, 12, 8], [9], [10, 11, 12]], sampling, no_tick)


def weighed(
    policy: Policy, rollouts: Rollouts, method: str, rewards: torch.Tensor | None = None, **changes: Any
) -> Experience:  # fmt: skip
    """Completions in groups of four with ``rewards`` (of 0 and 1), with all extras that any method
    reads.
    """
    number = len(rollouts.completion_ids)
    completions, built = rollouts, get_method(method, fixed_length=9, **changes)
    wanted: dict[str, Any] = {"second_moments": True, "tempered": 1.2, "top_p": 0.8}
    old = measure(policy, completions, temperature=TEMPERATURE, budget=1000, tick=no_tick, **wanted)
    if rewards is None:
        rewards = torch.randint(0, 2, (number,), generator=torch.Generator().manual_seed(0)).float()
        rewards[:3] = torch.tensor([0.0, 1.0, 1.0])
    place = torch.arange(completions.tokens)
    extras = {"answer": place % 3 == 0, "teacher_logp": old.logp - 0.1}
    return weigh(
        built, completions, rewards, torch.arange(number) // 4, old, controller=make_controller(built),
        ref_logp=old.logp + 0.1, extras=extras, progress=0.5, seed=1,
    )  # fmt: skip


@pytest.fixture
def experience(policy: Policy, rollouts: Rollouts) -> Experience:
    return replace(weighed(policy, rollouts, "eapo"), positive_weight=torch.tensor(0.7))


def learner(
    policy: Policy, method: str = "eapo", changes: dict[str, Any] | None = None, tolerance: float | None = None, **optim: Any
) -> Learner:  # fmt: skip
    built, settings = get_method(method, fixed_length=9, **(changes or {})), OptimConfig(**{"lr": 1e-2, **optim})
    return Learner(policy, built, settings, temperature=TEMPERATURE, steps=10, gradient_tolerance=tolerance)


def test_a_tolerance_of_the_gradient_is_used_and_reported(policy: Policy, experience: Experience) -> None:
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    exact = learner(policy).update(experience, step=0, seed=0, tick=no_tick)
    after = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    policy.model.load_state_dict(before, strict=False)
    found = learner(policy, tolerance=1e-6).update(experience, step=0, seed=0, tick=no_tick)
    assert found["sparse/dense_share"] == 1, "49 columns are not worth leaving any out"
    assert {n: v for n, v in found.items() if not n.startswith("sparse/")} == exact
    assert all(torch.equal(weight, after[name]) for name, weight in policy.model.named_parameters())


def test_batches_hold_every_response_token_once(rollouts: Rollouts) -> None:
    completions = rollouts.take([7, 0, 3, 11, 5])
    groups = plan(completions, range(5), budget=30)
    assert sorted(i for group in groups for i in group) == list(range(5))
    tokens = []
    for group in groups:
        assert len(group) == 1 or len(group) * max(map(completions.length, group)) <= 30
        batch = collate(completions, group, torch.device("cpu"))
        columns = (batch.rows, batch.targets, batch.tokens)
        for row, target, token in zip(*(column.tolist() for column in columns), strict=True):
            sequence = bisect_right(completions.starts, token) - 1
            position = token - completions.starts[sequence]
            assert target == completions.completion_ids[sequence][position]
            place, column = divmod(row, batch.input_ids.shape[1])
            assert column == len(completions.prompt_ids[sequence]) - 1 + position
            assert batch.input_ids[place, column + 1] == target
        tokens += batch.tokens.tolist()
        assert batch.attention_mask.sum() == sum(map(completions.length, group))
    assert sorted(tokens) == list(range(completions.tokens))
    assert plan(completions, range(5), budget=1) == [[i] for i in sorted(range(5), key=completions.length, reverse=True)]


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_measurement_equals_dense_logits(policy: Policy, rollouts: Rollouts, budget: int) -> None:
    completions = rollouts
    found = measure(policy, completions, temperature=TEMPERATURE, budget=budget, tick=no_tick)
    for i, (prompt, completion) in enumerate(zip(completions.prompt_ids, completions.completion_ids, strict=True)):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        full = (logits.double() / TEMPERATURE).log_softmax(-1)
        own = slice(completions.starts[i], completions.starts[i + 1])
        torch.testing.assert_close(found.logp[own].double(), full.gather(1, torch.tensor(completion)[:, None])[:, 0],
                                   atol=2e-5, rtol=0)  # fmt: skip
        torch.testing.assert_close(found.entropy[own].double(), -(full.exp() * full).sum(-1), atol=2e-5, rtol=0)
    torch.testing.assert_close(found.logp, torch.cat(completions.logp), atol=2e-5, rtol=0)
    torch.testing.assert_close(found.entropy, torch.cat(completions.entropy), atol=2e-5, rtol=0)


def test_batches_hold_the_support_of_their_tokens(cut: Rollouts) -> None:
    completions = cut.take([7, 0, 3, 11, 5])
    assert completions.support is not None
    by_token = [kept for own in completions.support for kept in own.ids.split(own.counts.tolist())]
    for group in plan(completions, range(5), budget=30):
        batch = collate(completions, group, torch.device("cpu"))
        assert batch.support is not None
        batch.support.check(batch.targets, 49)
        expected = TokenSupport.from_lists([by_token[token] for token in batch.tokens])
        assert torch.equal(batch.support.ids, expected.ids)
        assert torch.equal(batch.support.offsets, expected.offsets)


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_measurement_over_a_support_equals_dense_logits(policy: Policy, cut: Rollouts, budget: int) -> None:
    completions = cut
    wanted: dict[str, Any] = {"second_moments": True, "tempered": 1.5}
    found = measure(policy, completions, temperature=TEMPERATURE, budget=budget, tick=no_tick, **wanted)
    assert completions.support is not None
    expected: list[list[float]] = []
    rows = zip(completions.prompt_ids, completions.completion_ids, completions.support, strict=True)
    for prompt, completion, support in rows:
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        for token, kept, z in zip(completion, support.ids.split(support.counts.tolist()), logits, strict=True):
            place, z = kept.tolist().index(token), z[kept.long()]
            log_p = (z / TEMPERATURE).log_softmax(0)
            tempered = (z / TEMPERATURE / 1.5).log_softmax(0)
            entropy, p2 = -(log_p.exp() * log_p).sum(), log_p.exp().square().sum()
            expected.append([log_p[place].item(), entropy.item(), p2.item(), tempered[place].item()])
    assert found.p2 is not None
    assert found.tempered_logp is not None
    got = torch.stack([found.logp, found.entropy, found.p2, found.tempered_logp], 1)
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=0)
    torch.testing.assert_close(
        (found.logp - torch.cat(completions.logp)).exp(), torch.ones(completions.tokens), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(found.entropy, torch.cat(completions.entropy), atol=2e-5, rtol=0)


def gradients(policy: Policy, experience: Experience, budget: int, method: str, **changes: Any) -> tuple[list, dict]:
    """Gradients that the optimizer would see in one update (the norm is far below the clip)."""
    own = learner(policy, method, changes, micro_batch_tokens=budget, max_grad_norm=1e9)
    own.optimizer.step = lambda: None  # type: ignore[method-assign]
    metrics = own.update(experience, step=0, seed=0, tick=no_tick)
    return [p.grad.clone() for p in policy.trainable() if p.grad is not None], metrics


def metrics_of_any_cut(policy: Policy, experience: Experience, method: str) -> dict[str, float]:
    """The metrics of an update, which its cut into micro-batches does not change, nor its gradients."""
    uncut, metrics = gradients(policy, experience, 10_000, method)
    assert sum(g.abs().sum() for g in uncut) > 0
    for budget in (1, 45):
        cut, cut_metrics = gradients(policy, experience, budget, method)
        for a, b in zip(uncut, cut, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        for name in ("loss", "grad_norm", "clip_fraction", "ratio_mean", "eapo/entropy"):
            assert cut_metrics[name] == pytest.approx(metrics[name], abs=1e-6, rel=1e-4)
    return metrics


@pytest.mark.parametrize("method", METHODS)
def test_the_cut_into_micro_batches_changes_nothing(policy: Policy, rollouts: Rollouts, method: str) -> None:
    metrics_of_any_cut(policy, weighed(policy, rollouts, method), method)


@pytest.mark.parametrize("method", ["eapo", "dapo", "gspo", "clip_v"])
def test_the_cut_into_micro_batches_changes_nothing_over_a_support(policy: Policy, cut: Rollouts, method: str) -> None:
    """And with the unchanged policy every ratio is 1, though the policy gives the tokens that were
    removed a fifth of the probability.
    """
    experience = weighed(policy, cut, method, torch.arange(12.0) % 2)
    metrics = metrics_of_any_cut(policy, experience, method)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["eapo/entropy"] == pytest.approx(experience.old.entropy.mean().item(), rel=1e-5)
    whole = measure(policy, replace(experience.completions, support=None), temperature=TEMPERATURE, budget=99, tick=no_tick)
    assert (whole.logp - torch.cat(experience.completions.logp)).exp().mean() < 0.9


def test_gradient_is_that_of_the_equation(policy: Policy, experience: Experience) -> None:
    """E10 with ratio 1, written out on the model's own logits: -1/T sum_t w_i A_i dlogp_t."""
    found, _ = gradients(policy, experience, 10_000, "eapo")
    rewards = experience.batch.rewards.view(3, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
    weighted = torch.where(advantages > 0, 0.7 * advantages, advantages)
    policy.zero_grad()
    completions = experience.completions
    for i, (prompt, completion) in enumerate(zip(completions.prompt_ids, completions.completion_ids, strict=True)):
        logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
        (-weighted[i] * logp.sum() / completions.tokens).backward()
    for a, p in zip(found, policy.trainable(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-3)


def test_minibatches_and_epochs_take_as_many_optimizer_steps(policy: Policy, experience: Experience) -> None:
    own = learner(policy, minibatches=3, epochs=2, micro_batch_tokens=40)
    ticks: list[tuple[int, int]] = []
    metrics = own.update(experience, step=0, seed=0, tick=lambda *done: ticks.append(done))
    assert {int(state["step"]) for state in own.optimizer.state.values()} == {6}
    assert [done for done, _ in ticks] == list(range(ticks[0][1]))
    assert metrics["ratio_mean"] != 1.0


def test_eight_bit_moments_follow_adamw() -> None:
    """After ten updates the weights have moved as with AdamW, within 10 % of the way."""
    pytest.importorskip("torchao", reason="needs torchao: pip install '.[adamw-8bit]'")
    ways = []
    for optimizer in ("adamw", "adamw_8bit"):
        policy = Policy(make_model(hidden_size=64, intermediate_size=96), make_tokenizer())
        sampling = Sampling(4, 9, TEMPERATURE, 1.0, seed=2)
        sampled = TransformersEngine(policy, 64).generate([[5, 6, 7, 12, 8], [9], [10, 11, 12]], sampling, no_tick)
        own, before = learner(policy, optimizer=optimizer, lr=1e-3), [w.detach().clone() for w in policy.trainable()]
        experience = weighed(policy, sampled, "eapo")
        for step in range(10):
            own.update(replace(experience, positive_weight=torch.tensor(0.7)), step=step, seed=step, tick=no_tick)
        ways.append(torch.cat([(w - b).flatten() for w, b in zip(policy.trainable(), before, strict=True)]))
        quantized = [state for state in own.optimizer.state.values() if hasattr(state["exp_avg"], "codes")]
        assert bool(quantized) is (optimizer == "adamw_8bit")
        assert own.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert (ways[1] - ways[0]).norm() < 0.1 * ways[0].norm()


def test_fewer_completions_than_minibatches_are_a_minibatch_each(policy: Policy, rollouts: Rollouts) -> None:
    completions, built = rollouts.take([0, 5]), get_method("grpo")
    old = measure(policy, completions, temperature=TEMPERATURE, budget=1000, tick=no_tick)
    experience = weigh(built, completions, torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64), old)
    own = learner(policy, "grpo", minibatches=5)
    ticks: list[tuple[int, int]] = []
    metrics = own.update(experience, step=0, seed=0, tick=lambda *done: ticks.append(done))
    assert {int(state["step"]) for state in own.optimizer.state.values()} == {2}
    assert ticks == [(0, 2), (1, 2)]
    assert metrics["eapo/positive_fraction"] == pytest.approx(0.5), "the mean over two, not over five"


def test_a_loss_that_is_not_finite_stops_before_the_step(policy: Policy, experience: Experience) -> None:
    with torch.no_grad():
        policy.language_model.model.norm.weight[0] = float("inf")
    before = [p.clone() for p in policy.trainable()]
    with pytest.raises(DivergenceError, match="expected a finite number, got nan; no step was taken"):
        learner(policy).update(experience, step=0, seed=0, tick=no_tick)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable(), strict=True))


def test_leaving_through_the_tick_keeps_the_weights(policy: Policy, experience: Experience) -> None:
    before = [p.clone() for p in policy.trainable()]

    def leave(done: int, total: int) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        learner(policy, micro_batch_tokens=30).update(experience, step=0, seed=0, tick=leave)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable(), strict=True))


def test_schedules() -> None:
    policy = Policy(make_model(), make_tokenizer())
    constant = learner(policy, warmup_steps=4)
    assert [constant.learning_rate(step) for step in (0, 1, 3, 4, 9)] == pytest.approx([2.5e-3, 5e-3, 1e-2, 1e-2, 1e-2])
    cosine = learner(policy, schedule="cosine", warmup_steps=2)
    assert [cosine.learning_rate(step) for step in (2, 6, 10)] == pytest.approx([1e-2, 5.5e-3, 1e-3])


def completions_of(lengths: list[tuple[int, int]]) -> Rollouts:
    return Rollouts([[2] * p for p, _ in lengths], [[3] * c for _, c in lengths], [torch.zeros(c) for _, c in lengths], [])


def test_plan_puts_neighbours_in_length_together() -> None:
    completions = completions_of([(1, 1), (1, 99), (2, 1), (2, 98), (1, 2)])
    assert plan(completions, range(5), budget=200) == [[1, 3], [2, 4, 0]]


@pytest.mark.parametrize("method", ["psr", "grpo"])
def test_a_step_with_nothing_to_learn_leaves_the_weights(policy: Policy, rollouts: Rollouts, method: str) -> None:
    """psr without a correct completion, grpo with equal rewards: a loss of zero and no gradient."""
    completions, built = rollouts, get_method(method)
    old = measure(policy, completions, temperature=TEMPERATURE, budget=1000, tick=no_tick)
    before = [p.clone() for p in policy.trainable()]
    own = learner(policy, method, micro_batch_tokens=45, minibatches=2)
    experience = weigh(built, completions, torch.zeros(12), torch.arange(12) // 4, old)
    metrics = own.update(experience, step=0, seed=0, tick=no_tick)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable(), strict=True))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_gradient_is_summed_in_fp32(tied: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16: 64 micro-batches give the gradient of one up to fp32 rounding. A model without layers,
    so that hidden states do not depend on the micro-batch.

    With the gradient of every micro-batch rounded to bfloat16 the error was 1.7e-3 of its norm (1.3e-3 tied).
    """
    model = make_model(num_hidden_layers=0, tie_word_embeddings=tied)
    policy = Policy(model, make_tokenizer(), torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    prompts = [[int(i)] for i in torch.randint(2, 49, (64,), generator=random)]
    answers = [torch.randint(2, 49, (5,), generator=random).tolist() for _ in range(64)]
    completions = Rollouts(prompts, answers, [torch.zeros(5)] * 64, [True] * 64)
    rewards, method = torch.rand(64, generator=random), get_method(name)
    known = Measurement(torch.zeros(320), torch.ones(320))
    experience = weigh(method, completions, rewards, torch.arange(64) // 8, known)

    def error(budget: int) -> float:
        gradients(policy, experience, budget, name)
        found = model.lm_head.weight.grad
        assert found is not None
        assert found.dtype is torch.float32
        return ((found.double() - oracle).norm() / oracle.norm()).item()

    oracle = torch.zeros(49, 32, dtype=torch.float64)
    error(10_000)
    oracle = model.lm_head.weight.grad.double()  # type: ignore[union-attr]
    assert error(1) < 1e-6
    monkeypatch.setattr(Policy, "main_grad", lambda _: None)
    assert 5e-4 < error(1) < 3e-3

    monkeypatch.undo()
    weight = model.lm_head.weight.detach().double().requires_grad_()
    table = weight if tied else model.model.embed_tokens.weight.detach().double()
    ids = torch.tensor([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
    x = table[ids[:, :-1]]
    hidden = x * (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t + (t.detach().bfloat16().double() - t.detach())

    logp = (rounded(hidden) @ rounded(weight).T / TEMPERATURE).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    groups = rewards.double().view(8, 8)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    (-(advantages[:, None] * logp).sum() / 320).backward()
    oracle = weight.grad  # type: ignore[assignment]
    assert error(1) < (2**-8 if tied else 1e-6), "the embedding's share passes through hidden states in bfloat16"


PACKED = {
    "llama": lambda: make_model(),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=1.0, final_logit_softcapping=2.0)
    ),
}


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("family", PACKED)
def test_packing_changes_nothing(family: str, filtered: bool) -> None:
    """Old log-probs, loss and gradients within 1e-6 of their size, for any budget, with sdpa or eager
    attention (Gemma 2: a sliding window shorter than the completions, capped attention scores).
    """
    torch.manual_seed(0)
    padded = Policy(PACKED[family]().eval(), make_tokenizer())
    packed = Policy(padded.model, padded.tokenizer, packing="always")
    assert padded.language_model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    sampling = Sampling(4, 9, TEMPERATURE, 0.7 if filtered else 1.0, seed=2)
    rollouts = TransformersEngine(padded, 64).generate([[5, 6, 7, 12, 8], [9], [10, 11, 12]], sampling, no_tick)
    ours, theirs = (weighed(policy, rollouts, "eapo", torch.arange(12.0) % 2) for policy in (packed, padded))
    torch.testing.assert_close(ours.old.logp, theirs.old.logp, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(ours.old.entropy, theirs.old.entropy, atol=2e-6, rtol=1e-6)
    expected, metrics = gradients(padded, theirs, 10_000, "eapo")
    for budget in (1, 33, 10_000):
        found, packed_metrics = gradients(packed, theirs, budget, "eapo")
        assert packed_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6, abs=1e-6)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-6 * torch.cat([g.flatten() for g in expected]).norm()


def test_a_packed_micro_batch_has_no_padding() -> None:
    completions = completions_of([(1, 1), (1, 99), (2, 1), (2, 98), (1, 2)])
    assert plan(completions, range(5), budget=203, packed=True) == [[1, 3, 2], [4, 0]]
    batch = collate(completions, [1, 3, 2], torch.device("cpu"), packed=True)
    assert batch.input_ids.shape == (1, 203)
    assert (batch.attention_mask, batch.lengths) == (None, [100, 100, 3])
    assert batch.rows.tolist() == [*range(99), *range(101, 199), 201]
    assert batch.targets.tolist() == [3] * 198


def one_spread(groups: int, values: tuple[float, ...]) -> torch.Tensor:
    """Rewards of groups of four: 0 and 1 in the first one, one of ``values`` in each of the others."""
    flat = torch.tensor(values).repeat(groups)[: groups - 1].repeat_interleave(4)
    return torch.cat([torch.tensor([0.0, 1.0, 1.0, 0.0]), flat])


@pytest.mark.parametrize(
    ("method", "changes", "idle"),
    [(name, {}, None) for name in METHODS]
    + [("grpo", {"kl_coef": 0.1}, 0), ("grpo", {"entropy_coef": 0.01}, 0), ("eapo", {"advantage": "batch_norm"}, 0)]
    + [("grpo", {}, 8), ("eapo", {"surrogate": "gspo"}, 8), ("dapo", {}, 8), ("psr", {}, 6), ("nsr", {}, 6)],
)
def test_leaving_out_idle_completions_changes_nothing(
    policy: Policy, rollouts: Rollouts, method: str, changes: dict[str, Any], idle: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradient and their norm, for groups with equal rewards and for weights of zero."""
    binary = get_method(method).config.advantage == "binary"
    experience = weighed(policy, rollouts, method, one_spread(3, (1.0, 0.0) if binary else (0.7, 0.1)), **changes)
    left_out = idle_sequences(
        experience.batch, method=get_method(method, fixed_length=9, **changes), positive_weight=experience.positive_weight
    )
    assert idle is None or left_out.sum() == idle
    found, metrics = gradients(policy, experience, 60, method, **changes)
    monkeypatch.setattr("trainer.learning.learner.idle_sequences", lambda *_, **__: torch.zeros(12, dtype=torch.bool))
    expected, all_metrics = gradients(policy, experience, 60, method, **changes)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(all_metrics[name], abs=1e-7, rel=1e-5)
    if "advantage" not in changes and method in ("grpo", "eapo", "dapo"):
        assert metrics["eapo/positive_fraction"] == pytest.approx(all_metrics["eapo/positive_fraction"])


def test_one_useful_group_of_eight_costs_an_eighth(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in tokens of the update's forward passes."""
    prompts = [[5 + i, 6, 7] for i in range(8)]
    many = TransformersEngine(policy, 64).generate(prompts, Sampling(4, 9, TEMPERATURE, 1.0, seed=2), no_tick)
    real = torch.tensor([float(len(p) + len(c)) for p, c in zip(many.prompt_ids, many.completion_ids, strict=True)])
    seen: list[int] = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, ids, *rest: (seen.append(ids.numel()), forward(self, ids, *rest))[1])
    for rewards, groups in ((one_spread(8, (0.3,)), 1), (torch.arange(32.0), 8)):
        experience = weighed(policy, many, "eapo", rewards)
        seen.clear()
        learner(policy).update(experience, step=0, seed=0, tick=no_tick)
        own = real[: 4 * groups]
        assert own.sum() <= sum(seen) <= len(own) * own.max(), "those of the groups with spread"


def test_dropped_completions_leave_the_denominator(policy: Policy, rollouts: Rollouts) -> None:
    """nsr with two wrong completions of twelve: the mean over the tokens of those two, for any
    split.
    """
    completions, built = rollouts, get_method("nsr")
    old = measure(policy, completions, temperature=TEMPERATURE, budget=1000, tick=no_tick)
    rewards = torch.ones(12)
    rewards[[2, 7]] = 0
    experience = weigh(built, completions, rewards, torch.arange(12) // 4, old)
    for budget in (45, 10_000):
        _, metrics = gradients(policy, experience, budget, "nsr")
        assert metrics["loss"] == pytest.approx(1.0, abs=1e-5)  # -mean(ratio * -1)
