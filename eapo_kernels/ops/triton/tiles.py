"""The tile configurations of the Triton kernels as data, and how one is found.

None of ``TABLE`` has been measured on hardware yet: its tiles compile for their architecture without
spills (tests/aot) and are otherwise what the shapes suggest. Lines that ``python -m benchmarks.gpu --tune``
measured are read from ``measured.json`` beside this file and come first. Nothing here imports triton or
looks at a device.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from ...errors import require
from .. import measured_tiles

logger = logging.getLogger("eapo_kernels")


PRODUCTS = ("stream_statistics", "logit_gradient", "scaled_exp_gemm", "scaled_exp_rescue", "row_maxima")
"""Kernels that multiply hidden and weight. "scaled_exp_rescue" and "row_maxima" gather their rows and so have no descriptors."""


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        block_n, block_v, block_d: tokens and columns of a program's tile, and the depth of one step of its product.
        group_n: row tiles that sweep the vocabulary together, so that hidden and weight panels stay in L2.
        warps, stages: warps of a program; steps of the product in flight.
        max_registers: cap on registers per thread, or None.
        descriptors: load operands by tensor descriptor (TMA); needs rows of 16-byte multiples, see ``common.describable``.
        resident: programs that share one multiprocessor.
        slices: pieces of its columns in which a tile leaves the product: more of them need fewer registers.
        stores: write by tensor descriptor too, where the output can be described.
        persistent: only as many programs as run at once, each of which walks over tiles; else a program a tile.
    """

    block_n: int
    block_v: int
    block_d: int = 0
    group_n: int = 16
    warps: int = 4
    stages: int = 3
    max_registers: int | None = None
    descriptors: bool = False
    resident: int = 1
    slices: int = 1
    persistent: bool = False
    stores: bool = False


@dataclass(frozen=True)
class Entry:
    """A line of the table: ``tile`` suits ``kernel`` on ``family`` near [*, dim] x [vocab, dim] operands of ``itemsize`` bytes.

    Kernels without a product have one line a family, of itemsize 4.
    """

    kernel: str
    family: str
    itemsize: int
    dim: int
    vocab: int
    tile: Tile


def _lines(kernels: tuple[str, ...], family: str, itemsize: int, dim: int, *tiles: Tile) -> tuple[Entry, ...]:
    return tuple(Entry(kernel, family, itemsize, dim, 131072, tile) for tile in tiles for kernel in kernels)


_products = functools.partial(_lines, ("stream_statistics", "logit_gradient"))


_exponentials = functools.partial(_lines, ("scaled_exp_gemm",))


_rescued = functools.partial(_lines, ("scaled_exp_rescue", "row_maxima"))


TABLE = (
    # Interpreted: time goes by operations, not by elements, so tiles are large.
    *_products("interpreter", 2, 4096, Tile(64, 2048, 128, descriptors=True)),
    *_products("interpreter", 2, 4096, Tile(64, 2048, 128)),
    *_products("interpreter", 4, 4096, Tile(64, 2048, 128)),
    Entry("row_statistics", "interpreter", 4, 4096, 131072, Tile(64, 4096)),
    Entry("row_gradient", "interpreter", 4, 4096, 131072, Tile(64, 4096)),
    Entry("finalize", "interpreter", 4, 4096, 131072, Tile(1024, 0)),
    Entry("collect_rescue_ids", "interpreter", 4, 4096, 131072, Tile(128, 32)),
    Entry("scaled_exp_finalize", "interpreter", 4, 4096, 131072, Tile(128, 32)),
    *_exponentials("interpreter", 2, 4096, Tile(64, 2048, 128, descriptors=True, slices=2, stores=True), Tile(64, 2048, 128)),
    *_exponentials("interpreter", 4, 4096, Tile(64, 2048, 128)),
    *(line for size in (2, 4) for line in _rescued("interpreter", size, 4096, Tile(32, 2048, 128))),
    *(Entry("row_offsets", "interpreter", size, 4096, 131072, Tile(128, 0, 1024)) for size in (2, 4)),
    *(Entry("target_rows", "interpreter", size, 4096, 131072, Tile(4, 0, 1024)) for size in (2, 4)),
    # Hopper, half precision: 128x128 leaves room for two programs, whose epilogues and products overlap (the epilogue weighs
    # more when D is small); 128x256 reads less shared memory per operation. Lines without descriptors are for operands that no
    # descriptor can describe: rows that are not multiples of 16 bytes, or strided.
    *_products("sm90", 2, 2048, Tile(128, 128, 64, warps=8, max_registers=128, descriptors=True, resident=2, slices=4)),
    *_products("sm90", 2, 4096, Tile(128, 256, 64, warps=8, descriptors=True, slices=4)),
    *_products("sm90", 2, 4096, Tile(64, 128, 32, warps=8, slices=4)),
    *_products("sm90", 4, 4096, Tile(64, 64, 32, warps=8, stages=2, resident=2)),
    # Blackwell (data centre): accumulators live in tensor memory.
    *_products("sm100", 2, 4096, Tile(128, 128, 64, warps=8, descriptors=True, resident=2, slices=4)),
    *_products("sm100", 2, 4096, Tile(64, 64, 32, warps=8, slices=2)),
    *_products("sm100", 4, 4096, Tile(64, 64, 32, warps=8, stages=2, resident=2)),
    # Ampere and everything else: at most 96 KiB of shared memory.
    *_products("sm80", 2, 4096, Tile(128, 128, 32, warps=8, slices=4)),
    *_products("sm80", 4, 4096, Tile(64, 64, 32, warps=8, stages=2, resident=2)),
    # The product of the scaled exponentials: like the streaming forward, without running maxima.
    *_exponentials(
        "sm90", 2, 2048, Tile(128, 128, 64, warps=8, max_registers=128, descriptors=True, resident=2, slices=4, stores=True)
    ),
    *_exponentials(
        "sm90", 2, 4096, Tile(128, 256, 64, warps=8, stages=4, descriptors=True, slices=4, persistent=True, stores=True)
    ),
    *_exponentials("sm90", 2, 4096, Tile(64, 128, 32, warps=8, slices=4)),
    *_exponentials("sm100", 2, 4096, Tile(128, 128, 64, warps=8, descriptors=True, resident=2, slices=8)),
    *_exponentials("sm100", 2, 4096, Tile(64, 64, 32, warps=8, slices=2)),
    *_exponentials("sm80", 2, 4096, Tile(128, 128, 32, warps=8, slices=4)),
    *(line for name in ("sm80", "sm90", "sm100") for line in _exponentials(name, 4, 4096, Tile(64, 64, 32, warps=8, stages=2))),
    # Rescued rows are rare, so one shape serves all. The columns are at most those of the first run.
    *(line for name in ("sm80", "sm90", "sm100") for line in _rescued(name, 2, 4096, Tile(64, 256, 32, warps=8, slices=8))),
    *(line for name in ("sm80", "sm90", "sm100") for line in _rescued(name, 4, 4096, Tile(64, 64, 32, warps=8, stages=2))),
    # One row a program, bound by memory on every architecture.
    *(
        Entry(kernel, family, 4, 4096, 131072, Tile(1, block, warps=8))
        for family in ("sm80", "sm90", "sm100")
        for kernel, block in (("row_statistics", 8192), ("row_gradient", 4096))
    ),
    *(Entry("finalize", family, 4, 4096, 131072, Tile(256, 0)) for family in ("sm80", "sm90", "sm100")),
    # Vectors of the scaled exponentials: a few rows a program, so that a chunk of 1024 rows is many programs.
    *(
        Entry(kernel, family, size, 4096, 131072, tile)
        for family in ("sm80", "sm90", "sm100")
        for kernel, size, tile in (
            ("row_offsets", 2, Tile(4, 0, 512)),
            ("row_offsets", 4, Tile(4, 0, 512)),
            ("target_rows", 2, Tile(8, 0, 512)),
            ("target_rows", 4, Tile(8, 0, 512)),
            ("collect_rescue_ids", 4, Tile(32, 64)),
            ("scaled_exp_finalize", 4, Tile(32, 64, warps=8)),
        )
    ),
)


MEASURED = Path(__file__).with_name("measured.json")
"""Measured tiles, in the format of ``ops.measured_tiles``."""


@functools.cache
def measured(path: Path) -> tuple[Entry, ...]:
    """The file's lines in its order, none without a file; read once per process.

    Raises EapoError naming the file when it is not such a file.
    """
    return measured_tiles.entries(path, Entry, Tile, _check)


def _candidates(kernel: str, family: str, itemsize: int, *, descriptors: bool) -> list[Entry]:
    """The measured lines that ``tiles.find`` may choose from; where there are any, they come before the unmeasured table.

    descriptors: as for ``tiles.find``. A product measured on rows that no descriptor can describe says nothing about rows
    that one can, and a tile with descriptors cannot run the former.
    """
    lines = [e for e in measured(MEASURED) if (e.kernel, e.family, e.itemsize) == (kernel, family, itemsize)]
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


def family(capability: tuple[int, int] | None) -> str:
    """The table's name of a compute capability; None is the interpreter. Unknown ones get what asks least of the hardware."""
    if capability is None:
        return "interpreter"
    return {9: "sm90", 10: "sm100"}.get(capability[0], "sm80")


@functools.cache
def find(kernel: str, family: str, itemsize: int, dim: int = 4096, vocab: int = 131072, *, descriptors: bool = False) -> Tile:
    """The tile of the nearest line: kernel, family and item size must agree, then D and V by their ratios.

    Measured lines come before those of ``TABLE``. descriptors: whether the operands can be loaded by descriptor; such lines
    are preferred then, and excluded otherwise.
    """
    known = _candidates(kernel, family, itemsize, descriptors=descriptors)

    def distance(entry: Entry) -> tuple[bool, float]:
        far = abs(math.log2(max(dim, 1) / entry.dim)) + abs(math.log2(vocab / entry.vocab))
        return not known and entry.tile.descriptors != descriptors, far

    lines = known or [e for e in TABLE if (e.kernel, e.family, e.itemsize) == (kernel, family, itemsize)]
    entry = min((e for e in lines if descriptors or not e.tile.descriptors), key=distance)
    _log_choice(entry, bool(known))
    return entry.tile


@functools.cache
def _log_choice(entry: Entry, is_measured: bool) -> None:
    """Once a process for every line of the table that is used."""
    how = "measured" if is_measured else "not measured on hardware"
    logger.info(
        "tile of %s on %s, near D=%d V=%d (%s): %s", entry.kernel, entry.family, entry.dim, entry.vocab, how, entry.tile
    )


@functools.cache
def tiles_per_split(row_tiles: int, column_tiles: int, slots: int, max_splits: int) -> int:
    """Vocabulary tiles per program of the forward pass, so that the programs fill the machine's ``slots`` evenly.

    The cost of a choice is its waves times the length of a program, where starting and ending a program counts as one tile.
    """
    limit = max(1, min(column_tiles, max_splits, -(-4 * slots // row_tiles)))

    def cost(splits: int) -> tuple[int, int]:
        length = -(-column_tiles // splits)
        programs = row_tiles * -(-column_tiles // length)
        return -(-programs // slots) * (length + 1), splits

    return -(-column_tiles // min(range(1, limit + 1), key=cost))
