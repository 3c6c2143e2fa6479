"""Model, tokenizer and lengths are compared before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dry_run import estimate
from tiny import WORDS, make_model, make_tokenizer, tiny_config
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from trainer.__main__ import main
from trainer.config import Config, RewardModelConfig
from trainer.config.settings import to_toml
from trainer.errors import DataError, ModelError
from trainer.loop import train
from trainer.models.limits import check_prompts, positions
from trainer.models.policy import Policy
from trainer.rewards import Failed
from trainer.rewards.reward_model import RewardModel

IDS: dict[str, Any] = {"vocab_size": len(WORDS), "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
LIMIT = 16
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": LIMIT}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(**IDS, **GPT)).eval()


MODELS: dict[str, tuple[Callable[[], Any], int | None, int | None]] = {
    # A model, its learned positions, those that its configuration states.
    "gpt2": (gpt2, LIMIT, LIMIT),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**IDS, **OPT, max_position_embeddings=LIMIT)), LIMIT, LIMIT),
    "gptj": (lambda: GPTJForCausalLM(GPTJConfig(**IDS, **GPT, rotary_dim=4)), LIMIT, LIMIT),
    "llama": (lambda: make_model(max_position_embeddings=LIMIT), None, LIMIT),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**IDS, hidden_size=32, num_hidden_layers=1, state_size=4)), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_longest_sequence_of_a_model(name: str) -> None:
    make, held, stated = MODELS[name]
    model = make().eval()
    assert positions(model) == (held, stated)
    model(input_ids=torch.full((1, LIMIT), 5))
    if held is None:
        model(input_ids=torch.full((1, LIMIT + 1), 5))
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, LIMIT + 1), 5))


class Prompts:
    setting = "data.train"

    def __init__(self, *lengths: int) -> None:
        self.ids = [[5] * length for length in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_checked_at_and_beyond_the_limit(name: str) -> None:
    make, held, stated = MODELS[name]
    model, lines = make(), list[str]()
    given: Any = (model, make_tokenizer(), Prompts(3, 10), LIMIT - 10, lines.append)
    check_prompts(*given)
    assert lines == []
    beyond: Any = (model, make_tokenizer(), Prompts(3, 11), LIMIT - 10, lines.append)
    if held is not None:
        with pytest.raises(
            DataError, match=r"within the 16 learned positions of .*, got 11 tokens and rollout.max_new_tokens = 6"
        ):
            check_prompts(*beyond)
    else:
        check_prompts(*beyond)
        assert len(lines) == (stated is not None)
        assert not stated or "exceed the 16 positions of the model's configuration" in lines[0]


def save(directory: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(prompts: Path, tmp_path: Path) -> Callable[..., Config]:
    def of(made: Any, tokenizer: Any, **sections: Any) -> Config:
        path = save(tmp_path / "model", made, tokenizer)
        return tiny_config(path, prompts, tmp_path).replace(steps=1, diagnose_every=0, **sections)

    return of


@pytest.mark.parametrize("name", MODELS)
def test_the_memory_of_every_kind_of_model_is_estimated(run: Callable[..., Config], name: str) -> None:
    """GPT-2's configuration names no inner size, Mamba's no attention heads."""
    model = MODELS[name][0]()
    found = estimate(run(model, make_tokenizer()), 1)
    assert found.always["AdamW"] == 8 * sum(p.numel() for p in model.parameters())
    assert all(size > 0 for size in found.update.values())


def test_a_pad_token_without_a_row_only_pads(run: Callable[..., Config], tmp_path: Path) -> None:
    """Prompts of different lengths are padded; the padding is masked."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(WORDS)
    rows = [{"prompt": "n1 " * (1 + i % 3), "answer": "n3"} for i in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "q.jsonl"), "eval": ""}
    assert train(run(make_model(), tokenizer, data=data))
    known = run(make_model(), make_tokenizer(), data=data, name="known")
    assert train(known)
    metrics = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("tiny", "known")]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-6)
    assert metrics[0]["reward/mean"] == metrics[1]["reward/mean"]


def test_a_vocabulary_padded_to_a_multiple_trains(run: Callable[..., Config]) -> None:
    """Sampled ids without a text decode to nothing."""
    padded = make_model(vocab_size=64)
    with torch.no_grad():
        padded.lm_head.weight[len(WORDS) :] = padded.lm_head.weight[10]
    assert train(run(padded, make_tokenizer(), lora={"rank": 0}))


def test_an_added_token_in_a_prompt_is_one_line(
    run: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    rows = [{"prompt": f"what {'<new>' * (i == 2)} n{i}", "answer": "n1"} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for which in ("train", "eval"):
        config = run(make_model(), tokenizer, data={which: str(tmp_path / "q.jsonl"), "eval_limit": 0})
        expected = rf"data.{which}: expected token ids below the {len(WORDS)} rows .*got {len(WORDS)} .'<new>'. in prompt 2"
        with pytest.raises(DataError, match=expected):
            train(config)
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    for command in (["train", "--dry-run"], ["eval"]):
        assert main([*command, "--config", str(tmp_path / "recipe.toml")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "data.eval: expected token ids below" in line
    resized = make_model()
    resized.resize_token_embeddings(len(tokenizer))
    assert train(run(resized, tokenizer, data={"train": str(tmp_path / "q.jsonl"), "train_limit": 4}))


@pytest.mark.parametrize(("added", "own", "found"), [(True, 1, [1]), (True, [1, 99], [1]), (True, 99, None), (False, -1, [1])])
def test_only_tokens_with_a_row_end_a_completion(added: bool, own: Any, found: list[int] | None) -> None:
    tokenizer, model = make_tokenizer(), make_model()
    if added:
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    model.generation_config.eos_token_id = own
    if found is None:
        with pytest.raises(ModelError, match=rf"expected an end-of-sequence token .*, got \[{len(WORDS)}, 99\]"):
            Policy(model, tokenizer)
    else:
        assert Policy(model, tokenizer).eos_ids == found


def test_learned_positions_are_one_line_before_training(
    run: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(run(gpt2(), make_tokenizer(), rollout={"max_new_tokens": 20})))
    for command in (["train"], ["train", "--dry-run"], ["eval"]):
        assert main([*command, "--config", str(tmp_path / "recipe.toml")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "data.train: expected prompt and completion within the 16 learned positions" in line.replace("eval:", "train:")
    assert not (tmp_path / "tiny").exists()


def test_the_teachers_prompts_are_compared_too(run: Callable[..., Config]) -> None:
    """They hold the reference answer as well, so they are longer."""
    sections: dict[str, Any] = {"data": {"eval": "", "teacher_prompt": "{prompt} {answer}"}, "loss": {"method": "trace"}}
    model, new_tokens = gpt2(), {"max_new_tokens": LIMIT - 7}
    assert train(run(model, make_tokenizer(), rollout={"max_new_tokens": LIMIT - 9}, **sections))
    with pytest.raises(DataError, match=r"data.teacher_prompt: expected prompt and completion within the 16 learned positions"):
        train(run(model, make_tokenizer(), rollout=new_tokens, name="longer", **sections))


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.toml").write_text(to_toml(tiny_config(tmp_path / "model", prompts, tmp_path)))
    assert main(["train", "--config", str(tmp_path / "recipe.toml")]) == 2
    assert "model: expected a tokenizer in" in capsys.readouterr().err.splitlines()[-1]


def test_a_head_with_a_bias_trains_in_every_dtype(run: Callable[..., Config]) -> None:
    """All weights or adapters: the bias follows the hidden states."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    for dtype in ("float32", "bfloat16"):
        for rank in (0, 2):
            lora = {"rank": rank, "targets": ("q_proj",)}
            sections: dict[str, Any] = {"model": {"dtype": dtype}, "lora": lora, "data": {"eval": ""}, "overwrite": True}
            config = run(PhiForCausalLM(PhiConfig(**IDS, **sizes)), make_tokenizer(), **sections)
            assert train(config), (dtype, rank)


def test_a_reward_model_pads_with_a_token_that_it_knows(tmp_path: Path) -> None:
    """Its classifier reads the last token that is not config.pad_token_id; another pad would be read instead."""
    from test_reward_model import PROMPTS, TEXTS
    from test_reward_model import save as save_reward_model

    save_reward_model(tmp_path)
    alone = RewardModel(RewardModelConfig(path=str(tmp_path), batch=1), "unused", torch.device("cpu"))(PROMPTS, TEXTS)
    tokenizer = make_tokenizer()
    for pad in ("<unk>", "[PAD]"):
        tokenizer.add_special_tokens({"pad_token": pad})
        tokenizer.save_pretrained(tmp_path)
        batched = RewardModel(RewardModelConfig(path=str(tmp_path), batch=4), "unused", torch.device("cpu"))
        assert batched(PROMPTS, TEXTS) == pytest.approx(alone, abs=1e-5), pad
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    made = RewardModel(RewardModelConfig(path=str(tmp_path)), "unused", torch.device("cpu"))
    failed, scored = made(PROMPTS[:2], ["<new>", "n9"])
    assert failed == Failed(
        f"expected token ids below the {len(WORDS)} rows of the reward model's embedding, got {len(WORDS) + 1}"
    )
    assert isinstance(scored, float)


def test_a_reward_model_is_not_given_more_than_its_positions(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 1}
    config = RobertaConfig(**{**IDS, "pad_token_id": 1}, **sizes, max_position_embeddings=LIMIT + 2, type_vocab_size=1)
    save(tmp_path, RobertaForSequenceClassification(config), make_tokenizer(chat=False))
    made = RewardModel(RewardModelConfig(path=str(tmp_path)), "unused", torch.device("cpu"))
    assert made.max_tokens == LIMIT
    fits, long = made(["n1 " * 8, "n1 " * 8], ["n2 " * 8, "n2 " * 9])
    assert isinstance(fits, float)
    assert isinstance(long, Failed)
