"""The job that is measured: one policy-gradient step on the head. Its inputs, and its results in
float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eapo_kernels import Options, TokenBatch, TokenSupport
from eapo_kernels.objectives.advantages import group_norm
from eapo_kernels.testing import make_inputs
from eapo_kernels.types import IGNORE_INDEX

from .real_rows import TEMPERATURES, real_inputs

POSITIVE_WEIGHT, CLIP = 0.7, 0.2
N_RESPONSES, GROUP_SIZE = 16, 4

MODES = ("fwd", "fwd_bwd", "frozen_head", "half_zero_rows")
"""fwd: log-prob and entropy of every token. fwd_bwd: policy loss and both gradients. frozen_head:
d_hidden only. half_zero_rows: fwd_bwd where the second half of every response is masked, as padding
is."""

SPARSE_MODES = ("sampling_mask", "sparse_gradient")
"""sampling_mask: fwd_bwd where each token was drawn from the ``MASK_SIZE`` likeliest, and all is over these alone.
sparse_gradient: fwd_bwd with ``Options(gradient_tolerance=TOLERANCE)`` where a provider has it, else exact."""

MASK_SIZE, TOLERANCE = 50, 2e-3

INPUTS = ("peaked", "uniform", "steep", *TEMPERATURES)
"""peaked, uniform: see ``make_inputs``. steep: peaked with all logits doubled, where rounding
logits hurts most. real_*: of a language model, see ``real_rows``."""

OBJECTIVES = ("policy", "cross_entropy")
"""policy: ``policy_loss``. cross_entropy: the mean of -logp, all that some peers can compute."""

Results = dict[str, Tensor]
"""What a run yields: some of logp, entropy [N], loss, d_hidden [N, D], d_weight [V, D], and metrics of a loss
with a "/" in their names, which are recorded and not compared."""

_PRODUCTS = {"fwd": 1, "fwd_bwd": 3, "frozen_head": 2, "half_zero_rows": 3}
_EXACT_ROWS = 256
_EVERYTHING = 2**27
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 512, 4096


@dataclass(frozen=True)
class Case:
    """One shape with its inputs: 16 responses of equal length in 4 groups, an old policy 0.2 nats
    away.

    Attributes:
        inputs_name: one of ``INPUTS``.
        hidden: [N, D].
        weight: [V, D].
        targets: [N] int64, -100 where ``valid`` is False.
        valid: [N] bool, the tokens that count.
        batch: the same for ``eapo_loss``, with rewards and old log-probs.
        advantages: [N] fp32, weighted, for providers that take them per token.
        lse, logp, entropy: [N] in float64, of every row, masked ones too.
        largest_logit: max |z| over the matrix.
        memory_budget: bytes for this package's logit-sized workspace; None: its default.
        support: [N, K] int64, the ids that could be drawn, where they are not all.
        gradient_tolerance: of this package's one-pass schedule, or None.
    """

    inputs_name: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    valid: Tensor
    batch: TokenBatch
    advantages: Tensor
    lse: Tensor
    logp: Tensor
    entropy: Tensor
    largest_logit: float
    memory_budget: int | None = None
    support: Tensor | None = None
    gradient_tolerance: float | None = None

    @property
    def n(self) -> int:
        return self.hidden.shape[0]

    @property
    def d(self) -> int:
        return self.hidden.shape[1]

    @property
    def v(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def old_logp(self) -> Tensor:
        """[N] fp32."""
        assert self.batch.old_logp is not None
        return self.batch.old_logp

    @property
    def options(self) -> Options:
        return Options(memory_budget=self.memory_budget, gradient_tolerance=self.gradient_tolerance)

    @property
    def n_valid(self) -> int:
        return int(self.valid.sum())

    def useful_flops(self, mode: str) -> int:
        """Operations of the matrix products that the job needs."""
        if self.support is not None:
            return 6 * self.support.numel() * self.d
        return 2 * _PRODUCTS.get(mode, 3) * self.n_valid * self.d * self.v

    def least_bytes(self, mode: str) -> int:
        """Bytes of operands and results, each moved once: hidden, weight, and their gradients where
        the mode wants them."""
        hidden, weight = self.n_valid * self.d, self.v * self.d
        gradients = {"fwd": 0, "frozen_head": hidden}.get(mode, hidden + weight)
        return (hidden + weight + gradients) * self.hidden.element_size()

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "D": self.d, "V": self.v, "dtype": str(self.dtype).removeprefix("torch.")}

    def for_mode(self, mode: str) -> Case:
        """This case, the one with half of its rows masked, with a sampling mask, or with a tolerance."""
        if mode == "sampling_mask":
            return _with_sampling_mask(self)
        if mode == "sparse_gradient":
            return replace(self, gradient_tolerance=TOLERANCE)
        if mode != "half_zero_rows":
            return self
        length = self.n // N_RESPONSES
        valid = torch.arange(self.n, device=self.hidden.device) % length < (length + 1) // 2
        targets = torch.where(valid, self.targets, IGNORE_INDEX)
        return replace(self, targets=targets, valid=valid, batch=replace(self.batch, targets=targets, mask=valid))


def policy_loss(case: Case, logp: Tensor) -> Tensor:
    """The EAPO loss written by hand: clipped surrogate of weighted advantages, mean over the valid
    tokens (E9, E10).

    logp: [N]; rows that are not valid may hold any finite number.
    """
    ratio = (logp - case.old_logp.to(logp.dtype)).exp()
    gain = torch.minimum(ratio * case.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * case.advantages)
    return -(gain * case.valid).sum() / case.valid.sum()


def make_case(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    *,
    inputs: str = "peaked",
    device: str = "cpu",
    seed: int = 0,
    memory_budget: int | None = None,
) -> Case:
    """A case; ``n`` must be a multiple of the 16 responses. Raises ValueError for sizes or inputs
    that cannot be."""
    if n % N_RESPONSES:
        raise ValueError(f"n: expected a multiple of {N_RESPONSES}, got {n}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs: expected one of {', '.join(INPUTS)}, got {inputs!r}")
    if inputs in TEMPERATURES:
        made = real_inputs(n, d, v, inputs, N_RESPONSES, dtype)
        made = replace(made, hidden=made.hidden.to(device), weight=made.weight.to(device), targets=made.targets.to(device))
    else:
        made = make_inputs(n, d, v, dtype=dtype, peaked=inputs != "uniform", device=device, seed=seed)
    if inputs == "steep":
        made.hidden.mul_(2)
    generator = torch.Generator().manual_seed(seed + 1)
    rewards = torch.rand(N_RESPONSES, generator=generator).to(device)
    group_ids = torch.arange(N_RESPONSES, device=device) // GROUP_SIZE
    sequence_ids = torch.arange(n, device=device) * N_RESPONSES // n
    advantages = group_norm(rewards, group_ids)
    weighted = torch.where(advantages > 0, POSITIVE_WEIGHT * advantages, advantages)[sequence_ids]
    lse, logp, entropy, largest = _exact_statistics(made.hidden, made.weight, made.targets)
    old_logp = logp.float() + 0.2 * torch.randn(n, generator=generator).to(device)
    batch = TokenBatch(made.targets, sequence_ids, rewards, group_ids, old_logp=old_logp)
    valid = torch.ones(n, dtype=torch.bool, device=device)
    statistics = (lse, logp, entropy, largest)
    return Case(inputs, made.hidden, made.weight, made.targets, valid, batch, weighted, *statistics, memory_budget)


def _with_sampling_mask(case: Case) -> Case:
    """The case over the likeliest ``MASK_SIZE`` ids of each row, the target in the last's place if it is not one of them."""
    parts = []
    for start in range(0, case.n, _EXACT_ROWS):
        rows = slice(start, start + _EXACT_ROWS)
        ids = (case.hidden[rows].float() @ case.weight.float().T).topk(min(MASK_SIZE, case.v)).indices
        target = case.targets[rows, None]
        ids[:, -1:] = torch.where((ids == target).any(1, keepdim=True), ids[:, -1:], target)
        z = (case.hidden[rows, None].double() * case.weight[ids].double()).sum(-1)
        lse = z.logsumexp(1)
        log_p = z - lse[:, None]
        logp = torch.where(ids == target, log_p, 0.0).sum(1)
        parts.append((ids, lse, logp, -(log_p.exp() * log_p).sum(1)))
    support, lse, logp, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    old_logp = (case.old_logp - case.logp + logp).float()
    batch = replace(case.batch, old_logp=old_logp, support=TokenSupport.from_padded(support))
    return replace(case, batch=batch, lse=lse, logp=logp, entropy=entropy, support=support)


def _exact_statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """(lse, logp, entropy) [N] float64 and max |z|, a few rows at a time, without this package's
    kernels."""
    wide, parts, largest = weight.double(), [], 0.0
    for start in range(0, hidden.shape[0], _EXACT_ROWS):
        rows = slice(start, start + _EXACT_ROWS)
        z = hidden[rows].double() @ wide.T
        largest = max(largest, float(z.abs().max()))
        lse = torch.logsumexp(z, -1)
        logp = z.gather(1, targets[rows, None])[:, 0] - lse
        z -= lse[:, None]
        parts.append(torch.stack([lse, logp, -(z.exp() * z).sum(1)]))
    lse, logp, entropy = torch.cat(parts, 1)
    return lse, logp, entropy, largest


@dataclass(frozen=True)
class Reference:
    """A case's results in float64. Large cases keep a sample of the rows of d_hidden and of the
    rows (columns of the logits) of d_weight.

    Attributes:
        logp, entropy: [N].
        valid: [N] bool, the rows whose statistics are compared.
        rows: [R] rows of ``d_hidden``; columns: [C] rows of ``d_weight``.
        loss, d_hidden, d_weight: by objective: 0-dim, [R, D], [C, D].
    """

    logp: Tensor
    entropy: Tensor
    valid: Tensor
    rows: Tensor
    columns: Tensor
    loss: dict[str, Tensor]
    d_hidden: dict[str, Tensor]
    d_weight: dict[str, Tensor]

    def errors(self, results: Results, objective: str) -> dict[str, float]:
        """||result - reference|| / ||reference|| of everything the provider returned."""
        return {name: float((got - exact).norm() / exact.norm()) for name, got, exact in self._pairs(results, objective)}

    def largest_errors(self, results: Results, objective: str) -> dict[str, float]:
        """The largest |result - reference|: in nats for log-probs, entropies and the loss, as a share of the largest
        |reference| for gradients."""
        found = {name: ((got - exact).abs().max(), exact.abs().max()) for name, got, exact in self._pairs(results, objective)}
        return {name: float(error / size if name.startswith("d_") else error) for name, (error, size) in found.items()}

    def _pairs(self, results: Results, objective: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, result in float64, reference) of everything the provider returned, where it is compared."""
        for name, value in results.items():
            if "/" in name:
                continue
            if name in ("logp", "entropy"):
                exact, value = getattr(self, name)[self.valid], value[self.valid]
            else:
                exact = getattr(self, name)[objective]
                places = {"d_hidden": self.rows, "d_weight": self.columns}.get(name)
                value = value if places is None else value[places]
            yield name, value.double(), exact


def reference_of(case: Case) -> Reference:
    """Everything for small cases, gradients on a sample of rows and columns for large ones."""
    n, v, device = case.n, case.v, case.hidden.device
    rows, columns = torch.arange(n, device=device), torch.arange(v, device=device)
    if n * v > _EVERYTHING:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(n, generator=generator)[:_SAMPLED_ROWS].to(device)
        drawn = torch.randint(v, (_SAMPLED_COLUMNS // 2,), generator=generator).to(device)
        columns = torch.cat([drawn, case.targets[case.valid][: _SAMPLED_COLUMNS // 2]]).unique()  # half of them are targets
    logp = case.logp.clone().requires_grad_()
    losses = {"policy": policy_loss(case, logp), "cross_entropy": -(logp * case.valid).sum() / case.valid.sum()}
    coefficients = {name: torch.autograd.grad(loss, logp)[0] for name, loss in losses.items()}
    return Reference(
        case.logp,
        case.entropy,
        case.valid,
        rows,
        columns,
        {name: loss.detach() for name, loss in losses.items()},
        {name: _d_hidden(case, c, rows) for name, c in coefficients.items()},
        {name: _d_weight(case, c, columns) for name, c in coefficients.items()},
    )


def _logit_gradient(case: Case, coefficient: Tensor, rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """a_t (1[v = y_t] - p_v), [rows, columns] float64; ``weight`` holds the columns' rows in
    float64."""
    p = (case.hidden[rows].double() @ weight.T).sub_(case.lse[rows, None]).exp_()
    if case.support is not None:
        allowed = torch.zeros(len(rows), case.v, dtype=torch.bool, device=rows.device).scatter_(1, case.support[rows], True)
        p *= allowed[:, columns]
    is_target = case.targets[rows, None] == columns[None, :]
    return (is_target.double() - p).mul_(coefficient[rows, None])


def _d_hidden(case: Case, coefficient: Tensor, rows: Tensor) -> Tensor:
    weight, columns = case.weight.double(), torch.arange(case.v, device=case.weight.device)
    return torch.cat([_logit_gradient(case, coefficient, part, columns, weight) @ weight for part in rows.split(256)])


def _d_weight(case: Case, coefficient: Tensor, columns: Tensor) -> Tensor:
    weight = case.weight[columns].double()
    gradient = torch.zeros_like(weight)
    for part in torch.arange(case.n, device=case.hidden.device).split(256):
        gradient += _logit_gradient(case, coefficient, part, columns, weight).T @ case.hidden[part].double()
    return gradient
