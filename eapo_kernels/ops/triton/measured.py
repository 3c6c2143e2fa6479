"""Tiles that ``python -m benchmarks.tune`` measured on hardware, read from ``measured.json`` beside this file if it is there.

The file: {"environment": {gpu, driver, torch, triton, commit, date}, "lines": [{kernel, family, itemsize, dim, vocab, tile}]},
where "tile" names fields of ``configs.Tile``. Further keys of a line say how it was measured. Nothing here imports triton.
"""

from __future__ import annotations

import functools
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ...errors import require
from .configs import PRODUCTS, Entry, Tile

PATH = Path(__file__).with_name("measured.json")

_TYPES = {"int": (int,), "bool": (bool,), "str": (str,), "int | None": (int, type(None))}
"""What an annotation of ``Entry`` and ``Tile`` allows in JSON; a bool is no int."""


@functools.cache
def entries(path: Path = PATH) -> tuple[Entry, ...]:
    """The file's lines in its order, none without a file; read once per process.

    Raises EapoError naming the file when it is not what ``benchmarks.tune`` writes.
    """
    if not path.exists():
        return ()
    content = load(path)
    return tuple(_entry(f"{path}: lines[{number}]", line) for number, line in enumerate(content["lines"]))


def load(path: Path) -> dict[str, Any]:
    """The file as it is, its lines not yet checked. Raises EapoError when it is no JSON or lacks a part."""
    expected = 'JSON {"environment": {...}, "lines": [...]}'
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # also what is not UTF-8
        content, got = None, str(error)
    else:
        got = f"a {type(content).__name__}" + (f" of {sorted(content)}" if isinstance(content, dict) else "")
    good = isinstance(content, dict) and type(content.get("environment")) is dict and type(content.get("lines")) is list
    require(good, str(path), expected, got)
    assert isinstance(content, dict)
    return content


def candidates(kernel: str, family: str, itemsize: int, *, descriptors: bool) -> list[Entry]:
    """The measured lines that ``configs.find`` may choose from; where there are any, they come before the unmeasured table.

    descriptors: as for ``configs.find``. A product measured on rows that no descriptor can describe says nothing about rows
    that one can, and a tile with descriptors cannot run the former.
    """
    lines = [e for e in entries(PATH) if (e.kernel, e.family, e.itemsize) == (kernel, family, itemsize)]
    if descriptors and kernel in PRODUCTS:
        return [e for e in lines if e.dim * e.itemsize % 16 == 0]
    return [e for e in lines if not e.tile.descriptors]


def _entry(where: str, line: Any) -> Entry:
    """One line as an ``Entry``. Raises EapoError naming ``where`` it stands."""
    require(isinstance(line, dict) and isinstance(line.get("tile"), dict), where, "a line with a tile", repr(line))
    known = {f.name: line.get(f.name) for f in fields(Entry) if f.name != "tile"}
    for name, kind in ((f.name, str(f.type)) for f in fields(Entry) if f.name != "tile"):
        good = type(known[name]) in _TYPES[kind] and (kind == "str" or known[name] > 0)
        require(good, f"{where}.{name}", "a name" if kind == "str" else "a positive integer", repr(known[name]))
    return Entry(**known, tile=_tile(f"{where}.tile", line["tile"]))


def _tile(where: str, values: dict[str, Any]) -> Tile:
    kinds = {f.name: str(f.type) for f in fields(Tile)}
    needed = {f.name for f in fields(Tile) if f.default is MISSING}
    names = set(values)
    require(needed <= names <= set(kinds), where, f"{sorted(needed)} and perhaps more of {sorted(kinds)}", sorted(names))
    for name, value in values.items():
        require(type(value) in _TYPES[kinds[name]], f"{where}.{name}", kinds[name], repr(value))
    tile = Tile(**values)
    sizes = {name: getattr(tile, name) for name in ("block_n", "block_v", "block_d", "warps", "slices")}
    for name, size in sizes.items():
        optional = name in ("block_v", "block_d") and size == 0
        require(optional or (size > 0 and size & (size - 1) == 0), f"{where}.{name}", "a power of two", size)
    for name in ("group_n", "stages", "resident"):
        require(getattr(tile, name) > 0, f"{where}.{name}", "a positive integer", getattr(tile, name))
    return tile
