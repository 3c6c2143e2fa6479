"""Shapes of the CUDA kernels as data. None was measured on hardware yet; lines that ``benchmarks.tune`` measured come first.

Why these: csrc/README.md has the budgets of registers, shared memory and L2 that they come from. Nothing here imports triton
or cuda, or looks at a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

ProductKernel = Literal["stream_statistics", "exp_gemm"]
RowKernel = Literal["row_offsets", "finalize", "exp_finalize"]
Operand = Literal["bf16", "fp16"]

BLOCK_D = 64
"""Depth of a step: 64 half-precision numbers are the 128 bytes of the widest swizzle."""

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program may have on compute capability 9.0."""

THREADS = 384
"""Of a kernel that multiplies: one producer and two consumer warp groups."""


class Build(Protocol):
    """A kernel with everything that is decided when it is compiled; ``str`` of it names it in reports.

    Attributes:
        kernel: the name of the source file and of the kernel in it.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
    """

    @property
    def kernel(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...

    def macros(self) -> dict[str, str]:
        """What the sources read, by name."""
        ...

    def __hash__(self) -> int: ...


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
        staging = 2 * 2 * 64 * 64 * 2 if kernel == "exp_gemm" else 0
        return 1024 + operands + staging + 16 * self.stages

    @property
    def cluster_rows(self) -> int:
        return self.block_n * self.cluster


TILES = (
    # 80 bytes of shared memory and 32 bytes of L2 a clock: what cuBLAS asks for too. 128 accumulators a thread.
    Tile("shared", 128, 256, stages=4, cluster=2, pingpong=False, stagger=3),
    # For rows that fill one program only: nobody to share the weights with. Loads set the pace, so more stages stay for them.
    Tile("shared_alone", 128, 256, stages=4, cluster=1, pingpong=False, stagger=2),
    # Epilogues as long as a whole product are hidden, for 96 and 48 bytes a clock. To be measured where D is small.
    Tile("pingpong", 128, 128, stages=6, cluster=2, pingpong=True, stagger=0),
)


@dataclass(frozen=True)
class ProductBuild:
    """The ``Build`` of a kernel that multiplies hidden and weight.

    Attributes:
        kernel: see ``Build``.
        tile: its shape.
        operand: dtype of hidden, weight and bias.
        entropy: sum x e^x is wanted.
        second_moments: and the three sums of E4 (with ``entropy``; ``stream_statistics`` only).
        bias: one is added to the logits.
    """

    kernel: ProductKernel
    tile: Tile
    operand: Operand
    entropy: bool
    second_moments: bool = False
    bias: bool = False

    @property
    def threads(self) -> int:
        return THREADS

    @property
    def shared_bytes(self) -> int:
        return self.tile.shared_bytes(self.kernel)

    def macros(self) -> dict[str, str]:
        """See ``Build``."""
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


def product_builds() -> Iterator[ProductBuild]:
    """Every product that the backend can ask for."""
    for tile in tiles():
        for bias in (False, True):
            for operand in ("bf16", "fp16"):
                for entropy, moments in ((False, False), (True, False), (True, True)):
                    yield ProductBuild("stream_statistics", tile, operand, entropy, moments, bias)
                for entropy in (False, True):
                    yield ProductBuild("exp_gemm", tile, operand, entropy, bias=bias)


@dataclass(frozen=True)
class RowBuild:
    """The ``Build`` of a kernel over rows, which memory binds.

    There is one, or one an operand, for everything that may be asked for: branches that all threads take alike cost nothing
    beside the loads.

    Attributes:
        kernel: see ``Build``.
        operand: dtype of hidden, weight and bias (``row_offsets``), or None.
        threads: see ``Build``.
    """

    kernel: RowKernel
    operand: Operand | None = None
    threads: int = 256

    @property
    def rows(self) -> int:
        """Of a program: one a warp for ``row_offsets``, a line of 128 bytes of each field for the others."""
        return self.threads // 32 if self.kernel == "row_offsets" else 32

    @property
    def shared_bytes(self) -> int:
        return 0

    def macros(self) -> dict[str, str]:
        """See ``Build``."""
        numbers = {"EAPO_THREADS": str(self.threads), "EAPO_ROWS": str(self.rows)}
        return numbers | ({"EAPO_FP16": "1"} if self.operand == "fp16" else {})

    def __str__(self) -> str:
        return self.kernel if self.operand is None else f"{self.kernel} {self.operand}"


def row_builds() -> Iterator[RowBuild]:
    """Every kernel over rows that the backend can ask for."""
    for operand in ("bf16", "fp16"):
        yield RowBuild("row_offsets", operand)
    yield RowBuild("finalize")
    yield RowBuild("exp_finalize")


def builds() -> Iterator[Build]:
    """Everything that the backend can ask for."""
    yield from product_builds()
    yield from row_builds()


@dataclass(frozen=True)
class Entry:
    """A measured line: ``tile`` suits ``kernel`` near hidden states of [rows, dim]."""

    kernel: ProductKernel
    dim: int
    rows: int
    tile: Tile


def tiles() -> list[Tile]:
    """``TILES``, and the measured ones that compile to something else."""
    from . import measured

    compiled = {replace(tile, name="", group_n=1): tile for tile in TILES}
    for entry in measured.entries(measured.PATH):
        compiled.setdefault(replace(entry.tile, name="", group_n=1), entry.tile)
    return list(compiled.values())


def find(kernel: ProductKernel, n_rows: int, dim: int) -> Tile:
    """The tile for so many rows of a depth: of the nearest measured line, by D and then by N; without one, of ``TILES``.

    Rows that fill one program only have lines of their own: they have nobody to share the weights with.
    """
    from . import measured

    alone = TILES[1].block_n

    def distance(entry: Entry) -> tuple[float, float]:
        return abs(math.log2(max(dim, 1) / entry.dim)), abs(math.log2(max(n_rows, 1) / entry.rows))

    lines = [e for e in measured.entries(measured.PATH) if e.kernel == kernel and (e.rows <= alone) == (n_rows <= alone)]
    if lines:
        return min(lines, key=distance).tile
    return TILES[1] if n_rows <= alone else TILES[0]
