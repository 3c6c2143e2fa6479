"""From a TOML recipe and command-line overrides to a ``Config``, and back to TOML.

tyro parses and converts both: the recipe is handed to it as arguments, so there is one set of rules
for values. Its boxes of help are turned into one line, because a typo in a job script should not
fill a screen.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tyro

from ..errors import ConfigError
from .loss import loss_numbers
from .tree import Config


def parse_config(arguments: Sequence[str], *, recipe: Path | None = None, prog: str = "python -m trainer train") -> Config:
    """Build a ``Config`` from ``--config RECIPE`` (or ``recipe``) and ``--section.key value``
    overrides.

    Raises:
        ConfigError: the recipe cannot be read, a key is unknown or a value does not fit; one line,
            expected and got.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, default=recipe)
    try:
        known, overrides = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        raise ConfigError("command line: --config: expected the path of a TOML recipe, got nothing") from None
    recipe = known.config
    config = Config()
    if recipe is not None:
        config = _apply(_read_recipe(recipe), config, prog, source=str(recipe))
    for argument in overrides:
        if argument.startswith("--") and argument not in ("--help", "--"):
            _check_key(argument[2:].split("=")[0].replace("-", "_"), source="command line")
    return _apply(overrides, config, prog, source="command line")


def _apply(arguments: Sequence[str], default: Config, prog: str, source: str) -> Config:
    """The arguments on top of ``default``: a method's numbers are taken here, everything else is
    tyro's.

    Another method than the default's starts from its own numbers.
    """
    numbers, rest = _split_numbers(arguments, source)
    config = _tyro(rest, replace(default, loss=replace(default.loss, numbers={})), prog, source)
    if config.loss.method == default.loss.method:
        numbers = {**default.loss.numbers, **numbers}
    try:
        return replace(config, loss=replace(config.loss, numbers=numbers)) if numbers else config
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _split_numbers(arguments: Sequence[str], source: str) -> tuple[dict[str, Any], list[str]]:
    """``--loss.NAME value`` for the names of ``loss_numbers``, and the other arguments."""
    known, numbers, rest = loss_numbers(), {}, []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        key, equals, value = argument.partition("=")
        name = key.removeprefix("--loss.").replace("-", "_")
        if not key.startswith("--loss.") or name not in known:
            rest.append(argument)
            continue
        if not equals:
            if not left:
                raise ConfigError(f"{source}: {key}: expected a value, got nothing")
            value = left.pop(0)
        numbers[name] = _value(value)
    return numbers, rest


def _value(text: str) -> Any:
    """A number, true or false as TOML writes it; None; else the text."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, (int, float)) else text


def _read_recipe(path: Path) -> list[str]:
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config: expected a readable TOML recipe, got {path} ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, got {error}") from None
    return list(_as_arguments(table, "", str(path)))


def _as_arguments(table: dict[str, Any], prefix: str, source: str) -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        section = _check_key(name, source)
        if section != isinstance(value, dict):
            expected = "a table" if section else "a value"
            raise ConfigError(f"{source}: {name}: expected {expected}, got {value!r}")
        if isinstance(value, dict):
            yield from _as_arguments(value, f"{name}.", source)
        elif isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={value}"


def _check_key(name: str, source: str) -> bool:
    """Raise unless ``name`` is a field of the tree. Returns whether it is a section."""
    node: Any = Config()
    parts = name.split(".")
    if parts[0] == "loss" and len(parts) == 2 and parts[1] in loss_numbers():
        return False
    for i, part in enumerate(parts):
        known = [f.name for f in fields(node)] if is_dataclass(node) else []
        if part not in known:
            close = get_close_matches(part, known, n=1)
            suggestion = f" (did you mean {close[0]!r}?)" if close else ""
            where = ".".join(parts[:i]) or "the top level"
            raise ConfigError(f"{source}: {name}: expected at {where} one of {', '.join(known)}; got {part!r}{suggestion}")
        node = getattr(node, part)
    return is_dataclass(node)


def _tyro(arguments: Sequence[str], default: Config, prog: str, source: str) -> Config:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                Config,
                prog=prog,
                args=arguments,
                default=default,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
                description="Flags override the recipe given by --config RECIPE.toml.",
            )
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{source}: {_message(box.getvalue())}") from None


def _message(box: str) -> str:
    """The message of one of tyro's error boxes: its rows up to the first rule."""
    rows = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, row in enumerate(rows) if set(row) <= set("─╰╯")), len(rows))
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(rows[:end]))
    return re.sub(r"^Error parsing \w+: ", "", text)


def to_toml(config: Any, prefix: str = "") -> str:
    """The tree as TOML that ``parse_config`` reads back. None (TOML has no null) becomes a comment."""
    lines, tables = [], []
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, dict):  # numbers of the method
            lines += [f"{name} = {_toml_value('None' if v is None else v)}" for name, v in value.items()]
        elif is_dataclass(value):
            tables.append(f"\n[{prefix}{item.name}]\n" + to_toml(value, f"{prefix}{item.name}."))
        else:
            lines.append(f"# {item.name} is None" if value is None else f"{item.name} = {_toml_value(value)}")
    return "\n".join([*lines, *tables]) + ("\n" if not prefix else "")


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
