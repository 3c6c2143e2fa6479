"""Data files of any content, templates and chat messages: values exactly as written, or one line of what was expected."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer

from trainer.config import ColumnsConfig, DataConfig
from trainer.dataset import PromptSampler, PromptSet, encode, fill, load_prompts
from trainer.errors import DataError

UNUSUAL = ["", " ", "\u2028", "\u0085", "\x00", "\ufeff", "\ufeffa", "NA", "null", "007", "1e5", "1.50", "2021-05-01", "true",
           "\r", "\r\n", '"', "a,b", "'", "{prompt}", "{answer}", "####", "\U0001f600", "e\u0301", "\ud800"]  # fmt: skip
TEXTS = st.text(max_size=8) | st.sampled_from(UNUSUAL)
SCALARS = (
    TEXTS | st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats()
    | st.sampled_from([2**53 + 1, 1e16, 5e-324, -0.0])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)
CONTENTS = st.none() | TEXTS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=3)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": CONTENTS}), max_size=3)
ROWS = st.lists(
    st.dictionaries(TEXTS, VALUES, max_size=3).flatmap(
        lambda row: st.fixed_dictionaries({"prompt": TEXTS | MESSAGES | VALUES, "answer": VALUES}).map(
            lambda own: {**row, **own}
        )
    ),
    min_size=1,
    max_size=3,
)


def load(name: str, content: bytes, **changes: Any) -> list[dict[str, Any]] | str:
    """The rows, or the message of the refusal."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            return [dict(row) for row in load_prompts(DataConfig(train=str(path), **changes), "train").rows]
        except DataError as error:
            message = str(error)
    assert message.startswith("data.train: ")
    assert "expected" in message
    assert "\n" not in message
    message.encode()
    return message


def same(found: Any, written: Any) -> bool:
    """Equal in type and value; NaN equals NaN."""
    if isinstance(written, dict):
        return isinstance(found, dict) and found.keys() == written.keys() and all(same(found[k], v) for k, v in written.items())
    if isinstance(written, list):
        return isinstance(found, list) and len(found) == len(written) and all(map(same, found, written))
    equal = found == written or (found != found and written != written)
    return type(found) is type(written) and equal and repr(found) == repr(written)


def holds(value: Any, kind: type, wrong: Any) -> bool:
    """Whether a value contains one of this type for which ``wrong`` is true."""
    if isinstance(value, dict):
        return any(holds(own, kind, wrong) for pair in value.items() for own in pair)
    if isinstance(value, list):
        return any(holds(own, kind, wrong) for own in value)
    return isinstance(value, kind) and wrong(value)


def is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return value != ""
    good = (
        isinstance(value, list)
        and value != []
        and all(isinstance(own, dict) and own.get("content") is not None for own in value)
    )
    return good and all(own["content"] != [] and "role" in own for own in value)


def may_refuse(row: dict[str, Any]) -> bool:
    """Whether a row has no prompt or answer, or one that UTF-8 or JSON cannot hold, or a column that rewards use."""
    unfit = holds([row["prompt"], row["answer"]], str, lambda text: any("\ud800" <= c <= "\udfff" for c in text))
    nothing = row["answer"] is None or row["answer"] != row["answer"]
    infinite = holds(row, float, math.isinf)
    return (
        unfit
        or nothing
        or infinite
        or not is_prompt(row["prompt"])
        or bool({"prompts", "completions", "completion_ids"} & {*row})
    )


@given(
    ROWS,
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.sampled_from(["a.jsonl", "a.json", "list.json"]),
    st.booleans(),
)
def test_json(rows: list[dict[str, Any]], escaped: bool, end: str, name: str, mark: bool) -> None:
    try:
        lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
        content = (f"[{','.join(lines)}]" if name == "list.json" else end.join(lines)).encode()
    except UnicodeEncodeError:
        return
    found = load(name, (b"\xef\xbb\xbf" if mark else b"") + content)
    if isinstance(found, str):
        assert any(map(may_refuse, rows)), found
        return
    names = dict.fromkeys(name for row in rows for name in row)
    for own, row in zip(found, rows, strict=True):
        assert same(own, {name: row.get(name) for name in names}), (own, row)


FIELDS = TEXTS.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


@given(
    st.lists(FIELDS, max_size=2, unique=True), st.data(), st.sampled_from(["\n", "\r\n"]), st.booleans(),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)  # fmt: skip
def test_csv(others: list[str], data: st.DataObject, end: str, mark: bool, quoting: Any) -> None:
    names = ["prompt", "answer", *(name for name in others if name not in ("prompt", "answer"))]
    rows = data.draw(st.lists(st.lists(FIELDS, min_size=len(names), max_size=len(names)), min_size=1, max_size=3))
    text = io.StringIO(newline="")
    if any("\r" in field for row in [names, *rows] for field in row):
        quoting = csv.QUOTE_ALL  # Python's writer leaves a bare one unquoted, which is then the end of a line
    writer = csv.writer(text, lineterminator=end, quoting=quoting)
    writer.writerows([names, *rows])
    found = load("a.csv", ("\ufeff" if mark else "").encode() + text.getvalue().encode())
    if isinstance(found, str):
        assert any(row[0] == "" for row in rows), found
        return
    assert found == [dict(zip(names, row, strict=True)) for row in rows]


PARTS = [b'{"prompt": "a", "answer": "b"}', b"prompt,answer\na,b\n", b"PAR1", b"[", b"{", b'"', b"\xef\xbb\xbf", b"\xff\xfe",
         b"\x00",
         b"\x80", b"\n", b",", b"[" * 5000, b'{"a":' * 5000, b"1" * 5000, b"NaN", b"null", b"\\ud800"]  # fmt: skip


@given(
    st.binary(max_size=40) | st.lists(st.sampled_from(PARTS), max_size=5).map(b"".join),
    st.sampled_from(["jsonl", "json", "csv"]),
)
def test_any_bytes(content: bytes, suffix: str) -> None:
    """Rows, or one line; never a traceback."""
    load(f"a.{suffix}", content)


@settings(max_examples=max(settings().max_examples // 20, 3))
@given(st.binary(max_size=40) | st.lists(st.sampled_from(PARTS), max_size=5).map(b"".join))
def test_any_bytes_as_parquet(content: bytes) -> None:
    assert isinstance(load("a.parquet", content), str)


@given(
    st.text("ab.", max_size=5),
    st.text("ab.", max_size=5),
    st.recursive(
        st.just("x") | st.none(), lambda inner: st.dictionaries(st.text("ab.", max_size=3), inner, max_size=2), max_leaves=4
    ),
)
def test_column_maps(prompt: str, answer: str, value: Any) -> None:
    """A column by its whole name, else along its dots."""
    assume(isinstance(value, dict) and prompt)

    def at(column: str) -> Any:
        own: Any = value
        for part in [column] if column in value else column.split("."):
            if not isinstance(own, dict) or part not in own:
                return None
            own = own[part]
        return own

    found = load("a.jsonl", json.dumps(value).encode(), columns=ColumnsConfig(prompt=prompt, answer=answer))
    wanted = (at(prompt), at(answer) if answer else "")
    if isinstance(found, str):
        assert wanted[0] != "x" or wanted[1] is None
    else:
        assert (found[0]["prompt"], found[0]["answer"]) == wanted


@given(TEXTS, TEXTS, TEXTS, MESSAGES.filter(bool))
def test_templates(template: str, prompt: str, answer: str, messages: list[dict[str, Any]]) -> None:
    """{prompt} and {answer} of the template are replaced, and nothing else, not even in what replaces them."""
    expected, rest = "", template
    while rest:
        key = next((key for key in ("{prompt}", "{answer}") if rest.startswith(key)), rest[0])
        expected += {"{prompt}": prompt, "{answer}": answer}.get(key, key)
        rest = rest[len(key) :]
    assert fill(template, prompt, answer) == expected
    content = messages[-1]["content"]
    own = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    assert fill(template, messages, answer) == [*messages[:-1], {**messages[-1], "content": fill(template, own, answer)}]


WORDS = st.lists(st.sampled_from(["n1", "n2", "what", "{prompt}", "?"]), min_size=1, max_size=3).map(" ".join)
SPLIT = WORDS | st.lists(WORDS, min_size=1, max_size=2).map(
    lambda parts: [{"type": "text", "text": f"{text} "} for text in parts]
)


@given(
    WORDS
    | st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": SPLIT}), min_size=1, max_size=3
    ),
    WORDS | st.just(""),
    st.booleans(),
)
def test_encoded_prompts(prompt: Any, system: str, chat: bool) -> None:
    tokenizer = make_tokenizer(chat)
    config = DataConfig(system_prompt=system, prompt_template="{prompt} n3")
    if not chat and isinstance(prompt, list):
        with pytest.raises(DataError, match="no chat template"):
            encode([prompt], tokenizer, config)
        return
    ids = encode([prompt], tokenizer, config)[0]
    if not chat:
        assert ids == tokenizer(f"{system}\n\n{prompt} n3" if system else f"{prompt} n3")["input_ids"]
        return
    messages = (
        prompt
        if isinstance(prompt, list)
        else [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    )
    texts = [m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"]) for m in messages]
    texts[-1] += " n3"
    text = " ".join(f"{m['role']}: {own}" for m, own in zip(messages, texts, strict=True)) + " assistant:"
    assert ids == tokenizer(text)["input_ids"]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**64), st.integers(0, 9), st.integers(1, 9))
def test_the_sampler(size: int, batch: int, seed: int, before: int, after: int) -> None:
    """Every epoch is a permutation; a sampler resumed anywhere goes on with the next batch."""
    if batch > size:
        with pytest.raises(DataError, match=f"the {size} training prompts"):
            PromptSampler(size, batch, seed)
        return
    whole, resumed = PromptSampler(size, batch, seed), PromptSampler(size, batch, seed)
    rows = [whole.next() for _ in range(before)]
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    later = [whole.next() for _ in range(after)]
    assert [resumed.next() for _ in range(after)] == later
    flat = [row for own in rows + later for row in own]
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == list(range(size))
    assert all(len(own) == batch for own in later)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_long_prompts(lengths: list[int], most: int) -> None:
    rows = [{"prompt": " ".join(["n1"] * n), "answer": str(i)} for i, n in enumerate(lengths)]
    lines: list[str] = []
    kept = [str(i) for i, n in enumerate(lengths) if n + 2 <= most]
    prompts, config = PromptSet(rows, "data.train"), DataConfig(max_prompt_tokens=most)
    if not kept:
        with pytest.raises(DataError, match=r"data\.max_prompt_tokens"):
            prompts.encoded(make_tokenizer(), config)
        return
    found = prompts.encoded(make_tokenizer(), config, lines.append)
    assert [row["answer"] for row in found.rows] == kept
    assert len(lines) == (len(kept) < len(rows))
