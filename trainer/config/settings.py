"""From a TOML recipe and command-line flags to a ``Config``, and back to TOML."""

from __future__ import annotations

import copy
import shutil
import textwrap
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from ..errors import ConfigError
from . import Config, LossConfig
from .section import problem


def parse_config(arguments: Sequence[str], *, recipe: Path | None = None, prog: str = "python -m trainer train") -> Config:
    """Build a ``Config`` from ``--config RECIPE`` (or ``recipe``) and ``--section.key value``
    flags, which win over the recipe.

    A flag's value ends at the next flag; ``--key=value`` takes any text, None resets an optional
    setting. ``--help`` prints every setting and exits.

    Raises:
        ConfigError: the recipe cannot be read, a key is unknown or a value does not fit; one line,
            expected and got.
    """
    flags = _flags(arguments, prog)
    path = Path(flags.pop("config")) if "config" in flags else recipe
    table = _read_recipe(path) if path else {}
    try:
        return Config.model_validate(_merge(table, flags))
    except ValidationError as error:
        found = problem(error, Config)
    named = found.partition(":")[0]
    raise ConfigError(f"{path if path and named not in flags else 'command line'}: {found}")


def _flags(arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """The flags as key -> text, a list of texts where there are several, or None."""
    flags: dict[str, Any] = {}
    rest = deque(arguments)
    while rest:
        flag, equals, text = rest.popleft().partition("=")
        if flag in ("-h", "--help"):
            print(_help(prog))
            raise SystemExit(0)
        key = flag[2:].replace("-", "_")
        if not flag.startswith("--") or not key:
            raise ConfigError(f"command line: expected --section.key value, got {flag + equals + text!r}")
        values = [text] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.popleft())
        if not values:
            expected = "the path of a TOML recipe" if key == "config" else "a value"
            raise ConfigError(f"command line: {key}: expected {expected}, got nothing")
        flags[key] = None if values == ["None"] else values if len(values) > 1 else values[0]
    return flags


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: expected a readable TOML recipe, got {path} ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, got {error}") from None


def _merge(table: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The recipe's table with the flags in it. Another method than the recipe's starts from its own
    numbers.
    """
    tree = copy.deepcopy(table)
    loss = tree.get("loss")
    if isinstance(loss, dict) and "loss.method" in flags and flags["loss.method"] != loss.get("method"):
        tree["loss"] = {key: value for key, value in loss.items() if key in LossConfig.model_fields}
    for key, value in flags.items():
        *sections, name = key.split(".")
        node = tree
        for part in sections:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"command line: {key}: expected {part} to be a table, got {node!r}")
        node[name] = value
    return tree


def to_toml(config: Config) -> str:
    """The settings as TOML that ``parse_config`` reads back. A setting that is None (TOML has no
    null) is left out, or "None" where it is a number of the method.
    """
    tree = config.model_dump(exclude_none=True)
    tree["loss"] |= {name: "None" for name, value in config.loss.numbers.items() if value is None}
    return tomli_w.dumps(tree)


def _help(prog: str) -> str:
    usage = f"usage: {prog} [--config RECIPE.toml] [--section.key value ...]\n\nFlags win over the recipe."
    schema = Config.model_json_schema()
    return "\n".join([usage, *_describe(schema, "", schema["$defs"])])


def _describe(section: dict[str, Any], prefix: str, sections: dict[str, Any]) -> Iterator[str]:
    """Lines of help on a section's settings, then on those of its sections. section: its JSON
    schema.
    """
    width = min(shutil.get_terminal_size().columns, 120)

    def wrapped(text: str, indent: str) -> str:
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)

    yield "\n" + wrapped(f"{prefix.rstrip('.') or 'run'}: {section['description']}", "")
    inner = {name: field for name, field in section["properties"].items() if "$ref" in field}
    for name, field in section["properties"].items():
        if name not in inner:
            yield f"  --{prefix}{name}  {_kind(field)}  (default: {_shown(field['default'])})"
            yield wrapped(field["description"], "      ")
    for name, field in inner.items():
        yield from _describe(sections[field["$ref"].rpartition("/")[2]], f"{prefix}{name}.", sections)


def _shown(default: Any) -> str:
    text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return repr(text) if text == "" or "\n" in text else text


SIGNS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _kind(field: dict[str, Any]) -> str:
    """A type and its bounds as text: ``number > 0``."""
    if "anyOf" in field:
        return " | ".join(map(_kind, field["anyOf"]))
    if "enum" in field:
        return " | ".join(map(_shown, field["enum"]))
    limits = [f"{sign} {field[name]:g}" for name, sign in SIGNS.items() if name in field]
    name = "None" if field["type"] == "null" else field["type"]
    return f"{name} {', '.join(limits)}".strip()
