"""The tile configurations of the Triton kernels as data, and the choice of one for a shape.

The tiles of ``TABLE`` compile for their architecture without spills (tests/aot); none has been
measured on hardware yet. Tiles that ``python -m benchmarks.gpu --tune`` measured are in
``measured.json`` beside this file and are preferred. Nothing here uses triton or a device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import EapoError, require
from .. import measured_tiles
from ..chunking import cdiv

logger = logging.getLogger("eapo_kernels")


PRODUCTS = ("stream_statistics", "logit_gradient", "scaled_exp_gemm", "scaled_exp_rescue", "row_maxima")
"""Kernels that multiply hidden and weight. The last two gather rows, without descriptors."""


@dataclass(frozen=True)
class Tile:
    """How a kernel divides its work.

    Attributes:
        block_n, block_v, block_d: rows and columns of a program's tile; depth of a product's step.
        group_n: row tiles that pass over the vocabulary together, so that operands stay in L2.
        warps, stages: warps per program; steps of the product in flight.
        max_registers: limit of registers per thread, or None.
        descriptors: load operands by tensor descriptor (TMA), see ``lm_head.describable``.
        resident: programs that share one multiprocessor.
        slices: column slices that the epilogue processes one by one; more need fewer registers.
        persistent: launch as many programs as run at once, each of which computes several tiles;
            else one program per tile.
        stores: store by tensor descriptor, where the output can be described.
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
    """A kernel's tile on a GPU family for operands [*, dim], [vocab, dim] of ``itemsize`` bytes.

    Kernels that read no operands have one line per family, of itemsize 4.
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
    # Interpreter: time depends on the number of operations, not of elements, so tiles are large.
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
    *(Entry("add_rows", "interpreter", size, 4096, 131072, Tile(16, 0, 1024)) for size in (2, 4)),
    Entry("add_carries", "interpreter", 4, 4096, 131072, Tile(16, 0, 1024)),
    *(Entry("logits_at", "interpreter", size, 4096, 131072, Tile(128, 0, 1024)) for size in (2, 4)),
    # Hopper, half precision: two programs of 128x128 fit on a multiprocessor, and the epilogue of
    # one overlaps the product of the other (for small D, where the epilogue is a larger part);
    # 128x256 reads less shared memory per operation. Lines without descriptors are for operands
    # that no descriptor can describe: strided, or rows not a multiple of 16 bytes.
    *_products("sm90", 2, 2048, Tile(128, 128, 64, warps=8, max_registers=128, descriptors=True, resident=2, slices=4)),
    *_products("sm90", 2, 4096, Tile(128, 256, 64, warps=8, descriptors=True, slices=4)),
    *_products("sm90", 2, 4096, Tile(64, 128, 32, warps=8, slices=4)),
    *_products("sm90", 4, 4096, Tile(64, 64, 32, warps=8, stages=2, resident=2)),
    # Blackwell (data center): accumulators are in tensor memory.
    *_products("sm100", 2, 4096, Tile(128, 128, 64, warps=8, descriptors=True, resident=2, slices=4)),
    *_products("sm100", 2, 4096, Tile(64, 64, 32, warps=8, slices=2)),
    *_products("sm100", 4, 4096, Tile(64, 64, 32, warps=8, stages=2, resident=2)),
    # Ampere and all others: at most 96 KiB of shared memory.
    *_products("sm80", 2, 4096, Tile(128, 128, 32, warps=8, slices=4)),
    *_products("sm80", 4, 4096, Tile(64, 64, 32, warps=8, stages=2, resident=2)),
    # The product of the scaled exponentials: as stream_statistics, without running maxima.
    *_exponentials(
        "sm90", 2, 2048, Tile(128, 128, 64, warps=8, max_registers=128, descriptors=True, resident=2, slices=4, stores=True)
    ),
    # Stored by pointers: with a descriptor each slice waits for the store before it, ahead of its own
    # exponentials (docs/log.md). Two programs hide that from each other, one cannot.
    *_exponentials("sm90", 2, 4096, Tile(128, 256, 64, warps=8, stages=4, descriptors=True, slices=4, persistent=True)),
    *_exponentials("sm90", 2, 4096, Tile(64, 128, 32, warps=8, slices=4)),
    *_exponentials("sm100", 2, 4096, Tile(128, 128, 64, warps=8, descriptors=True, resident=2, slices=8)),
    *_exponentials("sm100", 2, 4096, Tile(64, 64, 32, warps=8, slices=2)),
    *_exponentials("sm80", 2, 4096, Tile(128, 128, 32, warps=8, slices=4)),
    *(line for name in ("sm80", "sm90", "sm100") for line in _exponentials(name, 4, 4096, Tile(64, 64, 32, warps=8, stages=2))),
    # Rescued rows are rare: one shape for all D. The launcher sets block_v to that of
    # scaled_exp_gemm, which is at most this.
    *(line for name in ("sm80", "sm90", "sm100") for line in _rescued(name, 2, 4096, Tile(64, 256, 32, warps=8, slices=8))),
    *(line for name in ("sm80", "sm90", "sm100") for line in _rescued(name, 4, 4096, Tile(64, 64, 32, warps=8, stages=2))),
    # One row per program, bound by memory on every architecture.
    *(
        Entry(kernel, family, 4, 4096, 131072, Tile(1, block, warps=8))
        for family in ("sm80", "sm90", "sm100")
        for kernel, block in (("row_statistics", 8192), ("row_gradient", 4096))
    ),
    *(Entry("finalize", family, 4, 4096, 131072, Tile(256, 0)) for family in ("sm80", "sm90", "sm100")),
    # Entries: a warp has 256 columns of each row (512 bytes in half precision), so that sums over
    # rows stay within a thread, and 8 rows in flight.
    *(
        Entry("add_rows", family, size, dim, 131072, Tile(8, 0, 256 * warps, warps=warps))
        for family in ("sm80", "sm90", "sm100")
        for size in (2, 4)
        for dim, warps in ((1024, 1), (4096, 4))
    ),
    # Vectors of the scaled exponentials: a few rows per program, so that a chunk of 1024 rows has
    # many programs.
    *(
        Entry(kernel, family, size, 4096, 131072, tile)
        for family in ("sm80", "sm90", "sm100")
        for kernel, size, tile in (
            ("row_offsets", 2, Tile(4, 0, 512)),
            ("row_offsets", 4, Tile(4, 0, 512)),
            ("logits_at", 2, Tile(16, 0, 256)),
            ("logits_at", 4, Tile(16, 0, 256)),
            ("add_carries", 4, Tile(8, 0, 256)),
            ("collect_rescue_ids", 4, Tile(32, 64)),
            ("scaled_exp_finalize", 4, Tile(32, 64, warps=8)),
        )
    ),
)


RIVALS = (
    # Hopper: an epilogue behind the next tile's loads, against two programs that overlap each other.
    *_exponentials(
        "sm90",
        2,
        4096,
        Tile(128, 256, 64, warps=8, stages=4, descriptors=True, slices=4, persistent=True, stores=True),
        Tile(128, 256, 64, warps=8, stages=4, descriptors=True, slices=8, persistent=True),
        Tile(128, 128, 64, warps=8, max_registers=128, descriptors=True, resident=2, slices=4),
    ),
    *_products("sm90", 2, 2048, Tile(128, 256, 64, warps=8, descriptors=True, slices=4, group_n=8)),
    *_products("sm90", 2, 4096, Tile(128, 256, 64, warps=8, stages=4, descriptors=True, slices=4)),
    *_products("sm80", 2, 4096, Tile(128, 128, 32, warps=8, stages=4, slices=4)),
    *_exponentials("sm80", 2, 4096, Tile(128, 128, 32, warps=8, stages=4, slices=4)),
    *_products("sm80", 2, 4096, Tile(64, 128, 32, warps=4, slices=4)),
    *_products("interpreter", 2, 4096, Tile(32, 2048, 128)),
    *_exponentials("interpreter", 2, 4096, Tile(32, 2048, 128)),
)
"""More tiles for ``tune`` to race; each compiles without spills (tests/aot)."""


MEASURED = Path(__file__).with_name("measured.json")
"""Measured tiles, in the format of ``ops.measured_tiles``."""


_tuned: list[Path] = []
"""Files of this machine's GPUs, which ``python -m eapo_kernels selftest --tune`` writes; before
``MEASURED``."""

_on_trial: dict[str, Tile] = {}
"""Tiles that ``tune`` races, by kernel; before all others."""


def use_tuned(path: Path) -> None:
    """Prefer the tiles in a file, if it exists. One that cannot be read is left out, with a warning."""
    if path in _tuned:
        return
    try:
        if not path.exists():
            return
        measured(path)
    except (EapoError, OSError) as error:
        logger.warning("tuned tiles are not used: %s", error)
        return
    _tuned.append(path)
    find.cache_clear()


def forget_tuned(path: Path) -> None:
    """Read a file again at its next use."""
    _tuned[:] = [one for one in _tuned if one != path]
    measured.cache_clear()
    find.cache_clear()


@contextlib.contextmanager
def on_trial(kernel: str, tile: Tile) -> Iterator[None]:
    """``find`` gives this tile for the kernel."""
    _on_trial[kernel] = tile
    find.cache_clear()
    try:
        yield
    finally:
        del _on_trial[kernel]
        find.cache_clear()


def candidates(kernel: str, family: str, itemsize: int, dim: int, vocab: int, *, descriptors: bool) -> list[Tile]:
    """Tiles worth racing: the one in use, then all others of ``TABLE`` and ``RIVALS`` that the
    operands allow."""
    lines = [e.tile for e in (*TABLE, *RIVALS) if (e.kernel, e.family, e.itemsize) == (kernel, family, itemsize)]
    found = [find(kernel, family, itemsize, dim, vocab, descriptors=descriptors)]
    return list(dict.fromkeys([*found, *(t for t in lines if descriptors or not t.descriptors)]))


@functools.cache
def measured(path: Path) -> tuple[Entry, ...]:
    """The lines of the file in order, none where it does not exist; read once per process.

    Raises EapoError with the path when the file has another format.
    """
    return measured_tiles.entries(path, Entry, Tile, _check)


def _candidates(kernel: str, family: str, itemsize: int, *, descriptors: bool) -> list[Entry]:
    """The measured lines that ``find`` may choose from.

    descriptors: as for ``find``. For operands that can be described, products measured on rows that
    cannot be are left out; for other operands, tiles with descriptors are.
    """
    known = [line for path in (*_tuned, MEASURED) for line in measured(path)]
    lines = [e for e in known if (e.kernel, e.family, e.itemsize) == (kernel, family, itemsize)]
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
    """The table's name of a compute capability; None is the interpreter. Unknown ones
    use sm80, whose tiles need the least shared memory."""
    if capability is None:
        return "interpreter"
    return {9: "sm90", 10: "sm100"}.get(capability[0], "sm80")


@functools.cache
def find(kernel: str, family: str, itemsize: int, dim: int = 4096, vocab: int = 131072, *, descriptors: bool = False) -> Tile:
    """The tile of the line of this kernel, family and item size whose D and V are nearest by ratio.

    Measured lines are preferred to those of ``TABLE``. descriptors: whether the operands can be
    loaded by descriptor; lines with descriptors are preferred if so, and excluded otherwise.
    """
    if kernel in _on_trial:
        return _on_trial[kernel]
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
    """Log each line once per process."""
    how = "measured" if is_measured else "not measured on hardware"
    logger.info(
        "tile of %s on %s, near D=%d V=%d (%s): %s", entry.kernel, entry.family, entry.dim, entry.vocab, how, entry.tile
    )


RANGE_COLUMNS = 2048
"""Columns of a range of the vocabulary whose sums ``stream_statistics`` stores. Fixed, so that a row's
statistics do not depend on the other rows. At V = 128256 they are 63, so 128 rows fill half of an H100
and each program of many rows starts once for 8 or 16 tiles."""

LIVE_BYTES = 2**24
"""Bytes of ``hidden`` that the programs in flight may read, a third of an L2 cache of 50 MB."""


@functools.cache
def range_tiles(block_v: int) -> int:
    """Column tiles of a range."""
    return max(1, RANGE_COLUMNS // block_v)


@functools.cache
def live_row_tiles(most: int, rows: int, dim: int, itemsize: int) -> int:
    """Row tiles of ``rows`` that pass over the vocabulary together: at most ``most``, and as many as
    keep their hidden states in L2, where each column tile reads them again."""
    return max(1, min(most, LIVE_BYTES // (rows * dim * itemsize)))


@functools.cache
def rows_within(budget: int, n_rows: int, fields: int, vocab: int) -> int:
    """Rows whose partial sums (two a range at most) fit the budget, but at least 128."""
    return min(n_rows, max(128, budget // (8 * fields * cdiv(vocab, RANGE_COLUMNS))))
