"""All plans of a loss give the same loss and gradients; rows without a gradient cost no product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_kernels import METHODS, EapoError, Method, Options, ShapeError, TokenBatch, TokenSupport, eapo_loss, policy_loss
from eapo_kernels.ops import gradients
from eapo_kernels.ops.lm_head import Projection, fill_holes_
from eapo_kernels.testing import Inputs, make_inputs, peak_memory

N, D, V = 96, 24, 700
SOME = 40 * V * 6  # bytes: forty rows of the CPU's workspace


def _batch(inputs: Inputs, *, far: float = 0.1) -> TokenBatch:
    """16 responses in 4 groups; ``far``: spread of the old policy's log-probs, which decides how many tokens are clipped."""
    targets, device = inputs.targets, inputs.targets.device
    with torch.no_grad():
        logp = torch.log_softmax(inputs.hidden.double() @ inputs.weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    generator = torch.Generator().manual_seed(5)
    noise = far * torch.randn(len(targets), generator=generator)
    return TokenBatch(
        targets=targets,
        sequence_ids=torch.arange(len(targets), device=device) * 16 // len(targets),
        rewards=torch.rand(16, generator=generator).to(device),
        group_ids=torch.arange(16, device=device) // 4,
        old_logp=logp.float() + noise.to(device),
    )


def _with(name: str, **config: Any) -> Method:
    method = METHODS[name]
    return replace(method, config=replace(method.config, **config))


def _run(inputs: Inputs, batch: TokenBatch, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    loss = eapo_loss(hidden, weight, batch, positive_weight=0.7, **options).loss
    return (loss.detach(), *torch.autograd.grad(loss, [hidden, weight]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("one_pass", Options(plan="one_chunk")),
        ("one_pass", Options(plan="chunks")),
        ("one_pass", Options(SOME)),
        ("auto", Options(SOME, plan="chunks")),
        ("auto", Options(plan="recompute")),
        ("autograd", Options(plan="one_chunk")),
        ("autograd", Options(SOME)),
    ],
    ids=str,
)
def test_every_plan_gives_the_same(schedule: str, options: Options, dtype: torch.dtype, device: str, poisoned: None) -> None:
    inputs = make_inputs(N, D, V, dtype=dtype, device=device)
    batch = _batch(inputs)
    expected = _run(inputs, batch, schedule="autograd", options=Options(plan="recompute"))
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for ours, plain in zip(_run(inputs, batch, schedule=schedule, options=options), expected, strict=True):
        assert ours.dtype == plain.dtype
        assert float((ours.double() - plain.double()).norm() / plain.double().norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [Options(), Options(SOME)], ids=["one_chunk", "chunks"])
def test_main_grad_takes_the_weight_gradient(options: Options, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(N, D, V, dtype=dtype, device=device)
    batch = _batch(inputs)
    wide = inputs.to(torch.float64)
    _, _, exact = _run(wide, batch, schedule="one_pass")
    before = torch.randn(V, D, generator=torch.Generator().manual_seed(1)).to(device)
    main = before.clone()
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    loss = eapo_loss(hidden, weight, batch, positive_weight=0.7, options=options, main_grad=main, main_grad_scale=8.0).loss
    (8.0 * loss).backward()
    assert weight.grad is None
    _, d_hidden, _ = _run(inputs, batch, schedule="one_pass", options=options)
    torch.testing.assert_close(hidden.grad, 8 * d_hidden, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)
    error = (main.double() - before.double() - 8 * exact).norm() / (8 * exact).norm()
    assert float(error) < {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [Options(), Options(SOME), Options(compact=True)], ids=["one_chunk", "chunks", "compact"])
@pytest.mark.parametrize("supported", [False, True], ids=["vocabulary", "support"])
def test_main_grad_of_a_loss_whose_tokens_need_each_other(
    supported: bool, options: Options, dtype: torch.dtype, device: str
) -> None:
    """GSPO, whose ratio is that of a response, with an entropy bonus: the autograd schedule's loss and gradients."""
    inputs = make_inputs(N, D, V, dtype=dtype, device=device)
    batch = replace(_batch(inputs), mask=torch.arange(N, device=device) % 7 != 3)
    if supported:
        near = (inputs.targets[:, None] + torch.arange(10, device=device)) % V
        batch = replace(batch, support=TokenSupport.from_padded(near))
    given = {"method": _with("gspo", entropy_coef=0.1, clip_low=0.2, clip_high=0.2)}

    def run(inputs: Inputs, **more: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias = (t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.weight[:, 0] * 0.1))
        out = policy_loss(hidden, weight, batch, bias=bias, **given, **more)
        (8 * out.loss).backward()
        return out.loss.detach(), hidden.grad, bias.grad, out.metrics["eapo/entropy"], out.metrics["ratio_mean"], weight.grad

    exact = run(inputs.to(torch.float64), schedule="autograd")
    before = torch.randn(V, D, generator=torch.Generator().manual_seed(1)).to(device)
    main = before.clone()
    *found, none = run(inputs, options=options, main_grad=main, main_grad_scale=8.0)
    assert none is None
    tolerance = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, plain in zip([*found, main.double() - before.double()], exact, strict=True):
        assert float((ours.double() - plain.double()).norm() / plain.double().norm()) < tolerance
    with torch.no_grad():
        assert torch.equal(policy_loss(inputs.hidden, inputs.weight, batch, main_grad=main.clone(), **given).loss,
                           policy_loss(inputs.hidden, inputs.weight, batch, schedule="autograd", **given).loss)  # fmt: skip


def test_main_grad_is_refused_where_it_cannot_be(device: str) -> None:
    inputs = make_inputs(32, D, V, device=device)
    batch, main = _batch(inputs), torch.zeros(V, D, device=device)
    with pytest.raises(EapoError, match="schedule: expected 'one_pass' or 'auto' with main_grad, got 'autograd'"):
        _run(inputs, batch, schedule="autograd", main_grad=main)
    with pytest.raises(ShapeError, match=r"main_grad: expected float32 \[700, 24\]"):
        _run(inputs, batch, main_grad=main[:-1])
    with pytest.raises(ShapeError, match=r"main_grad: expected float32 \[700, 24\]"):
        _run(inputs, batch, main_grad=main.bfloat16())
    with pytest.raises(EapoError, match="main_grad_scale: expected a finite number, got nan"):
        _run(inputs, batch, main_grad=main, main_grad_scale=float("nan"))
    with pytest.raises(EapoError, match=r"schedule: expected 'autograd' for entropy_top_p=0\.2"):
        policy_loss(inputs.hidden, inputs.weight, batch, main_grad=main, method=_with("gspo", entropy_top_p=0.2))


def test_plans_are_refused_where_they_cannot_be(device: str) -> None:
    inputs = make_inputs(32, D, V, device=device)
    batch = _batch(inputs)
    with pytest.raises(EapoError, match=r"Options.plan: expected one of auto, one_chunk, chunks, recompute, got 'slabs'"):
        Options(plan="slabs")
    with pytest.raises(
        EapoError, match=r"schedule: expected 'one_pass' or 'auto' with Options\(plan='chunks'\), got 'autograd'"
    ):
        _run(inputs, batch, schedule="autograd", options=Options(plan="chunks"))
    with pytest.raises(EapoError, match=r"Options.plan: expected auto, one_chunk or chunks with the one-pass schedule"):
        _run(inputs, batch, schedule="one_pass", options=Options(plan="recompute"))
    for schedule in ("one_pass", "autograd"):
        with pytest.raises(EapoError, match=r"Options.memory_budget: expected at least \d+ bytes for plan 'one_chunk'"):
            _run(inputs, batch, schedule=schedule, options=Options(8 * V * 6, plan="one_chunk"))


def test_one_chunk_needs_no_fp32_copy_of_the_weight_gradient(device: str) -> None:
    v, d = 100_000, 512
    inputs = make_inputs(32, d, v, dtype=torch.bfloat16, device=device)
    batch = _batch(inputs)
    inputs.hidden.requires_grad_()
    inputs.weight.requires_grad_()

    def work(plan: str) -> None:
        loss = eapo_loss(
            inputs.hidden, inputs.weight, batch, positive_weight=1.0, schedule="one_pass", options=Options(plan=plan)
        ).loss
        torch.autograd.grad(loss, [inputs.hidden, inputs.weight])

    peaks = {plan: peak_memory(lambda plan=plan: work(plan), device) for plan in ("one_chunk", "chunks")}
    saved = v * d * 4 - 2**26  # the accumulator, but for a slab of it
    assert peaks["one_chunk"] - 32 * v * 4 <= peaks["chunks"] - 0.95 * saved


def test_fill_holes() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        live = torch.rand(101, generator=generator) < share
        rows = torch.arange(101.0)[:, None].repeat(1, 3)
        order = fill_holes_(rows, live)
        assert sorted(order.tolist()) == live.nonzero().squeeze(1).tolist()
        assert torch.equal(rows[: len(order), 0], order.float())


@pytest.mark.parametrize("far", [0.05, 1.0, 50.0], ids=["few clipped", "many clipped", "extreme ratios"])
@pytest.mark.parametrize("options", [Options(), Options(SOME)], ids=["one_chunk", "chunks"])
def test_clipped_rows_cost_no_gradient_product(far: float, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(N, D, V)
    batch = _batch(inputs, far=far)
    multiplied = []
    original = gradients.gemm.add_product_

    def spy(out: Tensor, a: Tensor, b: Tensor, *, overwrite: bool = False) -> Tensor:
        if b.shape == (V, D):
            multiplied.append(len(a))
        return original(out, a, b, overwrite=overwrite)

    expected = _run(inputs, batch, schedule="autograd", options=Options(plan="recompute"))
    monkeypatch.setattr(gradients.gemm, "add_product_", spy)
    got = _run(inputs, batch, schedule="one_pass", options=options)
    for ours, plain in zip(got, expected, strict=True):
        assert float((ours - plain).norm() / plain.norm()) < 2e-5
    alive = int((expected[1].abs().sum(1) > 0).sum())
    assert alive <= sum(multiplied) <= alive + 0.02 * N + 1


@pytest.mark.parametrize("scale", [1.0, 1e4, 65536.0])
def test_fp16_operands_hold_a_scaled_loss(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the products multiply fp16: neither a mean's small coefficients nor a scaled loss's large ones fit."""
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda self: self.hidden.dtype))
    inputs = make_inputs(N, D, V, dtype=torch.float16)
    batch = _batch(inputs)
    _, _, exact = _run(inputs.to(torch.float64), batch, schedule="one_pass")
    hidden, main = inputs.hidden.detach().requires_grad_(), torch.zeros(V, D)
    eapo_loss(
        hidden, inputs.weight.detach(), batch, positive_weight=0.7, options=Options(SOME), main_grad=main, main_grad_scale=scale
    )
    assert float((main.double() / scale - exact).norm() / exact.norm()) < 3e-3
    full = _run(inputs, replace(batch, denominator=1.0), schedule="one_pass")[2]
    assert float((full.double() / N - exact).norm() / exact.norm()) < 3e-3
