"""A step over several ranks: every rank gets the statistics of the whole step.

One collective of vectors [N], once a step before the first update; hidden states and logits stay
where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import require
from ...types import PER_TOKEN, TokenBatch, TokenStats
from ..batch import has_token_advantages, n_sequences

_BATCH_SEQUENCES = ("rewards", "group_ids", "sequence_lengths")


class GatheredStep(NamedTuple):
    """A step of all ranks, and this rank's part of it.

    Attributes:
        batch: the responses of rank 0, then of rank 1, ..., with consecutive ``sequence_ids``. Its
            support is this rank's: tokens of other ranks have none.
        stats: of the same tokens.
        extras: of the same tokens, by name.
        own: this rank's tokens: ``batch.select(own)``.
        own_sequences: this rank's responses.
    """

    batch: TokenBatch
    stats: TokenStats
    extras: dict[str, Tensor]
    own: slice
    own_sequences: slice


def gather_step(
    batch: TokenBatch,
    stats: TokenStats,
    extras: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> GatheredStep:
    """Gather a step's ragged batches from all ranks of ``group``; all ranks return the same
    tensors.

        step = gather_step(batch, stats, extras)
        weighted = weight_tokens(method, step.batch, step.stats, extras=step.extras, ...)
        loss = policy_loss(hidden, weight, weighted.select(step.own), ...)  # or any part of ``own``

    ``batch.denominator`` is passed through; compute it from the whole step (``loss_denominator``).
    The sum of the ranks' gradients is then the whole step's gradient. With a wrapper that averages
    gradients over ranks, multiply the loss by the number of ranks.

    Args:
        batch: this rank's responses, sequence_ids in [0, B) of its own. ``group_ids`` are global:
            equal numbers on different ranks are the same group. A rank may have none.
        stats: the statistics of its tokens.
        extras: further [N] tensors by name, the same names on every rank.
        group: a process group whose backend handles the tensors' device; None: the default group.
            Without an initialised torch.distributed the step is this process's batch.

    Raises:
        EapoError: the ranks' fields or dtypes differ; raised on every rank.
    """
    extras = dict(extras or {})
    tokens, sequences = batch.targets.numel(), n_sequences(batch)
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return GatheredStep(batch, stats, extras, slice(0, tokens), slice(0, sequences))
    fields = _fields(batch, stats, extras)
    signature = {name: str(value.dtype) for name, value in fields.items()}
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, (tokens, sequences, signature), group=group)
    for rank, (_, _, theirs) in enumerate(sizes):
        require(theirs == sizes[0][2], f"fields of rank {rank}", f"those of rank 0, {sizes[0][2]}", theirs)
    parts = _exchange(fields, [(n, b) for n, b, _ in sizes], group)
    first = 0
    for part, (_, count, _) in zip(parts, sizes, strict=True):
        part["batch.sequence_ids"] = part["batch.sequence_ids"] + first
        first += count
    full = {name: torch.cat([part[name] for part in parts]) for name in fields}
    rank = dist.get_rank(group)
    before = [sum(size[i] for size in sizes[:rank]) for i in (0, 1)]
    renamed: dict[str, Any] = {name.split(".")[-1]: value for name, value in full.items() if name.startswith("batch.")}
    if "token.advantages" in full:
        renamed.update(advantages=full["token.advantages"])
    support = None if batch.support is None else batch.support.among(before[0], sum(n for n, *_ in sizes))
    by_token = None if batch.advantages is None else "token.advantages" in full
    return GatheredStep(
        replace(replace(batch, support=support, token_advantages=by_token), **renamed),
        stats._replace(**{name: full[f"stats.{name}"] for name in TokenStats._fields if f"stats.{name}" in full}),
        {name: full[f"extras.{name}"] for name in extras},
        slice(before[0], before[0] + tokens),
        slice(before[1], before[1] + sequences),
    )


def _fields(batch: TokenBatch, stats: TokenStats, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fields to gather by name; advantages are "batch.advantages" [B] or "token.advantages" [N]."""
    found = {f"batch.{name}": getattr(batch, name) for name in (*PER_TOKEN, *_BATCH_SEQUENCES)}
    found["token.advantages" if has_token_advantages(batch) else "batch.advantages"] = batch.advantages
    found |= {f"stats.{name}": value for name, value in zip(TokenStats._fields, stats, strict=True)}
    found |= {f"extras.{name}": value for name, value in sorted(extras.items())}
    return {name: value.detach() for name, value in found.items() if value is not None}


def _exchange(
    fields: Mapping[str, Tensor], sizes: list[tuple[int, int]], group: dist.ProcessGroup | None
) -> list[dict[str, Tensor]]:
    """The fields of every rank, bit for bit.

    One all-gather of the bytes of all fields, padded to the longest rank.
    """
    per_sequence = {"batch.advantages", *(f"batch.{name}" for name in _BATCH_SEQUENCES)}
    lengths = [
        {name: (b if name in per_sequence else n) * value.element_size() for name, value in fields.items()} for n, b in sizes
    ]
    own = torch.cat([value.contiguous().view(torch.uint8).flatten() for value in fields.values()])
    buffers = own.new_zeros(len(sizes), max(sum(part.values()) for part in lengths))
    padded = torch.nn.functional.pad(own, (0, buffers.shape[1] - own.numel()))
    dist.all_gather(list(buffers.unbind(0)), padded, group=group)
    result = []
    for buffer, part in zip(buffers, lengths, strict=True):
        pieces = buffer[: sum(part.values())].split(list(part.values()))
        result.append({name: piece.clone().view(fields[name].dtype) for name, piece in zip(part, pieces, strict=True)})
    return result
