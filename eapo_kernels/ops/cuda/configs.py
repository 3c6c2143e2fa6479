"""Shapes of the CUDA kernels as data. None was measured on hardware yet; lines that ``benchmarks.tune`` measured come first.

Why these: csrc/README.md has the budgets of registers, shared memory and L2 that they come from. Nothing here imports triton
or cuda, or looks at a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from . import measured
from .tile import TILES, Entry, ProductKernel, Tile

RowKernel = Literal["row_offsets", "finalize", "scaled_exp_finalize"]
Operand = Literal["bf16", "fp16"]

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
                    yield ProductBuild("scaled_exp_gemm", tile, operand, entropy, bias=bias)


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
    yield RowBuild("scaled_exp_finalize")


def builds() -> Iterator[Build]:
    """Everything that the backend can ask for."""
    yield from product_builds()
    yield from row_builds()


def tiles() -> list[Tile]:
    """``TILES``, and the measured ones that compile to something else."""
    compiled = {replace(tile, name="", group_n=1): tile for tile in TILES}
    for entry in measured.entries(measured.PATH):
        compiled.setdefault(replace(entry.tile, name="", group_n=1), entry.tile)
    return list(compiled.values())


def find(kernel: ProductKernel, n_rows: int, dim: int) -> Tile:
    """The tile for so many rows of a depth: of the nearest measured line, by D and then by N; without one, of ``TILES``.

    Rows that fill one program only have lines of their own: they have nobody to share the weights with.
    """
    alone = TILES[1].block_n

    def distance(entry: Entry) -> tuple[float, float]:
        return abs(math.log2(max(dim, 1) / entry.dim)), abs(math.log2(max(n_rows, 1) / entry.rows))

    lines = [e for e in measured.entries(measured.PATH) if e.kernel == kernel and (e.rows <= alone) == (n_rows <= alone)]
    if lines:
        return min(lines, key=distance).tile
    return TILES[1] if n_rows <= alone else TILES[0]
