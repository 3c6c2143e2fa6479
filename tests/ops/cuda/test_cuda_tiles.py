"""The choice of a tile from the table or a measured file, and files with mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from eapo_kernels import EapoError
from eapo_kernels.ops.cuda import tiles
from eapo_kernels.ops.cuda.tiles import SHARED_LIMIT, TILES, Tile

Write = Callable[..., None]
PINGPONG = replace(TILES[2], name="narrow", group_n=4)
LATE = replace(TILES[0], stagger=2)


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Write]:
    """Writes the measured lines that the package reads."""
    path = tmp_path / "measured.json"
    monkeypatch.setattr(tiles, "MEASURED", path)
    tiles.measured.cache_clear()

    def write(*lines: dict[str, Any]) -> None:
        path.write_text(json.dumps({"environment": {}, "lines": list(lines)}))
        tiles.measured.cache_clear()

    yield write
    tiles.measured.cache_clear()


def line(tile: Tile, *, kernel: str = "scaled_exp_gemm", dim: int = 1024, rows: int = 8192, **changes: Any) -> dict[str, Any]:
    return {"kernel": kernel, "dim": dim, "rows": rows, "ms": 1.0, "tile": asdict(tile) | changes}


@pytest.mark.usefixtures("write")
def test_without_a_file_the_rows_decide() -> None:
    assert tiles.tiles() == list(TILES)
    for kernel in ("stream_statistics", "scaled_exp_gemm"):
        assert tiles.find(kernel, 128, 4096) == TILES[1]
        assert tiles.find(kernel, 129, 1024) == TILES[0]
        assert tiles.find(kernel, 0, 4096) == TILES[1]


def test_the_nearest_measured_line_by_depth_then_by_rows(write: Write) -> None:
    deep, few = replace(TILES[0], group_n=16), replace(TILES[0], group_n=4)
    write(line(PINGPONG), line(deep, dim=4096), line(few, dim=4096, rows=512), line(LATE, kernel="stream_statistics"))
    assert tiles.find("scaled_exp_gemm", 3400, 1024) == PINGPONG
    assert tiles.find("scaled_exp_gemm", 4096, 4096) == deep
    assert tiles.find("scaled_exp_gemm", 4096, 3584) == deep, "D first, whatever N is"
    assert tiles.find("scaled_exp_gemm", 700, 8192) == few
    assert tiles.find("stream_statistics", 4096, 4096) == LATE, "the only line of this kernel"


def test_rows_that_fill_one_program_have_lines_of_their_own(write: Write) -> None:
    alone = replace(TILES[1], stagger=1)
    write(line(PINGPONG))
    assert tiles.find("scaled_exp_gemm", 100, 1024) == TILES[1]
    write(line(PINGPONG), line(alone, rows=64))
    assert tiles.find("scaled_exp_gemm", 100, 1024) == alone
    assert tiles.find("scaled_exp_gemm", 200, 1024) == PINGPONG


def test_what_is_built_includes_the_measured_tiles(write: Write) -> None:
    before = list(tiles.builds())
    write(line(replace(TILES[0], name="wide", group_n=16)), line(LATE), line(LATE, kernel="stream_statistics", dim=2048))
    assert tiles.tiles() == [*TILES, LATE], "group_n is an argument of the launch"
    added = [item for item in tiles.builds() if item not in before]
    assert len(added) == len(before) // len(TILES)
    assert {item.tile for item in added} == {LATE}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kernel": "finalize"}, r"lines\[0\]\.kernel: expected one of stream_statistics, scaled_exp_gemm, got 'finalize'"),
        ({"rows": 0}, r"lines\[0\]\.rows: expected a positive integer, got 0"),
        ({"block_v": 128}, r"tile: expected block_n, block_v and pingpong to be one of .*, got \(128, 128, False\)"),
        ({"cluster": 3}, r"tile\.cluster: expected 1 or 2, got 3"),
        ({"group_n": 0}, r"tile\.group_n: expected a positive integer, got 0"),
        ({"stagger": 4}, r"tile\.stagger: expected 0 to 3, got 4"),
        ({"stages": 5}, r"tile: expected at most 232448 bytes of shared memory, got 279632"),
        ({"stages": 1}, r"tile\.stages: expected at least 2, got 1"),
        ({"pingpong": 1}, r"tile\.pingpong: expected bool, got 1"),
    ],
)
def test_a_tile_that_no_kernel_can_have_is_named(write: Write, bad: dict[str, Any], message: str) -> None:
    write(line(TILES[0], **bad) if set(bad) <= set(asdict(TILES[0])) else line(TILES[0]) | bad)
    with pytest.raises(EapoError, match=message) as error:
        tiles.find("scaled_exp_gemm", 4096, 4096)
    assert str(tiles.MEASURED) in str(error.value)


def test_shared_memory_as_the_kernel_divides_it() -> None:
    """1024 for alignment, operands, slices of E for two groups in two buffers, two barriers a
    stage.
    """
    assert TILES[0].shared_bytes("stream_statistics") == 1024 + 4 * 384 * 128 + 4 * 16
    assert TILES[0].shared_bytes("scaled_exp_gemm") == TILES[0].shared_bytes("stream_statistics") + 4 * 8192
    assert all(one.shared_bytes("scaled_exp_gemm") <= SHARED_LIMIT for one in TILES)
    assert all(tile.stagger < tile.stages for tile in TILES)
