"""The float64 results of a case's job, and how far a provider's results are from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Case, policy_loss

Results = dict[str, Tensor]
"""What a run yields: some of logp, entropy [N], loss, d_hidden [N, D], d_weight [V, D]."""

OBJECTIVES = ("policy", "cross_entropy")
"""policy: ``case.policy_loss``. cross_entropy: the mean of -logp, all that some peers can compute."""

_EVERYTHING = 2**27
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 512, 4096


@dataclass(frozen=True)
class Truth:
    """Float64 results. Large cases keep a sample of the rows of d_hidden and of the rows (columns of the logits) of d_weight.

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
        """||result - truth|| / ||truth|| of everything the provider returned."""
        errors = {}
        for name, value in results.items():
            if name in ("logp", "entropy"):
                exact, value = getattr(self, name)[self.valid], value[self.valid]
            else:
                exact = getattr(self, name)[objective]
                value = {"d_hidden": lambda v: v[self.rows], "d_weight": lambda v: v[self.columns]}.get(name, lambda v: v)(
                    value
                )
            errors[name] = float((value.double() - exact).norm() / exact.norm())
        return errors


def exact(case: Case) -> Truth:
    """The truth of a case: everything for small cases, gradients on a sample of rows and columns for large ones."""
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
    return Truth(
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
    """a_t (1[v = y_t] - p_v), [rows, columns] float64; ``weight`` holds the columns' rows in float64."""
    p = (case.hidden[rows].double() @ weight.T).sub_(case.lse[rows, None]).exp_()
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
