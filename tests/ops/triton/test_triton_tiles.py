"""The table of tiles and the split of the vocabulary: pure functions, no triton."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.tiles import PRODUCTS, family, find

FAMILIES = ("interpreter", "sm80", "sm90", "sm100")
KERNELS = (
    *PRODUCTS,
    "row_statistics",
    "row_gradient",
    "finalize",
    "row_offsets",
    "collect_rescue_ids",
    "scaled_exp_finalize",
    "add_rows",
    "add_carries",
    "logits_at",
)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Use the table alone, even if a tuner has written a file of measured tiles."""
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "measured.json")
    tiles.find.cache_clear()
    yield
    tiles.find.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("descriptors", [True, False])
def test_every_kernel_has_a_tile_everywhere(kernel: str, name: str, descriptors: bool) -> None:
    for itemsize in (2, 4) if kernel in (*PRODUCTS, "row_offsets", "add_rows", "logits_at") else (4,):
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


@pytest.mark.parametrize("dim", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("n_rows", [128, 1024, 8192, 65536])
def test_ranges_fill_the_machine_and_keep_hidden_in_l2(n_rows: int, dim: int) -> None:
    """On 132 multiprocessors at V = 128256: the last wave is short, and the row tiles in flight are 16 MiB of hidden."""
    tile = find("stream_statistics", "sm90", 2, dim, 128256, descriptors=True)
    row_tiles, column_tiles = -(-n_rows // tile.block_n), -(-128256 // tile.block_v)
    ranges = -(-column_tiles // tiles.range_tiles(tile.block_v))
    assert ranges == 63
    programs, slots = row_tiles * ranges, 132 * tile.resident
    waves = programs / slots
    if n_rows >= 8192:
        assert math.ceil(waves) <= 1.05 * waves
    group = tiles.live_row_tiles(tile.group_n, tile.block_n, dim, 2)
    in_flight = min(row_tiles, group * math.ceil(slots / (group * ranges)))
    assert in_flight * tile.block_n * dim * 2 <= tiles.LIVE_BYTES


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
