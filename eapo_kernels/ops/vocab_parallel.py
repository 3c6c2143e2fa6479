"""A head whose weight is split over the vocabulary: which rows a process holds, and the exchanges the op needs.

Each process reduces its own columns to the sums of E3 and E4; those are exchanged once and merged in the same order
everywhere (docs/math.md E14), so that statistics and coefficients are the same bits on all processes. Each then has the
gradient of its own rows of the weight, and a part of d_hidden that is summed over the processes in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EapoError, require
from .collective_checks import exchange, require_group, require_initialised

ELSEWHERE = -1
"""Local target of a row whose target lies in another process's shard."""

NOWHERE = -2
"""Local target of a row whose target is no token, which nobody checks on CUDA: its statistics are NaN."""


@dataclass(frozen=True)
class VocabShard:
    """The rows ``start ... start + V - 1`` of a head's weight [total, D], held by one process of a group.

    May be given as ``process_group=`` wherever a group may: then nothing is exchanged before the work (a group alone costs one
    small collective a call and, on CUDA, a synchronisation), and ``torch.compile`` can trace the call; but an argument that
    one process refuses, or that differs between them, is no error on the others: they wait for it.

    Attributes:
        group: name of the process group (``ProcessGroup.group_name``).
        start: first row.
        total: rows of all shards.
        max_shard_vocab: rows of the largest shard: what all processes cut their work by.
    """

    group: str
    start: int
    total: int
    max_shard_vocab: int

    @staticmethod
    def of(process_group: dist.ProcessGroup, weight: Tensor) -> VocabShard:
        """The shard of this process's ``weight`` [V, D], behind those of the lower ranks. Collective: every process calls it.

        Raises:
            EapoError: not a process group that this process belongs to, or a process without rows (on every process).
        """
        require_group(process_group)
        sizes = exchange(process_group, weight.shape[0], {"call": "VocabShard.of"}, {}, weight.device)
        return VocabShard.of_sizes(process_group, sizes)

    @staticmethod
    def chunked(process_group: dist.ProcessGroup, total: int) -> VocabShard:
        """This process's shard where ``total`` rows are split as by ``torch.chunk``: equal parts, the last one smaller.

        That is how DTensor's ``Shard(0)`` splits, and any even split. No communication.

        Raises:
            EapoError: not a process group that this process belongs to, or so few rows that a process has none.
        """
        require_group(process_group)
        world = dist.get_world_size(process_group)
        max_shard_vocab = -(-total // world)
        return VocabShard.of_sizes(
            process_group, [max(0, min(max_shard_vocab, total - rank * max_shard_vocab)) for rank in range(world)]
        )

    @staticmethod
    def of_sizes(process_group: dist.ProcessGroup, sizes: list[int]) -> VocabShard:
        """This process's shard where the processes hold ``sizes`` rows, in the order of the ranks. No communication.

        Raises:
            EapoError: a process has no row.
        """
        require(min(sizes) >= 1, "weight", "at least one row on every process", f"shards of {sizes} rows")
        rank = dist.get_rank(process_group)
        return VocabShard(process_group.group_name, sum(sizes[:rank]), sum(sizes), max(sizes))

    @property
    def processes(self) -> int:
        return dist.get_world_size(_named_group(self.group))

    def local_targets(self, targets: Tensor, vocab: int) -> Tensor:
        """Targets [N] in [0, total) as columns of this shard of ``vocab`` rows; ELSEWHERE or NOWHERE where they are not."""
        local = targets - self.start
        known = torch.where((targets >= 0) & (targets < self.total), ELSEWHERE, NOWHERE)
        return torch.where((local >= 0) & (local < vocab), local, known)

    def gather(self, values: Tensor) -> Tensor:
        """[fields, processes, N] contiguous, in the order of the ranks, from [fields, N] of every process."""
        parts = [torch.empty_like(values) for _ in range(self.processes)]
        dist.all_gather(parts, values.contiguous(), group=_named_group(self.group))
        return torch.stack(parts, 1)

    def add_(self, values: Tensor) -> Tensor:
        """``values`` summed over the processes, in place; contiguous."""
        dist.all_reduce(values, group=_named_group(self.group))
        return values


def _named_group(name: Any) -> dist.ProcessGroup:
    """The group of a name: what a custom op's schema can carry.

    No public function of torch leads from a name to its group; DeviceMesh takes this one (looked up in 2.11 and 2.13).
    """
    require_initialised()
    resolve = getattr(dist.distributed_c10d, "_resolve_process_group", None)
    require(resolve is not None, "torch", "a release whose distributed_c10d has _resolve_process_group", torch.__version__)
    assert resolve is not None
    try:
        return resolve(name)
    except RuntimeError as error:
        raise EapoError(f"process_group: expected the name of a process group, got {name!r}") from error
