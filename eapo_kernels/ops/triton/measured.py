"""Tiles that ``python -m benchmarks.tune`` measured on hardware, read from ``measured.json`` beside this file if it is there.

The file is described in ``ops.measured_tiles``. Nothing here imports triton.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ...errors import require
from .. import measured_tiles
from .tile import PRODUCTS, Entry, Tile

PATH = Path(__file__).with_name("measured.json")


@functools.cache
def entries(path: Path = PATH) -> tuple[Entry, ...]:
    """The file's lines in its order, none without a file; read once per process.

    Raises EapoError naming the file when it is not what ``benchmarks.tune`` writes.
    """
    return measured_tiles.entries(path, Entry, Tile, _check)


def candidates(kernel: str, family: str, itemsize: int, *, descriptors: bool) -> list[Entry]:
    """The measured lines that ``configs.find`` may choose from; where there are any, they come before the unmeasured table.

    descriptors: as for ``configs.find``. A product measured on rows that no descriptor can describe says nothing about rows
    that one can, and a tile with descriptors cannot run the former.
    """
    lines = [e for e in entries(PATH) if (e.kernel, e.family, e.itemsize) == (kernel, family, itemsize)]
    if descriptors and kernel in PRODUCTS:
        return [e for e in lines if e.dim * e.itemsize % 16 == 0]
    return [e for e in lines if not e.tile.descriptors]


def _check(line: str, entry: Entry) -> None:
    where, tile = f"{line}.tile", entry.tile
    sizes = {name: getattr(tile, name) for name in ("block_n", "block_v", "block_d", "warps", "slices")}
    for name, size in sizes.items():
        optional = name in ("block_v", "block_d") and size == 0
        require(optional or (size > 0 and size & (size - 1) == 0), f"{where}.{name}", "a power of two", size)
    for name in ("group_n", "stages", "resident"):
        require(getattr(tile, name) > 0, f"{where}.{name}", "a positive integer", getattr(tile, name))
