"""Data files, the chat template, and the sampler's state."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from tiny import make_tokenizer

from trainer.config import DataConfig
from trainer.dataset import PromptSampler, encode_prompt, load_prompts
from trainer.errors import DataError


def test_jsonl_and_parquet_give_the_same_rows(prompts: Path, tmp_path: Path) -> None:
    rows = load_prompts(str(prompts))
    parquet = tmp_path / "prompts.parquet"
    Dataset.from_list([dict(row) for row in rows.rows]).to_parquet(parquet)
    assert [dict(row) for row in load_prompts(str(parquet)).rows] == [dict(row) for row in rows.rows]
    assert len(load_prompts(str(prompts), limit=5)) == 5


def test_columns_repeat_each_row_for_its_completions(prompts: Path) -> None:
    columns = load_prompts(str(prompts)).columns([4, 0], repeats=2)
    assert columns["number"] == [4, 4, 0, 0]
    assert set(columns) == {"prompt", "answer", "number"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n', "expected a column 'answer'"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n', "expected a column 'prompt'"),
        ("a.jsonl", '{"prompt": "x", "answer": "y", "completions": 1}\n', "got 'completions'"),
        ("a.jsonl", "", "empty file"),
        ("a.jsonl", "{not json", "expected rows that datasets can read"),
        ("a.csv", "prompt,answer\n", "expected a file ending in .jsonl, .json, .parquet"),
        ("a.jsonl", '{"prompt": "", "answer": "y"}\n', "row 0"),
        ("a.jsonl", '{"prompt": [{"role": "user"}], "answer": "y"}\n', "expected text or messages"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match="data: ") as error:
        load_prompts(str(path))
    assert message in str(error.value)
    with pytest.raises(DataError, match="expected a file"):
        load_prompts(str(tmp_path / "missing.jsonl"))


def test_text_becomes_one_user_message_where_there_is_a_template() -> None:
    chat, plain = make_tokenizer(), make_tokenizer(chat=False)
    config = DataConfig()
    decode = chat.decode
    assert decode(encode_prompt("what is n1 ?", chat, config)) == "user: what is n1 ? assistant:"
    assert decode(encode_prompt("what is n1 ?", plain, config)) == "what is n1 ?"
    messages = [{"role": role, "content": text} for role, text in (("user", "n1"), ("assistant", "n2"), ("user", "n3"))]
    assert decode(encode_prompt(messages, chat, config)) == "user: n1 assistant: n2 user: n3 assistant:"
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(messages, plain, config)
    with pytest.raises(DataError, match=r"expected 1 to 3 tokens .* got 6"):
        encode_prompt("what is n1 ?", chat, DataConfig(max_prompt_tokens=3))


def test_sampler_covers_every_epoch_and_continues_from_its_state() -> None:
    sampler = PromptSampler(size=10, batch=4, seed=3)
    batches = [sampler.next() for _ in range(5)]
    flat = [row for batch in batches for row in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]

    first = PromptSampler(size=10, batch=4, seed=3)
    assert [first.next() for _ in range(2)] == batches[:2]
    state = first.state_dict()
    second = PromptSampler(size=10, batch=4, seed=3)
    second.load_state_dict(state)
    assert [second.next() for _ in range(3)] == batches[2:]
    assert PromptSampler(size=10, batch=4, seed=4).next() != batches[0]
    with pytest.raises(DataError, match="at most the 3 training prompts, got 4"):
        PromptSampler(size=3, batch=4, seed=0)
