"""A head whose weight is split over the vocabulary: the rows of each rank, and the collectives.

Each rank reduces its own columns to the sums of E3 and E4. The sums are gathered once and merged in
the order of the ranks (docs/math.md E14), so that statistics and coefficients are the same bits on
all ranks. Each rank then computes the gradient of its own rows of the weight and a part of
d_hidden, which is summed over the ranks in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import EapoError, describe, require

ELSEWHERE = -1
"""Local target of a row whose target lies in another rank's shard."""

INVALID = -2
"""Local target of a row whose target is out of range; on CUDA such a row's statistics are NaN."""


@dataclass(frozen=True)
class VocabShard:
    """Rows ``start ... start + V - 1`` of a head's weight [total, D], held by one rank of a group.

    ``of`` checks that the weights of the ranks fit together; later calls exchange sums only.
    ``Options(debug=True)`` also compares the arguments of every call between the ranks.

    Attributes:
        group: name of the process group (``ProcessGroup.group_name``).
        start: first row.
        total: rows of all shards.
        max_shard_vocab: rows of the largest shard, from which all ranks compute the same chunks.
    """

    group: str
    start: int
    total: int
    max_shard_vocab: int

    @staticmethod
    def of(process_group: dist.ProcessGroup, weight: Tensor) -> VocabShard:
        """The shard of this rank's ``weight`` [V, D], behind those of the lower ranks.

        Collective: every rank calls it; one all-gather, and a synchronization on CUDA.

        Raises:
            EapoError: not a process group of this process, a rank has no rows, or the weights
                differ in columns, dtype or kind of device; the same message on all ranks.
        """
        require_group(process_group)
        dtypes = sorted(str(d) for d in vars(torch).values() if isinstance(d, torch.dtype))
        rows, columns = weight.shape if weight.dim() == 2 else (0, 0)  # refused by all ranks below
        mine = torch.tensor([rows, columns, dtypes.index(str(weight.dtype)), weight.is_cuda], device=weight.device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(parts, mine, group=process_group)
        sizes, dims, kinds, devices = torch.stack(parts, 1).tolist()
        shard = VocabShard.of_sizes(process_group, sizes)
        for name, values in (("columns", dims), ("dtype", [dtypes[k] for k in kinds]), ("device", devices)):
            for rank, value in enumerate(values):
                same = f"the same {name} on all ranks ({values[0]} on rank 0)"
                require(value == values[0], "weight", same, f"{value} on rank {rank}")
        return shard

    @staticmethod
    def chunked(process_group: dist.ProcessGroup, total: int) -> VocabShard:
        """This rank's shard of ``total`` rows split as by ``torch.chunk`` or DTensor's Shard(0).

        No communication.

        Raises:
            EapoError: not a process group of this process, or so few rows that a rank has none.
        """
        require_group(process_group)
        world = dist.get_world_size(process_group)
        largest = -(-total // world)
        return VocabShard.of_sizes(process_group, [max(0, min(largest, total - rank * largest)) for rank in range(world)])

    @staticmethod
    def of_sizes(process_group: dist.ProcessGroup, sizes: list[int]) -> VocabShard:
        """This rank's shard where the ranks hold ``sizes`` rows. No communication.

        Raises:
            EapoError: a rank has no row.
        """
        require(min(sizes) >= 1, "weight", "at least one row on every rank", f"shards of {sizes} rows")
        rank = dist.get_rank(process_group)
        return VocabShard(process_group.group_name, sum(sizes[:rank]), sum(sizes), max(sizes))

    @staticmethod
    def resolve(process_group: object, weight: Tensor) -> VocabShard | None:
        """The shard of a call's ``process_group``; None if this rank holds the whole weight.

        Args:
            process_group: None, a VocabShard, or a group. The first call with a group and a weight
                makes the shard (``of``, a collective), which is cached as long as the weight
                exists.
            weight: [V, D] of the caller.

        Raises:
            EapoError: none of the three, or a weight that does not fit the shard.
        """
        if process_group is None:
            return None
        shard = process_group
        if not isinstance(shard, VocabShard):
            require_group(process_group)
            assert isinstance(process_group, dist.ProcessGroup)
            require(isinstance(weight, Tensor), "weight", "a tensor [V, D]", describe(weight))
            known = _SHARDS.setdefault(weight, WeakKeyDictionary())
            shape, shard = known.get(process_group, (None, None))
            if shard is None or shape != weight.shape:
                shard = VocabShard.of(process_group, weight)
                known[process_group] = weight.shape, shard
        is_matrix = isinstance(weight, Tensor) and weight.dim() == 2 and weight.numel() > 0
        require(is_matrix, "weight", "a floating-point [V, D] with V, D >= 1", describe(weight))
        rows = weight.shape[0]
        fits = rows <= shard.max_shard_vocab and shard.start + rows <= shard.total
        expected = f"at most {shard.max_shard_vocab} rows from row {shard.start} of {shard.total}"
        require(fits, "weight", expected, f"{rows} rows")
        return shard if rows < shard.total else None

    @property
    def ranks(self) -> int:
        return dist.get_world_size(named_group(self.group))

    def local_targets(self, targets: Tensor, vocab: int) -> Tensor:
        """Targets [N] as columns of this shard of ``vocab`` rows, or ELSEWHERE or INVALID."""
        local = targets - self.start
        known = torch.where((targets >= 0) & (targets < self.total), ELSEWHERE, INVALID)
        return torch.where((local >= 0) & (local < vocab), local, known)

    def all_gather(self, values: Tensor) -> Tensor:
        """[fields, ranks, N] contiguous, in the order of the ranks, from [fields, N] of each."""
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        dist.all_gather(parts, values.contiguous(), group=named_group(self.group))
        return torch.stack(parts, 1)

    def all_reduce_(self, values: Tensor) -> Tensor:
        """``values`` summed over the ranks, in place; contiguous."""
        dist.all_reduce(values, group=named_group(self.group))
        return values


_SHARDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""weight -> {group: (shape of the weight, VocabShard)}, for calls with a group."""


def require_group(process_group: object) -> None:
    """Raise unless it is a process group of this process."""
    require(dist.is_available() and dist.is_initialized(), "process_group", "torch.distributed initialised", "no process group")
    member = isinstance(process_group, dist.ProcessGroup) and process_group is not dist.GroupMember.NON_GROUP_MEMBER
    require(member, "process_group", "a ProcessGroup of this process, a VocabShard or None", repr(process_group))


def named_group(name: Any) -> dist.ProcessGroup:
    """The process group of a name: the arguments of a custom op include the name only.

    torch has no public function for this; DeviceMesh uses the same private one (in 2.11 to 2.15).
    """
    require(dist.is_available() and dist.is_initialized(), "process_group", "torch.distributed initialised", "no process group")
    resolve = getattr(dist.distributed_c10d, "_resolve_process_group", None)
    require(resolve is not None, "torch", "a release whose distributed_c10d has _resolve_process_group", torch.__version__)
    assert resolve is not None
    try:
        return resolve(name)
    except RuntimeError as error:
        raise EapoError(f"process_group: expected the name of a process group, got {name!r}") from error


def merge_ranges(sums: Tensor) -> Tensor:
    """Merge sums over ranges of the vocabulary to sums over all of them (docs/math.md E14).

    Args:
        sums: [3, 4 or 7, ranges, N]; fields: row_max, z_target (0 outside the range that holds it),
            then sum_exp_excl_target, x_exp, exp2, x_exp2 and xx_exp (``torch_backend.RowSums``)
            relative to the range's row_max. A range whose columns are all removed has row_max -inf
            and zero sums.

    Returns:
        [3, 4 or 7, N] relative to the largest row_max.
    """
    row_max, z_target, sum_exp, *moments = sums.unbind(0)
    top = row_max.amax(0)
    shift = row_max - torch.where(top == -torch.inf, 0, top)
    r = shift.exp()
    shift = torch.where(r > 0, shift, 0)
    merged = [top, z_target.sum(0), (r * sum_exp).sum(0)]
    if moments:
        x_exp = moments[0]
        merged.append((r * (x_exp + shift * sum_exp)).sum(0))
    if len(moments) > 1:
        _, exp2, x_exp2, xx_exp = moments
        merged.append((r * r * exp2).sum(0))
        merged.append((r * r * (x_exp2 + shift * exp2)).sum(0))
        merged.append((r * (xx_exp + shift * (2 * x_exp + shift * sum_exp))).sum(0))
    return torch.stack(merged)
