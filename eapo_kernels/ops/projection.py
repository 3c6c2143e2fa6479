"""The logits that are never stored: the tensors and the scalar transform that define them (docs/math.md E1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .vocab_parallel import NOWHERE, VocabShard


@dataclass(frozen=True)
class Projection:
    """z = inv_temperature * cap(logit_scale * (hidden @ weight.T + bias)), cap(u) = softcap * tanh(u / softcap).

    Attributes:
        hidden: [N, D] bf16, fp16, fp32 or fp64.
        weight: [V, D], dtype of ``hidden``.
        bias: [V] or None, dtype of ``hidden``; -inf removes a column.
        inv_temperature: > 0, or the factor 1 when ``row_inv_temperature`` is given.
        row_inv_temperature: [N] fp32 (fp64 for fp64 inputs) > 0, or None.
        logit_scale: > 0.
        softcap: > 0, or None.
        shard: which rows of the whole weight ``weight`` (and ``bias``) are; None: all. V stays the number of rows here.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    inv_temperature: float = 1.0
    row_inv_temperature: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    shard: VocabShard | None = None

    @property
    def n_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def max_shard_vocab(self) -> int:
        """Rows of the largest shard, the same on all processes: for decisions that they must take alike."""
        return self.vocab if self.shard is None else self.shard.max_shard_vocab

    @property
    def whole_vocab(self) -> int:
        """Rows of all shards: targets lie below it."""
        return self.vocab if self.shard is None else self.shard.total

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    @property
    def statistics_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 inputs."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        """What the matrix products multiply: the inputs' dtype on CUDA, at least fp32 on the CPU.

        A CPU product of half-precision operands would round its result to half precision.
        """
        return self.hidden.dtype if self.hidden.is_cuda else self.statistics_dtype

    def rows(self, index: slice | Tensor) -> Projection:
        """The same projection for some of the rows."""
        temperature = None if self.row_inv_temperature is None else self.row_inv_temperature[index]
        return replace(self, hidden=self.hidden[index], row_inv_temperature=temperature)

    def local_targets(self, targets: Tensor) -> Tensor:
        """Targets [N] as columns of ``weight``; ELSEWHERE where they lie in another shard, NOWHERE where in none."""
        if self.shard is not None:
            return self.shard.local_targets(targets, self.vocab)
        return torch.where((targets >= 0) & (targets < self.vocab), targets, NOWHERE)

    def zero_invalid_rows(self, valid: Tensor) -> Projection:
        """The same projection with harmless numbers in the rows that do not count, where 0 times anything could be NaN."""
        temperature = self.row_inv_temperature
        if temperature is not None:
            temperature = torch.where(valid, temperature, 1)
        return replace(self, hidden=torch.where(valid.unsqueeze(1), self.hidden, 0), row_inv_temperature=temperature)

    def row_scale(self) -> float | Tensor:
        """dz / d(hidden @ weight.T + bias) without the soft-cap's factor: a number, or [N]."""
        scale = self.logit_scale * self.inv_temperature
        return scale if self.row_inv_temperature is None else self.row_inv_temperature * scale

    def shape_logits_(self, raw: Tensor, columns: slice) -> Tensor:
        """Turn ``raw = hidden @ weight[columns].T`` into z in place. raw: [N, columns] statistics dtype."""
        if self.bias is not None:
            raw += self.bias[columns]
        scale = self.row_scale()
        if self.softcap is not None:
            raw.mul_(self.logit_scale / self.softcap).tanh_()
            scale = scale * (self.softcap / self.logit_scale)
        if isinstance(scale, Tensor):
            raw.mul_(scale.unsqueeze(1))
        elif scale != 1.0:
            raw.mul_(scale)
        return raw

    def softcap_slope(self, z: Tensor) -> Tensor:
        """1 - tanh^2 of the soft-cap at the logits z: [N, columns] statistics dtype. Allocates the result."""
        assert self.softcap is not None
        inverse: float | Tensor = 1.0 / (self.softcap * self.inv_temperature)
        if self.row_inv_temperature is not None:
            inverse = (inverse / self.row_inv_temperature).unsqueeze(1)
        tanh = z * inverse
        return tanh.mul_(tanh).neg_().add_(1.0).clamp_(min=0.0)
