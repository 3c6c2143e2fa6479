"""The compiled kernels of both backends on the emulator, through the public functions, in bf16 and
fp16.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace

import emulated_gpu
import pytest
import torch
from comparison import check_compiles_once, check_custom_op, compare, compare_saved, cotangents
from loss_cases import CONFIGS, V, make_batch, run

from eapo_kernels import Options, token_stats
from eapo_kernels.ops import token_stats as op
from eapo_kernels.ops.dispatch import WeightedRows
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.testing import make_inputs

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run the kernels on the GPU"),
]

BF16, FP16 = torch.bfloat16, torch.float16
BACKENDS = ["triton", "cuda"]
KINDS = [("triton", "sm90"), ("cuda", "sm90"), ("triton", "sm80"), ("triton", "sm100")]
NARROW, WIDE = 2048, 4096
"""Lines of Triton's table of tiles for sm90: 128x128, two programs a multiprocessor; 128x256,
persistent.
"""

LINES = [
    ("triton", "sm90", NARROW, FP16),
    ("triton", "sm90", WIDE, BF16),
    ("cuda", "sm90", WIDE, BF16),
    ("cuda", "sm90", WIDE, FP16),
    ("triton", "sm80", WIDE, BF16),
    ("triton", "sm80", WIDE, FP16),
    ("triton", "sm100", WIDE, BF16),
    ("triton", "sm100", WIDE, FP16),
]
"""Backend, architecture, line of the table, dtype."""


@pytest.mark.parametrize(("backend", "family", "dim", "dtype"), LINES)
def test_statistics_and_gradients(
    dim: int, dtype: torch.dtype, backend: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and the gradient by slabs of the vocabulary, with a bias and a temperature per row;
    ragged tiles.
    """
    emulated_gpu.pretend(monkeypatch, family=family, dim=dim, seed=dim, lateness=0.7)
    inputs = make_inputs(130, 136, 515, dtype=dtype, bias=True)
    temperature = 0.5 + torch.rand(130, generator=torch.Generator().manual_seed(3))
    compare(inputs, cotangents(130), backend=backend, inv_temperature=temperature)


@pytest.mark.parametrize(("backend", "family"), KINDS)
def test_a_range_of_nothing_but_nan_spoils_every_row(backend: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's full vocabulary shard may be NaN. The hardware's maximum ignores NaN, the
    interpreter's does not.
    """
    emulated_gpu.pretend(monkeypatch, family=family)
    inputs = make_inputs(4, 72, 1024, dtype=torch.bfloat16)
    p = Projection(inputs.hidden.detach(), inputs.weight.detach().clone())
    p.weight[512:] = float("nan")
    used = importlib.import_module(f"eapo_kernels.ops.{backend}.backend")
    monkeypatch.setattr(used, "stream_statistics", functools.partial(used.stream_statistics, splits=2))
    targets = torch.tensor([0, 7, 300, 511])
    found = used.BACKEND.statistics(p, targets, entropy=True, second_moments=False, budget=2**20)
    assert found.logp.isnan().all()
    assert found.entropy.isnan().all()


@pytest.mark.parametrize(("family", "dtype"), [("sm80", BF16), ("sm90", BF16), ("sm90", torch.float32), ("sm100", BF16)])
def test_a_soft_cap_and_rows_that_no_descriptor_can_name(
    dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd D selects the lines of the table that load by pointer."""
    emulated_gpu.pretend(monkeypatch, family=family)
    inputs = make_inputs(70, 37, 300, dtype=dtype)
    compare(inputs, cotangents(70), backend="triton", softcap=4.0, logit_scale=0.7)


@pytest.mark.parametrize(
    ("config", "off_policy", "backend", "family", "dim", "dtype"),
    [
        *(("default", 0.3, *line) for line in LINES),
        *(("asymmetric_dual", 50.0, *line) for line in LINES if line[1] == "sm90"),
        ("asymmetric_dual", 50.0, "triton", "sm80", WIDE, FP16),
        ("asymmetric_dual", 50.0, "triton", "sm100", WIDE, BF16),
        *(("entropy_bonus", 0.3, "triton", family, WIDE, BF16) for family in ("sm80", "sm90", "sm100")),
    ],
)
def test_the_loss_in_one_pass(
    config: str, off_policy: float, dim: int, dtype: torch.dtype, backend: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same loss of the torch backend in float64.

    Offsets, the first product, rescued rows where the old log-prob is far off (off_policy 50),
    finalize with coefficients, rows of d_weight at the targets; with an entropy bonus a chunk of
    logits and its row kernels.
    """
    inputs = make_inputs(150, 72, V, dtype=dtype)
    batch = make_batch(inputs, off_policy=off_policy)
    wide = inputs.to(torch.float64)
    numbers = {k: v.double() for k, v in vars(batch).items() if torch.is_tensor(v) and v.is_floating_point()}
    double = replace(batch, **numbers | {"rewards": batch.rewards})  # in fp64 rewards a difference of 1e-9 is no tie
    settings = {"positive_weight": 0.7, "config": CONFIGS[config]}
    exact, exact_grads = run(wide, double, schedule="autograd", backend="torch", **settings)
    _, plain_grads = run(inputs, batch, schedule="autograd", backend="torch", **settings)
    emulated_gpu.pretend(monkeypatch, family=family, dim=dim, seed=dim + 1, lateness=0.7)
    options = Options(memory_budget=64 * 4 * V)  # several chunks
    got, grads = run(inputs, batch, schedule="one_pass", backend=backend, options=options, **settings)
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-4, atol=1e-5)
    for name, value in exact.metrics.items():
        torch.testing.assert_close(got.metrics[name].double(), value.double(), rtol=1e-3, atol=1e-4, msg=name)
    for name, ours, eager, right in zip(("hidden", "weight"), grads, plain_grads, exact_grads, strict=True):
        error = (ours.double() - right).norm() / right.norm()
        bound = max(2 * (eager.double() - right).norm() / right.norm(), torch.finfo(dtype).eps)
        assert error <= bound, f"d_{name}: {error:.1e} beside {bound:.1e}"


@pytest.mark.parametrize(("family", "dim"), [("sm80", WIDE), ("sm90", NARROW), ("sm90", WIDE), ("sm100", WIDE)])
@pytest.mark.parametrize(("dtype", "d"), [(BF16, 136), (FP16, 37), (torch.float32, 72)])
def test_entries_of_a_support(dtype: torch.dtype, d: int, dim: int, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 to 20 ids a row, one of them in most rows, some that do not exist; chosen logits, d_hidden, and d_weight by slabs.

    To 1e-6 of the sum of all terms without their signs, and twice the same bits.
    """
    emulated_gpu.pretend(monkeypatch, family=family, dim=dim)
    backend = importlib.import_module("eapo_kernels.ops.triton.backend").BACKEND
    n, v, g = 90, 64, torch.Generator().manual_seed(4)
    chosen = torch.rand(n, v, generator=g) < torch.arange(n).remainder(3)[:, None] / 10
    chosen[10:, 5] = True
    rows, ids = chosen.nonzero().unbind(1)
    ids[7], ids[20] = -1, v
    exists = (ids >= 0) & (ids < v)
    hidden, weight = torch.randn(n, d, generator=g).to(dtype), torch.randn(v, d, generator=g).to(dtype)
    values = torch.where(exists, torch.randn(len(ids), generator=g), 0.0)
    values[::9] = 0.0
    p = Projection(hidden, weight)
    z = backend.logits_at(p, rows, ids)
    terms = hidden.double()[rows[exists]] * weight.double()[ids[exists]]
    assert torch.equal(z.isnan(), ~exists)
    assert (z[exists].double() - terms.sum(1)).abs().le(1e-6 * terms.abs().sum(1)).all()
    assert torch.equal(backend.logits_at(p, rows, ids)[exists], z[exists])
    by_row = WeightedRows(rows, ids, values, weight)
    by_id = WeightedRows.sort(ids, rows, values, hidden)
    for size, entries in ((n, by_row), (v, by_id)):
        first, second = (torch.ones(size, d) for _ in range(2))
        for out in (first, second):
            backend.add_rows(out[:40], 0, entries)
            backend.add_rows(out[40:], 40, entries)
        used = entries.values != 0
        keys, terms = entries.keys[used], entries.source.double()[entries.rows[used]] * entries.values[used, None].double()
        exact, bound = (torch.ones(size, d).double().index_add_(0, keys, t) for t in (terms, terms.abs()))
        assert (first.double() - exact).abs().le(1e-6 * bound).all()
        assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "more"), [("triton", True), ("cuda", False)])
def test_the_contract_of_a_custom_op(more: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_gpu.pretend(monkeypatch)
    check_custom_op(backend, "cpu", entropy=more, second_moments=more, dtype=torch.bfloat16)
    check_compiles_once(backend, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "dtype", "budget"),
    [("triton", BF16, 2**24), ("triton", FP16, 2**24), ("cuda", BF16, 2**24), ("cuda", BF16, 2**17)],
)
def test_saved_rows(budget: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows, and a budget that recomputes them."""
    emulated_gpu.pretend(monkeypatch)
    mask = torch.arange(300) % 7 != 0
    compare_saved(make_inputs(300, 72, 700, dtype=dtype), budget, backend=backend, mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_one_row_and_targets_that_are_no_token(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of targets their rows become NaN, and nothing outside of the tensors is
    accessed.
    """
    emulated_gpu.pretend(monkeypatch)
    monkeypatch.setattr(op, "check_values", lambda *arguments: None)
    inputs = make_inputs(80, 72, 700, dtype=torch.bfloat16)
    for n in (0, 1):
        few = token_stats(inputs.hidden[:n], inputs.weight, inputs.targets[:n], backend=backend)
        assert few.logp.shape == (n,)
        assert few.logp.isfinite().all()
    targets = inputs.targets.clone()
    wrong = torch.tensor([3, 4, 20, 21, 79])
    targets[wrong] = torch.tensor([700, 705, -1, -7, 2**40])
    for plan in ("auto", "recompute"):
        hidden = inputs.hidden.detach().requires_grad_()
        stats = token_stats(hidden, inputs.weight, targets, entropy="nograd", backend=backend, options=Options(plan=plan))
        assert stats.logp.isnan().nonzero()[:, 0].tolist() == wrong.tolist()
        (d_hidden,) = torch.autograd.grad(stats.logp.sum(), [hidden])
        assert d_hidden.isnan().any(1).nonzero()[:, 0].tolist() == wrong.tolist()


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_model(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M on a paragraph in bf16, 80 rows: gradients five times as exact as with logits in
    bf16.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.models.embedded import resolve

    folder = resolve("smollm2-135m", "~/.cache/eapo_kernels")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0, :-1].bfloat16()
    weight, targets = model.get_output_embeddings().weight.detach().bfloat16(), ids[0, 1:]
    n = targets.numel()
    assert n > 70
    c = torch.randn(n, generator=torch.Generator().manual_seed(1))

    def gradients(logp: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
        return [one.double() for one in torch.autograd.grad((logp * c.to(logp.dtype)).sum(), leaves)]

    def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
        return [one.to(dtype).requires_grad_() for one in (hidden.detach(), weight.detach())]

    h, w = leaves(torch.float64)
    every = (h @ w.T).log_softmax(1)
    exact, exact_entropy = every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(1).detach()
    exact_grads = gradients(exact, h, w)
    h, w = leaves(torch.bfloat16)
    rounded = (h @ w.T).float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    plain = gradients(rounded, h, w)
    emulated_gpu.pretend(monkeypatch, seed=1, lateness=0.9)
    h, w = leaves(torch.bfloat16)
    stats = token_stats(h, w, targets, entropy="nograd", backend=backend)
    ours = gradients(stats.logp, h, w)
    # Most of the error comes from tensor cores that truncate their sums; with rounding it would be 5e-6.
    assert (stats.logp.detach().double() - exact.detach()).abs().max() < 5e-5
    assert (stats.entropy.double() - exact_entropy).abs().max() < 5e-5
    for got, eager, right in zip(ours, plain, exact_grads, strict=True):
        error, theirs = ((one - right).norm() / right.norm() for one in (got, eager))
        assert error < 3e-3, "bf16's own rounding is 1.7e-3"
        assert 5 * error < theirs


PARAGRAPH = """Asthma is a condition in which the airways narrow and swell and may produce extra mucus. This can make breathing
difficult and trigger coughing, a whistling sound when you breathe out, and shortness of breath. For some people it is a minor
nuisance; for others it interferes with daily activities and may lead to a life-threatening attack."""
