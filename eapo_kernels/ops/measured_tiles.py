"""Reads and checks the files of measured tiles that ``benchmarks.tune`` writes per backend.

A file: {"environment": {gpu, driver, torch, triton, commit, date}, "lines": [line, ...]}. A line
has the fields of the backend's ``Entry``, and under "tile" those of its ``Tile``; other keys record
how it was measured. Nothing here imports triton or cuda.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import require

Record = TypeVar("Record")

_TYPES = {"int": (int,), "bool": (bool,), "str": (str,), "int | None": (int, type(None))}
"""JSON types allowed for an annotation of ``Entry`` or ``Tile``, where a bool is not an int."""


def load(path: Path) -> dict[str, Any]:
    """The content, lines unchecked. Raises EapoError when it is not JSON or lacks a part."""
    expected = 'JSON {"environment": {...}, "lines": [...]}'
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        content, got = None, str(error)
    else:
        got = f"a {type(content).__name__}" + (f" of {sorted(content)}" if isinstance(content, dict) else "")
    good = isinstance(content, dict) and type(content.get("environment")) is dict and type(content.get("lines")) is list
    require(good, str(path), expected, got)
    assert isinstance(content, dict)
    return content


def entries(
    path: Path, kind: Callable[..., Record], tile: type[Any], check: Callable[[str, Record], None]
) -> tuple[Record, ...]:
    """The lines in order, none where the file does not exist, each passed to ``check``."""
    found = []
    for number, line in enumerate(load(path)["lines"] if path.exists() else ()):
        where = f"{path}: lines[{number}]"
        found.append(entry(where, kind, line, tile))
        check(where, found[-1])
    return tuple(found)


def entry(where: str, kind: Callable[..., Record], line: Any, tile: type[Any]) -> Record:
    """A line as a ``kind`` with a ``tile``. Raises EapoError that names ``where``."""
    require(isinstance(line, dict) and isinstance(line.get("tile"), dict), where, "a line with a tile", repr(line))
    known = {f.name: line.get(f.name) for f in fields(kind) if f.name != "tile"}  # type: ignore[arg-type]
    for name, value in known.items():
        is_name = name in ("kernel", "family")
        good = type(value) is str if is_name else type(value) is int and value > 0
        require(good, f"{where}.{name}", "a name" if is_name else "a positive integer", repr(value))
    return kind(**known, tile=_tile(f"{where}.tile", tile, line["tile"]))


def _tile(where: str, kind: type[Any], values: dict[str, Any]) -> Any:
    """A tile from the fields in ``values``, whose names and types are checked."""
    kinds = {f.name: str(f.type) for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    names = set(values)
    require(needed <= names <= set(kinds), where, f"{sorted(needed)} and perhaps more of {sorted(kinds)}", sorted(names))
    for name, value in values.items():
        require(type(value) in _TYPES[kinds[name]], f"{where}.{name}", kinds[name], repr(value))
    return kind(**values)
