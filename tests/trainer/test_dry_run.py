"""The estimate of the memory against what a policy and its optimizer really hold, and the checks that
need no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import dry_run
from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.dry_run import GIB, Estimate, prepare, skeleton_of
from trainer.learning.learner import make_optimizer
from trainer.loop import train
from trainer.models.policy import load_policy

Change = Callable[..., Config]
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip


def model(directory: Path, **changes: Any) -> str:
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def estimate(config: Config, processes: int) -> Estimate:
    """For prompts as long as they may be."""
    return dry_run.estimate(config, processes, skeleton_of(config), config.data.max_prompt_tokens)


def held(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("rank", "dtype", "tied"), [(0, "float32", False), (0, "bfloat16", True), (4, "float32", True), (4, "bfloat16", False)]
)
def test_weights_gradients_and_optimizer_are_exact(changed: Change, tmp_path: Path, rank: int, dtype: str, tied: bool) -> None:
    path = model(tmp_path / "m", tie_word_embeddings=tied)
    config = changed(model={"path": path, "dtype": dtype}, lora={"rank": rank})
    found = estimate(config, 1)
    policy = load_policy(config.model, config.lora, seed=0)
    optimizer = torch.optim.AdamW(policy.trainable())
    for weight in policy.trainable():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = [value for own in optimizer.state.values() for value in own.values() if value.dim()]
    assert found.always["weights"] == pytest.approx(held(policy.parameters()), rel=0.01)
    assert found.update["gradients"] == pytest.approx(held(w.grad for w in policy.trainable()), rel=0.01)
    assert found.always["AdamW"] == pytest.approx(held(state), rel=0.01)
    shared = estimate(config, 8)
    assert shared.always["weights"] == found.always["weights"] / 8
    root = sum(p.numel() for n, p in policy.named_parameters() if ".layers." not in n)
    assert shared.update["gathered layers"] > 4 * root
    assert shared.rollouts["all weights gathered"] > 4 * root


@pytest.mark.parametrize("processes", [1, 2])
def test_eight_bit_moments_are_exact(changed: Change, tmp_path: Path, processes: int) -> None:
    """In blocks of 256; in fp32 where a process holds less than 4096 weights or a part of a block."""
    pytest.importorskip("torchao", reason="needs torchao: pip install '.[adamw-8bit]'")
    config = changed(model={"path": model(tmp_path / "m")}, optim={"optimizer": "adamw_8bit"})
    weights = load_policy(config.model, config.lora, seed=0).trainable()
    shards = [torch.nn.Parameter(weight.detach()[: -(-len(weight) // processes)].clone()) for weight in weights]
    optimizer = make_optimizer(shards, config.optim)
    for weight in shards:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = [own[name] for own in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    quantized = [moment for moment in moments if hasattr(moment, "codes")]
    assert 0 < len(quantized) < len(moments)
    size = held(part for m in quantized for part in (m.codes, m.scale)) + held(m for m in moments if not hasattr(m, "codes"))
    assert estimate(config, processes).always["AdamW"] == size


def test_a_saved_adapter_is_estimated_with_its_base(changed: Change, tmp_path: Path) -> None:
    config = changed(model={"path": model(tmp_path / "m"), "dtype": "bfloat16"}, lora={"rank": 4})
    load_policy(config.model, config.lora, seed=0).save(tmp_path / "adapter")
    saved = config.replace(model={"path": str(tmp_path / "adapter")}, lora={"rank": 0})
    assert estimate(saved, 2) == estimate(config, 2)


def test_activations_and_the_cache_follow_the_shapes(changed: Change, tmp_path: Path) -> None:
    """Against the tensors that autograd keeps of one forward pass, each storage once."""
    config = changed(
        model={"path": model(tmp_path / "m")}, optim={"micro_batch_tokens": 2048}, data={"max_prompt_tokens": 64},
        rollout={"prompts": 16},
    )  # fmt: skip
    policy = load_policy(config.model, config.lora, seed=0)
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(2048).reshape(16, 128) % 512
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = policy(ids, torch.ones_like(ids), torch.arange(4), lambda h, w, **_: h.sum())
    measured = sum(size for place, size in storages.items() if place not in weights)
    assert out.requires_grad
    row = estimate(config, 1).update["activations of 2048 tokens"]
    assert 0.6 * measured < row < 1.6 * measured
    less = estimate(config.replace(model={"gradient_checkpointing": True}), 1).update["activations of 2048 tokens"]
    assert less < row / 2
    cache = estimate(config, 1).rollouts["KV cache"]
    assert cache == 64 * (64 + 6) * 2 * 3 * 2 * 16 * 4  # completions, tokens, keys and values, layers, heads, head_dim, bytes
    few = estimate(config.replace(rollout={"prompts": 3}), 1).update["activations of 840 tokens"]
    assert few == pytest.approx(row * 840 / 2048), "a step has no more tokens"


def test_vllms_share_is_on_top_unless_it_sleeps(changed: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    awake = changed(rollout={"engine": "vllm"})
    on_cpu = estimate(awake, 1)
    (cache,) = (size for name, size in on_cpu.always.items() if name.startswith("vLLM's KV cache"))
    assert cache == GIB, "an engine on a CPU does not sleep"
    assert on_cpu.always["vLLM's weights"] == on_cpu.always["weights"]

    class Gpu:
        total_memory = 80 * GIB

    monkeypatch.setattr("trainer.dry_run.find_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    asleep = estimate(awake, 1)
    assert sum(asleep.rollouts.values()) == pytest.approx(0.4 * 80 * GIB)
    assert asleep.update["logits in chunks"] == 2 * GIB
    assert "(the GPU has 80.0)" in asleep.line()


def test_the_command_checks_everything_but_the_weights(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loads weights"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))

    def run(*flags: str) -> tuple[int, str, str]:
        code = main(["train", "--config", str(recipe), *flags])
        return code, *capsys.readouterr()

    code, out, _ = run("--dry-run", "8", "--data.max_prompt_tokens", "7")
    assert code == 0
    assert "data.train: 8 prompts of at most 7 tokens" in out
    assert "rewards: reward_functions:low_numbers; engine: transformers" in out
    assert "memory of each of 8 processes, estimated" in out
    assert "always    AdamW" in out
    assert "memory of a process, estimated:" in out
    assert not (Path(config.out) / config.name).exists()
    for flags, message in (
        (("--rewards.functions", "reward_functions:nothing"), "rewards.functions: expected an importable"),
        (("--model.path", str(tmp_path / "none")), "model.path: expected a folder"),
        (("--data.columns.answer", "solution"), "expected the column 'solution'"),
        (("--rollout.prompts", "9"), "rollout.prompts: expected at most the 8 training prompts, got 9"),
        (("--rollout.engine", "vllm"), "rollout.engine: expected an installed vllm"),
        (("--optim.optimizer", "adamw_8bit"), "optim.optimizer: expected an installed torchao for adamw_8bit (pip install"),
        (("--data.max_prompt_tokens", "2"), "data.max_prompt_tokens: expected at least one prompt"),
    ):
        monkeypatch.setattr("trainer.dry_run.find_spec", lambda _: None)
        monkeypatch.setattr("trainer.learning.learner.find_spec", lambda _: None)
        code, _, err = run("--dry-run", *flags)
        assert code == 2
        assert message in err
    assert run("--dry-run", "0")[0] == run("--dry-run", "many")[0] == 2


def test_a_run_prints_the_estimate_and_finds_a_misspelt_reward_before_the_model(
    changed: Change, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(steps=1, data={"eval": ""})
    assert train(config)
    train_set, _, found = prepare(config, 1)
    assert found == estimate(config.replace(data={"max_prompt_tokens": max(map(len, train_set.ids))}), 1)
    assert found != estimate(config, 1)
    assert found.line() in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr("trainer.loop.load_policy", lambda *_, **__: pytest.fail("loads the model"))
    with pytest.raises(Exception, match=r"rewards\.functions: expected an importable"):
        train(changed(name="b", rewards={"functions": ("reward_functions:nothing",)}))
