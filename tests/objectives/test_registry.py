"""The registry: every method is described, its numbers can be changed, and it runs on steps that leave little to learn from."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from shaped import SIZES, Step, make_step
from torch.utils._python_dispatch import TorchDispatchMode

from eapo_kernels import (
    METHODS,
    EAPOConfig,
    EapoError,
    Method,
    TokenBatch,
    get_method,
    make_controller,
    observed_entropy,
    policy_loss,
    weight_tokens,
)
from eapo_kernels.objectives.controllers import CONTROLLERS
from eapo_kernels.objectives.token_weights.step import MARKS, STATISTICS

ISSUE = """eapo grpo dr_grpo dapo gspo cispo psr nsr w_reinforce clip_cov kl_cov steer clip_b clip_v papo_like siren aepo dcpo
aepo_agentic aem empg epo canon spine pear entrocraft entropic tea_rl empo spear exchange_ppl exchange_position cure t1 trace"""
ROOT = Path(inspect.getfile(get_method)).parent
SHAPED = [name for name, method in METHODS.items() if method.token_weighting is not None]


def test_every_method_is_there_and_described() -> None:
    assert set(ISSUE.split()) == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary.endswith(".")
        assert method.formula
        assert method.source[:4].isdigit() or method.source.startswith("EntroPIC")
        assert method.confidence in ("high", "medium", "low")
        if name.endswith("_like"):
            assert method.confidence == "low"
        if method.token_weighting is not None:
            assert method.token_weighting.scope in ("token", "sequence", "group", "batch")
            assert method.token_weighting.needs <= set(STATISTICS)
            assert method.token_weighting.uses <= set(MARKS)
            assert method.token_weighting.__doc__
            values = make_controller(method).values() if method.controller else {}
            assert method.token_weighting.state <= set(values)


def _changed(value: object) -> object:
    """Another value that the numbers of all methods can take."""
    if isinstance(value, float) and value:
        return 0.95 * value
    return 0.5


@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_changed_one_by_one(name: str) -> None:
    method = METHODS[name]
    for own in fields(method.token_weighting) if method.token_weighting is not None else ():
        value = getattr(method.token_weighting, own.name)
        if not isinstance(value, str):
            changed = get_method(name, **{own.name: _changed(value)})
            assert changed == replace(method, token_weighting=replace(method.token_weighting, **{own.name: _changed(value)}))
            assert get_method(changed, **{own.name: value}) == method
    for setting in inspect.signature(CONTROLLERS[method.controller]).parameters.values() if method.controller else ():
        changed = get_method(name, **{setting.name: _changed(setting.default)})
        assert changed.controller_settings == {setting.name: _changed(setting.default)}
        assert (changed.token_weighting, changed.config) == (method.token_weighting, method.config)
        assert make_controller(changed).state_dict()["settings"][setting.name] == _changed(setting.default)
    assert get_method(name, clip_high=0.123).config == replace(method.config, clip_high=0.123)
    assert get_method(name) is method


def test_no_number_has_two_owners() -> None:
    for method in METHODS.values():
        names = [f.name for f in fields(EAPOConfig)] + ["positive_weight"]
        names += [f.name for f in fields(method.token_weighting)] if method.token_weighting else []
        names += list(inspect.signature(CONTROLLERS[method.controller]).parameters) if method.controller else []
        assert len(names) == len(set(names)), method.name


def test_a_method_of_ones_own_settings() -> None:
    method = get_method("entropic", target=0.9, ki=0.0)
    controller = make_controller(method)
    assert controller.update(10.0, 10) == pytest.approx(0.1)
    assert make_controller(METHODS["grpo"]) is None
    with pytest.raises(EapoError, match=r"config: expected fields among .*target, kp, ki.*, got setpoint"):
        get_method("entropic", setpoint=0.9)
    with pytest.raises(EapoError, match=r"controller: expected one of entropy_ratio, .* got 'pid'"):
        make_controller(Method("mine", EAPOConfig(), controller="pid"))
    with pytest.raises(EapoError, match="controller_settings: expected names among target, kp, ki, got kd"):
        make_controller(Method("mine", EAPOConfig(), controller="proportional_integral", controller_settings={"kd": 1.0}))
    assert hash(METHODS["entropic"]) == hash(get_method("entropic"))


def _extras(step: Step, wanted: frozenset[str]) -> dict[str, torch.Tensor]:
    """Every tensor that a token_weighting may ask for."""
    n = len(step.ids)
    g = torch.Generator().manual_seed(7)
    coin = torch.rand(3, n, generator=g) > 0.5
    extras = {
        "tempered_logp": step.stats.logp - 0.1,
        "nucleus_entropy": 0.8 * step.stats.entropy,
        "teacher_logp": step.stats.logp + 0.3,
        "answer": coin[0],
        "spans": coin[1],
        "turn_ids": torch.arange(n) % 5 // 3,
        "reinforce": step.ids == 1,
        "replayed": step.ids == 2,
    }
    return {name: value for name, value in extras.items() if name in wanted}


def _some(step: Step, tokens: torch.Tensor, responses: int, ids: torch.Tensor) -> Step:
    """The step cut to ``tokens``, which belong to ``responses`` responses by ``ids``."""
    b = step.batch
    batch = replace(
        b.select(tokens), sequence_ids=ids, rewards=b.rewards[:responses], group_ids=b.group_ids[:responses], denominator=None
    )
    stats = type(step.stats)(*(None if t is None else t[tokens] for t in step.stats))
    return replace(step, hidden=step.hidden[tokens], batch=batch, stats=stats)


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


def _shaped(step: Step, method: Method) -> TokenBatch:
    """As a trainer does it: the controller takes the step's entropy, then the weights are fixed."""
    token_weighting = method.token_weighting
    extras = _extras(step, token_weighting.needs | token_weighting.uses) if token_weighting is not None else {}
    controller = make_controller(method)
    if controller is not None and bool(step.valid.any()):
        controller.update(*observed_entropy(method, step.batch, step.stats, extras=extras))
    state = {} if controller is None else controller.values()
    return weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=0.4, seed=1)


@pytest.mark.parametrize("case", _steps())
@pytest.mark.parametrize("name", METHODS)
def test_runs_on_any_step(name: str, case: str) -> None:
    step, method = _steps()[case], get_method(name, fixed_length=12)
    shaped = _shaped(step, method)
    if method.config.kl_coef:
        shaped = replace(shaped, ref_logp=shaped.old_logp)
    assert shaped.mask is not None
    hidden, weight = step.hidden.float().requires_grad_(), step.weight.float().requires_grad_()
    positive_weight = None if method.positive_weight is not None else 1.0
    count = max(1, int(shaped.mask.sum()))
    cuts = torch.arange(len(hidden)).tensor_split(3)
    for cut in cuts:
        if method.config.scope == "sequence" and len(hidden) > 1:
            cut = slice(None)
        part = replace(shaped.select(cut), denominator=count)
        out = policy_loss(hidden[cut], weight, part, method=method, positive_weight=positive_weight)
        out.loss.backward()
        assert out.loss.isfinite()
        if isinstance(cut, slice):
            break
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[~shaped.mask].any()


def test_as_many_tokens_as_responses_are_still_per_token() -> None:
    """A micro-batch of B tokens: the weights of weight_tokens stay the tokens'."""
    step, method = make_step(), METHODS["steer"]
    shaped = weight_tokens(method, step.batch, step.stats)
    part = shaped.select(slice(5, 5 + len(SIZES)))
    torch.testing.assert_close(part.advantages, shaped.advantages[5 : 5 + len(SIZES)])
    ours = policy_loss(step.hidden[5:13], step.weight, part, method=method).loss
    whole = [policy_loss(step.hidden[5:9], step.weight, shaped.select(slice(5, 9)), method=method).loss]
    whole.append(policy_loss(step.hidden[9:13], step.weight, shaped.select(slice(9, 13)), method=method).loss)
    torch.testing.assert_close(ours, sum(whole))
    with pytest.raises(EapoError, match=r"batch.advantages: expected .* \[8\] cpu, got float32 \[3\] cpu"):
        policy_loss(step.hidden[5:13], step.weight, replace(part, advantages=torch.zeros(3)), method=method)


@pytest.mark.parametrize("name", [n for n in SHAPED if n not in ("clip_cov", "spear")])  # they draw by the token's place
def test_the_order_of_the_responses_does_not_matter(name: str) -> None:
    step, method = make_step(4, binary=True), get_method(name, fixed_length=12)
    order = torch.tensor([6, 2, 0, 7, 1, 5, 4, 3])
    tokens = torch.cat([(step.ids == i).nonzero()[:, 0] for i in order])
    new_number = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    b = step.batch.select(tokens)
    moved = replace(b, sequence_ids=new_number[b.sequence_ids], rewards=b.rewards[order], group_ids=10 - b.group_ids[order])
    stats = type(step.stats)(*(None if t is None else t[tokens] for t in step.stats))
    extras = _extras(step, method.token_weighting.needs | method.token_weighting.uses)
    state = {name: torch.tensor(0.9, dtype=torch.float64) for name in method.token_weighting.state}
    ours = weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=0.3)
    theirs = weight_tokens(method, moved, stats, state=state, extras={k: v[tokens] for k, v in extras.items()}, progress=0.3)
    assert torch.equal(theirs.mask, ours.mask[tokens])
    for field in ("advantages", "entropy_coef", "ratio_penalty"):
        one, other = getattr(ours, field), getattr(theirs, field)
        if one is not None:
            torch.testing.assert_close(other, one[tokens], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHAPED)
def test_what_does_not_count_is_not_read(name: str) -> None:
    """NaN statistics and impossible response numbers at masked tokens change nothing."""
    step, method = make_step(binary=True), get_method(name, fixed_length=12)
    extras = _extras(step, method.token_weighting.needs | method.token_weighting.uses)
    state = {name: torch.tensor(0.9, dtype=torch.float64) for name in method.token_weighting.state}

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


@pytest.mark.parametrize("name", SHAPED)
def test_shaping_never_waits_for_the_device(name: str) -> None:
    step, method = make_step(binary=True), get_method(name, fixed_length=12)
    extras = _extras(step, method.token_weighting.needs | method.token_weighting.uses)
    state = {name: torch.tensor(0.9, dtype=torch.float64) for name in method.token_weighting.state}
    with _NoHostReads():
        shaped = weight_tokens(method, step.batch, step.stats, state=state, extras=extras, progress=0.3)
        observed_entropy(method, step.batch, step.stats, extras=extras)
    assert shaped.advantages.any()


@pytest.mark.parametrize("name", SHAPED)
def test_shaping_stays_on_the_device_of_its_inputs(name: str) -> None:
    """Tensors without values (device "meta"): a CPU tensor among them raises. The controller's state may be on the CPU."""
    step, method = make_step(binary=True), get_method(name, fixed_length=12)
    extras = _extras(step, method.token_weighting.needs | method.token_weighting.uses)

    def moved(values: dict[str, object]) -> dict[str, object]:
        return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    batch = replace(step.batch, **moved({f.name: getattr(step.batch, f.name) for f in fields(step.batch)}))
    stats = type(step.stats)(**moved(step.stats._asdict()))
    state = {name: torch.tensor(0.9, dtype=torch.float64) for name in method.token_weighting.state}
    shaped = weight_tokens(method, batch, stats, state=state, extras=moved(extras), progress=0.3)
    assert shaped.advantages.device.type == "meta"
    for field in ("entropy_coef", "ratio_penalty", "mask"):
        value = getattr(shaped, field)
        assert value is None or value.device.type == "meta"


def test_new_tensors_say_where_they_are() -> None:
    """Every tensor that the weights' code makes is given a device, and never one by name."""
    makers = {"arange", "zeros", "ones", "full", "empty", "tensor", "linspace", "eye"}
    files = [*(ROOT / "token_weights").glob("*.py"), *(ROOT / f"{n}.py" for n in ("grouping", "advantages", "reductions"))]
    assert len(files) > 9
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{maker}" for maker in makers}:
                devices = [k.value for k in node.keywords if k.arg == "device"]
                assert devices, f"{path.name}:{node.lineno} makes a tensor without a device"
                assert not isinstance(devices[0], ast.Constant), f"{path.name}:{node.lineno} names a device"


def test_shape_batch_says_what_is_missing() -> None:
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
    with pytest.raises(EapoError, match=r"extras: expected names among .*, got answers"):
        weight_tokens(method, step.batch, step.stats, extras={"answers": step.valid})
    with pytest.raises(EapoError, match=r"progress: expected a finite number in \[0, 1\], got 1.5"):
        weight_tokens(method, step.batch, step.stats, progress=1.5)


def test_ready_advantages_take_the_place_of_the_configs() -> None:
    step = make_step()
    given = torch.arange(len(SIZES)).float() - 3.5
    shaped = weight_tokens(get_method("steer", lambda_min=1.0), replace(step.batch, advantages=given), step.stats)
    torch.testing.assert_close(shaped.advantages, torch.where(step.valid, given[step.ids], 0.0))


def test_methods_cannot_be_changed_in_place() -> None:
    assert isinstance(METHODS, MappingProxyType)
