"""``python -m eapo_kernels selftest``: whether a backend's kernels are right on this machine.

The public functions run on about 300 rows in every form that a backend has, over outputs that are
filled with NaN before, and are compared with float64 element by element. ``backend="auto"`` runs the
same check in a child process before it takes a backend on a GPU (``ops.verdicts``).

The bounds follow from the arithmetic, so that they are as tight on small numbers as on large ones:

    statistics   4 times the largest error of PyTorch's fp32 logits in the row, plus 2^-20 of them and,
                 on tensor cores, D 2^-27, because these truncate their sums
    gradients    the roundings of their operands, sum_t |dL/dz_tv| |hidden_td| times 2^-8 in bf16;
                 along the exact gradient, where unbiased roundings cancel, a fifth of that

Twice the error of eager PyTorch in bf16 would be a loose bound: its logits are rounded to bf16, which
hides a lost column. The table gives the error beside eager's all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .errors import BackendUnavailable, EapoError
from .loss import eapo_loss
from .objectives.config import EAPOConfig
from .ops import verdicts
from .ops.dispatch import available_backends
from .ops.token_stats import token_stats
from .ops.verdicts import Question, Verdict
from .support import TokenSupport
from .testing import eager_token_stats
from .types import IGNORE_INDEX, Options, TokenBatch, TokenStats

N_ROWS, FEW_ROWS = 300, 120
"""Rows on a GPU, and of interpreted kernels, whose programs run one after the other."""

COLUMNS = 1100
"""Columns that are checked, at least: several tiles of every kernel. A class of vocabularies is known
by what V is divisible by, and so are these."""

POSITIVE_WEIGHT, ENTROPY_COEF, SOFTCAP = 0.7, 0.05, 30.0
_FAR = (-100.0, -40.0, 0.0, 40.0, 100.0)
"""Nats by which guesses of the log-probs are wrong. Rows are rescued beyond 33 nats, and beyond 88
nothing else can give right numbers."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Problem:
    """Inputs that every tile boundary matters to: half of the rows have their largest logit at one.

    Attributes:
        hidden, weight: [N, D] and [V, D] in the dtype of the question.
        targets: [N] int64, in four of five rows the largest logit's column.
        old_logp: [N] fp32, exact log-probs minus the log of a ratio that no clip bound is near.
        bias: [V] with some -inf, or None. inv_temperature: [N] fp32, or 1.0.
        softcap: or None.
        allowed: [N, V] bool, the columns of a support, or None.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    inv_temperature: Tensor | float
    softcap: float | None
    allowed: Tensor | None = None

    def over_support(self) -> Problem:
        """The same inputs over few columns of each row, and the target's; none in some masked rows."""
        g = torch.Generator().manual_seed(23)
        allowed = torch.rand(len(self.hidden), len(self.weight), generator=g) < 0.015
        allowed &= (torch.arange(len(allowed)) % 20 != 19)[:, None]
        allowed = allowed.to(self.targets.device).scatter_(1, torch.where(self.valid, self.targets, 0)[:, None], True)
        return replace(self, allowed=allowed)

    @cached_property
    def support(self) -> TokenSupport | None:
        if self.allowed is None:
            return None
        return TokenSupport.from_lists([row.nonzero()[:, 0].cpu() for row in self.allowed], self.targets.device)

    @property
    def terms(self) -> dict[str, Any]:
        """Keyword arguments of the public functions."""
        return {"bias": self.bias, "inv_temperature": self.inv_temperature, "softcap": self.softcap}

    @cached_property
    def valid(self) -> Tensor:
        return self.targets != IGNORE_INDEX

    @cached_property
    def sequence_ids(self) -> Tensor:
        n = len(self.targets)
        return torch.arange(n, device=self.targets.device) * 6 // n

    @cached_property
    def rewards(self) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.25, 1.0, 1.0, 0.5], device=self.targets.device)

    @cached_property
    def group_ids(self) -> Tensor:
        return torch.tensor([0, 0, 0, 1, 1, 1], device=self.targets.device)

    @cached_property
    def random(self) -> Tensor:
        """[3, N] fp32: cotangents, advantages."""
        return torch.randn(3, len(self.targets), generator=torch.Generator().manual_seed(5)).to(self.targets.device)

    @cached_property
    def old_logp(self) -> Tensor:
        ratios = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.6], device=self.targets.device).repeat(len(self.targets) // 5)
        return (self.exact.logp - ratios.double().log()).float()

    @cached_property
    def far_logp(self) -> Tensor:
        """``old_logp``, far off in four of five rows."""
        return self.old_logp + torch.tensor(_FAR, device=self.targets.device).repeat(len(self.targets) // len(_FAR))

    def batch(self, old_logp: Tensor, *, mask: bool = False, advantages: Tensor | None = None) -> TokenBatch:
        tokens = advantages is not None
        return TokenBatch(
            targets=torch.where(self.valid, self.targets, 0) if mask else self.targets, sequence_ids=self.sequence_ids,
            rewards=None if tokens else self.rewards, group_ids=None if tokens else self.group_ids, old_logp=old_logp,
            mask=self.valid if mask else None, advantages=advantages, token_advantages=True if tokens else None,
        )  # fmt: skip

    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias as new leaves."""
        leaf = [None if t is None else t.detach().requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        assert leaf[0] is not None
        assert leaf[1] is not None
        return leaf[0], leaf[1], leaf[2]

    @cached_property
    def raw(self) -> Tensor:
        """hidden @ weight.T in float64."""
        return self.hidden.double() @ self.weight.double().T

    @cached_property
    def _oracle(self) -> dict[str, Any]:
        """``terms`` in float64, and the identity: the oracle then takes raw logits for hidden states."""
        wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in self.terms.items()}
        return wide | {"weight": torch.eye(len(self.weight), dtype=torch.float64, device=self.weight.device)}

    def logits(self, raw: Tensor) -> Tensor:
        """E1 of raw logits [N, V] float64."""
        z = reference.logits(raw, **self._oracle)
        return z if self.allowed is None else z.masked_fill(~self.allowed, -math.inf)

    def statistics(self, raw: Tensor) -> TokenStats:
        """E2-E4 of raw logits [N, V] float64, zero in masked rows; differentiable."""
        return reference.token_stats(raw, targets=self.targets, second_moments=True, allowed=self.allowed, **self._oracle)

    def eager(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStats:
        """The statistics by plain PyTorch in the inputs' dtype; differentiable."""
        added = 0.0 if self.allowed is None else torch.where(self.allowed, 0.0, -1e4)
        terms = self.terms | {"bias": bias, "added": added}
        return eager_token_stats(hidden, weight, self.targets, second_moments=True, **terms)

    @cached_property
    def exact(self) -> TokenStats:
        return self.statistics(self.raw)

    @cached_property
    def tolerance(self) -> Tensor:
        """[N] float64, allowed error of a row's lse."""
        plain = (self.hidden.float() @ self.weight.float().T).double()
        scale = self.inv_temperature.double() if isinstance(self.inv_temperature, Tensor) else 1.0
        # Tensor cores truncate the sum at each step of 16 products; the emulated ones are at a third of this.
        truncated = 0.0 if self.hidden.dtype == torch.float32 else self.hidden.shape[1] * 2.0**-27
        return scale * (4 * (plain - self.raw).abs().amax(1) + (2**-20 + truncated) * self.raw.abs().amax(1)) + 2**-18


def checked_columns(vocab: int) -> int:
    """A vocabulary of at least ``COLUMNS`` (or ``vocab``) that is divisible by what ``vocab`` is."""
    step = math.gcd(vocab, 256)
    columns = -(-min(vocab, COLUMNS) // step)
    return step * (columns + (columns % 2 == 0 and vocab // step % 2 == 1))


def make_problem(question: Question, device: torch.device, *, full: bool, rows: int = N_ROWS) -> Problem:
    """The inputs of one form. full: with a bias, a temperature per row and masked rows. rows: a
    multiple of 30."""
    g = torch.Generator().manual_seed(17 + full)
    n, d, v, dtype = rows, question.dim, checked_columns(question.vocab), DTYPES[question.dtype]
    weight, hidden = torch.randn(v, d, generator=g) / math.sqrt(d), 3 * torch.randn(n, d, generator=g)
    row = torch.arange(n)
    edges = torch.tensor([v - 1, 0, *(c for k in range(64, v, 64) for c in (k, k - 1)), v - 2 if v > 1 else 0])
    peaks = torch.where(row % 2 == 0, edges[row // 2 % len(edges)], torch.randint(v, (n,), generator=g))
    hidden[row % 7 == 6] *= 0.03  # nearly uniform rows
    height = 4 + 12 * torch.rand(n, 1, generator=g)
    hidden += height * weight[peaks] / weight[peaks].square().sum(1, keepdim=True)
    targets = torch.where(row % 5 == 3, torch.randint(v, (n,), generator=g), peaks)
    bias: Tensor | None = None
    inv_temperature: Tensor | float = 1.0
    if full:
        bias = torch.randn(v, generator=g)
        removed = torch.rand(v, generator=g) < 0.02
        removed[torch.cat([targets, edges])] = False
        bias[removed] = -math.inf
        inv_temperature = (0.5 + torch.rand(n, generator=g)).to(device)
        targets[row % 10 == 9] = IGNORE_INDEX

    def place(matrix: Tensor) -> Tensor:
        matrix = matrix.to(device, dtype)
        if not question.strided:
            return matrix
        wide = matrix.new_zeros(matrix.shape[0], matrix.shape[1] + 1)
        wide[:, : matrix.shape[1]] = matrix
        return wide[:, : matrix.shape[1]]

    softcap = SOFTCAP if question.softcap else None
    bias = None if bias is None else bias.to(device, dtype)
    return Problem(place(hidden), place(weight), targets.to(device), bias, inv_temperature, softcap)


Values = dict[str, Tensor]


class Case(NamedTuple):
    """One way through a backend.

    Attributes:
        name: for the table.
        kernels: Triton's, in the scaled-exponential form where it names them; soft-caps and fp32
            inputs take ``_PLAIN`` instead.
        run: (problem, backend) -> results by name.
        loss: the same loss from the statistics of all rows; None: no gradient is taken.
        over_support: it runs on ``Problem.over_support``.
    """

    name: str
    kernels: str
    run: Callable[[Problem, str], Values]
    loss: Callable[[Problem, TokenStats], Tensor] | None
    over_support: bool = False


def _run_statistics(p: Problem, backend: str) -> Values:
    with torch.no_grad():
        stats = token_stats(p.hidden, p.weight, p.targets, second_moments=True, backend=backend, **p.terms)
        alone = token_stats(p.hidden[:1], p.weight, p.targets[:1], backend=backend, **_first(p))
    return _named(stats) | {f"{name} of a row alone": value for name, value in _named(alone).items()}


def _first(p: Problem) -> dict[str, Any]:
    scale = p.inv_temperature
    return p.terms | {"inv_temperature": scale[:1] if isinstance(scale, Tensor) else scale}


def _named(stats: TokenStats) -> Values:
    return {name: value.detach() for name, value in stats._asdict().items() if value is not None}


def _run_stats_loss(
    entropy: str, plan: str, loss: Callable[[Problem, TokenStats], Tensor]
) -> Callable[[Problem, str], Values]:  # fmt: skip
    def run(p: Problem, backend: str) -> Values:
        hidden, weight, bias = p.leaves()
        stats = token_stats(
            hidden, weight, p.targets, entropy=entropy, backend=backend, options=Options(plan=plan),
            support=p.support, **p.terms | {"bias": bias},
        )  # fmt: skip
        loss(p, stats).backward()
        return _named(stats) | _gradients(hidden, weight, bias)

    return run


def _gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Values:
    found = {"d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": None if bias is None else bias.grad}
    return {name: value for name, value in found.items() if value is not None}


def _logp_loss(p: Problem, s: TokenStats) -> Tensor:
    return (p.random[0].to(s.logp.dtype) * s.logp).sum()


def _mixed_loss(p: Problem, s: TokenStats) -> Tensor:
    assert s.entropy is not None
    c = p.random.to(s.logp.dtype)
    return (c[0] * s.logp + c[1] * s.entropy + c[2] * s.lse).sum()


def _clipped_loss(p: Problem, s: TokenStats) -> Tensor:
    """E10 by the oracle."""
    v = p.valid
    return reference.eapo_loss(
        s.logp[v], p.old_logp[v].to(s.logp.dtype), p.sequence_ids[v], p.rewards, p.group_ids, positive_weight=POSITIVE_WEIGHT
    )  # fmt: skip


def _bonus_loss(p: Problem, s: TokenStats) -> Tensor:
    assert s.entropy is not None
    return _clipped_loss(p, s) - ENTROPY_COEF * s.entropy[p.valid].mean()


def _cispo_loss(p: Problem, s: TokenStats) -> Tensor:
    """CISPO (arXiv 2506.13585): its gradient does not vanish where the old log-prob is far off."""
    weight = (s.logp - p.far_logp.to(s.logp.dtype)).detach().exp().clamp(0.8, 1.2)
    return -(weight * p.random[0].to(s.logp.dtype) * s.logp)[p.valid].mean()


def _run_one_pass(
    plan: str, config: EAPOConfig, *, far: bool = False, mask: bool = False
) -> Callable[[Problem, str], Values]:  # fmt: skip
    def run(p: Problem, backend: str) -> Values:
        hidden, weight, bias = p.leaves()
        batch = p.batch(p.far_logp, advantages=p.random[0]) if far else p.batch(p.old_logp, mask=mask)
        out = eapo_loss(
            hidden, weight, batch, positive_weight=1.0 if far else POSITIVE_WEIGHT, config=config, schedule="one_pass",
            backend=backend, options=Options(plan=plan), **p.terms | {"bias": bias},
        )  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss.detach(), "mean entropy": out.metrics["eapo/entropy"]} | _gradients(hidden, weight, bias)

    return run


_PLAIN = "row_statistics, row_gradient"
_EXP = "row_offsets, scaled_exp_gemm, scaled_exp_finalize, add_rows"
CASES = (
    Case("statistics", "stream_statistics, finalize", _run_statistics, None),
    Case(
        "autograd, recomputed", "stream_statistics, logit_gradient", _run_stats_loss("grad", "recompute", _mixed_loss),
        _mixed_loss,
    ),
    Case("autograd, saved", _EXP, _run_stats_loss("nograd", "one_chunk", _logp_loss), _logp_loss),
    Case("one pass, chunks", _EXP, _run_one_pass("chunks", EAPOConfig(), mask=True), _clipped_loss),
    Case(
        "one pass, rescued rows", f"{_EXP}, collect_rescue_ids, row_maxima, scaled_exp_rescue",
        _run_one_pass("one_chunk", EAPOConfig(surrogate="cispo"), far=True), _cispo_loss,
    ),
    Case("one pass, entropy bonus", _PLAIN, _run_one_pass("one_chunk", EAPOConfig(entropy_coef=ENTROPY_COEF)), _bonus_loss),
    Case("support", "logits_at, add_rows, add_carries", _run_stats_loss("grad", "auto", _mixed_loss), _mixed_loss, True),
)  # fmt: skip


class Expected(NamedTuple):
    """What a case should give."""

    exact: Values  # float64
    allowed: Values  # errors, of the same shapes
    eager: Values  # plain PyTorch in the inputs' dtype


def expect(p: Problem, case: Case) -> Expected:
    """Results of a case in float64 with their bounds, and those of plain PyTorch."""
    s, tolerance = p.exact, p.tolerance
    assert s.entropy is not None
    assert s.varentropy is not None
    assert s.p2 is not None
    assert s.p2_logp is not None
    exact: Values = _named(s)
    allowed: Values = {
        "logp": 2 * tolerance,
        "lse": tolerance,
        "entropy": tolerance * (2 + s.varentropy.sqrt()),
        "p2": 4 * tolerance * s.p2 + 2**-22,
        "p2_logp": 4 * tolerance * (s.p2 - s.p2_logp) + 2**-22,
        "varentropy": 8 * tolerance * (1 + s.varentropy),
    }
    eager = _named(p.eager(p.hidden, p.weight, p.bias))
    if case.loss is None:
        for values in (exact, allowed, eager):
            values |= {f"{name} of a row alone": values[name][:1] for name in ("logp", "entropy", "lse")}
        return Expected(exact, allowed, eager)

    raw = p.raw.detach().requires_grad_()
    stats = p.statistics(raw)
    assert stats.entropy is not None
    leaves = stats.logp, stats.entropy
    for value in leaves:
        value.retain_grad()
    loss = case.loss(p, stats)
    loss.backward()
    grad = raw.grad
    assert grad is not None
    hidden, weight = p.hidden.double(), p.weight.double()
    exact |= {
        "loss": loss.detach(),
        "mean entropy": s.entropy[p.valid].mean(),
        "d_hidden": grad @ weight,
        "d_weight": grad.T @ hidden,
        "d_bias": grad.sum(0),
    }

    unit = torch.finfo(p.hidden.dtype).eps / 2
    relative = 2.5 * unit + 2**-20 + (4 if p.softcap is None else 8) * tolerance
    c_logp, c_entropy = (torch.zeros_like(tolerance) if v.grad is None else v.grad.abs() for v in leaves)
    log_p = torch.log_softmax(p.logits(p.raw), -1)
    p_v, scale = (
        log_p.exp(),
        p.inv_temperature.double() if isinstance(p.inv_temperature, Tensor) else torch.ones_like(tolerance),
    )
    # The gradient of the entropy is a difference of two terms, each of which may be larger than it.
    terms = c_entropy.unsqueeze(1) * (1 + torch.where(p_v > 0, (log_p + s.entropy.unsqueeze(1)).abs(), 0.0))
    size = (grad.abs() + scale.unsqueeze(1) * p_v * terms) * relative.unsqueeze(1)
    if p.softcap is not None:  # the slope 1 - tanh^2 is exact to 2^-21, of 1 and not of itself
        size = size + 2**-21 * scale.unsqueeze(1) * p_v * (c_logp.unsqueeze(1) + terms)
    if p.hidden.dtype == torch.float16:  # E of a row with a sum of 1 or more is subnormal below 2^-14
        size = size + 2**-24 * scale.unsqueeze(1) * (c_logp.unsqueeze(1) + terms)
    least = 2 * unit * torch.finfo(torch.float16).smallest_normal if p.hidden.dtype == torch.float16 else 0.0
    rounding = {name: 2 * unit * exact[name].abs() + least for name in ("d_hidden", "d_weight", "d_bias")}
    allowed |= {
        "d_hidden": size @ weight.abs() + rounding["d_hidden"],
        "d_weight": size.T @ hidden.abs() + rounding["d_weight"],
        "d_bias": size.sum(0) + rounding["d_bias"],
        "loss": 1.5 * (c_logp * allowed["logp"] + c_entropy * allowed["entropy"]).sum() + 2**-20 * (1 + loss.detach().abs()),
        "mean entropy": allowed["entropy"][p.valid].mean() + 2**-22,
    }
    # A systematic error hides in element-wise bounds where the terms of a sum cancel, not along the gradient itself.
    worst = float(relative.max())
    for name, squares in (
        ("d_hidden", size.square() @ weight.square().sum(1)),
        ("d_weight", size.T.square() @ hidden.square().sum(1)),
    ):
        length, one_by_one = exact[name].norm(dim=1), squares.sqrt() + 2**-20 * exact[name].norm(dim=1)
        allowed[f"{name} by row"] = 1.5 * torch.maximum(length * worst, one_by_one) + least * p.hidden.shape[1] ** 0.5
        exact[f"{name} by row"] = length
        exact[f"{name} as a whole"] = exact[name].norm()
        allowed[f"{name} as a whole"] = (worst - 2 * unit) * exact[name].norm() + least * exact[name].numel() ** 0.5
    return Expected(exact, allowed, eager | _eager_gradients(p, case))


def _lengths(values: Values, exact: Values) -> Values:
    """The values, and the gradients' components along the exact ones."""
    found = dict(values)
    for name in ("d_hidden", "d_weight"):
        if name in values:
            product, length = values[name].double() * exact[name], exact[name].norm(dim=1)
            found[f"{name} by row"] = product.sum(1) / length.clamp_min(1e-300)
            found[f"{name} as a whole"] = product.sum() / exact[name].norm()
    return found


def _eager_gradients(p: Problem, case: Case) -> Values:
    assert case.loss is not None
    hidden, weight, bias = p.leaves()
    stats = p.eager(hidden, weight, bias)
    loss = case.loss(p, stats)
    loss.backward()
    assert stats.entropy is not None
    return {"loss": loss.detach(), "mean entropy": stats.entropy[p.valid].mean().detach()} | _gradients(hidden, weight, bias)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        case, kernels: of ``Case``; full: see ``make_problem``.
        outcome: "right", "wrong", "crashed" or "unknown".
        error: the largest error, as a share of the allowed one.
        beside_eager: the largest ratio of an error to plain PyTorch's, over the results.
        detail: what is wrong.
        seconds: of the three runs, and of compiling where ``compile_cases`` did not.
    """

    case: str
    kernels: str
    full: bool
    outcome: str
    error: float
    beside_eager: float
    detail: str
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.case}, {'with' if self.full else 'without'} bias"


@contextlib.contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    """PyTorch fills memory that it allocates without a value with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _failures() -> tuple[type[Exception], ...]:
    """Errors of a run that make it a crash. Triton's are there once it is imported: a kernel may not
    compile, or need more shared memory than the GPU has."""
    known = (RuntimeError, EapoError, OSError, ValueError, TypeError, AssertionError, ImportError)
    errors = sys.modules.get("triton.errors")
    return known if errors is None else (*known, errors.TritonError)


def compile_cases(problems: Sequence[Problem], cases: Sequence[Case], backend: str) -> None:
    """Compile the Triton kernels of the cases side by side, by runs that launch nothing.

    What fails here fails again in its case, whose row says it.
    """
    if backend != "triton" or not problems[0].hidden.is_cuda:
        return
    try:
        from .ops.triton.compiling import compiled_together

        # In this thread alone: a backward pass in another one would launch.
        with torch.autograd.set_multithreading_enabled(False), compiled_together(launch=False):
            for p in problems:
                for case in cases:
                    case.run(p.over_support() if case.over_support else p, backend)
    except _failures():
        return


def check_case(p: Problem, case: Case, backend: str, *, full: bool) -> Row:
    """Run a case three times: over NaN, and twice as users run it."""
    start = time.monotonic()
    p = p.over_support() if case.over_support else p

    plain_form = case.kernels.startswith(_EXP) and (p.softcap is not None or p.hidden.dtype == torch.float32)
    kernels = _PLAIN if plain_form else case.kernels

    def row(outcome: str, detail: str = "", error: float = 0.0, beside: float = 0.0) -> Row:
        return Row(case.name, kernels, full, outcome, error, beside, detail, round(time.monotonic() - start, 2))

    try:
        expected = expect(p, case)
        with _new_memory_is_nan():
            over_nan = case.run(p, backend)
        once, twice = case.run(p, backend), case.run(p, backend)
        if p.hidden.is_cuda:
            torch.cuda.synchronize()
    except (BackendUnavailable, torch.OutOfMemoryError) as error:
        return row("unknown", _first_line(error))
    except _failures() as error:
        return row("crashed", f"{type(error).__name__}: {_first_line(error)}")
    worst, detail, beside = 0.0, "", 0.0
    for number, values in enumerate((over_nan, once)):
        for name, value in _lengths(values, expected.exact).items():
            share, place = _compare(value, expected.exact[name], expected.allowed[name])
            if share > worst:
                worst = share
                where = "" if not place else f" at {place}"
                detail = f"{name}{where}: the error is {share:.3g} of what is allowed{' (over NaN)' if number == 0 else ''}"
            if name not in values:
                continue
            plain = float((expected.eager[name].double() - expected.exact[name]).abs().nan_to_num(0.0).max())
            ours = float((value.double() - expected.exact[name]).abs().max())
            beside = max(beside, ours / plain if plain > 0 else 0.0)
    if not worst <= 1:
        return row("wrong", detail, worst, beside)
    for name, value in once.items():
        if not torch.equal(value, twice[name]):
            return row("wrong", f"{name}: a second run gives other bits", worst, beside)
        whole = name.removesuffix(" of a row alone")
        if whole != name and backend != "torch" and not torch.equal(value, once[whole][:1]):
            return row("wrong", f"{whole}: other bits alone than among other rows", worst, beside)
    return row("right", "", worst, beside)


def _compare(got: Tensor, exact: Tensor, allowed: Tensor) -> tuple[float, str]:
    """(the largest error as a share of the allowed one, inf for a NaN; where)."""
    if got.shape != exact.shape:
        return math.inf, f"shape {list(got.shape)}"
    error = (got.double() - exact).abs()
    share = torch.where(
        error <= allowed,
        error / allowed.clamp_min(1e-300),
        torch.where(error.isfinite(), error / allowed.clamp_min(1e-300), math.inf),
    )
    place = int(share.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), got.shape))
    return float(share.flatten()[place]), str(list(index)) if index else ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def check(
    question: Question, device: torch.device, tell: Callable[[Row], object] = lambda row: None, *, first_only: bool = False,
    rows: int = N_ROWS,
) -> list[Row]:  # fmt: skip
    """Every case, without and with bias, temperatures and masked rows.

    Stops at a crash on a GPU, which is unusable then, and with ``first_only`` at anything that is
    not right.
    """
    found = []
    problems = [make_problem(question, device, full=full, rows=rows) for full in (False, True)]
    compile_cases(problems, CASES, question.backend)
    for full, problem in enumerate(problems):
        for case in CASES:
            found.append(check_case(problem, case, question.backend, full=bool(full)))
            tell(found[-1])
            outcome = found[-1].outcome
            if outcome != "right" and (first_only or outcome == "unknown" or (outcome == "crashed" and device.type == "cuda")):
                return found
    return found


def judge(rows: Sequence[Row], ratio: float | None, seconds: float) -> Verdict:
    """The verdict of the rows: the worst of them."""
    for outcome in ("unknown", "crashed", "wrong"):
        bad = [row for row in rows if row.outcome == outcome]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            return Verdict(outcome, f"{bad[0].title} ({bad[0].kernels}): {bad[0].detail}{more}", ratio, seconds)
    return Verdict("right", "", ratio, seconds)


def table(rows: Sequence[Row]) -> str:
    """The results for a person."""
    lines = [f"{'case':<40} {'right?':<8} {'error/allowed':>13} {'error/eager':>11} {'seconds':>8}  kernels"]
    for row in rows:
        lines.append(
            f"{row.title:<40} {row.outcome:<8} {row.error:>13.3f} {row.beside_eager:>11.3f} {row.seconds:>8.2f}  {row.kernels}"
        )
        if row.detail:
            lines.append(f"    {row.detail}")
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eapo_kernels", description="Checks of eapo_kernels on this machine.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser(
        "selftest", help="whether a backend's kernels are right on this machine",
        description="Compares a backend with float64, and on a GPU keeps the verdict that backend='auto' asks for. "
        "Exit code 0: right; 1: wrong or crashed; 2: could not be checked.",
    )  # fmt: skip
    one.add_argument("--backend", default="triton", choices=("triton", "cuda", "torch"))
    one.add_argument(
        "--device", default=None, help="cuda, cuda:1, ...; cpu with TRITON_INTERPRET=1 (default: cuda if there is one)"
    )
    one.add_argument("--dtype", default="bf16", choices=[*_SHORT, *DTYPES])
    one.add_argument("--dim", type=_positive, default=None, help="hidden size D (default 4096; 192 on a CPU)")
    one.add_argument("--vocab", type=_positive, default=None, help="vocabulary V; its class is checked (default 151936)")
    one.add_argument("--softcap", action="store_true", help="with a soft-cap of the logits")
    one.add_argument("--strided", action="store_true", help="with operands that tensor descriptors cannot read")
    one.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    one.add_argument("--tune", action="store_true", help="race tiles and backends first, and remember the fastest")
    one.add_argument("--seconds", type=_positive, default=120, help="of the race (default: %(default)s)")
    one.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; ends the process with its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device: expected one of {torch.cuda.device_count()} GPUs or cpu, got {device}")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    on_cpu = device.type == "cpu"
    dtype, dim = _SHORT.get(options.dtype, options.dtype), options.dim or (192 if on_cpu else 4096)
    question = Question(options.backend, dtype, dim, options.vocab or 151936, options.softcap, options.strided)
    quiet = options.json or options.child
    if not quiet:
        where, v = "the CPU" if on_cpu else torch.cuda.get_device_name(device), checked_columns(question.vocab)
        n = FEW_ROWS if on_cpu else N_ROWS
        print(f"checking {question.backend} on {where}: {dtype}, N={n} D={dim} V={v}", flush=True)
    from . import tune  # which reads this module

    tuned: tune.Tuned | None = None
    if options.tune:
        reason = available_backends(device)["triton"]
        if reason is not None:
            parser.error(f"--tune: expected a device for the triton backend, got {reason}")
        if options.strided:
            parser.error("--tune: expected operands that can be described, as the remembered tiles are for, got --strided")
        try:
            tuned = tune.tune(question, device, options.seconds, toy=on_cpu)
        except (EapoError, OSError) as error:  # no right tile, no memory, or a file of another format
            print(error, file=sys.stderr)
            sys.exit(1)
        if not quiet:
            print(tune.race_table(tuned), flush=True)
    start = time.monotonic()
    tell = (lambda row: None) if quiet else (lambda row: print(f"  {row.title}: {row.outcome}", flush=True))
    rows = check(question, device, tell, first_only=options.child, rows=FEW_ROWS if on_cpu else N_ROWS)
    speeds, ratio = tune.measure(question, device) if all(row.outcome == "right" for row in rows) else ([], None)
    verdict = judge(rows, ratio, round(time.monotonic() - start, 1))
    if options.child:
        print(
            verdicts.MARK + json.dumps({"outcome": verdict.outcome, "detail": verdict.detail, "ratio": verdict.ratio}),
            flush=True,
        )
    else:
        key = {} if on_cpu else verdicts.identity(question, device)
        verdict = verdict if on_cpu else verdicts.keep(key, verdict)
        if options.json:
            report: dict[str, Any] = {"key": key, "question": asdict(question), "verdict": asdict(verdict)}
            tables: dict[str, Sequence[Any]] = {"rows": rows, "speeds": speeds, "races": tuned.races if tuned else []}
            report |= {name: [line._asdict() for line in lines] for name, lines in tables.items()}
            if tuned:
                report["tuned"] = {"backend": tuned.backend, "reason": tuned.reason, "path": tuned.path}
            print(json.dumps(report, indent=1, default=asdict))
        else:
            print(table(rows) + tune.speed_table(speeds))
            print(
                f"\n{question.backend}: {verdict.outcome} in {verdict.seconds:.0f} s {verdict.detail} {verdict.path}".rstrip()
            )
    sys.exit({"right": 0, "unknown": 2}.get(verdict.outcome, 1))
