"""One-pass chunks of logits and of exponentials through the loss: the choice, agreement, memory and
rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import policy_batch, projection
from exponential_rows import out_of_range
from torch import Tensor

from eapo_kernels import EAPOConfig, Options, TokenBatch, eapo_loss
from eapo_kernels.ops import gemm
from eapo_kernels.ops.dispatch import LogitCotangents
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import backend as triton_backend
from eapo_kernels.ops.triton import scaled_exp
from eapo_kernels.ops.triton.backend import BACKEND
from eapo_kernels.ops.triton.scaled_exp import ScaledExpChunk
from eapo_kernels.testing import Inputs, assert_no_worse_than, make_inputs, peak_memory

pytestmark = [pytest.mark.usefixtures("poisoned", "narrow_fp16"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

FORMS = ("exponentials", "logits")


def force(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(triton_backend, "uses_logits", lambda projection, entropy_gradient: name == "logits")


def loss_and_gradients(inputs: Inputs, batch: TokenBatch, backend: str, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    out = eapo_loss(*leaves[:2], batch, bias=leaves[2], positive_weight=0.7, schedule="one_pass", backend=backend, **options)
    return out, torch.autograd.grad(out.loss, leaves)


def assert_agree(a: tuple[Any, tuple[Tensor, ...]], b: tuple[Any, tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    torch.testing.assert_close(a[0].loss, b[0].loss, rtol=2e-5, atol=1e-6)
    for name, value in a[0].metrics.items():
        torch.testing.assert_close(value, b[0].metrics[name], rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for got, expected in zip(a[1], b[1], strict=True):
        floor = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert_no_worse_than(got, expected, expected.double(), floor=floor, name="gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_choice(dtype: torch.dtype, softcap: float | None, entropy_gradient: bool) -> None:
    p = Projection(torch.zeros(2, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype), softcap=softcap)
    logits = dtype == torch.float32 or softcap is not None or entropy_gradient
    assert triton_backend.uses_logits(p, entropy_gradient) == logits


@pytest.mark.parametrize("name", FORMS)
def test_the_choice_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    force(monkeypatch, name)
    inputs = make_inputs(4, 8, 33, device=device)
    chunk = BACKEND.open_chunk(projection(inputs), inputs.targets, entropy=True, entropy_gradient=False)
    assert isinstance(chunk, ScaledExpChunk) == (name == "exponentials")


CONFIGS: dict[str, tuple[EAPOConfig, dict[str, Any]]] = {
    "fused": (EAPOConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.5), {}),
    "kl": (EAPOConfig(kl_coef=0.1), {"inv_temperature": "rows", "logit_scale": 0.8}),
    "entropy_gradient": (EAPOConfig(entropy_coef=0.05), {}),
}


@pytest.mark.parametrize(
    ("config_name", "name"),
    [("fused", "exponentials"), ("fused", "logits"), ("kl", "exponentials"), ("kl", "logits"), ("entropy_gradient", "logits")],
)
@pytest.mark.parametrize(
    ("dtype", "compact"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)],
    ids=str,
)
def test_loss_agrees_with_the_torch_backend(
    config_name: str, name: str, compact: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, metrics and the three gradients, in several chunks of odd size, with masked rows kept
    or compacted."""
    config, transform = CONFIGS[config_name]
    if config.entropy_coef == 0:
        force(monkeypatch, name)
    inputs = make_inputs(150, 24, 301, dtype=dtype, bias=True, device=device)
    batch = policy_batch(inputs, device)
    if config.kl_coef:
        batch = replace(batch, ref_logp=batch.old_logp + 0.1)
    rows = 0.5 + torch.rand(150, generator=torch.Generator().manual_seed(1)).to(device)
    transform = {k: rows if v == "rows" else v for k, v in transform.items()}
    options = {"config": config, "options": Options(memory_budget=301 * 4 * 64, compact=compact), **transform}
    results = [loss_and_gradients(inputs, batch, backend, **options) for backend in ("triton", "torch")]
    assert_agree(*results, dtype)


@pytest.mark.parametrize(
    ("dtype", "off"),
    [
        *((torch.bfloat16, off) for off in (None, 25.0, -200.0)),
        *((torch.float16, off) for off in (None, 0.0, -25.0, 50.0)),
    ],
    ids=str,
)
def test_old_log_probs_may_be_anything(
    dtype: torch.dtype, off: float | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """old_logp is the logp_guess and the ratio's denominator: if far off, all rows are rescued and
    the loss is unchanged."""
    rescued = []

    class Counting(ScaledExpChunk):
        def gradient(self, cotangents: LogitCotangents) -> Any:
            rescued.append(int(self.sums.n_rescue))
            return super().gradient(cotangents)

    monkeypatch.setattr(scaled_exp, "ScaledExpChunk", Counting)
    inputs = make_inputs(150, 24, 301, dtype=dtype, bias=True, device=device)
    batch = policy_batch(inputs, device)
    old = None if off is None else batch.old_logp + off
    largest_ratio = math.exp(min(max(-(off or 0.0), 0.0), 60.0))  # divided out, because the gradients must be finite in fp16
    batch = replace(batch, old_logp=old, mask=None, denominator=150 * largest_ratio)
    options = {"config": EAPOConfig(clip_high=1e30), "options": Options(memory_budget=301 * 4 * 64)}
    results = [loss_and_gradients(inputs, batch, backend, **options) for backend in ("triton", "torch")]
    assert_agree(*results, dtype)
    if off is not None:
        assert sum(rescued) == (150 if abs(off) > (5.5 if dtype == torch.float16 else 33) else 0)
    else:
        assert sum(rescued) == int(out_of_range(projection(inputs), inputs.targets, None).sum())
    assert len(rescued) > 1


@pytest.mark.parametrize("trained", ["hidden", "weight", "nothing"])
def test_frozen_parts(trained: str, device: str) -> None:
    inputs = make_inputs(70, 24, 301, dtype=torch.bfloat16, device=device)
    batch = policy_batch(inputs, device)
    hidden, weight = (
        t.detach().clone().requires_grad_(trained == n) for t, n in ((inputs.hidden, "hidden"), (inputs.weight, "weight"))
    )
    out = eapo_loss(hidden, weight, batch, positive_weight=0.7, schedule="one_pass", backend="triton")
    both = [t.detach().clone().requires_grad_() for t in (inputs.hidden, inputs.weight)]
    whole = eapo_loss(*both, batch, positive_weight=0.7, schedule="one_pass", backend="triton")
    assert torch.equal(out.loss, whole.loss)
    gradients = dict(zip(("hidden", "weight"), torch.autograd.grad(whole.loss, both), strict=True))
    if trained != "nothing":
        out.loss.backward()
        assert torch.equal({"hidden": hidden, "weight": weight}[trained].grad, gradients[trained])


@pytest.mark.parametrize("name", FORMS)
def test_a_chunk_stays_within_its_bytes(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, name)
    inputs = make_inputs(256, 8, 20_001, device=device)  # fp32: the CPU would widen others
    p, one = projection(inputs), LogitCotangents(torch.ones(256, device=device))
    bytes_per_row = BACKEND.chunk_row_bytes(p, False)
    if name == "exponentials":
        assert bytes_per_row <= 20_016 * p.operand_dtype.itemsize * 1.04

    def work() -> None:
        chunk = BACKEND.open_chunk(p, inputs.targets, entropy=True, entropy_gradient=False)
        chunk.statistics()
        chunk.gradient(one)

    work()
    assert peak_memory(work, device) <= 256 * bytes_per_row + 256 * 200 + 2**16


@pytest.mark.parametrize("off", [None, -30.0, 100.0])
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "uniform"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_round_like_one_product_of_halves(
    dtype: torch.dtype, off: float | None, peaked: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative errors at most 0.4 (hidden) and 0.6 (weight) of those of exact dlogits rounded once
    to the dtype.

    E is stored in the dtype; the target's entry, the largest of a row, is separate and not rounded.
    All products are exact, so only the rounding of E and of factor * hidden is compared. The
    guesses have errors of about 0.3 nats.
    """
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda self: dtype))  # as on CUDA
    n, d, v = 256, 64, 2049
    inputs = make_inputs(n, d, v, dtype=dtype, peaked=peaked, device=device)
    p = projection(inputs)
    g = torch.Generator().manual_seed(2)
    targets = torch.multinomial(torch.softmax((p.hidden.double() @ p.weight.double().T).cpu(), 1), 1, generator=g).squeeze(1)
    targets = targets.to(device)
    a = torch.randn(n, generator=g).to(device) / n
    hidden, weight = p.hidden.double(), p.weight.double()
    log_p = torch.log_softmax(hidden @ weight.T, 1)
    dlogits = a.double()[:, None] * (torch.nn.functional.one_hot(targets, v) - log_p.exp())
    exact = dlogits @ weight, dlogits.T @ hidden
    row_scale = LogitCotangents(a).split_pow2(dtype)[1].double()[:, None]
    rounded = (dlogits / row_scale).to(dtype).double() * row_scale
    ideal = rounded @ weight, rounded.T @ hidden
    noise = off if off is None else off + 0.3 * torch.randn(n, generator=g).to(device)
    logp_guess = None if noise is None else log_p.gather(1, targets[:, None]).squeeze(1).float() + noise
    chunk = BACKEND.open_chunk(p, targets, entropy=True, entropy_gradient=False, logp_guess=logp_guess)
    chunk.statistics()
    matrix, factor, entries = chunk.gradient(LogitCotangents(a))
    assert matrix is not None
    assert factor is not None
    assert entries is not None
    assert matrix.dtype == dtype
    scaled, unit = gemm.scale_rows(p.hidden, factor, dtype)
    scaled = scaled.double() * (1.0 if unit is None else unit.double())
    targets_part = torch.zeros_like(dlogits).index_put_((entries.rows, entries.ids), entries.values.double())
    got = (
        matrix.double() @ weight * factor.double()[:, None] + targets_part @ weight,
        matrix.double().T @ scaled + targets_part.T @ hidden,
    )
    for value, best, ref64, factor, name in zip(got, ideal, exact, (0.4, 0.6), ("hidden", "weight"), strict=True):
        error, allowed = (value - ref64).norm() / ref64.norm(), factor * (best - ref64).norm() / ref64.norm()
        assert error <= allowed, f"d_{name}: {float(error):.2e}, allowed {float(allowed):.2e}"
