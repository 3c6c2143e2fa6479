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

from ..checks import FLOATS, describe
from ..errors import EapoError, require

ELSEWHERE = -1
"""Local target of a row whose target lies in another process's shard."""

NOWHERE = -2
"""Local target of a row whose target is no token, which nobody checks on CUDA: its statistics are NaN."""

_REFUSED = -1
_SAME = ("columns of the weight", "rows of hidden", "dtype of the weight", "gradients wanted")


@dataclass(frozen=True)
class VocabShard:
    """The rows ``start ... start + V - 1`` of a head's weight [total, D], held by one process of a group.

    May be given as ``process_group=`` wherever a group may: then no sizes are exchanged (a group alone costs one small
    collective a call and, on CUDA, a synchronisation), and ``torch.compile`` can trace the call.

    Attributes:
        group: name of the process group (``ProcessGroup.group_name``).
        start: first row.
        total: rows of all shards.
        widest: rows of the largest shard: what all processes cut their work by.
    """

    group: str
    start: int
    total: int
    widest: int

    @staticmethod
    def of(process_group: dist.ProcessGroup, weight: Tensor) -> VocabShard:
        """The shard of this process's ``weight`` [V, D], behind those of the lower ranks. Collective: every process calls it.

        Raises:
            EapoError: not a process group that this process belongs to, or a process without rows (on every process).
        """
        _require_group(process_group)
        sizes = [row[0] for row in _exchange_numbers(process_group, [weight.shape[0]], weight.device)]
        return _from_sizes(process_group, sizes)

    @staticmethod
    def chunked(process_group: dist.ProcessGroup, total: int) -> VocabShard:
        """This process's shard where ``total`` rows are split as by ``torch.chunk``: equal parts, the last one smaller.

        That is how DTensor's ``Shard(0)`` splits, and any even split. No communication.

        Raises:
            EapoError: not a process group that this process belongs to, or so few rows that a process has none.
        """
        _require_group(process_group)
        world = dist.get_world_size(process_group)
        widest = -(-total // world)
        return _from_sizes(process_group, [max(0, min(widest, total - rank * widest)) for rank in range(world)])

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


def resolve_shard(process_group: object, hidden: Tensor, weight: Tensor) -> VocabShard | None:
    """The shard that ``process_group`` (None, a group or a VocabShard) means for checked inputs; None: the weight is whole.

    A group: exchanges the sizes, and compares what must be the same on all processes.

    Raises:
        EapoError: it is none of these, the processes differ, or the weight is not the shard's (the last for a VocabShard: on
            the process where it is not).
    """
    if process_group is None:
        return None
    rows = weight.shape[0]
    if isinstance(process_group, VocabShard):
        shard = process_group
        fits = rows <= shard.widest and shard.start + rows <= shard.total
        require(fits, "weight", f"at most {shard.widest} rows from row {shard.start} of {shard.total}", describe(weight))
    else:
        _require_group(process_group)
        assert isinstance(process_group, dist.ProcessGroup)
        wanted = 2 * hidden.requires_grad + weight.requires_grad if torch.is_grad_enabled() else 0
        numbers = [rows, weight.shape[1], hidden.shape[:-1].numel(), FLOATS.index(weight.dtype), wanted]
        table = _exchange_numbers(process_group, numbers, weight.device)
        for rank, found in enumerate(table):
            for name, ours, theirs in zip(_SAME, table[0][1:], found[1:], strict=True):
                require(ours == theirs, name, f"the same on all processes ({ours} on rank 0)", f"{theirs} on rank {rank}")
        shard = _from_sizes(process_group, [row[0] for row in table])
    return shard if rows < shard.total else None  # no other process has rows


def refuse_call(process_group: object, weight: object) -> None:
    """Tell the other processes of the group that this one cannot take part, so that they raise instead of waiting."""
    if isinstance(process_group, dist.ProcessGroup) and isinstance(weight, Tensor):
        _require_group(process_group)
        _exchange_numbers(process_group, [_REFUSED] * (1 + len(_SAME)), weight.device)


def _named_group(name: Any) -> dist.ProcessGroup:
    """The group of a name: what a custom op's schema can carry."""
    require(dist.is_available() and dist.is_initialized(), "process_group", "torch.distributed initialised", "no process group")
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)
    except RuntimeError as error:
        raise EapoError(f"process_group: expected the name of a process group, got {name!r}") from error


def _require_group(process_group: object) -> None:
    require(dist.is_available() and dist.is_initialized(), "process_group", "torch.distributed initialised", "no process group")
    member = isinstance(process_group, dist.ProcessGroup) and process_group is not dist.GroupMember.NON_GROUP_MEMBER
    require(member, "process_group", "a ProcessGroup of this process, a VocabShard or None", repr(process_group))


def _exchange_numbers(process_group: dist.ProcessGroup, numbers: list[int], device: torch.device) -> list[list[int]]:
    """What every process brings, by rank. Raises EapoError where one refused."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, mine, group=process_group)
    table: list[list[int]] = torch.stack(parts).tolist()
    refused = [rank for rank, row in enumerate(table) if row[0] == _REFUSED]
    if refused and numbers[0] != _REFUSED:
        raise EapoError(f"process_group: expected inputs that fit on every process, got an error on rank {refused[0]}")
    return table


def _from_sizes(process_group: dist.ProcessGroup, sizes: list[int]) -> VocabShard:
    require(min(sizes) >= 1, "weight", "at least one row on every process", f"shards of {sizes} rows")
    rank = dist.get_rank(process_group)
    return VocabShard(process_group.group_name, sum(sizes[:rank]), sum(sizes), max(sizes))
