"""Any text in any setting: the value as written, through TOML and back, or one line of what was expected."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_origin

import tomli_w
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from trainer.config import Config
from trainer.config.settings import parse_config, to_toml
from trainer.errors import ConfigError


def leaves(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting and its type."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= leaves(kind, f"{prefix}{name}.") if is_section else {prefix + name: kind}  # type: ignore[arg-type]
    return found


KINDS = leaves(Config)
TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(
    [
        "None",
        "true",
        "inf",
        "-inf",
        "nan",
        "--x",
        "1e400",
        "\r\n",
        "\x00",
        "\ud800",
        "'''",
        '"""',
        "\\",
        "\ufeff",
        " a ",
        "a\u2028b",
    ]
)
NUMBERS = st.integers() | st.integers(0, 9) | st.floats() | st.floats(0, 1) | st.sampled_from([10**400, 2**63, 5e-324, -0.0])
VALUES = TEXTS | NUMBERS | st.booleans()


def one_line(error: ConfigError) -> None:
    assert "expected" in str(error)
    assert "\n" not in str(error)
    str(error).encode()


def value_of(config: BaseModel, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def same(found: Any, given: Any) -> bool:
    """Whether a setting has the given value; texts are read as what the setting is."""
    if isinstance(found, tuple):
        given = given.split() if isinstance(given, str) else given
        return len(found) == len(given) and all(map(same, found, given))
    if isinstance(found, bool):
        return str(given).strip().lower() in (
            ("true", "1", "1.0", "yes", "on", "t", "y") if found else ("false", "0", "0.0", "-0.0", "no", "off", "f", "n")
        )
    if isinstance(found, int):
        return (float(given) if isinstance(given, float) or {".", "e", "E"} & {*str(given)} else int(given)) == found
    if isinstance(found, float):
        return float(given) == found
    return bool(found == given)


def there_and_back(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_text(to_toml(config), encoding="utf-8")
        assert parse_config([], recipe=path) == config


@given(st.sampled_from(sorted(KINDS)), VALUES | st.lists(VALUES, min_size=2, max_size=3))
@example("data.answer_after", "\ud800")
def test_a_flag(key: str, given: Any) -> None:
    texts = [str(one) for one in given] if isinstance(given, list) else [str(given)]
    if isinstance(given, list):
        assume(not any(text.startswith("--") for text in texts))
        flags = [f"--{key}", *texts]
    else:
        flags = [f"--{key}={texts[0]}"]
    try:
        config = parse_config(flags)
    except ConfigError as error:
        one_line(error)
        return
    found = value_of(config, key)
    assert (found is None and texts == ["None"]) or same(found, texts if len(texts) > 1 else texts[0])
    there_and_back(config)


@given(st.sampled_from(sorted(KINDS)), VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(TEXTS, VALUES, max_size=2))
def test_a_line_of_a_recipe(key: str, given: Any) -> None:
    table: dict[str, Any] = {}
    *sections, name = key.split(".")
    node = table
    for part in sections:
        node = node.setdefault(part, {})
    node[name] = given
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_bytes(tomli_w.dumps(table).encode("utf-8", "surrogatepass"))
        try:
            config = parse_config([], recipe=path)
        except ConfigError as error:
            one_line(error)
            return
    found = value_of(config, key)
    if get_origin(KINDS[key]) is dict:
        words = {"true": True, "false": False}
        assert {k: words.get(str(v).lower(), v) for k, v in given.items()} == found
    else:
        assert same(found, given) or (found is None and given == "None")
    there_and_back(config)


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_recipe(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_bytes(content)
        try:
            parse_config([], recipe=path)
        except ConfigError as error:
            one_line(error)


@given(
    st.lists(
        TEXTS | st.sampled_from(["--", "--steps", "--steps=3", "--optim", "--loss.method", "--data", "--.", "--a..b"]),
        max_size=4,
    )
)
def test_any_command_line(arguments: list[str]) -> None:
    assume(not {"-h", "--help"} & {text.partition("=")[0] for text in arguments})
    try:
        parse_config(arguments)
    except ConfigError as error:
        one_line(error)
