"""EAPOTrainer and the fused head on the real TRL: training on a CPU, parity for every loss type."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import VOCABULARY, tiny_batch, tiny_model, tiny_tokenizer

from eapo_kernels import EapoError, EntropyRatio

pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl==1.16.0")

from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from eapo_kernels.integrations.trl import LOSS_TYPES, EAPOTrainer, add_eapo_head

ONE = {"kappa": 0.0}


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def _trainer(kind: type, directory: Path, *, model: Any = None, extra: dict[str, Any] | None = None, **settings: Any) -> Any:
    from datasets import Dataset

    config: dict[str, Any] = {
        "output_dir": str(directory), "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": 6, "max_steps": 3, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "bf16": False, "seed": 11, "temperature": 0.8, "disable_tqdm": True,
    }  # fmt: skip
    dataset = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{2 * i}" for i in range(8)]})
    return kind(
        model=tiny_model("qwen3") if model is None else model,
        reward_funcs=_reward,
        args=GRPOConfig(**{**config, **settings}),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        **(extra or {}),
    )


def _saved(family: str, directory: Path) -> str:
    """A tiny model on disk: with beta > 0 TRL loads the reference from the policy's path."""
    path = directory / family
    tiny_model(family).save_pretrained(path)
    return str(path)


def _settings(loss_type: str) -> dict[str, Any]:
    """The settings that TRL requires with a loss type."""
    own: dict[str, dict[str, Any]] = {"luspo": {"importance_sampling_level": "sequence"}, "cispo": {"epsilon_high": 3.0}}
    return {"loss_type": loss_type, **own.get(loss_type, {})}


@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "vespo"])
def test_weight_one_trains_bit_for_bit_like_stock(loss_type: str, tmp_path: Path) -> None:
    settings = {**_settings(loss_type), "max_steps": 2}
    stock = _trainer(GRPOTrainer, tmp_path / "a", **settings)
    stock.train()
    ours = _trainer(EAPOTrainer, tmp_path / "b", extra={"controller": EntropyRatio(**ONE)}, **settings)
    ours.train()
    theirs = stock.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.model.state_dict().items())
    moved = tiny_model("qwen3").state_dict()
    assert any(not torch.equal(value, moved[name]) for name, value in theirs.items()), "it trained at all"
    logged = [row for row in ours.state.log_history if "eapo/positive_weight" in row]
    assert [row["eapo/positive_weight"] for row in logged] == [1.0, 1.0]
    assert len({row["eapo/entropy_init"] for row in logged}) == 1


def _batch(trainer: Any, *, off_policy: bool) -> dict[str, Any]:
    """One micro-batch of the trainer; off_policy moves the old log-probs so that clips act."""
    trainer.model.train()
    torch.manual_seed(5)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    prompts = [{"prompt": f"w{i // 4} w3"} for i in range(trainer.args.generation_batch_size)]
    torch.manual_seed(6)
    batch = trainer._prepare_inputs(prompts)
    if off_policy:
        torch.manual_seed(7)
        with torch.no_grad():
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            width = batch["completion_ids"].size(1)
            logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, width)
        batch["old_per_token_logps"] = logps + 0.3 * torch.randn_like(logps)
    return batch


def _loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_same_batch_through_the_stock_path_and_ours(loss_type: str, tmp_path: Path) -> None:
    """loss(ours) = w * stock(positives only) + stock(negatives only), value and gradient."""
    weight = 0.4
    stock = _trainer(GRPOTrainer, tmp_path / "a", **_settings(loss_type))
    ours = _trainer(EAPOTrainer, tmp_path / "b", extra={"controller": EntropyRatio(scale=weight)}, **_settings(loss_type))
    theirs_batch, our_batch = _batch(stock, off_policy=True), _batch(ours, off_policy=True)
    advantages = theirs_batch["advantages"]
    assert (advantages > 0).any()
    assert (advantages < 0).any()
    assert torch.equal(our_batch["completion_ids"], theirs_batch["completion_ids"])
    assert torch.equal(our_batch["advantages"], torch.where(advantages > 0, weight * advantages, advantages))

    found, gradients = _loss_and_gradients(ours, our_batch)
    positive, d_positive = _loss_and_gradients(stock, {**theirs_batch, "advantages": advantages.clamp_min(0)})
    negative, d_negative = _loss_and_gradients(stock, {**theirs_batch, "advantages": advantages.clamp_max(0)})
    torch.testing.assert_close(found, weight * positive + negative, rtol=1e-5, atol=1e-6)
    for name in gradients:
        torch.testing.assert_close(gradients[name], weight * d_positive[name] + d_negative[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_against_a_hand_written_loss(loss_type: str, tmp_path: Path) -> None:
    """E10 re-typed on plain logits: entropy, weight, clipped ratio, reduction."""
    trainer = _trainer(EAPOTrainer, tmp_path, extra={"controller": EntropyRatio(scale=0.5)}, **_settings(loss_type))
    trainer.eapo.controller.update(300.0, 100)  # H_0 = 3 nats
    batch = _batch(trainer, off_policy=True)
    full = trainer._buffered_inputs
    model, temperature, eps = trainer.model, 0.8, 0.2

    def plain(b: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, width = torch.cat([b["prompt_ids"], b["completion_ids"]], 1), b["completion_ids"].size(1)
        attention = torch.cat([b["prompt_mask"], b["completion_mask"]], 1)
        z = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1] / temperature
        return z.log_softmax(-1), b["completion_mask"].float()

    with torch.no_grad():
        parts = [(-(logp.exp() * logp).sum(-1) * mask, mask) for logp, mask in map(plain, full)]
    entropy = sum(h.sum() for h, _ in parts) / sum(m.sum() for _, m in parts)
    weight = 0.5 * float(entropy) / 3.0
    assert math.isclose(float(trainer.eapo.weight), weight, rel_tol=1e-5)

    rows = [(_valid(prompt, m0), _valid(row, m), a) for b in full for prompt, m0, row, m, a in _rows(b)]
    rewards = torch.tensor(_reward(completion_ids=[row for _, row, _ in rows]))
    expected_advantages = torch.empty_like(rewards)
    for prompt in {tuple(p) for p, _, _ in rows}:
        group = torch.tensor([tuple(p) == prompt for p, _, _ in rows])
        assert group.sum() == 4
        r = rewards[group]
        expected_advantages[group] = (r - r.mean()) / (r.std() + 1e-4)
    expected_advantages = torch.where(expected_advantages > 0, weight * expected_advantages, expected_advantages)
    torch.testing.assert_close(torch.stack([a for _, _, a in rows]), expected_advantages, rtol=1e-4, atol=1e-5)

    log_all, mask = plain(batch)
    logp = log_all.gather(-1, batch["completion_ids"][..., None])[..., 0]
    ratio = (logp - batch["old_per_token_logps"]).exp()
    advantages = batch["advantages"][:, None]
    term = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    if loss_type == "grpo":
        expected = -((term * mask).sum(1) / mask.sum(1)).mean() / 2
    else:
        expected = -(term * mask).sum() / batch["num_items_in_batch"]
    loss = trainer._compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def _rows(batch: dict[str, Any]) -> list[tuple[torch.Tensor, ...]]:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
    return list(zip(*(batch[name] for name in names), strict=True))


def _valid(row: torch.Tensor, mask: torch.Tensor) -> list[int]:
    return row[mask.bool()].tolist()


def test_previous_batch_lags_by_one_and_costs_no_pass(tmp_path: Path) -> None:
    trainer = _trainer(EAPOTrainer, tmp_path, extra={"entropy_from": "previous"}, max_steps=3)
    calls = []
    original = trainer._get_per_token_logps_and_entropies

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return original(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = counted
    trainer.train()
    assert calls == [True] * 6, "three steps of two micro-batches, nothing else"
    weights = [row["eapo/positive_weight"] for row in trainer.state.log_history if "eapo/positive_weight" in row]
    entropies = [row["entropy"] for row in trainer.state.log_history if "entropy" in row]
    assert weights[:2] == [1.0, 1.0], "before anything is known, then H_0 / H_0"
    assert weights[2] != 1.0
    assert abs(weights[2] - entropies[1] / entropies[0]) < 0.02, "the second batch's entropy over the first's"


def test_old_policy_pass_is_reused(tmp_path: Path) -> None:
    model = _saved("qwen3", tmp_path)
    trainer = _trainer(EAPOTrainer, tmp_path, model=model, max_steps=2, num_iterations=2, beta=0.05)
    passes = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append("grad" if torch.is_grad_enabled() else "policy" if model is self.model else "reference")
        return original(self, model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
        trainer.train()
    assert passes.count("policy") == passes.count("reference") == 1, "one rollout, one old pass"
    assert "eapo/positive_weight" in trainer.state.log_history[0]


def test_resume_keeps_the_initial_entropy(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = _trainer(EAPOTrainer, tmp_path, **settings)
    first.train()
    again = _trainer(EAPOTrainer, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.eapo.controller.initial_entropy, first.eapo.controller.initial_entropy)
    assert float(again.eapo.weight) != 1.0
    # TRL samples the resumed steps with the random state it finds, so the entropies agree only roughly.
    assert abs(float(again.eapo.weight) - float(first.eapo.weight)) < 0.1
    (tmp_path / "checkpoint-2" / "eapo_state.json").unlink()
    with pytest.raises(EapoError, match=r"expected eapo_state.json"):
        _trainer(EAPOTrainer, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation_is_neither_measured_nor_weighted(tmp_path: Path) -> None:
    from datasets import Dataset

    trainer = _trainer(
        EAPOTrainer, tmp_path, max_steps=1, per_device_eval_batch_size=4,
        extra={"eval_dataset": Dataset.from_dict({"prompt": ["w1 w2", "w3"]}), "controller": EntropyRatio(scale=0.5)},
    )  # fmt: skip
    trainer.train()
    before = trainer.eapo.controller.state_dict()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert trainer.eapo.controller.state_dict() == before


def _process(rank: int, directory: str) -> None:
    trainer = _trainer(EAPOTrainer, Path(directory), max_steps=2, extra={"fused_head": "eapo"})
    assert trainer.accelerator.num_processes == 2
    own: list[tuple[float, float]] = []
    observe = trainer.eapo.observe

    def watched(entropy: torch.Tensor, mask: torch.Tensor) -> None:
        own.append((torch.where(mask.bool(), entropy, 0.0).sum().item(), mask.sum().item()))
        observe(entropy, mask)

    trainer.eapo.observe = watched
    trainer.train()
    torch.save((own, trainer.eapo.controller.state_dict(), trainer.model.state_dict()), f"{directory}/{rank}.pt")


def test_two_processes_share_one_weight(tmp_path: Path) -> None:
    run_ranks(_process, str(tmp_path))
    (own, state, model), (other, state_too, model_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert own != other
    assert state == state_too
    assert all(torch.equal(value, model_too[name]) for name, value in model.items())
    entropies = [(a[0] + b[0]) / (a[1] + b[1]) for a, b in zip(own, other, strict=True)]
    assert float(state["initial_entropy"]) == pytest.approx(entropies[0], rel=1e-6)
    assert float(state["weight"]) == pytest.approx(entropies[1] / entropies[0], rel=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_our_op_behind_the_fused_head_contract(loss_type: str, tmp_path: Path) -> None:
    settings = {**_settings(loss_type), "beta": 0.04, "entropy_coef": 0.01}
    model = _saved("gemma2_softcap", tmp_path)
    stock = _trainer(EAPOTrainer, tmp_path / "a", model=model, **settings)
    ours = _trainer(EAPOTrainer, tmp_path / "b", model=model, extra={"fused_head": "eapo"}, **settings)
    theirs_batch, our_batch = _batch(stock, off_policy=True), _batch(ours, off_policy=True)
    assert torch.equal(our_batch["completion_ids"], theirs_batch["completion_ids"])
    torch.testing.assert_close(our_batch["advantages"], theirs_batch["advantages"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_batch["ref_per_token_logps"], theirs_batch["ref_per_token_logps"], rtol=1e-5, atol=1e-5)
    found, gradients = _loss_and_gradients(ours, theirs_batch)
    expected, d_expected = _loss_and_gradients(stock, theirs_batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == d_expected.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], d_expected[name], rtol=1e-4, atol=1e-5)


def test_our_head_trains_with_lora(tmp_path: Path) -> None:
    """LoRA beside the head (TRL refuses it on the head); the reference is the model without it."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = _trainer(
        EAPOTrainer, tmp_path, model=tiny_model("llama"), extra={"fused_head": "eapo", "peft_config": lora}, beta=0.04
    )
    trainer.train()
    changed = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert changed
    assert all(p.abs().sum() > 0 for p in changed)


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        ({}, {"entropy_from": "reward"}, "entropy_from"),
        ({}, {"fused_head": "liger"}, "fused_head"),
        ({"cast_lm_head_to_fp32": True}, {"fused_head": "eapo"}, "cast_lm_head_to_fp32"),
        ({}, {"controller": 1.0}, "controller"),
    ],
)
def test_unsupported_combinations_raise(settings: dict[str, Any], extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EapoError, match=message):
        _trainer(EAPOTrainer, tmp_path, extra=extra, **settings)


@pytest.mark.parametrize("family", ["cohere_scale", "gemma2_softcap", "phi_bias"])
def test_the_fused_head_contract_beside_trls_own_head(family: str) -> None:
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    theirs, ours = tiny_model(family), tiny_model(family)
    add_fused_lm_head(theirs, temperature=0.7, outputs=fields)
    add_eapo_head(ours, temperature=0.7, outputs=fields)
    ids, attention, response = tiny_batch()
    labels = torch.where(response, ids, -100)
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    for given in ({"labels": labels}, {"shift_labels": shifted}, {"labels": labels, "num_items_in_batch": 11}):
        a = theirs(input_ids=ids, attention_mask=attention, fused_lm_head=True, **given)
        b = ours(input_ids=ids, attention_mask=attention, fused_lm_head=True, **given)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    masked = ours(input_ids=ids, attention_mask=attention, fused_lm_head=True, labels=torch.full_like(ids, -100))
    masked.loss.backward()
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    with pytest.raises(EapoError, match="outputs"):
        add_eapo_head(tiny_model("llama"), outputs=("logits",))


def test_fused_head_of_a_mixture_of_experts() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    models = []
    for add in (add_fused_lm_head, add_eapo_head):
        torch.manual_seed(0)
        models.append(Qwen3MoeForCausalLM(config).eval())
        add(models[-1])
    ids, attention, response = tiny_batch()
    given = {"labels": torch.where(response, ids, -100), "fused_lm_head": True, "output_router_logits": True}
    a, b = (model(input_ids=ids, attention_mask=attention, **given) for model in models)
    torch.testing.assert_close(b.aux_loss, a.aux_loss)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-5, atol=1e-5)


def _offline(kind: str, directory: Path, ours: bool) -> tuple[Any, list[dict[str, float]]]:
    """One of TRL's trainers after two steps, and what it logged."""
    import trl
    from datasets import Dataset

    texts = [f"w{i} w{i + 1}" for i in range(8)]
    rows: dict[str, dict[str, Any]] = {
        "SFT": {"text": [f"{text} w5 w6 w7" for text in texts]},
        "DPO": {"prompt": texts, "chosen": [" w5 w6"] * 8, "rejected": [" w9 w10 w11"] * 8},
        "KTO": {"prompt": texts, "completion": [" w5 w6", " w9 w10 w11"] * 4, "label": [True, False] * 4},
        "RLOO": {"prompt": texts},
        "GRPO": {"prompt": texts},
    }
    online = {"num_generations": 4, "max_completion_length": 5, "temperature": 0.7, "beta": 0.0}
    own: dict[str, dict[str, Any]] = {"DPO": {"use_weighting": True}, "RLOO": online, "GRPO": online}
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        use_cpu=True, bf16=False, seed=3, learning_rate=1e-3, disable_tqdm=True, gradient_checkpointing=False, report_to=[],
        **own.get(kind, {}),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=_saved("gemma2_softcap", directory), args=args, train_dataset=Dataset.from_dict(rows[kind]),
        processing_class=tiny_tokenizer(), **({"reward_funcs": _reward} if kind in ("RLOO", "GRPO") else {}),
    )  # fmt: skip
    if ours:
        add_eapo_head(trainer.model)
    trainer.train()
    return trainer, trainer.state.log_history[:2]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "RLOO", "GRPO"])
def test_trls_trainers_train_as_with_their_own_head(kind: str, tmp_path: Path) -> None:
    theirs, expected = _offline(kind, tmp_path / "a", False)
    ours, found = _offline(kind, tmp_path / "b", True)
    timing = ("runtime", "per_second", "step_time", "accuracies")  # DPO starts at its reference: ties
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not any(part in name for part in timing):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4, abs=1e-5), name
    trained = theirs.model.state_dict()
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_deep_copy_keeps_its_own_weights() -> None:
    for before in (
        lambda model: None,
        lambda model: add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "is_top1")),
    ):
        model = tiny_model("hyperclovax_scale")
        before(model)
        add_eapo_head(model)
        ids, _, _ = tiny_batch()
        reference = copy.deepcopy(model)
        calls = ({"fused_lm_head": True, "labels": ids}, {})
        expected = [reference(input_ids=ids, **given) for given in calls]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        found = [reference(input_ids=ids, **given) for given in calls]
        assert torch.equal(found[0].log_probs, expected[0].log_probs)
        assert torch.equal(found[1].logits, expected[1].logits)
        assert not torch.equal(model(input_ids=ids).logits, expected[1].logits)


@pytest.mark.parametrize("how", ["pickle", "replica", "export"])
@torch.no_grad()
def test_other_copies_compute_with_their_own_weights_too(how: str) -> None:
    """What a pickle, nn.DataParallel and torch.export make of the model."""
    from test_hf import _replica

    model = tiny_model("gemma2_softcap")
    add_eapo_head(model)
    ids, _, _ = tiny_batch()
    given = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    negative = tiny_model("gemma2_softcap")
    for parameter in negative.parameters():
        parameter.neg_()
    if how == "export":
        twin = torch.export.export(model, (), given, strict=False).module()
        negative = tiny_model("gemma2_softcap")
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
        for parameter in twin.parameters():
            parameter.neg_()
    else:
        twin = _replica(model)
    expected = negative(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (twin(**given).log_probs - expected).abs().max() < 1e-5


def test_the_settings_of_trls_head_are_taken_over() -> None:
    model, plain = tiny_model("hyperclovax_scale"), tiny_model("hyperclovax_scale")
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "is_top1"))
    add_eapo_head(model)
    ids, _, _ = tiny_batch()
    output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    logp = (plain(input_ids=ids).logits[:, :-1] / 0.5).log_softmax(-1)
    assert (output.log_probs - logp.gather(-1, ids[:, 1:, None])[..., 0]).abs().max() < 1e-5
    assert torch.equal(output.is_top1, logp.argmax(-1) == ids[:, 1:])
    assert output.entropy is output.mean_logits is None
    model = tiny_model("llama")
    add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    with pytest.raises(EapoError, match="cast_lm_head_to_fp32"):
        add_eapo_head(model)
