"""The table of tiles and the split of the vocabulary: pure functions, no triton."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.tiles import PRODUCTS, family, find, tiles_per_split

FAMILIES = ("interpreter", "sm80", "sm90", "sm100")
KERNELS = (
    *PRODUCTS,
    "row_statistics",
    "row_gradient",
    "finalize",
    "row_offsets",
    "collect_rescue_ids",
    "scaled_exp_finalize",
    "target_rows",
)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Use the table alone, even if a tuner has written a file of measured tiles."""
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "measured.json")
    find.cache_clear()
    yield
    find.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("descriptors", [True, False])
def test_every_kernel_has_a_tile_everywhere(kernel: str, name: str, descriptors: bool) -> None:
    for itemsize in (2, 4) if kernel in (*PRODUCTS, "row_offsets") else (4,):
        for dim in (1, 576, 4096, 20_000):
            tile = find(kernel, name, itemsize, dim, 1 if dim == 1 else 151_936, descriptors=descriptors)
            assert descriptors or not tile.descriptors


def test_the_nearest_line_wins() -> None:
    assert find("stream_statistics", "sm90", 2, 1024, 131072, descriptors=True).block_v == 128
    assert find("stream_statistics", "sm90", 2, 8192, 131072, descriptors=True).block_v == 256
    assert find("stream_statistics", "sm90", 2, 8192, 131072, descriptors=True).descriptors
    assert not find("stream_statistics", "sm90", 4, 8192, 131072, descriptors=True).descriptors


def test_tiles_are_legal() -> None:
    for entry in tiles.TABLE:
        t = entry.tile
        sizes = [t.block_n, *([t.block_v] if t.block_v else []), *([t.block_d] if t.block_d else [])]
        assert all(size & (size - 1) == 0 for size in sizes), entry
        if entry.kernel in PRODUCTS:
            assert min(sizes) >= 16, entry
            assert not t.descriptors or max(t.block_n, t.block_v) <= 256 or entry.family == "interpreter", entry
        assert t.block_v % max(t.slices, 1) == 0, entry


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_are_rescued_with_the_columns_of_the_first_run(name: str, itemsize: int) -> None:
    """A rescue takes block_v from the first product, which must not need more registers than
    the line's."""
    first = [e.tile for e in tiles.TABLE if (e.kernel, e.family, e.itemsize) == ("scaled_exp_gemm", name, itemsize)]
    (again,) = (e.tile for e in tiles.TABLE if (e.kernel, e.family, e.itemsize) == ("scaled_exp_rescue", name, itemsize))
    assert not again.descriptors
    assert not again.stores
    for tile in first:
        assert tile.block_v <= again.block_v
        assert tile.block_v % again.slices == 0


def test_families() -> None:
    assert family(None) == "interpreter"
    assert [family(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))] == [
        "sm80", "sm80", "sm90", "sm100", "sm100", "sm80",
    ]  # fmt: skip


@pytest.mark.parametrize("row_tiles", [1, 2, 32, 64, 65, 500])
@pytest.mark.parametrize("column_tiles", [1, 3, 197, 594, 1187])
def test_ranges_fill_the_machine(row_tiles: int, column_tiles: int) -> None:
    """Never slower than one range, no empty range, and within a tenth of perfect balance for large
    inputs."""
    slots = 264

    def waves(length: int) -> int:
        return math.ceil(row_tiles * math.ceil(column_tiles / length) / slots) * (length + 1)

    length = tiles_per_split(row_tiles, column_tiles, slots, 10**9)
    assert 1 <= length <= column_tiles
    assert waves(length) <= waves(column_tiles)
    work = row_tiles * column_tiles
    if work >= 64 * slots and row_tiles >= 32:
        assert waves(length) <= 1.1 * work / slots


def test_ranges_respect_their_limit() -> None:
    assert tiles_per_split(1, 1000, 264, 0) == 1000
    assert tiles_per_split(1, 1000, 264, 4) >= 250
    assert tiles_per_split(64, 1000, 1, 10**9) == 1000


def test_no_line_appears_twice() -> None:
    assert len(set(tiles.TABLE)) == len(tiles.TABLE)


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One log message per line of the table that is used, for any number of shapes."""
    tiles.find.cache_clear()
    tiles._log_choice.cache_clear()
    with caplog.at_level("INFO", logger="eapo_kernels"):
        for vocab in (128256, 131072, 151936, 131072):
            tiles.find("scaled_exp_gemm", "sm90", 2, 4096, vocab, descriptors=True)
        tiles.find("scaled_exp_gemm", "sm90", 2, 1024, 131072, descriptors=True)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith(
        "tile of scaled_exp_gemm on sm90, near D=4096 V=131072 (not measured on hardware): Tile("
    )
    assert "near D=2048" in caplog.messages[1]
