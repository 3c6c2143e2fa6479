"""Which tiles are worth trying: a space of choices for each kernel, cut down by what a multiprocessor has. Pure functions."""

from __future__ import annotations

import itertools
import operator
import random
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.tiles import PRODUCTS, Entry, Tile

if TYPE_CHECKING:
    from eapo_kernels.ops.triton.report import Usage

SHARED_LIMIT = MappingProxyType({"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024})
"""Bytes of shared memory that programs on one multiprocessor may have together; 1 KiB a program is the system's."""

REGISTERS = 65536
_MOST_REGISTERS = 255
_ACCUMULATOR = MappingProxyType({"sm80": 128, "sm90": 128, "sm100": 256})
"""Registers a thread may spend on its part of a product (sm100 keeps it in tensor memory)."""

Space = dict[str, tuple[Any, ...]]

_PRODUCT: Space = {
    "block_n": (64, 128, 256),
    "block_v": (64, 128, 256),
    "block_d": (32, 64, 128),
    "group_n": (8, 16, 32),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "descriptors": (True, False),
    "resident": (1, 2),
    "slices": (1, 2, 4, 8),
}
_ROWS: Space = {"block_n": (1, 2, 4), "block_v": (1024, 2048, 4096, 8192, 16384), "warps": (4, 8, 16)}
_MERGE: Space = {"block_n": (8, 16, 32, 64, 128), "block_v": (16, 32, 64, 128), "warps": (1, 2, 4, 8)}

SPACES: MappingProxyType[str, Space] = MappingProxyType(
    {
        "stream_statistics": _PRODUCT,
        "logit_gradient": _PRODUCT,
        "scaled_exp_gemm": _PRODUCT | {"persistent": (False, True), "stores": (False, True)},
        "row_statistics": _ROWS,
        "row_gradient": _ROWS,
        "finalize": {"block_n": (32, 64, 128, 256, 512, 1024), "block_v": (0,), "warps": (1, 2, 4, 8)},
        "row_offsets": {
            "block_n": (1, 2, 4, 8, 16), "block_v": (0,), "block_d": (128, 256, 512, 1024, 2048), "warps": (1, 2, 4, 8),
        },
        "target_rows": {
            "block_n": (2, 4, 8, 16, 32), "block_v": (0,), "block_d": (128, 256, 512, 1024, 2048), "warps": (1, 2, 4, 8),
        },
        "collect_rescue_ids": _MERGE,
        "scaled_exp_finalize": _MERGE,
    }
)  # fmt: skip
"""Kernel -> values of the fields of ``Tile`` to combine; other fields keep their defaults."""

UNTUNED = MappingProxyType(
    dict.fromkeys(("scaled_exp_rescue", "row_maxima"), "runs for rows whose old log-prob was wrong by 33 nats, which are rare")
)
"""Kernels of the table that are not searched, and why."""

_WIDE: Space = {"block_n": (32, 64, 128), "block_v": (32, 64, 128), "block_d": (16, 32, 64), "descriptors": (False,)}
"""Products of fp32 operands run on the ordinary cores: smaller tiles."""


@dataclass(frozen=True)
class Search:
    """One line of the table to be measured.

    Attributes:
        kernel, family, itemsize: as in ``tiles.Entry``.
        n, d, v: rows, depth and vocabulary of the operands.
        dtype: name of the operands' dtype ("bfloat16").
    """

    kernel: str
    family: str
    itemsize: int
    n: int
    d: int
    v: int
    dtype: str

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What a line of the measured table is known by."""
        return self.kernel, self.family, self.itemsize, self.d, self.v

    @property
    def describable(self) -> bool:
        """Whether rows of the operands are multiples of 16 bytes."""
        return self.kernel in PRODUCTS and self.d * self.itemsize % 16 == 0

    def entry(self, tile: Tile) -> Entry:
        return Entry(*self.key, tile)

    def current(self) -> Tile:
        """The tile that is used today."""
        return tiles.find(self.kernel, self.family, self.itemsize, self.d, self.v, descriptors=self.describable)

    def candidates(self) -> list[Tile]:
        """See the function of this name."""
        return candidates(self)


def candidates(search: Search, seed: int = 0) -> list[Tile]:
    """Every tile of the kernel's space that can fit, the current one first, then those that differ from it in fewest fields.

    Tiles equally far are in random order, so that a search that ends early has looked everywhere near.
    """
    space, current = SPACES[search.kernel], search.current()
    if search.kernel in PRODUCTS and search.itemsize == 4:
        space = space | _WIDE
    tiles = [Tile(**dict(zip(space, values, strict=True))) for values in itertools.product(*space.values())]
    if search.kernel in PRODUCTS:
        tiles += [replace(t, max_registers=cap) for t in tiles if (cap := register_cap(t)) is not None]
    found = [t for t in tiles if t != current and misfit(search, t) is None]
    random.Random(seed).shuffle(found)
    mine = tuple(vars(current).values())
    found.sort(key=lambda t: sum(map(operator.ne, vars(t).values(), mine)))
    return [current, *found]


def register_cap(tile: Tile) -> int | None:
    """Registers per thread with which ``tile.resident`` programs share a multiprocessor, where that is a limit at all."""
    cap = REGISTERS // (tile.resident * 32 * tile.warps) // 8 * 8
    return cap if tile.resident > 1 and cap < _MOST_REGISTERS else None


def misfit(search: Search, tile: Tile) -> str | None:
    """Why a tile cannot work or is not worth compiling, or None; an estimate from its sizes alone."""
    threads = 32 * tile.warps
    if search.kernel not in PRODUCTS:
        per_thread = tile.block_n * max(tile.block_v, 1) * max(tile.block_d, 1) / threads
        return None if 1 <= per_thread <= 64 else f"{per_thread:g} elements a thread"
    if tile.descriptors and not search.describable:
        return "rows that no descriptor can describe"
    if tile.stores and not tile.descriptors:
        return "stores by descriptor with loads by pointer"
    if tile.block_v // tile.slices < 16:
        return "slices of less than 16 columns"
    if search.itemsize == 4 and tile.slices > 1 and tile.block_v <= 64:
        return "slices of a narrow tile"
    accumulator = tile.block_n * tile.block_v // threads
    if not 8 <= accumulator <= _ACCUMULATOR[search.family]:
        return f"{accumulator} registers of product a thread"
    if search.family != "sm100" and tile.resident * threads * (accumulator + 32) > REGISTERS:
        return "registers of the programs that share a multiprocessor"
    shared = (tile.block_n + tile.block_v) * tile.block_d * search.itemsize * tile.stages
    if tile.stores:
        shared += tile.block_n * tile.block_v // tile.slices * search.itemsize
    limit = SHARED_LIMIT[search.family]
    return None if tile.resident * (shared + 1024) <= limit + 1024 else f"{shared} bytes of shared memory"


def flaw(search: Search, tile: Tile, usage: Usage, *, plain: bool = True) -> str | None:
    """Why a compiled tile is not taken, or None. plain: also what decides how many programs share a multiprocessor.

    usage: of the launch with the tile, or with every switch of the kernel on (then not ``plain``). The same demands as those
    of tests/aot on the shipped table.
    """
    if usage.spills or usage.stack:
        return f"{usage.spills} spills, {usage.stack} bytes of stack"
    if usage.shared > SHARED_LIMIT[search.family]:
        return f"{usage.shared} bytes of shared memory"
    if search.kernel in PRODUCTS and search.itemsize == 2 and not usage.tensor:
        return "no tensor cores"
    if not plain:
        return None
    if tile.resident * usage.threads * (-(-usage.registers // 8) * 8) > REGISTERS:
        return f"{usage.registers} registers"
    together = tile.resident * (usage.shared + 1024)
    return None if together <= SHARED_LIMIT[search.family] + 1024 else f"{together} bytes of shared memory together"
