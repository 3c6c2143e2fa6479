"""From a TOML recipe and command-line flags to a ``Config``, and back to TOML."""

from __future__ import annotations

import copy
import shutil
import textwrap
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from .loss import LossConfig
from .section import problem
from .tree import Config


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
    return "\n".join([usage, *_describe(Config, "")])


def _describe(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Lines of help on a section's settings, then on those of its sections."""
    width = min(shutil.get_terminal_size().columns, 120)

    def wrapped(text: str | None, indent: str) -> str:
        return textwrap.fill(" ".join((text or "").split()), width, initial_indent=indent, subsequent_indent=indent)

    yield "\n" + wrapped(f"{prefix.rstrip('.') or 'run'}: {section.__doc__}", "")
    inner = {name: field for name, field in section.model_fields.items() if _is_section(field.annotation)}
    for name, field in section.model_fields.items():
        if name not in inner:
            yield f"  --{prefix}{name}  {_kind(field.annotation, field.metadata)}  (default: {_shown(field.default)})"
            yield wrapped(field.description, "      ")
    for name, field in inner.items():
        yield from _describe(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _shown(default: Any) -> str:
    text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return repr(text) if text == "" or "\n" in text else text


SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _kind(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """A type and its bounds as text: ``float > 0``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0], [bound for field in parts[1:] for bound in field.metadata])
    if origin is Literal:
        text = " | ".join(map(str, parts))
    elif origin is dict:
        text = "table"
    elif origin is tuple:
        text = " ".join(_kind(part) if part is not ... else "..." for part in parts)
    else:
        text = " | ".join("None" if part is type(None) else _kind(part) for part in parts) or annotation.__name__
    limits = [f"{sign} {getattr(bound, name):g}" for bound in bounds for name, sign in SIGNS.items() if hasattr(bound, name)]
    return " ".join([text, ", ".join(limits)]).strip()
