"""Tiles of the CUDA kernels worth trying. Few, so all are raced. Pure functions."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

from eapo_kernels.ops.cuda import tiles
from eapo_kernels.ops.cuda.tiles import TILES, KernelName, Tile

KERNELS: tuple[KernelName, ...] = ("stream_statistics", "scaled_exp_gemm")

STAGGERS, GROUPS, CLUSTERS = (0, 2, 3), (4, 8, 16), (2, 1)
"""Steps before a tile's end at which the second warp group waits (1 was behind 2 in a prediction, see docs/log.md), row tiles that
sweep the vocabulary together, programs of a cluster."""


@dataclass(frozen=True)
class CudaSearch:
    """One line of the CUDA kernels' table to be measured; see ``search.Job``."""

    kernel: KernelName
    n: int
    d: int
    v: int
    dtype: str = "bfloat16"

    @property
    def key(self) -> tuple[str, int, int]:
        return self.kernel, self.d, self.n

    def current(self) -> Tile:
        return tiles.find(self.kernel, self.n, self.d)

    def candidates(self) -> list[Tile]:
        """Every shape of ``TILES`` in clusters of one and two with every group and stagger, nearest to today's first."""
        current = self.current()
        found = [
            replace(shape, name=_name(shape, cluster), cluster=cluster, stagger=stagger, group_n=group)
            for shape in TILES
            for cluster in CLUSTERS
            for stagger in ((0,) if shape.pingpong else STAGGERS)
            for group in GROUPS
        ]
        found = [tile for tile in dict.fromkeys(found) if tile != current]
        mine = tuple(vars(current).values())
        return [current, *sorted(found, key=lambda tile: sum(map(operator.ne, vars(tile).values(), mine)))]


def _name(shape: Tile, cluster: int) -> str:
    return shape.name.removesuffix("_alone") + ("_alone" if cluster == 1 else "")
