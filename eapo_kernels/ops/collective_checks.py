"""One exchange before the work on a head split over processes: what each process brings, or why it cannot take part.

So that what one process refuses is an error on all of them, instead of a wait for a collective that never comes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EapoError, require

Fact = int | float | str | bool | None

_TEXT = "128q"
"""What every process sends first, as int64: 1 KiB of text, cut where a message is longer."""

_CHECKSUMS = 2
_REFUSAL = "!"  # facts start with a bracket


@contextmanager
def propagate_errors(process_group: object, *tensors: object) -> Iterator[None]:
    """Around the checks of a call, before ``exchange``: an EapoError raised inside reaches the other processes of a group.

    tensors: the first one tells the device that the processes exchange on; none: the CPU.
    """
    try:
        yield
    except EapoError as error:
        if isinstance(process_group, dist.ProcessGroup):
            require_group(process_group)
            device = next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
            _gather(process_group, f"{_REFUSAL}{error}", {}, device)
        raise


def exchange(
    process_group: dist.ProcessGroup, rows: int, facts: Mapping[str, Fact], values: Mapping[str, Tensor], device: torch.device
) -> list[int]:
    """``rows`` of every process, in the order of the ranks. Collective; on CUDA the exchange waits, nothing else does.

    Args:
        process_group: all its processes call this, or leave ``propagate_errors`` by an error.
        rows: may differ.
        facts: must be the same everywhere, by name; the first one says which call it is.
        values: up to two tensors [N] that must be the same bits everywhere, by name. Compared by checksums.
        device: where to exchange.

    Raises:
        EapoError: a process refused, or a fact or a value is not the same on all (on every process, the same message).
    """
    texts, checksums = _gather(process_group, json.dumps([*facts.values(), rows]), values, device)
    for rank, text in enumerate(texts):
        if text.startswith(_REFUSAL):
            raise EapoError(f"{text.removeprefix(_REFUSAL)} on rank {rank}")
    table = [json.loads(text) for text in texts]
    for rank, found in enumerate(table):
        for name, ours, theirs in zip(facts, table[0], found, strict=False):  # another call has other facts, but a first one
            require(ours == theirs, name, f"the same on all processes ({ours} on rank 0)", f"{theirs} on rank {rank}")
    for rank, sums in enumerate(checksums):
        for name, ours, theirs in zip(values, checksums[0], sums, strict=False):
            require(ours == theirs, name, "the same values on all processes", f"other ones than rank 0 on rank {rank}")
    return [row[-1] for row in table]


def require_group(process_group: object) -> None:
    """Raise unless it is a process group that this process belongs to."""
    require_initialised()
    member = isinstance(process_group, dist.ProcessGroup) and process_group is not dist.GroupMember.NON_GROUP_MEMBER
    require(member, "process_group", "a ProcessGroup of this process, a VocabShard or None", repr(process_group))


def require_initialised() -> None:
    """Raise unless there are process groups at all."""
    require(dist.is_available() and dist.is_initialized(), "process_group", "torch.distributed initialised", "no process group")


def _gather(
    process_group: dist.ProcessGroup, text: str, values: Mapping[str, Tensor], device: torch.device
) -> tuple[list[str], list[list[int]]]:
    """The text and the checksums of every process, by rank."""
    size = struct.calcsize(_TEXT)
    mine = torch.tensor(struct.unpack(_TEXT, text.encode()[:size].ljust(size)), dtype=torch.int64, device=device)
    words = len(mine)
    sums = [_checksum(t) for t in values.values()]
    mine = torch.cat([mine, *sums, mine.new_zeros(_CHECKSUMS - len(sums))])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, mine, group=process_group)
    table = torch.stack(parts).tolist()
    texts = [struct.pack(_TEXT, *row[:words]).decode(errors="ignore").rstrip() for row in table]
    return texts, [row[words:] for row in table]


def _checksum(values: Tensor) -> Tensor:
    """[1] int64 from the bits of ``values`` [N] and their places: integers that wrap, the same in any order of addition."""
    bits = {4: torch.int32, 8: torch.int64}[values.element_size()]
    places = torch.arange(1, values.numel() + 1, device=values.device)
    mixed = (values.contiguous().view(bits).long() ^ (places * 0x9E3779B1)) * 0x2545F4914F6CDD1D
    return ((mixed ^ (mixed >> 32)) * 0x2545F4914F6CDD1D).sum(0, keepdim=True)
