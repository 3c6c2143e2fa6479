"""A tiny reward model on disk: its input, batches against single completions, and invalid
directories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, make_model, make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from trainer.config import RewardModelConfig, RewardsConfig
from trainer.config.settings import parse_config
from trainer.errors import ConfigError, ModelError
from trainer.rewards.reward_model import RewardModel
from trainer.rewards.scoring import Rewards

SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
PROMPTS = ["what is n1 ?", "n2", "what is after n3 ?", "n4"]
TEXTS = ["n5 n6 n7 n8", "n9", "", "n1 n2 n3 n4 n5 n6 n7"]


def save(directory: Path, *, chat: bool = True, pad: bool = True, labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=labels, pad_token_id=0 if pad else None)).eval()
    model.save_pretrained(directory)
    tokenizer = make_tokenizer(chat)
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    return model


def load(directory: Path, **options: Any) -> RewardModel:
    return RewardModel(RewardModelConfig(path=str(directory), **options), "unused", torch.device("cpu"))


def expected(model: LlamaForSequenceClassification, ids: list[list[int]]) -> list[float]:
    """The score head on the last token's hidden state, one completion at a time."""
    with torch.no_grad():
        hidden = [model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
        return [model.score(h).item() for h in hidden]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pad", [True, False])
def test_scores_of_a_chat_model(tmp_path: Path, batch: int, pad: bool) -> None:
    model, tokenizer = save(tmp_path, pad=pad), make_tokenizer()
    texts = [f"user: {p} assistant: {t} " for p, t in zip(PROMPTS, TEXTS, strict=True)]
    wanted = expected(model, [tokenizer(text)["input_ids"] for text in texts])
    made = load(tmp_path, batch=batch)
    assert made(PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions: Any = [[{"role": "assistant", "content": t}] for t in TEXTS]
    assert made(chats, completions) == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 3) for value in wanted}) == 4, "it tells the completions apart"


def test_a_tokenizer_without_a_template_gets_a_pair(tmp_path: Path) -> None:
    model, tokenizer = save(tmp_path, chat=False), make_tokenizer(chat=False)
    wanted = expected(model, [tokenizer(p, t)["input_ids"] for p, t in zip(PROMPTS, TEXTS, strict=True)])
    assert load(tmp_path)(PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)


def test_long_completions_fail_alone(tmp_path: Path) -> None:
    save(tmp_path)
    reward_model = RewardModelConfig(path=str(tmp_path), max_tokens=9, dtype="bfloat16")
    rewards = Rewards(
        RewardsConfig(functions=("reward_model",), reward_model=reward_model), cache="", device=torch.device("cpu")
    )
    found = rewards.score({"prompt": PROMPTS}, TEXTS, [[1]] * 4)
    assert [value is None for value in found.parts["reward_model"]] == [True, False, False, True]
    assert "expected at most 9 tokens (rewards.reward_model.max_tokens), got 10" in str(found.failures[0])


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.reward_model\.path: expected a directory, got ''"):
        parse_config(["--rewards.functions", "reward_model"])
    with pytest.raises(ModelError, match=r"rewards\.reward_model\.path: expected a folder"):
        load(tmp_path / "none")
    save(tmp_path / "two", labels=2)
    with pytest.raises(ModelError, match="expected a model with 1 output, got 2"):
        load(tmp_path / "two")
    make_model().save_pretrained(tmp_path / "base")  # a language model has no score head: it would be random
    make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"expected all weights in .*, got none of score\.weight"):
        load(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"rewards\.reward_model: expected a sequence classifier"):
        load(tmp_path / "empty")
