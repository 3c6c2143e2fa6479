"""The launchers of the two kernels, with the outputs of their namesakes in ``ops/triton``, so that what follows is shared."""

from __future__ import annotations

import torch
from torch import Tensor

from ..projection import Projection
from ..triton.configs import Tile as TritonTile
from ..triton.configs import tiles_per_split
from ..triton.offsets import ScaledExpSums
from ..triton.sums import PartialSums
from . import configs
from .configs import Operand, ProductBuild, Tile
from .launch import Launch, product_launch, slots

OPERANDS: dict[torch.dtype, Operand] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def stream_statistics(
    projection: Projection,
    targets: Tensor,
    *,
    entropy: bool,
    second_moments: bool,
    budget: int,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Launch, PartialSums]:
    """The launch that fills the sums of every row, and the sums, which take at most ``budget`` bytes (one range if need be).

    targets: [N] int64. tile, splits: instead of the table's tile and the number of ranges that fills the device. In ping-pong
    each warp group keeps sums of its own, and a range has two.
    """
    tile = tile or configs.find("stream_statistics", projection.n_rows, projection.dim)
    per_range = 2 if tile.pingpong else 1
    row_tiles, column_tiles = -(-projection.n_rows // tile.cluster_rows), -(-projection.vocab // tile.block_v)
    if splits is None:
        most = budget // (4 * PartialSums.fields(entropy, second_moments) * projection.n_rows * per_range)
        length = tiles_per_split(row_tiles, column_tiles, slots(projection.hidden.device, tile), most)
    else:
        length = -(-column_tiles // splits)
    ranges = -(-column_tiles // length)
    sums = PartialSums.empty(projection, ranges * per_range, entropy, second_moments)
    item = ProductBuild(
        "stream_statistics",
        tile,
        OPERANDS[projection.hidden.dtype],
        entropy=entropy or second_moments,
        second_moments=second_moments,
        bias=projection.bias is not None,
    )
    return product_launch(item, projection, targets, sums.values, length), sums


def exp_sums(projection: Projection, entropy: bool, tile: Tile | None = None) -> ScaledExpSums:
    """Uninitialised offsets and sums for ``scaled_exp_gemm``."""
    tile = tile or configs.find("scaled_exp_gemm", projection.n_rows, projection.dim)
    return ScaledExpSums.empty(projection, entropy, tile=TritonTile(tile.block_n, tile.block_v))


def scaled_exp_gemm(
    projection: Projection, targets: Tensor, sums: ScaledExpSums, matrix: Tensor, *, tile: Tile | None = None
) -> Launch:
    """The launch that fills ``matrix`` [N, V] with E and ``sums.values``, from ``sums.offsets``.

    targets: [N] int64. matrix: in hidden's dtype, contiguous rows, a multiple of 16 bytes apart. tile: instead of the table's.
    """
    tile = tile or configs.find("scaled_exp_gemm", projection.n_rows, projection.dim)
    assert projection.softcap is None
    assert tile.block_v == sums.block_v
    assert matrix.dtype == projection.hidden.dtype
    item = ProductBuild("scaled_exp_gemm", tile, OPERANDS[matrix.dtype], entropy=sums.entropy, bias=projection.bias is not None)
    return product_launch(item, projection, targets, sums.values, 1, offsets=sums.offsets[0], matrix=matrix)
