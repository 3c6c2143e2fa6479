"""Rows of a gradient as few entries: the certificate, what is left of the gradients, and what the search costs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eapo_kernels import EapoError, Options, TokenBatch, eapo_loss, token_stats
from eapo_kernels.ops import dispatch, gradients, sparsify
from eapo_kernels.ops.dispatch import Coefficients, Entries, LogitCotangents, LogitGradient
from eapo_kernels.ops.gradients import MainGrad
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.vocab_shard import VocabShard
from eapo_kernels.types import SUMS

FLOOR = 1 / 64
FORMS = ("exponentials", "softmax", "softmax_fp16", "entries")


class Outcome(NamedTuple):
    exact: Tensor  # [C, V] float64, the gradient as it was given
    found: Tensor  # [C, V] float64
    sparse: Tensor  # [C] bool
    report: sparsify.Sparsity


def chunk_gradient(z: Tensor, targets: Tensor, cotangents: Tensor, form: str) -> LogitGradient:
    """The gradient of sum cotangents * logp as the torch backend stores it on a CPU ("exponentials") and
    on CUDA ("softmax", bf16 or scaled fp16), and as the Triton kernels do ("entries", bf16)."""
    index, z = targets[:, None], z.double()
    others = z.scatter(1, index, -torch.inf)
    e, offset = (others - z.amax(1, keepdim=True)).exp(), z.amax(1, keepdim=True)
    rest = e.sum(1)
    s0 = rest + (z.gather(1, index) - offset).exp().squeeze(1)
    if form == "exponentials":
        return LogitGradient(e.scatter(1, index, -rest[:, None]).float(), (cotangents / -s0).float())
    if form == "entries":
        k = 1 + torch.rand(len(z), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        entries = Entries.one_a_row(targets, (cotangents * rest / s0).float())
        return LogitGradient((e * k).bfloat16(), (cotangents / -(s0 * k.squeeze(1))).float(), entries)
    dtype, scale = (torch.float16, 1024.0) if form == "softmax_fp16" else (torch.bfloat16, 1.0)
    q = torch.softmax(z.scatter(1, index, torch.finfo(torch.float32).min), 1).scatter(1, index, -1.0) * scale
    return LogitGradient(q.to(dtype), (cotangents * rest / s0 / -scale).float())


def written_out(gradient: LogitGradient, n_rows: int, vocab: int) -> Tensor:
    """[R, V] float64."""
    full = torch.zeros(n_rows, vocab, dtype=torch.float64)
    if gradient.matrix is not None:
        assert gradient.row_scale is not None
        full[: len(gradient.matrix)] = gradient.matrix.double() * gradient.row_scale.double()[:, None]
    if gradient.entries is not None:
        rows, ids, values, _ = gradient.entries
        assert bool((rows.diff() >= 0).all()), "rows ascend"
        full.index_put_((rows, ids), values.double(), accumulate=True)
    return full


def check(gradient: LogitGradient, targets: Tensor, tolerance: float) -> Outcome:
    """``sparsify``, and (S1) for every row from the gradient written out in float64. A row's norm is 2 |s| R."""
    assert gradient.matrix is not None
    shape, matrix = gradient.matrix.shape, gradient.matrix.clone()
    exact = written_out(gradient, *shape)
    result, order, tally = sparsify.sparsify(gradient, targets, tolerance)
    report = sparsify.Sparsity.of([tally])
    sparse = torch.zeros(shape[0], dtype=torch.bool)
    if order is None:
        assert torch.equal(result.matrix.nan_to_num(7.0), matrix.nan_to_num(7.0)), "nothing is moved or lost"
        return Outcome(exact, exact, sparse, report)
    assert torch.equal(order.sort().values, torch.arange(shape[0])), "a permutation"
    found = torch.empty_like(exact)
    found[order] = written_out(result, *shape)
    sparse[order[0 if result.matrix is None else len(result.matrix) :]] = True
    assert torch.equal(found[~sparse].nan_to_num(7.0), exact[~sparse].nan_to_num(7.0)), "dense rows are exact"
    assert (found != 0).sum(1)[sparse].amax() <= shape[1] // 32
    norm = 2 * exact.gather(1, targets[:, None]).squeeze(1).abs()
    floor = torch.where(norm.isfinite(), norm, 0).mean() * FLOOR
    error = (found - exact).abs().sum(1)[sparse]
    assert error.isfinite().all()
    allowed = tolerance * torch.maximum(norm[sparse], floor)
    assert bool((error <= allowed * (1 + 1e-5) + 1e-30).all()), "(S1)"
    own = exact.gather(1, targets[:, None])
    assert torch.allclose(found.gather(1, targets[:, None]).float()[sparse], own.float()[sparse], rtol=1e-6, atol=0)
    shares = (error / torch.maximum(norm[sparse], floor) * 2).nan_to_num(0)  # of R, half the norm; 0 / 0 without cotangents
    assert float(report.dropped_mass_max) <= 2 * tolerance * (1 + 1e-6)
    assert float(shares.max()) <= float(report.dropped_mass_max) * (1 + 1e-4) + 1e-6
    assert math.isclose(float(report.dense_share), 1 - float(sparse.float().mean()), abs_tol=1e-6)
    return Outcome(exact, found, sparse, report)


def random_logits(n: int, vocab: int, seed: int, steepest: float = 14.0) -> tuple[Tensor, Tensor, Tensor]:
    """(z, targets, cotangents): rows between nearly uniform and nearly certain, targets drawn from them."""
    draw = torch.Generator().manual_seed(seed)
    steep = 0.3 + (steepest - 0.3) * torch.rand(n, 1, generator=draw)
    z = torch.randn(n, vocab, generator=draw) * steep
    targets = torch.multinomial(torch.softmax(z, 1), 1, generator=draw).squeeze(1)
    return z, targets, torch.randn(n, generator=draw) / n


@pytest.fixture(params=["one column", "64 columns"])
def groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as of a small vocabulary, or as of a large one."""
    if request.param == "64 columns":
        monkeypatch.setattr(sparsify, "_LEAST_GROUPS", 16)


@pytest.mark.usefixtures("groups", "poisoned")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tolerance", [1e-7, 1e-4, 2e-3, 0.05, 0.5])
def test_certificate_of_random_rows(tolerance: float, form: str) -> None:
    """Every row of every form, tolerance and seed; V = 1031 fills neither groups nor words."""
    n_sparse = 0
    for seed, vocab in enumerate((1031, 2048, 1031, 3001)):
        z, targets, cotangents = random_logits(100, vocab, seed)
        n_sparse += int(check(chunk_gradient(z, targets, cotangents, form), targets, tolerance).sparse.sum())
    assert n_sparse > 20 or tolerance < 1e-6


def adversarial(vocab: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """(z, targets, name -> row)."""
    ranks = torch.arange(1, vocab + 1, dtype=torch.float64)
    shuffled = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))
    flat = torch.zeros(vocab, dtype=torch.float64)

    def one(value: float, background: float = 0.0) -> Tensor:
        return torch.full_like(flat, background).index_fill(0, torch.tensor([5]), value)

    zipf, geometric = -1.5 * ranks.log()[shuffled], -0.5 * ranks[shuffled]
    removed = zipf.clone()
    removed[torch.arange(vocab) % 3 == 0] = -torch.inf
    cases = {
        "uniform": (flat, 7),
        "two points": (one(0.0, -torch.inf).index_fill(0, torch.tensor([9]), 0.0), 5),
        "two points above dust": (one(40.0).index_fill(0, torch.tensor([9]), 40.0), 5),
        "certain: p = 1 - 1e-12": (one(math.log(vocab) + 12 * math.log(10)), 5),
        "one-hot": (one(0.0, -torch.inf), 5),
        "all mass on a wrong token": (one(60.0), 11),
        "geometric": (geometric, int(geometric.argmax())),
        "geometric, the least likely": (geometric, int(geometric.argmin())),
        "zipf, the likeliest": (zipf, int(zipf.argmax())),
        "zipf, the least likely": (zipf, int(zipf.argmin())),
        "removed columns": (removed, int(removed.argmax())),
        "equal groups": (-(torch.arange(vocab) % 16).double(), 3),
        "heads of equal groups": (torch.where(torch.arange(vocab) < 64, 3.0, -6.0).double(), 3),
        "nan": (zipf.index_fill(0, torch.tensor([8]), torch.nan), 3),
        "all nan": (flat * torch.nan, 3),
    }
    rows = [row for row, _ in cases.values()]
    return torch.stack(rows), torch.tensor([t for _, t in cases.values()]), {name: i for i, name in enumerate(cases)}


@pytest.mark.usefixtures("groups", "poisoned")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tolerance", [1e-4, 2e-3, 0.1])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_certificate_of_adversarial_rows(sign: float, tolerance: float, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsify, "_LEAST_SPARSE", 0.0)
    z, targets, row = adversarial(2050)
    cotangents = torch.full((len(z),), sign)
    outcome = check(chunk_gradient(z, targets, cotangents, form), targets, tolerance)
    dense = {name for name, i in row.items() if not outcome.sparse[i]}
    assert {"uniform", "nan", "all nan"} <= dense
    if sparsify._LEAST_GROUPS == 16:  # of 32 groups too many may be hit
        return
    assert not dense & {
        "two points", "two points above dust", "certain: p = 1 - 1e-12", "one-hot", "all mass on a wrong token",
        "geometric", "geometric, the least likely",
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_cotangent_have_no_entries_but_a_nan_shows(form: str) -> None:
    z, targets, cotangents = random_logits(64, 1031, 3)
    cotangents[::2] = 0
    z[:2, 4] = torch.nan
    outcome = check(chunk_gradient(z, targets, cotangents, form), targets, 2e-3)
    assert outcome.sparse[2::2].all()
    assert not outcome.sparse[:2].any()
    assert not outcome.found[2::2].any()
    assert outcome.found[:2].isnan().any(1).all()
    nothing = check(chunk_gradient(z[2:], targets[2:], cotangents[2:] * 0, form), targets[2:], 2e-3)
    assert nothing.sparse.all()


def test_infinite_rows_and_invalid_targets_stay_dense() -> None:
    z, targets, cotangents = random_logits(64, 1031, 3)
    gradient = chunk_gradient(z, targets, cotangents, "exponentials")
    assert gradient.matrix is not None
    gradient.matrix[0, 9], gradient.matrix[1, 9] = torch.inf, -torch.inf
    gradient.matrix[2] = 0
    result, order, _ = sparsify.sparsify(gradient, targets.index_fill(0, torch.tensor([2, 3]), -1), 0.1)
    assert order is not None
    assert result.matrix is not None
    assert {0, 1, 2, 3} <= set(order[: len(result.matrix)].tolist())


def test_rows_of_the_other_sign_stay_dense() -> None:
    """The gradient itself as the matrix: where the cotangent is positive, its other entries are negative."""
    z, targets, cotangents = random_logits(64, 1031, 3)
    matrix = written_out(chunk_gradient(z, targets, cotangents, "exponentials"), 64, 1031).float()
    outcome = check(LogitGradient(matrix, torch.ones(64)), targets, 0.1)
    assert not outcome.sparse[cotangents > 0].any()
    assert outcome.sparse[cotangents < 0].any()


def test_kept_entries_are_about_the_fewest_possible() -> None:
    """Sorted, the fewest columns that leave 2 tol R; and the exact error is what the report says."""
    draw, vocab, tolerance = torch.Generator().manual_seed(0), 49152, 2e-3
    ranks = torch.stack([torch.randperm(vocab, generator=draw) for _ in range(64)]) + 1
    z = torch.linspace(-1.5, -3, 64)[:, None] * ranks.double().log()
    targets = torch.multinomial(torch.softmax(z, 1), 1, generator=draw).squeeze(1)
    gradient = chunk_gradient(z, targets, torch.ones(64), "exponentials")
    assert gradient.matrix is not None
    e = gradient.matrix.double().scatter(1, targets[:, None], 0.0)
    fewest = vocab - (e.sort(1).values.cumsum(1) <= 2 * tolerance * e.sum(1, keepdim=True)).sum(1)
    outcome = check(gradient, targets, tolerance)
    assert float((fewest <= vocab / 40).float().mean()) > 0.5
    assert outcome.sparse[fewest <= vocab / 40].all()
    kept = (outcome.found != 0).sum(1)[outcome.sparse] - 1
    assert kept.sum() < 1.25 * fewest[outcome.sparse].sum()
    assert torch.isclose(outcome.report.kept_per_row, kept.float().mean() + 1)
    shares = (outcome.found - outcome.exact).abs().sum(1) / outcome.exact.abs().sum(1) * 2
    assert torch.isclose(outcome.report.dropped_mass_mean.double(), shares.mean(), rtol=3e-3)


def test_the_floor_frees_certain_rows() -> None:
    """A row far below the mean norm keeps its target alone, whatever its tail; of equal rows none is."""
    vocab = 2048
    z = torch.zeros(32, vocab, dtype=torch.float64)
    z[:, 0] = math.log(vocab) + 9
    z[:16, 1] = z[:16, 0]
    targets = torch.zeros(32, dtype=torch.int64)
    outcome = check(chunk_gradient(z, targets, torch.ones(32), "exponentials"), targets, 0.02)
    assert outcome.sparse.all()
    assert torch.equal((outcome.found != 0).sum(1)[16:], torch.ones(16, dtype=torch.int64))
    equal = check(chunk_gradient(z[16:], targets[16:], torch.ones(16), "exponentials"), targets[16:], 0.02)
    assert not equal.sparse.any()


class Moved(TorchDispatchMode):
    """Counts the elements that operators read and write; views count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        indexed = function.overloadpacket in (torch.ops.aten.gather, torch.ops.aten.scatter_)
        if not view and not indexed:
            self.elements += sum(t.numel() for t in (*args, result) if isinstance(t, Tensor))
        return result


def test_high_entropy_is_left_alone_at_almost_no_cost() -> None:
    """A look at 32 rows moves less than a quarter of the matrix, once; a forward and backward moves it some ten
    times beside its products."""
    z, targets, cotangents = random_logits(1024, 16384, 0, steepest=0.5)
    gradient = chunk_gradient(z, targets, cotangents, "exponentials")
    before = gradient.matrix.clone()
    with Moved() as moved:
        result, order, tally = sparsify.sparsify(gradient, targets, 2e-3)
    assert order is None
    assert result is gradient
    assert torch.equal(result.matrix, before)
    assert moved.elements < 0.25 * before.numel()
    report = sparsify.Sparsity.of([tally])
    assert [float(x) for x in report] == [0, 0, 0, 1]


N, D, V = 96, 24, 2051


def head(seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Projection, Tensor, Tensor]:
    """(projection, targets drawn from it, cotangents) with rows that are mostly concentrated."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=draw), torch.randn(V, D, generator=draw)
    projection = Projection(hidden.to(dtype), weight.to(dtype), **more)
    z = hidden @ weight.T
    targets = torch.multinomial(torch.softmax(z, 1), 1, generator=draw).squeeze(1)
    return projection, targets, torch.randn(N, generator=draw) / N


def one_pass(
    projection: Projection, targets: Tensor, cotangents: Tensor, options: Options, *, factor: float = 1.0,
    main_grad: MainGrad | None = None, lse: Tensor | None = None, entropy: Tensor | None = None,
) -> tuple[tuple[Tensor | None, ...], sparsify.Sparsity | None]:  # fmt: skip
    """The gradients of the sum of cotangents * logp."""

    def coefficients(chunk: dispatch.Chunk, rows: slice) -> Coefficients:
        chunk.statistics()
        more = (None if c is None else c[rows] for c in (entropy, lse))
        return Coefficients(LogitCotangents(cotangents[rows], *more), torch.zeros(len(SUMS)))

    backend, wanted = dispatch.load("torch"), entropy is not None

    def open_chunk(rows: slice) -> dispatch.Chunk:
        return backend.open_chunk(projection.rows(rows), targets[rows], entropy=wanted, entropy_gradient=wanted)

    _, finish, _, report = gradients.one_pass(
        projection, targets, backend, open_chunk, coefficients, row_bytes=backend.chunk_row_bytes(projection, wanted),
        needs=(True, True, projection.bias is not None), options=options, main_grad=main_grad,
    )  # fmt: skip
    return finish(torch.tensor(factor), projection), report


def logit_gradients(projection: Projection, targets: Tensor, cotangents: Tensor) -> Tensor:
    """[N, V] float64, with respect to hidden @ weight.T."""
    z = (projection.hidden.double() @ projection.weight.double().T).requires_grad_()
    logits = z if projection.bias is None else z + projection.bias.double()
    logp = torch.log_softmax(logits * projection.row_scale(), 1).gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad((cotangents.double() * logp).sum(), z)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [None, 40 * V * 6], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("zeros", [False, True])
def test_gradients_differ_by_what_the_tolerance_explains(zeros: bool, budget: int | None, dtype: torch.dtype) -> None:
    """The error of a row of d_hidden is at most the L1 error of its logits times the largest |weight|; the
    errors of d_weight together at most the sum of all L1 errors times the largest |hidden| row."""
    tolerance = 0.01
    projection, targets, cotangents = head(dtype=dtype, bias=torch.linspace(-1, 1, V).to(dtype), inv_temperature=1.3)
    if zeros:
        cotangents[::3] = 0
    exact, none = one_pass(projection, targets, cotangents, Options(memory_budget=budget), factor=0.5)
    found, report = one_pass(
        projection, targets, cotangents, Options(memory_budget=budget, gradient_tolerance=tolerance), factor=0.5
    )
    assert none is None
    assert report is not None
    assert 0.02 < float(report.dense_share) < 0.7, "rows of both kinds"
    assert 0 < float(report.dropped_mass_mean) < float(report.dropped_mass_max) <= 2 * tolerance
    assert 1 < float(report.kept_per_row) <= V / 32
    hidden, weight = projection.hidden.double(), projection.weight.double()
    norms = 0.5 * logit_gradients(projection, targets, cotangents).abs().sum(1)
    parts = [norms] if budget is None else [norms[rows] for rows in (slice(0, 32), slice(32, 64), slice(64, N))]
    live = [part[part > 0] if zeros else part for part in parts]
    floors = torch.cat([m.mean() * FLOOR * torch.ones_like(p) for p, m in zip(parts, live, strict=True)])
    allowed = tolerance * torch.maximum(norms, floors)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    differences = [
        (a.double() - b.double()).abs() for a, b in zip(found, exact, strict=True) if a is not None and b is not None
    ]
    own = [rounding * b.double().abs() for b in exact if b is not None]
    noise = rounding * norms[:, None] * weight.abs().amax()
    assert bool((differences[0] <= allowed[:, None] * weight.abs().amax() + own[0] + noise).all())
    assert float((differences[1] - own[1]).clamp_min(0).sum(0).amax()) <= float(
        (allowed + rounding * norms) @ hidden.abs().amax(1)
    )
    assert float((differences[2] - own[2]).clamp_min(0).sum()) <= float((allowed + rounding * norms).sum())
    if dtype == torch.float64:
        assert max(float(d.max()) for d in differences) > 0, "something was dropped"


def test_main_grad_and_its_scale() -> None:
    projection, targets, cotangents = head()
    options = Options(gradient_tolerance=0.01)
    into = torch.full((V, D), 0.5)
    (_, none, _), _ = one_pass(projection, targets, cotangents, options, main_grad=MainGrad(into, 0.25))
    (_, d_weight, _), _ = one_pass(projection, targets, cotangents, options, factor=0.25)
    assert none is None
    assert d_weight is not None
    torch.testing.assert_close(into - 0.5, d_weight, rtol=1e-5, atol=1e-7)


def test_without_a_tolerance_nothing_is_searched_and_with_one_bits_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    projection, targets, cotangents = head()
    first, report = one_pass(projection, targets, cotangents, Options(gradient_tolerance=2e-3))
    second, again = one_pass(projection, targets, cotangents, Options(gradient_tolerance=2e-3))
    assert report is not None
    assert again is not None
    assert all(a is None or torch.equal(a, b) for a, b in zip((*first, *report), (*second, *again), strict=True))
    monkeypatch.setattr(gradients, "sparsify", None)
    one_pass(projection, targets, cotangents, Options())


def test_a_tolerance_of_nothing_gains_nothing() -> None:
    """With 1e-9 no row passes: the gradients are the exact ones bit for bit."""
    projection, targets, cotangents = head()
    exact, _ = one_pass(projection, targets, cotangents, Options())
    found, report = one_pass(projection, targets, cotangents, Options(gradient_tolerance=1e-9))
    assert report is not None
    assert float(report.dense_share) == 1
    assert all(a is None or torch.equal(a, b) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("case", ["entropy", "softcap"])
def test_other_gradients_stay_exact(case: str) -> None:
    """Their rows have another form: all dense, the same bits."""
    projection, targets, cotangents = head(**({"softcap": 20.0} if case == "softcap" else {}))
    more = {"entropy": cotangents} if case == "entropy" else {}
    exact, _ = one_pass(projection, targets, cotangents, Options(), **more)
    found, report = one_pass(projection, targets, cotangents, Options(gradient_tolerance=0.1), **more)
    assert report == (0, 0, 0, 1)
    assert all(a is None or torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_where_it_applies() -> None:
    """Not with a cotangent of lse, on a split head, or to entries alone."""
    projection, _, c = head()
    gradient = LogitGradient(torch.ones(N, V), torch.ones(N))
    assert sparsify.applies(projection, gradient, LogitCotangents(c))
    assert not sparsify.applies(projection, gradient, LogitCotangents(c, None, c))
    assert not sparsify.applies(replace(projection, shard=VocabShard("", 0, 2 * V, V)), gradient, LogitCotangents(c))
    assert not sparsify.applies(projection, LogitGradient(None, None), LogitCotangents(c))


@pytest.mark.parametrize("schedule", ["one_pass", "autograd"])
def test_the_loss_is_exact_and_its_gradient_within_the_tolerance(schedule: str) -> None:
    projection, targets, _ = head()
    draw = torch.Generator().manual_seed(1)
    rewards = torch.rand(8, generator=draw)
    groups = torch.arange(8) // 4
    batch = TokenBatch(targets, torch.arange(N) // 12, rewards, groups, mask=torch.rand(N, generator=draw) < 0.9)

    def run(tolerance: float | None) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.clone().requires_grad_() for t in (projection.hidden, projection.weight)]
        out = eapo_loss(*leaves, batch, positive_weight=0.7, schedule=schedule, options=Options(gradient_tolerance=tolerance))
        out.loss.backward()
        return out.loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    (loss, exact), (same, found) = run(None), run(0.02)
    assert torch.equal(loss, same)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    assert len(errors) == 2
    assert 0 < max(errors) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_saved_by_token_stats_are_left_as_they_are(masked: bool, dtype: torch.dtype) -> None:
    """The backward of the autograd schedule gives the gradients of one pass, and the same bits a second time."""
    projection, targets, cotangents = head(dtype=dtype)
    mask = torch.arange(N) % 3 > 0 if masked else None
    if masked:
        cotangents = cotangents * (torch.arange(N) % 3 > 0)
    options = Options(gradient_tolerance=0.01)
    leaves = [t.clone().requires_grad_() for t in (projection.hidden, projection.weight)]
    stats = token_stats(*leaves, targets, mask=mask, entropy="none", options=options)
    first, second = (torch.autograd.grad((stats.logp * cotangents).sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    exact = torch.autograd.grad(
        (token_stats(*leaves, targets, mask=mask, entropy="none").logp * cotangents).sum(), leaves
    )  # fmt: skip
    (like_d_hidden, like_d_weight, _), _ = one_pass(projection, targets, cotangents, options)
    rounding = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    for found, like, right in zip(first, (like_d_hidden, like_d_weight), exact, strict=True):
        assert like is not None
        norm = right.double().norm()
        assert (found.double() - like.double()).norm() <= rounding * norm
        assert 0 < (found.double() - right.double()).norm() <= (0.02 + rounding) * norm


def test_a_backward_that_computes_the_logits_again_stays_exact() -> None:
    projection, targets, cotangents = head()
    leaves = [t.clone().requires_grad_() for t in (projection.hidden, projection.weight)]

    def run(tolerance: float | None) -> tuple[Tensor, ...]:
        stats = token_stats(*leaves, targets, options=Options(plan="recompute", gradient_tolerance=tolerance))
        return torch.autograd.grad((stats.logp * cotangents).sum(), leaves)

    assert all(map(torch.equal, run(0.1), run(None)))


def test_no_rows_and_only_dead_rows() -> None:
    projection, targets, cotangents = head()
    options = Options(gradient_tolerance=0.1)
    (d_hidden, d_weight, _), _ = one_pass(projection, targets, cotangents * 0, options)
    assert d_hidden is not None
    assert d_weight is not None
    assert not d_hidden.any()
    assert not d_weight.any()
    none = projection.rows(slice(0, 0))
    (d_hidden, d_weight, _), report = one_pass(none, targets[:0], cotangents[:0], options)
    assert report == (0, 0, 0, 1)
    assert d_weight is not None
    assert not d_weight.any()


@pytest.mark.parametrize("value", [0, 0.0, -1e-3, 0.51, math.nan, math.inf, True, "0.1"])
def test_tolerances_that_make_no_sense(value: Any) -> None:
    with pytest.raises(EapoError, match=r"Options.gradient_tolerance: expected a number in \(0, 0.5\] or None, got"):
        Options(gradient_tolerance=value)
    assert Options(gradient_tolerance=0.5).gradient_tolerance == 0.5
