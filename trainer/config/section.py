"""What the sections share: a frozen pydantic model, types with bounds, messages of one line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import chain
from typing import Annotated, Any, Self, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of the settings: checked when it is built, with a sentence under every field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_text(cls, value: Any, info: ValidationInfo) -> Any:
        """A flag's text becomes a sequence where the field is one. true and false are no numbers. A text that
        UTF-8 cannot hold (bytes of another encoding on the command line) could not be written to config.toml.
        """
        kind = cls.model_fields[str(info.field_name)].annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            try:
                "".join(_texts(value)).encode()
            except UnicodeEncodeError:
                raise PydanticCustomError("text", "Input should be text that UTF-8 can hold") from None
        if get_origin(kind) is tuple and isinstance(value, str):
            return value.split()
        if get_origin(kind) is dict and isinstance(value, dict):
            return {key: literal(text) for key, text in value.items()}
        if isinstance(value, bool) and kind is not bool:
            raise PydanticCustomError("bool", "Input should be a number or text")
        return value

    def replace(self, **changes: Any) -> Self:
        """A checked copy with these fields; a dict changes fields of a section."""
        changes = {k: getattr(self, k).replace(**v) if isinstance(v, dict) else v for k, v in changes.items()}
        return self.model_validate({**dict(self), **changes})


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value and its parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in chain(value, value.values() if isinstance(value, dict) else ()):
            yield from _texts(part)


def literal(value: Any) -> Any:
    """The value of a flag's text for a setting without a type: a number, a truth value, None, else
    the text.
    """
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(value, value)) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem that the validation of ``model`` found, as ``key: expected ..., got ...``."""
    first = error.errors(include_url=False)[0]
    names = [part for part in first["loc"] if isinstance(part, str)]
    if first["type"] == "value_error":
        return ".".join([*names, str(first["ctx"]["error"])])
    if first["type"] == "extra_forbidden":
        for part in names[:-1]:
            model = model.model_fields[part].annotation  # type: ignore[assignment]
        return unknown(names, list(model.model_fields))
    if first["type"] in ("model_type", "literal_error"):
        expected = first.get("ctx", {}).get("expected", "a table")
    else:
        expected = re.sub(r"^\w+ should (be|have) (?=greater|less)", "a number ", first["msg"])
        expected = re.sub(r"^\w+ should (be|have) |,? (unable|after|got) .*$", "", expected)
        expected = expected.replace("String should match pattern", "text that matches")
    return f"{'.'.join(names)}: expected {expected}, got {first['input']!r}"


def unknown(names: list[str], known: list[str]) -> str:
    """The message about a key that does not exist. names: its path. known: the keys of its section."""
    close = get_close_matches(names[-1], known, n=1)
    suggestion = f" (did you mean {close[0]!r}?)" if close else ""
    where = ".".join(names[:-1]) or "the top level"
    return f"{'.'.join(names)}: expected at {where} one of {', '.join(known)}; got {names[-1]!r}{suggestion}"
