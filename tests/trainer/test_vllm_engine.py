"""Real vLLM on a CPU: where a completion ends, which log-probs are recorded, and weight updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM pins other versions and has an environment of its own: make test-vllm")

from test_checkpoint_weights import adapted
from test_rollouts import teacher_forced
from tiny import make_model, make_tokenizer, no_tick

from trainer.config import Config, RolloutConfig, VllmConfig
from trainer.errors import ConfigError, Interrupted, ModelError
from trainer.loop import train
from trainer.models.policy import Policy
from trainer.records import Rollouts, Sampling
from trainer.rollouts import vllm_engine
from trainer.rollouts.vllm_engine import VllmEngine
from trainer.runs.rundir import read

PROMPTS = [[5, 6, 7, 12, 8], [9], [10, 11, 12]]
SAMPLING = Sampling(responses=6, max_new_tokens=10, temperature=0.7, top_p=1.0, seed=5)
SIZES: dict[str, Any] = {"head_dim": 32, "max_position_embeddings": 512}  # vLLM's CPU attention has no heads of 8
EXACT = 2e-5
"""Nats; fp32 in both."""


def start(policy: Policy, batch: int = 64, longest: int = 512, **options: Any) -> VllmEngine:
    return VllmEngine(policy, RolloutConfig(batch=batch, vllm=VllmConfig(kv_cache_gib=0.1, **options)), longest)


def gap(policy: Policy, rollouts: Rollouts, temperature: float = SAMPLING.temperature) -> float:
    """Largest difference between the recorded log-probs and the policy's."""
    dense = teacher_forced(policy, rollouts, temperature)
    rows = zip(rollouts.completion_ids, rollouts.logp, dense, strict=True)
    return max((logp - full.gather(1, torch.tensor(ids)[:, None])[:, 0]).abs().max().item() for ids, logp, full in rows)


def change(policy: Policy, seed: int = 3) -> None:
    """Change all trained weights, as a step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


class TestOneEngine:
    """Tests that leave the weights of the engine unchanged. A process has one engine at a time, so
    it is closed before the others start.
    """

    @pytest.fixture(scope="class")
    def shared(self) -> Iterator[tuple[Policy, VllmEngine]]:
        policy = Policy(make_model(**SIZES), make_tokenizer())
        engine = start(policy)
        yield policy, engine
        engine.close()

    def test_a_completion_ends_with_its_eos_and_never_holds_another(self, shared: tuple[Policy, VllmEngine]) -> None:
        rollouts = shared[1].generate(PROMPTS, SAMPLING, no_tick)
        assert len(rollouts.completion_ids) == 18
        assert rollouts.prompt_ids == [prompt for prompt in PROMPTS for _ in range(6)]
        assert 0 < sum(rollouts.truncated) < 18
        for ids, logp, truncated in zip(rollouts.completion_ids, rollouts.logp, rollouts.truncated, strict=True):
            assert len(ids) == len(logp) <= 10
            assert logp.dtype is torch.float32
            assert 1 not in ids[:-1]
            assert (ids[-1] == 1) is not truncated
            assert not truncated or len(ids) == 10

    def test_recorded_log_probs_are_the_teacher_forced_ones(self, shared: tuple[Policy, VllmEngine]) -> None:
        assert gap(shared[0], shared[1].generate(PROMPTS, SAMPLING, no_tick)) < EXACT

    def test_nucleus_sampling_records_the_cut_distribution(self, shared: tuple[Policy, VllmEngine]) -> None:
        policy, engine = shared
        rollouts = engine.generate(PROMPTS, replace(SAMPLING, top_p=0.5, record_support=False), no_tick)
        for ids, logp, full in zip(rollouts.completion_ids, rollouts.logp, teacher_forced(policy, rollouts, 0.7), strict=True):
            ordered, order = full.exp().sort(-1, descending=True)
            kept = ordered.cumsum(-1) - ordered < 0.5
            cut = torch.zeros_like(full).scatter(1, order, torch.where(kept, ordered, 0.0))
            expected = (cut / cut.sum(-1, keepdim=True)).gather(1, torch.tensor(ids)[:, None])[:, 0].log()
            torch.testing.assert_close(logp.double(), expected, atol=EXACT, rtol=0)

    def test_greedy_completions_have_the_most_probable_tokens(self, shared: tuple[Policy, VllmEngine]) -> None:
        policy, engine = shared
        rollouts = engine.generate(PROMPTS, replace(SAMPLING, top_p=0.9).greedy(), no_tick)
        assert len(rollouts.completion_ids) == len(PROMPTS)
        for ids, full in zip(rollouts.completion_ids, teacher_forced(policy, rollouts, 0.7), strict=True):
            assert ids == full.argmax(-1).tolist()

    def test_a_completion_depends_on_its_own_seed_only(self, shared: tuple[Policy, VllmEngine]) -> None:
        _, engine = shared
        everyone = engine.generate(PROMPTS, SAMPLING, no_tick)
        again = engine.generate(PROMPTS, SAMPLING, no_tick)
        first = engine.generate(PROMPTS[:1], SAMPLING, no_tick)
        other = engine.generate(PROMPTS, replace(SAMPLING, seed=6), no_tick)
        assert everyone.completion_ids == again.completion_ids
        assert everyone.completion_ids[:6] == first.completion_ids
        assert everyone.completion_ids != other.completion_ids
        assert len({tuple(ids) for ids in first.completion_ids}) > 1

    def test_a_prompt_that_leaves_no_room_is_refused(self, shared: tuple[Policy, VllmEngine]) -> None:
        with pytest.raises(ModelError, match="expected room for a completion to 512 tokens, got 512 in all"):
            shared[1].generate([[5], [6] * 512], SAMPLING, no_tick)
        rollouts = shared[1].generate([[6] * 509], SAMPLING, no_tick)
        assert max(map(len, rollouts.completion_ids)) == 3, "a completion ends where the model's positions do"

    def test_an_interrupted_pass_leaves_nothing_behind(self, shared: tuple[Policy, VllmEngine]) -> None:
        _, engine = shared
        wanted = engine.generate(PROMPTS, SAMPLING, no_tick)
        calls = 0

        def stop(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            assert total == 18
            if calls == 4:
                raise Interrupted

        with pytest.raises(Interrupted):
            engine.generate(PROMPTS, SAMPLING, stop)
        assert not engine.llm.llm_engine.has_unfinished_requests()
        assert engine.generate(PROMPTS, SAMPLING, no_tick).completion_ids == wanted.completion_ids


@pytest.fixture
def alone() -> Iterator[Callable[..., VllmEngine]]:
    """``start`` for one engine, closed after the test."""
    engines: list[VllmEngine] = []

    def begin(policy: Policy, **options: Any) -> VllmEngine:
        engines.append(start(policy, **options))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close()


def test_the_engine_follows_the_trainer_and_stale_weights_show(alone: Callable[..., VllmEngine]) -> None:
    """Includes a prompt with cached attention keys, which belong to the old weights."""
    policy = Policy(make_model(**SIZES), make_tokenizer())
    engine = alone(policy)
    prompts = [[2 + i % 40 for i in range(400)]]  # longer than a block of the prefix cache
    assert gap(policy, engine.generate(prompts, SAMPLING, no_tick)) < EXACT
    change(policy)
    assert gap(policy, engine.generate(prompts, SAMPLING, no_tick)) > 0.1, "the engine has its own copy"
    engine.sync_weights(policy)
    assert gap(policy, engine.generate(prompts, SAMPLING, no_tick)) < EXACT
    change(policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        engine.sync_weights(policy)
    assert gap(policy, engine.generate(prompts, SAMPLING, no_tick)) > 1e-3, "stale keys in the prefix cache show too"
    engine.sync_weights(policy)
    assert gap(policy, engine.generate(prompts, SAMPLING, no_tick)) < EXACT


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_and_tied_heads(alone: Callable[..., VllmEngine], tied: bool) -> None:
    policy = Policy(adapted(make_model(**SIZES, tie_word_embeddings=tied)), make_tokenizer())
    engine = alone(policy)
    assert gap(policy, engine.generate(PROMPTS, SAMPLING, no_tick)) < EXACT
    change(policy)
    assert gap(policy, engine.generate(PROMPTS, SAMPLING, no_tick)) > 0.01
    engine.sync_weights(policy)
    assert gap(policy, engine.generate(PROMPTS, SAMPLING, no_tick)) < EXACT


def test_weights_under_wrong_names_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM only logs a missing weight and keeps its random initial value."""
    own = vllm_engine.checkpoint_weights
    monkeypatch.setattr(
        vllm_engine, "checkpoint_weights", lambda p: ((n, w) for n, w in own(p) if not n.endswith("down_proj.weight"))
    )
    with pytest.raises(ModelError, match=r"expected vLLM's log-probs of LlamaForCausalLM within 0\.001 of the trainer's"):
        start(Policy(make_model(**SIZES), make_tokenizer()))


def test_settings_that_vllm_refuses_are_one_line() -> None:
    with pytest.raises(ModelError, match=r"^rollout\.engine: expected a model and settings that vLLM accepts, got: .+$"):
        start(Policy(make_model(**SIZES), make_tokenizer()), max_model_len=100_000)


def test_sampling_masks_are_refused_where_vllm_has_none() -> None:
    """On a CPU it has none."""
    policy = Policy(make_model(**SIZES), make_tokenizer())
    with pytest.raises(
        ConfigError, match=r"^rollout\.record_support: expected a vLLM .*, got: sampling distribution replay .+$"
    ):
        VllmEngine(policy, RolloutConfig(top_p=0.5, vllm=VllmConfig(kv_cache_gib=0.1)), 512)


@pytest.fixture
def run(changed: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """``changed`` for a model that vLLM's CPU attention supports."""
    make_model(**SIZES).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    def make(**fields: Any) -> Config:
        engine = {"engine": "vllm", "vllm": VllmConfig(kv_cache_gib=0.1, **fields.pop("vllm", {}))}
        return changed(model={"path": str(tmp_path / "model")}, rollout={**engine, **fields.pop("rollout", {})}, **fields)

    return make


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run(run: Callable[..., Config], lora: int) -> None:
    config = run(steps=4, lora={"rank": lora}, optim={"lr": 0.03})
    assert train(config)
    rows = read(Path(config.out) / config.name, "metrics")
    assert len(rows) == 4
    for row in rows:
        assert row["rollout/logp_gap_max"] < EXACT, "stale weights after the first step would be off by more"
        assert row["rollout/importance_ess"] == pytest.approx(1, abs=1e-5)
        assert math.isfinite(row["loss"])
    assert rows[0]["reward/mean"] != rows[-1]["reward/mean"]


def test_a_bf16_engine_with_truncated_importance_sampling(run: Callable[..., Config]) -> None:
    """The same completions with and without the cap: the mismatch is real, and the loss of the
    first step is weighted by it.
    """
    losses = {}
    for name, cap in (("plain", None), ("wide", 5.0), ("tight", 1.0)):
        config = run(name=name, steps=2, vllm={"dtype": "bfloat16"}, loss={"importance_cap": cap}, data={"eval": ""})
        assert train(config)
        row = read(Path(config.out) / config.name, "metrics")[0]
        assert 1e-4 < row["rollout/logp_gap_mean"] < 0.1
        assert 0.9 < row["rollout/importance_ess"] < 1
        if cap is None:
            assert "rollout/importance_capped" not in row
        else:
            assert row["rollout/importance_capped"] == 0 if cap == 5.0 else 0.1 < row["rollout/importance_capped"] < 0.9
        losses[name] = row["loss"], row["grad_norm"]
    assert losses["plain"] != losses["wide"] != losses["tight"]
    assert losses["wide"] == pytest.approx(losses["plain"], abs=0.02)


def test_a_resumed_run_samples_from_the_checkpoints_weights(run: Callable[..., Config]) -> None:
    fields = {"data": {"eval": ""}, "optim": {"lr": 0.03}, "checkpoint": {"every": 1}}
    assert train(run(name="uncut", steps=3, **fields))
    assert train(run(name="parts", steps=2, **fields))
    config = run(name="parts", steps=3, resume="auto", **fields)
    assert train(config)
    last, wanted = (read(Path(config.out) / name, "metrics")[-1] for name in ("parts", "uncut"))
    assert last["step"] == wanted["step"] == 3
    assert last["rollout/logp_gap_max"] < EXACT
    assert last["reward/mean"] == wanted["reward/mean"]
