"""``weight_tokens`` for every method: what it reads, where it runs, what it refuses, and which steps it can take."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from token_steps import SIZES, Step, extras_of, make_step, state_of
from torch.utils._python_dispatch import TorchDispatchMode

from eapo_kernels import (
    METHODS,
    EapoError,
    Method,
    TokenBatch,
    get_method,
    make_controller,
    observed_entropy,
    policy_loss,
    weight_tokens,
)
from eapo_kernels.objectives import methods

ROOT = Path(inspect.getfile(methods)).parent
WEIGHTED = [name for name, method in METHODS.items() if method.token_weighting is not None]


def _some(step: Step, tokens: torch.Tensor, responses: int, ids: torch.Tensor) -> Step:
    """The step cut to ``tokens``, which belong to ``responses`` responses by ``ids``."""
    b = step.batch
    batch = replace(
        b.select(tokens), sequence_ids=ids, rewards=b.rewards[:responses], group_ids=b.group_ids[:responses], denominator=None
    )
    stats = type(step.stats)(*(None if t is None else t[tokens] for t in step.stats))
    return replace(step, hidden=step.hidden[tokens], batch=batch, stats=stats)


@cache
def _steps() -> dict[str, Step]:
    step = make_step(binary=True)
    b = step.batch

    def with_batch(**changes: torch.Tensor) -> Step:
        return replace(step, batch=replace(b, **changes))

    first = torch.arange(SIZES[0])
    seven = torch.tensor([0, 1, 2, 3, 9, 10, 11, 12])
    return {
        "random": step,
        "all rewards equal": with_batch(rewards=torch.ones(len(SIZES))),
        "all rewards zero": with_batch(rewards=torch.zeros(len(SIZES))),
        "groups of one": with_batch(group_ids=torch.arange(len(SIZES))),
        "an empty response": with_batch(mask=b.mask & (step.ids != 3)),
        "one response": _some(step, first, 1, torch.zeros_like(first)),
        "one token": _some(step, first[:1], 1, torch.zeros(1, dtype=torch.int64)),
        "as many tokens as responses": _some(step, seven, len(SIZES), step.ids[seven]),
        "no token": with_batch(mask=torch.zeros_like(b.mask)),
    }


def _weighted(step: Step, method: Method) -> TokenBatch:
    """As a trainer does it: the controller takes the step's entropy, then the weights are fixed."""
    extras = extras_of(step, method)
    controller = make_controller(method)
    if controller is not None and bool(step.valid.any()):
        controller.update(*observed_entropy(method, step.batch, step.stats, extras=extras))
    state = {} if controller is None else controller.values()
    return weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=0.4, seed=1)


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if "same data" not in m.summary])
def test_runs_on_any_step(name: str) -> None:
    for case, step in _steps().items():
        _check_run(step, get_method(name, fixed_length=12), case)


def _check_run(step: Step, method: Method, case: str) -> None:
    """Loss and gradients are finite in three micro-batches, and zero at tokens that do not count."""
    weighted = _weighted(step, method)
    if method.config.kl_coef:
        weighted = replace(weighted, ref_logp=weighted.old_logp)
    assert weighted.mask is not None
    hidden, weight = step.hidden.float().requires_grad_(), step.weight.float().requires_grad_()
    positive_weight = None if method.positive_weight is not None else 1.0
    count = max(1, int(weighted.mask.sum()))
    uncut = method.config.scope == "sequence" and len(hidden) > 1
    for cut in [slice(None)] if uncut else torch.arange(len(hidden)).tensor_split(3):
        part = replace(weighted.select(cut), denominator=count)
        out = policy_loss(hidden[cut], weight, part, method=method, positive_weight=positive_weight)
        out.loss.backward()
        assert out.loss.isfinite(), case
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all(), case
    assert not hidden.grad[~weighted.mask].any(), case


def test_as_many_tokens_as_responses_are_still_per_token() -> None:
    """A micro-batch of B tokens: the weights of weight_tokens stay the tokens'."""
    step, method = make_step(), METHODS["steer"]
    weighted = weight_tokens(method, step.batch, step.stats)
    part = weighted.select(slice(5, 5 + len(SIZES)))
    torch.testing.assert_close(part.advantages, weighted.advantages[5 : 5 + len(SIZES)])
    ours = policy_loss(step.hidden[5:13], step.weight, part, method=method).loss
    parts = [policy_loss(step.hidden[5:9], step.weight, weighted.select(slice(5, 9)), method=method).loss]
    parts.append(policy_loss(step.hidden[9:13], step.weight, weighted.select(slice(9, 13)), method=method).loss)
    torch.testing.assert_close(ours, sum(parts))
    with pytest.raises(EapoError, match=r"batch.advantages: expected .* \[8\] cpu, got float32 \[3\] cpu"):
        policy_loss(step.hidden[5:13], step.weight, replace(part, advantages=torch.zeros(3)), method=method)


def assert_same_weights(found: TokenBatch, expected: TokenBatch) -> None:
    assert torch.equal(found.mask, expected.mask)
    for field in ("advantages", "entropy_coef", "ratio_penalty", "entropy_score"):
        one, other = getattr(expected, field), getattr(found, field)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in WEIGHTED if n not in ("clip_cov", "spear")])  # they draw by the token's place
def test_a_response_without_tokens_is_in_no_statistic(name: str) -> None:
    """The others have the weights that they have in a step without it, whatever its reward. Where the method keeps the
    config's advantages these are given, because its reward is in their baselines."""
    step, method, gone = make_step(4, binary=True), get_method(name, fixed_length=12), 3
    given = None if name in ("pear", "canon", "hapo") else torch.linspace(-1, 1, len(SIZES))
    empty = replace(step.batch, mask=step.valid & (step.ids != gone), advantages=given)
    tokens, rest = (step.ids != gone).nonzero()[:, 0], torch.arange(len(SIZES)) != gone
    b = empty.select(tokens)
    without = replace(
        b, sequence_ids=b.sequence_ids - (b.sequence_ids > gone).long(), rewards=b.rewards[rest],
        group_ids=b.group_ids[rest], advantages=None if given is None else given[rest],
    )  # fmt: skip
    stats = type(step.stats)(*(None if t is None else t[tokens] for t in step.stats))
    extras, state = extras_of(step, method), state_of(method)
    ours = weight_tokens(method, empty, step.stats, state=state, extras=extras, progress=0.3)
    theirs = weight_tokens(method, without, stats, state=state, extras={k: v[tokens] for k, v in extras.items()}, progress=0.3)
    assert_same_weights(theirs, ours.select(tokens))


@pytest.mark.parametrize("name", WEIGHTED)
def test_stated_lengths_follow_a_narrower_mask(name: str) -> None:
    """``sequence_lengths`` says what is counted anyway: it changes neither the weights nor the loss."""
    step = make_step(4, binary=True)
    method = get_method(name, fixed_length=12, reduction="seq_mean_token_mean")
    lengths = torch.zeros(len(SIZES)).index_add_(0, step.ids, step.valid.float())
    losses = []
    for batch in (replace(step.batch, sequence_lengths=None), replace(step.batch, sequence_lengths=lengths)):
        weighted = weight_tokens(method, batch, step.stats, state=state_of(method), extras=extras_of(step, method))
        losses.append(policy_loss(step.hidden, step.weight, weighted, method=method).loss)
    assert losses[0] == losses[1]


def test_stated_lengths_cannot_know_which_single_tokens_are_dropped() -> None:
    step = make_step()
    method = get_method("nsr", split="advantage", reduction="seq_mean_token_mean")
    batch = replace(step.batch, advantages=torch.linspace(-1, 1, len(step.ids)), token_advantages=True)
    lengths = torch.zeros(len(SIZES)).index_add_(0, step.ids, step.valid.float())
    assert policy_loss(step.hidden, step.weight, batch, method=method).loss.isfinite()
    with pytest.raises(EapoError, match=r"batch.sequence_lengths: expected None where drop_zero_weight drops single tokens"):
        policy_loss(step.hidden, step.weight, replace(batch, sequence_lengths=lengths), method=method)


@pytest.mark.parametrize("name", [n for n in WEIGHTED if n not in ("clip_cov", "spear")])  # they draw by the token's place
def test_the_order_of_the_responses_does_not_matter(name: str) -> None:
    step, method = make_step(4, binary=True), get_method(name, fixed_length=12)
    order = torch.tensor([6, 2, 0, 7, 1, 5, 4, 3])
    tokens = torch.cat([(step.ids == i).nonzero()[:, 0] for i in order])
    new_number = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    b = step.batch.select(tokens)
    moved = replace(b, sequence_ids=new_number[b.sequence_ids], rewards=b.rewards[order], group_ids=10 - b.group_ids[order])
    stats = type(step.stats)(*(None if t is None else t[tokens] for t in step.stats))
    extras = extras_of(step, method)
    state = state_of(method)
    ours = weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=0.3)
    theirs = weight_tokens(method, moved, stats, state=state, extras={k: v[tokens] for k, v in extras.items()}, progress=0.3)
    assert_same_weights(theirs, ours.select(tokens))


@pytest.mark.parametrize("name", WEIGHTED)
def test_what_does_not_count_is_not_read(name: str) -> None:
    """NaN statistics and impossible response numbers at masked tokens change nothing."""
    step, method = make_step(binary=True), get_method(name, fixed_length=12)
    extras = extras_of(step, method)
    state = state_of(method)

    def spoiled(values: torch.Tensor) -> torch.Tensor:
        bad = {torch.bool: True, torch.int64: -1000}.get(values.dtype, float("nan"))
        return torch.where(step.valid, values, torch.tensor(bad, dtype=values.dtype))

    stats = type(step.stats)(*(None if t is None else spoiled(t) for t in step.stats))
    batch = replace(step.batch, sequence_ids=spoiled(step.ids))
    clean = weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=0.3)
    dirty = weight_tokens(method, batch, stats, state=state, extras={k: spoiled(v) for k, v in extras.items()}, progress=0.3)
    for field in ("advantages", "entropy_coef", "ratio_penalty", "mask"):
        one, other = getattr(clean, field), getattr(dirty, field)
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other)


class _NoHostReads(TorchDispatchMode):
    """Refuses what would wait for an accelerator: values that reach Python, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default"):
            assert word not in str(func), f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", WEIGHTED)
def test_nothing_is_read_on_the_host(name: str) -> None:
    step, method = make_step(binary=True), get_method(name, fixed_length=12)
    extras = extras_of(step, method)
    state = state_of(method)
    with _NoHostReads():
        weighted = weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=0.3)
        observed_entropy(method, step.batch, step.stats, extras=extras)
    assert weighted.advantages.any()


@pytest.mark.parametrize("name", WEIGHTED)
def test_tensors_stay_on_the_device_of_the_inputs(name: str) -> None:
    """Tensors without values (device "meta"): a CPU tensor among them raises. The controller's state may be on the CPU."""
    step, method = make_step(binary=True), get_method(name, fixed_length=12)
    extras = extras_of(step, method)

    def moved(values: dict[str, object]) -> dict[str, object]:
        return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    batch = replace(step.batch, **moved({f.name: getattr(step.batch, f.name) for f in fields(step.batch)}))
    stats = type(step.stats)(**moved(step.stats._asdict()))
    state = state_of(method)
    weighted = weight_tokens(method, batch, stats, state=state, extras=moved(extras), progress=0.3)
    assert weighted.advantages.device.type == "meta"
    for field in ("entropy_coef", "ratio_penalty", "mask"):
        value = getattr(weighted, field)
        assert value is None or value.device.type == "meta"


def test_new_tensors_are_made_on_a_given_device() -> None:
    """Every tensor that the weights' code makes is given a device, and never one by name."""
    makers = {"arange", "zeros", "ones", "full", "empty", "tensor", "linspace", "eye"}
    files = [
        *(ROOT / "token_weights").glob("*.py"),
        *(ROOT / f"{n}.py" for n in ("grouping", "advantages", "reductions", "semantic")),
    ]
    assert len(files) > 9
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{maker}" for maker in makers}:
                devices = [k.value for k in node.keywords if k.arg == "device"]
                assert devices, f"{path.name}:{node.lineno} makes a tensor without a device"
                assert not isinstance(devices[0], ast.Constant), f"{path.name}:{node.lineno} names a device"


def test_missing_inputs_are_named() -> None:
    step, method = make_step(), METHODS["steer"]
    for change, message in (
        ({"rewards": None}, r"batch.rewards: expected \[B\] with method 'steer', got None"),
        ({"group_ids": None}, r"batch.group_ids: expected \[B\] with method 'steer', got None"),
        ({"advantages": torch.zeros(3)}, r"batch.advantages: expected .* \[8\] cpu, got float32 \[3\] cpu"),
    ):
        with pytest.raises(EapoError, match=message):
            weight_tokens(method, replace(step.batch, **change), step.stats)
    with pytest.raises(EapoError, match=r"stats.entropy: expected \[N\], got None"):
        weight_tokens(method, step.batch, step.stats._replace(entropy=None))
    with pytest.raises(EapoError, match=r"extras.answer: expected bool \[80\] cpu, got float32 \[80\] cpu"):
        weight_tokens(method, step.batch, step.stats, extras={"answer": torch.zeros(80)})
    with pytest.raises(EapoError, match=r"extras: expected names among .*, got unknown"):
        weight_tokens(method, step.batch, step.stats, extras={"unknown": step.valid})
    with pytest.raises(EapoError, match=r"progress: expected a finite number in \[0, 1\], got 1.5"):
        weight_tokens(method, step.batch, step.stats, progress=1.5)

    with pytest.raises(EapoError, match="stats, extras: expected second_moments with method 'clip_v', got no second_moments"):
        weight_tokens(METHODS["clip_v"], step.batch, step.stats._replace(p2=None))
    with pytest.raises(EapoError, match="stats, extras: expected nucleus_entropy with method 'siren', got no nucleus_entropy"):
        weight_tokens(get_method("siren", fixed_length=9), step.batch, step.stats, state=state_of(METHODS["siren"]))
    with pytest.raises(EapoError, match="state: expected trend of controller 'entropy_trend' for method 'papo_like', got no"):
        weight_tokens(METHODS["papo_like"], step.batch, step.stats)


def test_advantages_of_the_batch_replace_the_configs() -> None:
    step = make_step()
    given = torch.arange(len(SIZES)).float() - 3.5
    weighted = weight_tokens(get_method("steer", lambda_min=1.0), replace(step.batch, advantages=given), step.stats)
    torch.testing.assert_close(weighted.advantages, torch.where(step.valid, given[step.ids], 0.0))


def test_a_loss_refuses_a_batch_without_token_weights() -> None:
    step = make_step()
    with pytest.raises(EapoError, match=r"batch.advantages: expected those of weight_tokens with method 'steer', got None"):
        policy_loss(step.hidden, step.weight, step.batch, method="steer")


def test_a_name_is_no_method() -> None:
    case = make_step()
    for function in (weight_tokens, observed_entropy):
        with pytest.raises(EapoError, match=r"method: expected a Method, such as get_method\(name\), got 'steer'"):
            function("steer", case.batch, case.stats)
