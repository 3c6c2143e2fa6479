"""``Options(debug=True)`` on a split head: the ranks compare the arguments of each call.

A difference, or an invalid argument on one rank, then raises an error on every rank. Without the
comparison the other ranks would wait in a collective until its time-out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EapoError, require
from ..types import IGNORE_INDEX, Options
from .chunking import workspace_bytes
from .lm_head import Projection
from .vocab_shard import VocabShard, named_group


def propagate(error: EapoError, process_group: object, options: object) -> None:
    """With ``debug``: make ``compare`` raise ``error`` on all other ranks."""
    group = _group(process_group)
    if group is not None and isinstance(options, Options) and options.debug:
        _all_gather(group, str(error))


def compare(projection: Projection, targets: Tensor, options: Options, **arguments: object) -> None:
    """With ``debug`` on a split head: raise unless all ranks make the same call. Collective.

    Args:
        projection, targets: of the call; targets [N] int64 are compared by their values.
        arguments: further values that must be equal, by name; the first is the name of the call.

    Raises:
        EapoError: a rank called ``propagate``, or an argument differs; the same message on all
            ranks.
    """
    p = projection
    if p.shard is None or not options.debug:
        return
    gradients = [n for n in ("hidden", "weight") if torch.is_grad_enabled() and getattr(p, n).requires_grad]
    temperature: Any = p.inv_temperature
    if p.row_inv_temperature is not None:
        temperature = torch.where(targets == IGNORE_INDEX, 1, p.row_inv_temperature).tolist()
    facts: dict[str, object] = {
        **arguments,
        "columns of the weight": p.dim,
        "rows of hidden": p.n_rows,
        "dtype of the weight": str(p.weight.dtype),
        "gradients wanted": " and ".join(gradients) or "none",
        "bias": "none" if p.bias is None else "one",
        "softcap": p.softcap,
        "logit_scale": p.logit_scale,
        "memory budget": workspace_bytes(options, p.hidden.device),
        "Options.plan": options.plan,
        "Options.compact": options.compact,
        "targets": targets.tolist(),
        "inv_temperature": temperature,
    }
    ranks = _all_gather(named_group(p.shard.group), facts)
    for rank, found in enumerate(ranks):
        if isinstance(found, str):
            raise EapoError(f"{found} on rank {rank}")
    for rank, found in enumerate(ranks):
        for name, ours in ranks[0].items():
            theirs = found.get(name, "nothing")
            if isinstance(ours, list) and isinstance(theirs, list):
                require(ours == theirs, name, "the same values on all ranks", f"others than rank 0 on rank {rank}")
            ours, theirs = ("a tensor" if isinstance(value, list) else value for value in (ours, theirs))
            require(ours == theirs, name, f"the same on all ranks ({ours} on rank 0)", f"{theirs} on rank {rank}")


def _group(process_group: object) -> dist.ProcessGroup | None:
    if isinstance(process_group, VocabShard):
        return named_group(process_group.group)
    member = isinstance(process_group, dist.ProcessGroup) and process_group is not dist.GroupMember.NON_GROUP_MEMBER
    return process_group if member else None  # type: ignore[return-value]


def _all_gather(group: dist.ProcessGroup, mine: Mapping[str, object] | str) -> list[Any]:
    """``mine`` of every rank, in the order of the ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
