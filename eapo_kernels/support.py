"""``TokenSupport``: the tokens that a sampler could have drawn at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .errors import EapoError, ShapeError, describe, require
from .types import IGNORE_INDEX

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class TokenSupport:
    """The tokens that a sampler could have drawn at each of N positions: the ids of top-p, top-k, min-p.

    With a support softmax, log-prob, entropy and lse are those of the logits of these tokens alone
    (docs/sparse.md). A position whose target counts has its target among them; one that does not
    count may have none. Make it with ``from_lists``, ``from_padded`` or ``from_csr``, which sort.

    Attributes:
        ids: [E] int64, the tokens of position 0, of position 1, ...; ascending within a position.
        offsets: [N + 1] int64, the tokens of position i are ids[offsets[i] : offsets[i + 1]].
        full_entropy: entropies are those of the whole vocabulary instead (one product of hidden and
            weight more); log-prob and lse stay those of the support.
    """

    ids: Tensor
    offsets: Tensor
    full_entropy: bool = False

    def __post_init__(self) -> None:
        for name, value in (("ids", self.ids), ("offsets", self.offsets)):
            if not (isinstance(value, Tensor) and value.dim() == 1 and value.dtype == torch.int64):
                raise ShapeError(f"support.{name}: expected int64 [{'E' if name == 'ids' else 'N + 1'}], got {describe(value)}")
        if self.offsets.numel() == 0 or self.offsets.device != self.ids.device:
            raise ShapeError(
                f"support.offsets: expected int64 [N + 1] {self.ids.device} like the ids, got {describe(self.offsets)}"
            )

    @staticmethod
    def from_lists(
        lists: Sequence[Sequence[int] | Tensor], device: str | torch.device = "cpu", *, full_entropy: bool = False
    ) -> TokenSupport:
        """From the token ids of each position, in any order."""
        parts = [torch.as_tensor(one).reshape(-1) for one in lists]
        wrong = [part for part in parts if part.numel() and part.dtype not in _INTEGERS]
        require(not wrong, "lists", "integers, the token ids of each position", wrong[:1])
        counts = torch.tensor([0, *(part.numel() for part in parts)])
        ids = torch.cat([part.long() for part in parts]) if parts else counts[:0]
        return TokenSupport.from_csr(ids.to(device), counts.cumsum(0).to(device), full_entropy=full_entropy)

    @staticmethod
    def from_padded(ids: Tensor, pad: int = -1, *, full_entropy: bool = False) -> TokenSupport:
        """From [N, K] integers in any order, filled up with ``pad``."""
        if not (isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype in _INTEGERS):
            raise ShapeError(f"ids: expected integers [N, K], got {describe(ids)}")
        given = ids != pad
        offsets = functional.pad(given.sum(1).cumsum(0), (1, 0))
        return TokenSupport.from_csr(ids[given].long(), offsets, full_entropy=full_entropy)

    @staticmethod
    def from_csr(ids: Tensor, offsets: Tensor, *, full_entropy: bool = False) -> TokenSupport:
        """From ids [E] in any order within a position, and offsets [N + 1]; both int64 or int32.

        vLLM's sampling masks have this form. The offsets of a part of a longer list may start above 0.
        """
        for name, value in (("ids [E]", ids), ("offsets [N + 1]", offsets)):
            if not (isinstance(value, Tensor) and value.dim() == 1 and value.dtype in (torch.int64, torch.int32)):
                raise ShapeError(f"{name}: expected int64/int32 of one dimension, got {describe(value)}")
        support = TokenSupport(ids.long(), offsets.long(), full_entropy)
        if offsets.numel() > 1:
            first, last = (int(end) for end in offsets[[0, -1]])
            inside = bool((offsets.diff() >= 0).all()) and first >= 0 and last <= len(ids)
            require(inside, "offsets", f"rising numbers in [0, {len(ids)}]", offsets.tolist()[:8])
            support = TokenSupport(support.ids[first:last], support.offsets - first, full_entropy)
        by_id = support.ids.argsort(stable=True)
        order = by_id[support.rows()[by_id].argsort(stable=True)]
        return TokenSupport(support.ids[order], support.offsets, full_entropy)

    @property
    def n_rows(self) -> int:
        """N."""
        return self.offsets.numel() - 1

    def rows(self) -> Tensor:
        """[E] int64, the position of every id."""
        numbers = torch.arange(self.n_rows, device=self.offsets.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=self.ids.numel())

    def select(self, positions: Tensor | slice) -> TokenSupport:
        """The support of some of the positions. Synchronizes on CUDA."""
        counts, starts = self.offsets.diff()[positions], self.offsets[:-1][positions]
        offsets = functional.pad(counts.cumsum(0), (1, 0))
        places = torch.arange(int(offsets[-1]), device=self.ids.device)
        places += (starts - offsets[:-1]).repeat_interleave(counts, output_size=places.numel())
        return TokenSupport(self.ids[places], offsets, self.full_entropy)

    def among(self, before: int, total: int) -> TokenSupport:
        """The support of ``total`` positions of which these are those behind the first ``before``; the
        others have no ids."""
        behind = total - before - self.n_rows
        ends = self.offsets.new_tensor([0, self.ids.numel()])
        offsets = torch.cat([ends[:1].expand(before), self.offsets, ends[1:].expand(behind)])
        return TokenSupport(self.ids, offsets, self.full_entropy)

    def to(self, device: str | torch.device) -> TokenSupport:
        """The same support on another device."""
        return TokenSupport(self.ids.to(device), self.offsets.to(device), self.full_entropy)

    def check(self, targets: Tensor, vocab: int) -> None:
        """Raise EapoError unless the values make sense: offsets from 0 to E, ids ascending in [0, vocab),
        and each target [N] that is not -100 among the ids of its position. Reads values.
        """
        offsets, ids, rows = self.offsets, self.ids, None
        good = int(offsets[0]) == 0 and int(offsets[-1]) == ids.numel() and bool((offsets.diff() >= 0).all())
        require(good, "support.offsets", f"rising numbers from 0 to {ids.numel()}, the number of ids", offsets.tolist()[:8])
        rows = self.rows()
        inside = (ids >= 0) & (ids < vocab)
        if not bool(inside.all()):
            place = int((~inside).nonzero()[0, 0])
            raise EapoError(f"support.ids: expected values in [0, {vocab}), got {int(ids[place])} in row {int(rows[place])}")
        wrong = (ids[1:] <= ids[:-1]) & (rows[1:] == rows[:-1])
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0, 0])
            pair = f"{int(ids[place])} before {int(ids[place + 1])} in row {int(rows[place])}"
            raise EapoError(f"support.ids: expected ascending ids without duplicates (from_csr sorts), got {pair}")
        found = torch.zeros_like(targets, dtype=torch.bool)
        found[rows[ids == targets[rows]]] = True
        lost = (targets != IGNORE_INDEX) & ~found
        if bool(lost.any()):
            row = int(lost.nonzero()[0, 0])
            expected = f"the target {int(targets[row])} among the ids of row {row}"
            raise EapoError(f"support.ids: expected {expected}, got {ids[rows == row].tolist()[:8]}")


def require_support(support: object, targets: Tensor, name: str) -> None:
    """Raise unless it is a support with a row for each of the targets [N], on their device."""
    if not isinstance(support, TokenSupport):
        raise EapoError(f"{name}: expected a TokenSupport or None, got {support!r}")
    fits = support.n_rows == targets.numel() and support.ids.device == targets.device
    got = f"{support.n_rows} positions on {support.ids.device}"
    require(fits, name, f"{targets.numel()} positions on {targets.device}", got, ShapeError)
