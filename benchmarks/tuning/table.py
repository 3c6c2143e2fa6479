"""The file of measured tiles: merging new lines into it and writing it whole or not at all. ``measured`` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from eapo_kernels.ops.triton import configs, measured
from eapo_kernels.ops.triton.configs import Tile

from .candidates import Search

ENVIRONMENT = ("gpu", "driver", "torch", "triton", "commit", "date")

_KEY = ("kernel", "family", "itemsize", "dim", "vocab")


def line(search: Search, tile: Tile, ms: float, environment: dict[str, Any]) -> dict[str, Any]:
    """One line: the key, the fields of the tile that are not defaults, and how it was measured.

    GPU and commit stand in every line because lines of several runs share a file.
    """
    optional = {f.name: f.default for f in fields(Tile)}
    values = {name: value for name, value in asdict(tile).items() if value != optional[name]}
    key = dict(zip(_KEY, search.key, strict=True))
    how = {"ms": round(ms, 5), "shape": {"N": search.n, "D": search.d, "V": search.v, "dtype": search.dtype}}
    return key | {"tile": values} | how | {name: environment.get(name) for name in ("gpu", "commit")}


def merge(old: dict[str, Any] | None, environment: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """``old`` with ``lines``, which replace those of the same key, in a fixed order; the environment is the new one's."""
    kept = {tuple(entry[name] for name in _KEY): entry for entry in [*(old["lines"] if old else []), *lines]}
    return {
        "environment": {name: environment.get(name) for name in ENVIRONMENT},
        "lines": [kept[key] for key in sorted(kept)],
    }


def read(path: Path) -> dict[str, Any] | None:
    """The file if it is there. Raises EapoError when it is malformed."""
    if not path.exists():
        return None
    measured.entries.cache_clear()
    measured.entries(path)  # checks every line
    return measured.load(path)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the file, a line of the table on a line of its own, and let ``configs.find`` see it in this process."""
    rows = ",\n  ".join(json.dumps(entry) for entry in content["lines"])
    text = f'{{\n "environment": {json.dumps(content["environment"])},\n "lines": [\n  {rows}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(text)
    scratch.replace(path)
    measured.entries.cache_clear()
    configs.find.cache_clear()
