"""How the kernels that multiply cut their work, as data. Nothing here imports cuda, or looks at a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProductKernel = Literal["stream_statistics", "scaled_exp_gemm"]

BLOCK_D = 64
"""Depth of a step: 64 half-precision numbers are the 128 bytes of the max_shard_vocab swizzle."""

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program may have on compute capability 9.0."""


@dataclass(frozen=True)
class Tile:
    """How a kernel that multiplies cuts its work.

    Attributes:
        name: what the report and the tests call it.
        block_n, block_v: tokens and columns of a program's tile.
        stages: steps of the product (``BLOCK_D`` deep) in flight.
        cluster: programs (1 or 2) of neighbouring row tiles that load each weight tile once for all of them.
        pingpong: each consumer warp group takes every other tile whole; else both share every tile, half of the rows each.
        stagger: steps of a shared tile before whose end the second group waits for the first, so that their epilogues do not
            coincide; fewer than ``stages``.
        group_n: row tiles of clusters that sweep the vocabulary together, so that hidden and weight panels stay in L2.
    """

    name: str
    block_n: int
    block_v: int
    stages: int
    cluster: int
    pingpong: bool
    stagger: int
    group_n: int = 8

    def shared_bytes(self, kernel: ProductKernel) -> int:
        """Dynamic shared memory: alignment, operands, the slices of E on their way out, barriers."""
        operands = self.stages * (self.block_n + self.block_v) * BLOCK_D * 2
        staging = 2 * 2 * 64 * 64 * 2 if kernel == "scaled_exp_gemm" else 0
        return 1024 + operands + staging + 16 * self.stages

    @property
    def cluster_rows(self) -> int:
        return self.block_n * self.cluster


@dataclass(frozen=True)
class Entry:
    """A measured line: ``tile`` suits ``kernel`` near hidden states of [rows, dim]."""

    kernel: ProductKernel
    dim: int
    rows: int
    tile: Tile


TILES = (
    # 80 bytes of shared memory and 32 bytes of L2 a clock: what cuBLAS asks for too. 128 accumulators a thread.
    Tile("shared", 128, 256, stages=4, cluster=2, pingpong=False, stagger=3),
    # For rows that fill one program only: nobody to share the weights with. Loads set the pace, so more stages stay for them.
    Tile("shared_alone", 128, 256, stages=4, cluster=1, pingpong=False, stagger=2),
    # Epilogues as long as a whole product are hidden, for 96 and 48 bytes a clock. To be measured where D is small.
    Tile("pingpong", 128, 128, stages=6, cluster=2, pingpong=True, stagger=0),
)
