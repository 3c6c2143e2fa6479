"""Error messages of the losses for invalid arguments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import CONFIGS, B, D, N, V, make_batch, run

from eapo_kernels import (
    EAPOConfig,
    EapoError,
    ShapeError,
    eapo_loss,
)
from eapo_kernels.testing import make_inputs


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rewards": torch.full((B,), math.nan)}, EapoError, r"batch.rewards: expected finite numbers, got nan at 0"),
        ({"rewards": torch.zeros(B, dtype=torch.int64)}, ShapeError, r"batch.rewards: expected .* \[12\] cpu, got int64"),
        ({"rewards": None}, EapoError, r"batch.rewards: expected \[B\] unless advantages are given, got None"),
        ({"group_ids": None}, EapoError, r"batch.group_ids: expected \[B\]"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ShapeError, r"batch.group_ids: expected int64 \[12\]"),
        ({"sequence_ids": torch.full((N,), B)}, EapoError, r"batch.sequence_ids: expected values in \[0, 12\), got 12"),
        ({"sequence_ids": torch.zeros(4, dtype=torch.int64)}, ShapeError, r"batch.sequence_ids: expected int64 \[150\]"),
        ({"targets": torch.full((N,), V)}, EapoError, r"targets: expected values in \[0, 301\)"),
        ({"targets": torch.zeros(N)}, ShapeError, r"batch.targets: expected int64 \[N\], got float32 \[150\]"),
        ({"mask": torch.ones(N)}, ShapeError, r"batch.mask: expected bool \[150\]"),
        ({"old_logp": torch.full((N,), -math.inf)}, EapoError, r"batch.old_logp: expected finite numbers, got -inf at 0"),
        ({"old_logp": torch.zeros(N, 1)}, ShapeError, r"batch.old_logp: expected .* \[150\] cpu, got float32 \[150, 1\]"),
        ({"advantages": torch.zeros(5)}, ShapeError, r"batch.advantages: expected"),
        ({"denominator": math.inf}, EapoError, r"batch.denominator: expected a positive finite number, got inf"),
        ({"denominator": torch.ones(2)}, EapoError, r"batch.denominator: expected a number or a 0-dim tensor"),
        ({"rewards": [0.0] * B}, ShapeError, r"batch.rewards: expected .* \[12\] cpu, got \[0.0, "),
        ({"sequence_lengths": torch.full((B,), -3)}, EapoError, r"batch.sequence_lengths: expected at least .* got -3.0"),
        ({"sequence_lengths": torch.full((B,), math.nan)}, EapoError, r"batch.sequence_lengths: expected at least .*, got nan"),
        ({"denominator": 0.0}, EapoError, r"batch.denominator: expected a positive finite number, got 0.0"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_bad_batches(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make_inputs(N, D, V)
    with pytest.raises(error, match=message):
        run(inputs, replace(make_batch(inputs), **changes), positive_weight=1.0)


def test_a_batch_that_is_none() -> None:
    inputs = make_inputs(N, D, V)
    for call, message in (
        (lambda: eapo_loss(inputs.hidden, inputs.weight, {}, positive_weight=1.0), "batch: expected a TokenBatch, got {}"),
        (lambda: eapo_loss(inputs.hidden, None, make_batch(inputs), positive_weight=1.0), r"weight: expected \[V, D\] on cpu"),
        (lambda: run(inputs, make_batch(inputs), positive_weight=1.0, config={}), "config: expected an EAPOConfig or None"),
        (lambda: run(inputs, make_batch(inputs), positive_weight=1.0, options={}), "options: expected Options or None"),
        (lambda: run(inputs, make_batch(inputs), positive_weight="x"), "positive_weight: expected a number, .* got 'x'"),
    ):
        with pytest.raises(EapoError, match=message):
            call()


def test_gspo_wants_whole_responses() -> None:
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs, masked=False)
    lengths = torch.bincount(batch.sequence_ids, minlength=B)
    run(inputs, replace(batch, sequence_lengths=lengths), positive_weight=1.0, config=CONFIGS["gspo"])
    with pytest.raises(EapoError, match="expected whole responses with surrogate 'gspo', got parts"):
        run(inputs, replace(batch, sequence_lengths=lengths + 1), positive_weight=1.0, config=CONFIGS["gspo"])


def test_advantages_of_one_token_responses_must_not_be_ambiguous() -> None:
    inputs = make_inputs(B, D, V)
    batch = replace(make_batch(inputs, masked=False), sequence_ids=torch.arange(B).flip(0), advantages=torch.randn(B))
    for rewards, groups in ((batch.rewards, batch.group_ids), (None, None)):
        with pytest.raises(EapoError, match=r"batch.advantages: expected \[B\] or \[N\] with B != N .*, got B = N = 12"):
            run(inputs, replace(batch, rewards=rewards, group_ids=groups), positive_weight=1.0)
    run(inputs, replace(batch, sequence_ids=torch.arange(B)), positive_weight=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_weight": -1.0}, r"positive_weight: expected a finite number >= 0, got -1.0"),
        ({"positive_weight": math.nan}, r"positive_weight: expected a finite number >= 0, got nan"),
        ({"positive_weight": torch.ones(2)}, r"positive_weight: expected a number, .* got float32 \[2\]"),
        ({"positive_weight": 1.0, "schedule": "fast"}, r"schedule: expected one of auto, one_pass, autograd, got 'fast'"),
        ({"positive_weight": 1.0, "config": CONFIGS["gspo"], "schedule": "one_pass"}, r"expected 'autograd' for a loss of seq"),
        ({"method": "grpo", "positive_weight": 0.5}, r"expected None for method 'grpo'"),
        ({"method": "eapo"}, r"positive_weight: expected a number, .* for method 'eapo', got None"),
        ({"method": "gpro"}, r"method: expected one of eapo, grpo, .*, got 'gpro'"),
        ({"method": "dr_grpo"}, r"fixed_length: expected a positive int with reduction 'fixed_length', got None"),
        ({"method": "psr"}, r"rewards: expected 0 or 1 with advantage 'binary'"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    inputs = make_inputs(N, D, V)
    with pytest.raises(EapoError, match=message):
        run(inputs, make_batch(inputs), **options)


@pytest.mark.parametrize("missing", [{"kl_coef": 0.1}, {"importance_cap": 2.0}], ids=str)
def test_what_a_loss_needs_must_be_there(missing: dict[str, float]) -> None:
    inputs = make_inputs(N, D, V)
    batch = replace(make_batch(inputs), ref_logp=None, rollout_logp=None)
    with pytest.raises(EapoError, match=r"batch.(ref|rollout)_logp: expected \[N\] floats with"):
        run(inputs, batch, positive_weight=1.0, config=EAPOConfig(**missing))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inv_temperature": 1e300}, r"inv_temperature: expected a positive finite number, got 1e\+300 \(bounds: "),
        ({"inv_temperature": torch.full((N,), 1e300, dtype=torch.float64)}, "inv_temperature: expected positive finite values"),
        ({"inv_temperature": torch.tensor(True)}, "inv_temperature: expected bfloat16/.*, got bool"),
        ({"inv_temperature": torch.tensor(2j)}, "inv_temperature: expected bfloat16/.*, got complex64"),
        ({"softcap": 1e-320}, "softcap: expected a positive finite number, got 1e-320"),
        ({"logit_scale": 10**400}, "logit_scale: expected a positive finite number, got 1000"),
        ({"positive_weight": 1e300}, r"positive_weight: expected a finite number >= 0, got 1e\+300"),
        ({"positive_weight": 10**400}, "positive_weight: expected a number"),
        ({"positive_weight": torch.tensor(1e300, dtype=torch.float64)}, "positive_weight: expected a finite number >= 0"),
        ({"denominator": 1e-320}, "batch.denominator: expected a positive finite number, got 1e-320"),
        ({"denominator": 1e300}, r"batch.denominator: expected a positive finite number, got 1e\+300"),
        ({"denominator": 10**400}, "batch.denominator: expected a number or a 0-dim tensor, got 1000"),
        (
            {"rewards": torch.full((B,), 1e200, dtype=torch.float64)},
            r"batch.rewards: expected finite numbers, got 1e\+200 at 0",
        ),
        ({"old_logp": torch.full((N,), -1e39, dtype=torch.float64)}, r"batch.old_logp: expected finite numbers, got -1e\+39"),
    ],
    ids=str,
)
def test_numbers_that_fp32_cannot_hold(options: dict[str, Any], message: str) -> None:
    """They would become infinities and NaN, or an overflow inside."""
    inputs = make_inputs(N, D, V)
    batch = make_batch(inputs)
    fields = {name: options[name] for name in options if hasattr(batch, name)}
    others = {name: value for name, value in options.items() if name not in fields}
    with pytest.raises(EapoError, match=message):
        run(inputs, replace(batch, **fields), **{"positive_weight": 1.0, **others})


@pytest.mark.parametrize(
    "change",
    [{"kl_coef": 1e300}, {"clip_high": 1e300}, {"clip_high": 10**400}, {"dual_clip": 1e300}, {"fixed_length": 10**300}],
    ids=str,
)
def test_settings_that_fp32_cannot_hold(change: dict[str, Any]) -> None:
    with pytest.raises(EapoError, match=r"expected a (finite number|positive int)"):
        EAPOConfig(**change)
