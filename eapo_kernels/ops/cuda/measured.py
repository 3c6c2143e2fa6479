"""Tiles that ``python -m benchmarks.tune`` measured on hardware, read from ``measured.json`` beside this file if it is there.

The file is described in ``ops.measured_tiles``. Nothing here imports cuda.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import get_args

from ...errors import require
from .. import measured_tiles
from .tile import SHARED_LIMIT, TILES, Entry, ProductKernel, Tile

PATH = Path(__file__).with_name("measured.json")


@functools.cache
def entries(path: Path = PATH) -> tuple[Entry, ...]:
    """The file's lines in its order, none without a file; read once per process.

    Raises EapoError naming the file when it is not what ``benchmarks.tune`` writes, or names a tile that no kernel can have.
    """
    return measured_tiles.entries(path, Entry, Tile, _check)


def _check(where: str, entry: Entry) -> None:
    """The sources are written for the shapes of ``TILES``; what else a tile says may differ."""
    tile, kernels = entry.tile, get_args(ProductKernel)
    require(entry.kernel in kernels, f"{where}.kernel", f"one of {', '.join(kernels)}", repr(entry.kernel))
    shapes = sorted({(t.block_n, t.block_v, t.pingpong) for t in TILES})
    shape = tile.block_n, tile.block_v, tile.pingpong
    require(shape in shapes, f"{where}.tile", f"block_n, block_v and pingpong to be one of {shapes}", shape)
    require(tile.cluster in (1, 2), f"{where}.tile.cluster", "1 or 2", tile.cluster)
    require(tile.group_n > 0, f"{where}.tile.group_n", "a positive integer", tile.group_n)
    require(tile.stages > 1, f"{where}.tile.stages", "at least 2", tile.stages)
    most = 0 if tile.pingpong else tile.stages - 1
    require(0 <= tile.stagger <= most, f"{where}.tile.stagger", f"0 to {most}", tile.stagger)
    size = tile.shared_bytes(entry.kernel)
    require(size <= SHARED_LIMIT, f"{where}.tile", f"at most {SHARED_LIMIT} bytes of shared memory", size)
