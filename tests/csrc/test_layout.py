"""Index arithmetic of csrc/layout.h against the formulas of the PTX manual, typed again; and the
order of tiles.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise

import pytest

pytestmark = pytest.mark.csrc


def fragment(host: ctypes.CDLL, thread: int, i: int) -> tuple[int, int]:
    row, column = ctypes.c_int(), ctypes.c_int()
    host.fragment(thread, i, ctypes.byref(row), ctypes.byref(column))
    return row.value, column.value


@pytest.mark.parametrize("n", [128, 256])
def test_accumulator_fragments(n: int, host: ctypes.CDLL) -> None:
    """PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", matrix D: row and column of d[i]
    of a thread.
    """
    seen = set()
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            row = 16 * warp + lane // 4 + (8 if i % 4 >= 2 else 0)
            column = 8 * (i // 4) + 2 * (lane % 4) + (i & 1)
            assert fragment(host, thread, i) == (row, column)
            seen.add((row, column))
    assert seen == {(row, column) for row in range(64) for column in range(n)}, "every element has one owner"


def test_swizzle(host: ctypes.CDLL) -> None:
    """CU_TENSOR_MAP_SWIZZLE_128B: address bits 4-6 are XORed with bits 7-9. A bijection without
    bank conflicts.
    """
    seen = set()
    for row in range(256):
        for chunk in range(8):
            plain = row * 128 + chunk * 16
            assert host.swizzled_byte(row, chunk) == plain ^ (plain >> 7 & 7) << 4
            seen.add(host.swizzled_byte(row, chunk))
    assert seen == set(range(0, 256 * 128, 16))
    for first in range(0, 64, 8):  # eight rows that stmatrix writes at once
        for chunk in range(8):
            assert len({host.swizzled_byte(first + r, chunk) % 128 for r in range(8)}) == 8


def test_operand_descriptor(host: ctypes.CDLL) -> None:
    """PTX ISA, "Matrix Descriptor Format", for a K-major operand with the 128-byte swizzle."""
    host.descriptor.restype = ctypes.c_uint64
    for address in (0, 1024, 3 * 49152 + 16384, 227 * 1024 // 1024 * 1024):
        bits = host.descriptor(address)
        assert bits & 0x3FFF == address >> 4, "start address"
        assert bits >> 32 & 0x3FFF == 1024 >> 4, "stride between groups of eight rows"
        assert bits >> 49 & 0x7 == 0, "base offset: stages start at multiples of 1024"
        assert bits >> 62 == 1, "128-byte swizzle"
        for step in range(4):  # 16 numbers along a row: the start moves by 32 bytes and stays inside of the address field
            assert (bits + 2 * step) & 0x3FFF == (address + 32 * step) >> 4
            assert (bits + 2 * step) >> 14 == bits >> 14


def units(host: ctypes.CDLL, row_tiles: int, column_tiles: int, per_split: int, group: int) -> list[tuple[int, ...]]:
    out = (ctypes.c_int * 4)()
    found = []
    for index in range(host.walk_units(row_tiles, column_tiles, per_split, group)):
        host.walk_unit(row_tiles, column_tiles, per_split, group, index, out)
        found.append(tuple(out))
    return found


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (5, 7, 1, 2), (17, 33, 4, 8), (8, 512, 62, 8), (3, 10, 10, 8), (9, 11, 3, 4)])
def test_the_walk_covers_every_tile_once(shape: tuple[int, int, int, int], host: ctypes.CDLL) -> None:
    row_tiles, column_tiles, per_split, _ = shape
    found = units(host, *shape)
    tiles = [(row, tile) for row, _, first, end in found for tile in range(first, end)]
    assert sorted(tiles) == [(row, tile) for row in range(row_tiles) for tile in range(column_tiles)]
    assert len({(row, split) for row, split, _, _ in found}) == len(found), "every partial sum has one owner"
    assert all(first == split * per_split for _, split, first, _ in found)


def test_the_walk_stays_within_groups_and_turns_round(host: ctypes.CDLL) -> None:
    found = units(host, 20, 6, 1, 8)
    groups = [[u for u in found if u[0] // 8 == number] for number in range(3)]
    assert [u for group in groups for u in group] == found
    for group in groups:
        for (row, split, *_), (following, after, *_) in pairwise(group):
            assert after == split if following == row + 1 else abs(after - split) == 1
    assert [group[0][1] for group in groups] == [0, 5, 0]
    assert [group[-1][1] for group in groups] == [5, 0, 5]
