"""What a line of the table of tiles says. Nothing here imports triton."""

from __future__ import annotations

from dataclasses import dataclass

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
        descriptors: load operands by tensor descriptor (TMA); needs rows of 16-byte multiples, see ``launch.describable``.
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
