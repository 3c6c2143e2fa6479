"""The table of tiles of the CUDA kernels, and what is compiled from it. Nothing here imports triton
or cuda, or uses a device.

``TILES`` follows from the budgets of registers, shared memory and L2 bandwidth in csrc/README.md;
none of it is measured on hardware yet. Lines that the tuner measured are read from
``measured.json`` beside this file, if there is one, and come first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from ...errors import require
from .. import measured_tiles

KernelName = Literal["stream_statistics", "scaled_exp_gemm"]
Operand = Literal["bf16", "fp16"]

MEASURED = Path(__file__).with_name("measured.json")
"""See ``ops.measured_tiles`` for the format."""

BLOCK_D = 64
"""Depth of a step: 64 half-precision numbers fill a row of the 128-byte swizzle."""

THREADS = 384
"""Threads of a program: one producer and two consumer warp groups."""

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program may use on compute capability 9.0."""


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        name: for reports and tests.
        block_n, block_v: tokens and columns of a program's tile.
        stages: steps of the product (``BLOCK_D`` deep) in flight.
        cluster: programs (1 or 2) of neighbouring row tiles that share each weight tile by
            multicast.
        pingpong: each consumer warp group takes every other tile whole; otherwise each takes half
            of the rows of every tile.
        stagger: without ping-pong, the steps before the end of a tile at which the second group
            waits for the first, so that their epilogues do not coincide; less than ``stages``.
        group_n: row tiles of clusters that sweep the vocabulary together, so that hidden and weight
            panels stay in L2.
    """

    name: str
    block_n: int
    block_v: int
    stages: int
    cluster: int
    pingpong: bool
    stagger: int
    group_n: int = 8

    def shared_bytes(self, kernel: KernelName) -> int:
        """Dynamic shared memory: alignment, operands, slices of E, barriers."""
        operands = self.stages * (self.block_n + self.block_v) * BLOCK_D * 2
        staging = 2 * 2 * 64 * 64 * 2 if kernel == "scaled_exp_gemm" else 0
        return 1024 + operands + staging + 16 * self.stages

    @property
    def cluster_rows(self) -> int:
        return self.block_n * self.cluster


@dataclass(frozen=True)
class Entry:
    """A measured line: ``tile`` suits ``kernel`` near hidden states of [rows, dim]."""

    kernel: KernelName
    dim: int
    rows: int
    tile: Tile


TILES = (
    # 80 bytes of shared memory and 32 bytes of L2 traffic a clock, as cuBLAS needs. 128 accumulators a thread.
    Tile("shared", 128, 256, stages=4, cluster=2, pingpong=False, stagger=3),
    # For rows that fill one program only, which has no neighbour to share weights with.
    Tile("shared_alone", 128, 256, stages=4, cluster=1, pingpong=False, stagger=2),
    # Hides epilogues as long as a whole product; needs 96 and 48 bytes a clock. To be measured where D is small.
    Tile("pingpong", 128, 128, stages=6, cluster=2, pingpong=True, stagger=0),
)


@functools.cache
def measured(path: Path) -> tuple[Entry, ...]:
    """The lines of a file in its order, none without a file; read once per process.

    Raises EapoError naming the file when its format is wrong, or when it names a tile that no
    kernel supports.
    """
    return measured_tiles.entries(path, Entry, Tile, _check)


def _check(where: str, entry: Entry) -> None:
    """Blocks must be those of ``TILES``; the other fields are free within limits."""
    tile, kernels = entry.tile, get_args(KernelName)
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


def find(kernel: KernelName, n_rows: int, dim: int) -> Tile:
    """The tile for [n_rows, dim] hidden states: of the nearest measured line, by D and then by N;
    else of ``TILES``.

    Rows that fill only one program have lines of their own, because their tiles form no cluster.
    """
    alone = TILES[1].block_n

    def distance(entry: Entry) -> tuple[float, float]:
        return abs(math.log2(max(dim, 1) / entry.dim)), abs(math.log2(max(n_rows, 1) / entry.rows))

    lines = [e for e in measured(MEASURED) if e.kernel == kernel and (e.rows <= alone) == (n_rows <= alone)]
    if lines:
        return min(lines, key=distance).tile
    return TILES[1] if n_rows <= alone else TILES[0]


def tiles() -> list[Tile]:
    """``TILES``, and the measured tiles that compile to other code."""
    compiled = {replace(tile, name="", group_n=1): tile for tile in TILES}
    for entry in measured(MEASURED):
        compiled.setdefault(replace(entry.tile, name="", group_n=1), entry.tile)
    return list(compiled.values())


@dataclass(frozen=True)
class Build:
    """A kernel with everything that is fixed when it is compiled. ``str`` of it names it in
    reports.

    Attributes:
        kernel: name of the source file and of the kernel in it.
        tile: its shape.
        operand: dtype of hidden, weight and bias.
        entropy: sum x e^x is computed.
        second_moments: and the three sums of E4 (with ``entropy``; ``stream_statistics`` only).
        bias: a bias is added to the logits.
    """

    kernel: KernelName
    tile: Tile
    operand: Operand
    entropy: bool
    second_moments: bool = False
    bias: bool = False

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a program."""
        return self.tile.shared_bytes(self.kernel)

    def macros(self) -> dict[str, str]:
        """The macros of the sources, by name."""
        t = self.tile
        numbers = {
            "BLOCK_N": t.block_n,
            "BLOCK_V": t.block_v,
            "STAGES": t.stages,
            "CLUSTER": t.cluster,
            "PINGPONG": int(t.pingpong),
            "STAGGER": t.stagger,
            "ENTROPY": int(self.entropy),
        }
        if self.kernel == "stream_statistics":
            numbers["MOMENTS"] = int(self.second_moments)
        switches = {"FP16": self.operand == "fp16", "BIAS": self.bias}
        return {f"EAPO_{name}": str(value) for name, value in numbers.items()} | {
            f"EAPO_{name}": "1" for name, on in switches.items() if on
        }

    def __str__(self) -> str:
        parts = {"entropy": self.entropy, "moments": self.second_moments, "bias": self.bias}
        return " ".join([self.kernel, self.tile.name, self.operand, *(name for name, on in parts.items() if on)])


def builds() -> Iterator[Build]:
    """Every build that the backend can ask for."""
    for tile in tiles():
        for bias in (False, True):
            for operand in get_args(Operand):
                for entropy, moments in ((False, False), (True, False), (True, True)):
                    yield Build("stream_statistics", tile, operand, entropy, moments, bias)
                for entropy in (False, True):
                    yield Build("scaled_exp_gemm", tile, operand, entropy, bias=bias)
