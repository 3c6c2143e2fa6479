"""Every recipe of real models, with a tiny model of the same class and rows in the columns of its
dataset.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trainer.config.settings import parse_config
from trainer.loop import train
from trainer.runs.rundir import read

RECIPES = Path(__file__).parents[2] / "trainer" / "recipes"
WORDS = ["<pad>", "<eos>", "<unk>", "user:", "assistant:", *(f"\\boxed{{{n}}}" for n in range(4)), "so", "then"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": f"What is 2 + {n}?", "answer": f"2 + {n} = <<2+{n}={2 + n}>>{2 + n}\n#### {2 + n}"}
        for n in (0, 1) * 4
    ],
    "dapo-math": [
        {
            "prompt": f"What is $2 + {n}$?", "solution": str(2 + n), "data_source": "math_dapo",
            "source_prompt": [{"role": "user", "content": f"Solve the problem. What is $2 + {n}$?"}], "ability": "MATH",
            "reward_model": {"ground_truth": str(2 + n), "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": f"{n}"},
        }
        for n in (0, 1) * 4
    ],
}  # fmt: skip


def save(kind: str, directory: Path) -> None:
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
             "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**sizes))
    made.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def commands(recipe: Path) -> list[list[str]]:
    """The flags of the commands in the recipe's header."""
    lines = re.findall(r"^#   (.*-m trainer train .*)$", recipe.read_text(), flags=re.MULTILINE)
    return [shlex.split(line.split("trainer train ")[1]) for line in lines]


@pytest.mark.parametrize("name", ROWS)
def test_the_commands_of_a_recipe_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parents[1])
    one, eight = (parse_config(flags) for flags in commands(RECIPES / f"{name}.toml"))
    assert one.lora.rank > 0
    assert eight.lora.rank == 0
    assert eight.optim.lr < one.optim.lr
    assert eight.rollout.prompts % 8 == 0
    assert one.data.chat_template_kwargs == {"enable_thinking": False}
    assert "\\boxed{}" in one.data.prompt_template


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_trains_a_tiny_model(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parents[1])
    save(kind, tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    small = {
        "model.path": tmp_path / "model", "model.device": "cpu", "data.train": tmp_path / "data.jsonl", "data.eval": "",
        "rollout.engine": "transformers", "rollout.prompts": 4, "rollout.max_new_tokens": 6, "rewards.overlong_window": 2,
        "optim.warmup_steps": 0, "steps": 2, "out": tmp_path / "runs",
    }  # fmt: skip
    flags = commands(RECIPES / f"{name}.toml")[0 if kind == "qwen3" else 1]
    config = parse_config([*flags, *(f"--{key}={value}" for key, value in small.items())])
    assert train(config)
    for row in read(tmp_path / "runs" / name, "metrics"):
        assert 0 < row["reward/math_verify/mean"] < 1
        assert row["reward/math_verify/failed"] == 0
        assert row["reward/flat_groups"] < 1
        assert row["grad_norm"] > 0
        assert ("reward/overlong/mean" in row) == (name == "dapo-math")
