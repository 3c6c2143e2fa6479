"""The one-pass chunk: against the torch backend's chunk, and through the loss against the autograd
schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import cotangents, dense, policy_batch, projection
from loss_cases import CONFIGS, D, N, V, make_batch
from torch import Tensor

from eapo_kernels import EAPOConfig, Options, TokenBatch, eapo_loss, reference
from eapo_kernels.ops import gradients, torch_backend
from eapo_kernels.ops.dispatch import LogitCotangents
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import common, logit_grad, online_softmax
from eapo_kernels.ops.triton.backend import BACKEND
from eapo_kernels.ops.triton.tiles import Tile
from eapo_kernels.testing import Inputs, assert_no_worse_than, make_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, about overflow before rows are rescued
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAPPED = {"softcap": 4.0, "logit_scale": 0.7, "inv_temperature": 1.3}


def chunk_gradient(backend: Any, inputs: Inputs, which: str, **transform: Any) -> tuple[Any, Tensor]:
    """Statistics and dL/d(raw logits) of a chunk, for one cotangent or for all."""
    logp, entropy, lse = cotangents(inputs.targets.numel(), which, inputs.hidden.device.type)
    given = LogitCotangents(logp, entropy if which != "logp" else None, lse if which == "all" else None)
    chunk = backend.open_chunk(
        projection(inputs, **transform), inputs.targets, entropy=True, entropy_gradient=given.entropy is not None
    )
    statistics = chunk.statistics()
    gradient = chunk.gradient(given)
    assert gradient.matrix.dtype == projection(inputs).operand_dtype
    return statistics, dense(gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "which", "transform"),
    [
        *(((1, 72, 257), which, {}) for which in ("logp", "all")),
        *(((63, 72, 1031), which, transform) for which in ("logp", "all") for transform in ({}, CAPPED)),
        ((3, 16, 50257), "logp", {}),
        ((3, 16, 50257), "all", CAPPED),
    ],
    ids=str,
)
def test_chunk_agrees_with_the_torch_backend(
    which: str, shape: tuple[int, int, int], transform: dict[str, float], dtype: torch.dtype, device: str
) -> None:
    inputs = make_inputs(*shape, dtype=dtype, bias=True, device=device)
    expected, gradient = chunk_gradient(torch_backend.BACKEND, inputs, which, **transform)
    got, matrix = chunk_gradient(BACKEND, inputs, which, **transform)
    for name in ("logp", "entropy", "lse"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=2e-6, atol=4e-6)
    for name in ("log_sum", "mean_shifted"):  # the offset may differ between backends
        shifted = [getattr(s, name) + s.row_offset for s in (got, expected)]
        torch.testing.assert_close(*shifted, rtol=2e-6, atol=4e-6)
    floor = 4e-6 if device == "cpu" or dtype == torch.float32 else torch.finfo(dtype).eps
    assert_no_worse_than(matrix, gradient, gradient, floor=floor, name="gradient")


def test_gradient_is_the_oracles(device: str) -> None:
    """E5 by autograd through float64 statistics, every cotangent, per-token temperature."""
    inputs = make_inputs(63, 72, 1031, device=device)
    temperature = 0.5 + torch.rand(63, device=device)
    wide = inputs.to(torch.float64)
    z = (wide.hidden @ wide.weight.T).requires_grad_()
    eye = torch.eye(1031, dtype=torch.float64, device=device)
    stats = reference.token_stats(z, eye, inputs.targets, inv_temperature=temperature.double())
    weights = cotangents(63, device=device).double()
    loss = (stats.logp * weights[0] + stats.entropy * weights[1] + stats.lse * weights[2]).sum()
    (exact,) = torch.autograd.grad(loss, [z])
    _, matrix = chunk_gradient(BACKEND, inputs, "all", row_inv_temperature=temperature)
    assert_no_worse_than(matrix, exact, exact, floor=1e-5, name="gradient")


@pytest.mark.parametrize("tile", [Tile(1, 128), Tile(4, 64), Tile(16, 2048)], ids=str)
def test_tiles_change_only_the_rounding(tile: Tile, device: str) -> None:
    inputs = make_inputs(21, 16, 515, bias=True, device=device)
    p = projection(inputs, softcap=5.0)
    expected, gradient = chunk_gradient(torch_backend.BACKEND, inputs, "all", softcap=5.0)
    raw = common.workspace(p, torch.float32)
    raw.copy_(p.hidden @ p.weight.T)
    launch, sums = online_softmax.row_statistics(raw, p, inputs.targets, entropy=True, tile=tile)
    launch()
    launch, final = online_softmax.finalize(sums)
    launch()
    torch.testing.assert_close(final.statistics().logp, expected.logp, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(final.statistics().entropy, expected.entropy, rtol=2e-6, atol=4e-6)
    weights = cotangents(21, device=device)
    logit_grad.row_gradient(raw, raw, p, inputs.targets, final.statistics(), LogitCotangents(*weights), tile=tile)()
    torch.testing.assert_close(raw.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["exponentials", "logits"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_small_cotangents_do_not_underflow(dtype: torch.dtype, form: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients of a mean over a million tokens: with fp16 operands their size is in row_scale,
    not in the matrix."""
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda self: dtype))  # as on CUDA
    inputs = make_inputs(16, 16, 99, dtype=torch.float16, device=device)
    p = projection(inputs)
    chunk = BACKEND.open_chunk(p, inputs.targets, entropy=True, entropy_gradient=form == "logits")
    chunk.statistics()
    small = torch.linspace(-1e-6, 1e-6, 16, device=device)
    small[3] = 0.0
    gradient = chunk.gradient(LogitCotangents(small))
    assert gradient.matrix.dtype == dtype
    if form == "logits":
        bits = gradient.row_scale.log2()
        assert (bits == bits.round()).all()
    prob = torch.softmax(p.hidden.double() @ p.weight.double().T, 1)
    one_hot = torch.nn.functional.one_hot(inputs.targets, 99)
    exact = small.double().unsqueeze(1) * (one_hot - prob)
    torch.testing.assert_close(dense(gradient), exact, rtol=2e-3, atol=1e-13)


def test_a_chunk_gives_its_gradient_once(device: str) -> None:
    inputs = make_inputs(5, 16, 99, device=device)
    chunk = BACKEND.open_chunk(projection(inputs), inputs.targets, entropy=False, entropy_gradient=False)
    assert chunk.statistics().entropy is None
    given = LogitCotangents(torch.ones(5, device=device))
    chunk.gradient(given)
    with pytest.raises(AssertionError, match="one call per chunk"):
        chunk.gradient(given)


def loss_and_gradients(inputs: Inputs, batch: TokenBatch, **options: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.hidden, inputs.weight)]
    out = eapo_loss(*leaves, batch, positive_weight=0.7, **options)
    return out.loss, out.metrics, list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize(
    "config",
    [
        EAPOConfig(),
        EAPOConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.5, negative_weight=0.8),
        EAPOConfig(entropy_coef=0.05),
        EAPOConfig(kl_coef=0.1),
    ],
    ids=["fused", "fused_dual_clip", "entropy_gradient", "kl"],
)
@pytest.mark.parametrize(
    ("dtype", "compact"),
    [(torch.float32, True), (torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=str,
)
def test_loss_agrees_between_schedules_and_backends(config: EAPOConfig, compact: bool, dtype: torch.dtype, device: str) -> None:
    """Loss, all metrics and both gradients, in several chunks, with masked rows kept or
    compacted."""
    inputs = make_inputs(150, 24, 301, dtype=dtype, device=device)
    batch = policy_batch(inputs, device)
    if config.kl_coef:
        batch = replace(batch, ref_logp=batch.old_logp + 0.1)
    options = Options(memory_budget=301 * 4 * 64, compact=compact)
    loss, metrics, grads = loss_and_gradients(
        inputs, batch, config=config, schedule="one_pass", backend="triton", options=options
    )
    for schedule, backend in (("autograd", "triton"), ("one_pass", "torch")):
        other, other_metrics, other_grads = loss_and_gradients(
            inputs, batch, config=config, schedule=schedule, backend=backend, options=options
        )
        torch.testing.assert_close(loss, other, rtol=2e-5, atol=1e-6)
        assert metrics.keys() == other_metrics.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(value, other_metrics[name], rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        for a, b in zip(grads, other_grads, strict=True):
            floor = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            assert_no_worse_than(a, b, b.double(), floor=floor, name="gradient")


def test_one_pass_is_bitwise_reproducible(device: str) -> None:
    inputs = make_inputs(150, 24, 301, dtype=torch.bfloat16, device=device)
    batch = policy_batch(inputs, device)
    options = {"schedule": "one_pass", "backend": "triton", "options": Options(memory_budget=301 * 4 * 64)}
    first, second = (loss_and_gradients(inputs, batch, **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[2], second[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
def test_every_backend_takes_the_schedule_with_the_fewest_products(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass wherever the loss allows it, also where the caller names the backend."""
    calls: list[str] = []
    right = gradients.one_pass

    def one_pass(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[2].name)
        return right(*arguments, **named)

    monkeypatch.setattr(gradients, "one_pass", one_pass)
    inputs = make_inputs(N, D, V, dtype=torch.bfloat16)
    batch = make_batch(inputs)
    eapo_loss(inputs.hidden, inputs.weight, batch, positive_weight=0.7, backend=backend)
    assert calls == ["torch" if backend == "auto" else backend]
    eapo_loss(inputs.hidden, inputs.weight, batch, positive_weight=0.7, backend=backend, options=Options(plan="recompute"))
    eapo_loss(inputs.hidden, inputs.weight, batch, positive_weight=0.7, backend=backend, config=CONFIGS["gspo"])
    assert len(calls) == 1
