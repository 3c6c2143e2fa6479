"""Data files, columns, the chat template, and the sampler's state."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import make_tokenizer

from trainer.config import ColumnsConfig, DataConfig
from trainer.config.settings import parse_config
from trainer.dataset import PromptSampler, PromptSet, encode, fill, load_prompts
from trainer.errors import DataError

GSM8K = [
    {"question": "Natalia sold 48 clips, then half as many. How many?", "answer": "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"},
    {"question": "A price of $1,200 falls by $200.", "answer": "1200 - 200 = 1000\n#### 1,000"},
]  # fmt: skip
DAPO = [
    {"prompt": "What is 2+2?", "solution": "4", "data_source": "math_dapo",
     "source_prompt": [{"role": "user", "content": "Solve: What is 2+2?"}], "ability": "MATH",
     "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "a"}},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source: str, **settings: Any) -> PromptSet:
    return load_prompts(DataConfig(train=source, **settings), "train")


def test_every_kind_of_source_gives_the_same_rows(prompts: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", rows[:2])
    Dataset.from_list(rows).to_parquet(tmp_path / "all.parquet")
    for source in (prompts, tmp_path / "all.json", tmp_path / "all.parquet", folder):
        assert [dict(row) for row in load(str(source)).rows] == rows
    assert [dict(row) for row in load(f"{folder}:test").rows] == rows[:2]
    assert [dict(row) for row in load(f"{folder}:default:train[:3]").rows] == rows[:3]
    assert len(load(str(prompts), train_limit=5)) == 5
    assert len(load_prompts(DataConfig(train=str(prompts), train_limit=5), "train", 3)) == 3


def test_values_are_exactly_those_of_the_file(tmp_path: Path) -> None:
    """No dates made of texts, no numbers of texts, no floats of integers."""
    rows = [
        {"prompt": "when?", "answer": "2021-05-01", "level": 1, "id": "007", "at": "2021-05-01T10:00:00"},
        {"prompt": "a\u2028b", "answer": "1e5", "level": 2.5, "id": "NA", "extra": [1, {"x": None}]},
    ]
    found = load(write(tmp_path / "a.jsonl", rows)).rows
    assert found == [{**rows[0], "extra": None}, {**rows[1], "at": None}]
    assert type(found[0]["level"]) is int
    (tmp_path / "a.csv").write_text('prompt,answer\n"one, two\nthree",007\nNA,\n')
    assert load(str(tmp_path / "a.csv")).rows == [
        {"prompt": "one, two\nthree", "answer": "007"},
        {"prompt": "NA", "answer": ""},
    ]


TEXTS = [
    "a\u2028b",
    "a\u2029b",
    "a\u0085b",
    "a\x0bb\x0cb\x1cb",
    "nul \x00 b",
    "\ufeffa",
    "tab\tb",
    "e\u0301 \U0001f600",
    "x" * 300_000,
]


@pytest.mark.parametrize("escaped", [False, True])
def test_every_text_comes_back_and_ends_no_line(tmp_path: Path, escaped: bool) -> None:
    """Separators of Unicode within JSON lines, NUL, byte-order marks, lines and CSV fields of any length."""
    rows = [{"prompt": text, "answer": f"{text}!"} for text in TEXTS]
    text = "".join(json.dumps(row, ensure_ascii=escaped) + "\r\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "lines.json").write_bytes(text.encode())
    (tmp_path / "list.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(rows, ensure_ascii=escaped).encode())
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    before = csv.field_size_limit()
    for name in ("a.jsonl", "lines.json", "list.json", "a.csv"):
        assert load(str(tmp_path / name)).rows == rows, name
    assert csv.field_size_limit() == before


def test_a_folder_is_read_as_its_files_are(tmp_path: Path) -> None:
    """``datasets`` makes dates of these answers, and numbers of CSV's texts."""
    rows = [{"prompt": f"when {i} ?", "answer": f"1989-11-0{i}", "level": level} for i, level in enumerate((1, 2.5, None), 1)]
    (tmp_path / "json").mkdir()
    (tmp_path / "csv").mkdir()
    for name, own in (("train-0", rows[:2]), ("train-1", rows[2:]), ("test", rows[:1])):
        write(tmp_path / "json" / f"{name}.jsonl", own)
        lines = "".join(f"{row['prompt']},{row['answer']},007\n" for row in own)
        (tmp_path / "csv" / f"{name}.csv").write_text("prompt,answer,level\n" + lines)
    assert load(str(tmp_path / "json")).rows == rows
    assert load(f"{tmp_path / 'json'}:train[1:]").rows == rows[1:]
    assert load(f"{tmp_path / 'json'}:test").rows == rows[:1]
    assert load(str(tmp_path / "csv")).rows == [{**row, "level": "007"} for row in rows]
    with pytest.raises(DataError, match="Unknown split"):
        load(f"{tmp_path / 'json'}:nothing")


def test_typed_values_of_parquet_stay(tmp_path: Path) -> None:
    row = {"prompt": "n1", "answer": decimal.Decimal("1.50"), "day": datetime.date(1989, 11, 9), "raw": b"\xff", "none": None}
    Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    assert load(str(tmp_path / "a.parquet")).rows == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "n1", "answer": "n2"}\n{"prompt": "n3", "answer": null}\n', "row 1 of .*: expected an answer .*got None"),
        (b'{"prompt": "n1", "answer": "n2"}\n{"prompt": "n3"}\n', "row 1 of .*: expected the column 'answer'"),
        (b'{"prompt": "n1", "answer": NaN}\n', "row 0 of .*: expected an answer .*got nan"),
        (b'{"prompt": "n1", "answer": "caf\xe9"}\n', "line 1: 'utf-8' codec can't decode byte 0xe9"),
        (b'{"prompt": "n1", "answer": "n2"}\n\n{"prompt": "n\x001"}\n', "line 3: Invalid control character"),
        (b'{"prompt": "n1 \\ud800", "answer": "n2"}\n', "row 0 of .*: expected text that UTF-8 can hold"),
        (b'{"prompt": "n1", "answer": 1e400}\n', r"line 1: expected a number below 1\.8e308, got 1e400"),
        (b'{"prompt": "n1", "answer": 1' + b"0" * 5000 + b"}\n", "line 1: Exceeds the limit"),
        (b'{"prompt": null, "answer": "n2"}\n', "row 0 of .*: expected a prompt"),
        (b'{"prompt": [{"role": "user", "content": null}], "answer": "n2"}\n', "row 0 of .*: expected a prompt"),
        (b'{"prompt": [{"role": "user", "content": 5}], "answer": "n2"}\n', "row 0 of .*: expected a prompt"),
        (b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "n2"}\n', "row 0 of .*: expected a prompt"),
        (b'{"prompt": "n1", "answer": ' + b"[" * 5000, "line 1: maximum recursion depth"),
        (
            b'{"prompt": "n1", "answer": "n2", "x": {"answer": 1, "answer": 2}}\n',
            "line 1: expected every name once, got 'answer' 2 times",
        ),
        (b'{"a\\nb": "n1"}\n', r"row 0 of .*: expected the column 'prompt' .*, got 'a\\nb'"),
        (b"prompt,answer,answer\nn1,n2,n3\n", "expected every name once, got 'answer' 2 times"),
        (b"prompt,answer\nn1,n2\nn3\n", "row 1 of .*: expected an answer .*got None"),
        ("prompt,answer\nn1,caf\xe9\n".encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
    ],
    ids=range(18),
)
def test_what_cannot_be_carried_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / ("a.csv" if content.startswith(b"prompt") else "a.jsonl")
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value)


def test_columns_by_name_nested_and_after_a_marker(tmp_path: Path) -> None:
    gsm8k = load(write(tmp_path / "g.jsonl", GSM8K), columns=ColumnsConfig(prompt="question"), answer_after="####")
    assert [(row["prompt"], row["answer"]) for row in gsm8k.rows] == [
        (r["question"], a) for r, a in zip(GSM8K, ("72", "1,000"), strict=True)
    ]
    source = write(tmp_path / "d.jsonl", DAPO)
    flat = load(source, columns=ColumnsConfig(answer="solution")).rows[0]
    nested = load(source, columns=ColumnsConfig(prompt="source_prompt", answer="reward_model.ground_truth")).rows[0]
    assert (flat["prompt"], flat["answer"]) == ("What is 2+2?", "4")
    assert (nested["prompt"], nested["answer"]) == (DAPO[0]["source_prompt"], "4")
    assert nested["reward_model"] == DAPO[0]["reward_model"], "the other columns stay"
    assert load(source, columns=ColumnsConfig(answer="")).rows[0]["answer"] == ""
    literal = write(tmp_path / "l.jsonl", [{"prompt": "x", "a.b": "y"}])
    assert load(literal, columns=ColumnsConfig(answer="a.b")).rows[0]["answer"] == "y"
    for settings, message in (
        (
            {"columns": ColumnsConfig(answer="reward_model.truth")},
            "row 0 of .*: expected the column 'reward_model.truth' .data.columns.answer",
        ),
        ({"columns": ColumnsConfig(answer="nothing")}, r"data\.columns\.answer\), got prompt, solution, data_source"),
        (
            {"columns": ColumnsConfig(answer="solution"), "answer_after": "####"},
            "row 0 of .*: expected '####' .data.answer_after",
        ),
    ):
        with pytest.raises(DataError, match=message):
            load(source, **settings)


def test_columns_repeat_each_row_for_its_completions(prompts: Path) -> None:
    found = load(str(prompts))
    columns = replace(found, ids=[[i] for i in range(len(found))]).take([4, 0]).columns(repeats=2)
    assert columns["number"] == [4, 4, 0, 0]
    assert set(columns) == {"prompt", "answer", "number"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n', "expected the column 'answer'"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n', "expected the column 'prompt'"),
        ("a.jsonl", '{"prompt": "x", "answer": "y", "completions": 1}\n', "got 'completions'"),
        ("a.jsonl", "", "expected at least one row"),
        ("a.jsonl", "{not json", "expected a JSONL, JSON, CSV or Parquet file"),
        ("a.jsonl", "[1]\n", "expected one object a row"),
        ("a.csv", "prompt,answer\n", "expected at least one row"),
        ("a.csv", "prompt,answer\na,b,c\n", "expected one object a row"),
        ("a.txt", "hello", "Parquet file"),
        ("a.jsonl", '{"prompt": "", "answer": "y"}\n', "row 0"),
        ("a.jsonl", '{"prompt": [{"role": "user"}], "answer": "y"}\n', "expected a prompt"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=r"data\.train: ") as error:
        load(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["", "missing.jsonl", "no/such-dataset", "no/such-dataset:main:train", "/no/such/folder"])
def test_what_is_not_there_is_one_line(source: str) -> None:
    with pytest.raises(DataError, match=r"data\.train: expected a .* file, a folder, or a reachable hub dataset") as error:
        load(source)
    assert repr(source) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "data/missing.parquet", "./no.csv", "~/no.json", "/no/such/folder"])
def test_a_path_is_not_looked_for_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would be a wrong name after five tries."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asks the hub"))
    with pytest.raises(DataError) as error:
        load(source)
    assert str(error.value).endswith(f"got {source!r} (there is no {Path(source).expanduser().absolute()})")


def test_text_becomes_one_user_message_where_there_is_a_template() -> None:
    chat, plain = make_tokenizer(), make_tokenizer(chat=False)

    def text(prompt: Any, tokenizer: Any = chat, **settings: Any) -> str:
        return chat.decode(encode([prompt], tokenizer, DataConfig(**settings))[0])

    assert text("what is n1 ?") == "user: what is n1 ? assistant:"
    assert text("what is n1 ?", plain) == "what is n1 ?"
    messages = [{"role": role, "content": text} for role, text in (("user", "n1"), ("assistant", "n2"), ("user", "n3"))]
    assert text(messages) == "user: n1 assistant: n2 user: n3 assistant:"
    with pytest.raises(DataError, match="no chat template"):
        text(messages, plain)
    assert text("n1", prompt_template="{prompt} is what ?") == "user: n1 is what ? assistant:"
    assert text(messages, prompt_template="after {prompt}") == "user: n1 assistant: n2 user: after n3 assistant:"
    assert fill("{prompt} {answer}", "a {answer}", "b") == "a {answer} b", "the prompt's own braces stay"


def test_a_system_prompt_is_a_message_or_a_paragraph() -> None:
    class Plain:
        chat_template = None

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[str]]:
            assert add_special_tokens
            return {"input_ids": texts}

    config = DataConfig(system_prompt="Think.")
    assert "".join(encode(["What is 1+1?"], Plain(), config)[0]) == "Think.\n\nWhat is 1+1?"  # type: ignore[arg-type]
    chat = make_tokenizer()
    system = chat.apply_chat_template(
        [{"role": "system", "content": "n1"}, {"role": "user", "content": "n2"}], tokenize=False, add_generation_prompt=True
    )
    assert encode(["n2"], chat, DataConfig(system_prompt="n1"))[0] == chat(system)["input_ids"]


def test_keywords_of_the_chat_template_and_its_refusals() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and enable_thinking is false %} n9{% endif %}"
    for switch, expected in (("false", "user: n1 assistant: n9"), ("true", "user: n1 assistant:")):
        data = parse_config(["--data.chat_template_kwargs.enable_thinking", switch]).data
        assert tokenizer.decode(encode(["n1"], tokenizer, data)[0]) == expected
    tokenizer.chat_template = "{{ raise_exception('system messages are not supported') }}"
    with pytest.raises(
        DataError, match=r"prompt 0: expected messages that the chat template accepts, got .*system messages are not supported"
    ):
        encode(["n1"], tokenizer, DataConfig())
    for template in ("{{ messages[1]['content'] }}", "{{ 1 / 0 }}", "{{ messages[0]['content'].nothing() }}", "{% if %}"):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match="prompt 0: expected messages that the chat template accepts"):
            encode(["n1"], tokenizer, DataConfig())


def test_content_in_parts_is_its_text() -> None:
    """A text model's template would write the list as Python does."""
    tokenizer, config = make_tokenizer(), DataConfig(prompt_template="{prompt} n5")
    parts = [{"type": "text", "text": "n1 "}, {"type": "text", "text": "n2", "image": None}]
    asked: Any = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "n3"},
        {"role": "user", "content": parts},
    ]
    plain = [{**message, "content": "n1 n2"} if message["content"] is parts else message for message in asked]
    assert encode([asked], tokenizer, config) == encode([plain], tokenizer, config)
    assert tokenizer.decode(encode([asked], tokenizer, config)[0]) == "user: n1 n2 assistant: n3 user: n1 n2 n5 assistant:"
    called = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "user", "content": "n1"}]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] or 'n7' }} {% endfor %}"
    assert tokenizer.decode(encode([called], tokenizer, DataConfig())[0]) == "n7 n1"


def test_long_prompts_are_left_out_and_counted() -> None:
    rows = [{"prompt": text, "answer": ""} for text in ("n1", "n1 n2 n3 n4", "n2")]
    lines: list[str] = []
    found = PromptSet(rows, "data.train").encoded(make_tokenizer(), DataConfig(max_prompt_tokens=4), lines.append)
    assert [row["prompt"] for row in found.rows] == ["n1", "n2"]
    assert [len(ids) for ids in found.ids] == [3, 3]
    assert lines == ["data.train: 1 of 3 prompts left out: more than 4 tokens (longest: 6)"]
    assert len(found.take([0]).ids) == 1
    with pytest.raises(
        DataError, match=r"data\.max_prompt_tokens: expected at least one prompt of data\.train .* got 2 and 3 or more"
    ):
        PromptSet(rows, "data.train").encoded(make_tokenizer(), DataConfig(max_prompt_tokens=2), lines.append)


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
