"""Adapters to frameworks that do not import on a CPU: against stand-ins with their signatures of August 2026."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from eapo_kernels import EapoError, EntropyRatio
from eapo_kernels.integrations import advantage_hooks, loss_hooks
from eapo_kernels.integrations.weight import AdvantageWeight

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
LOGP = torch.tensor([[-2.0, -2.0, float("nan")], [-1.0, -1.0, -1.0]])
ADVANTAGES = torch.tensor([[2.0, 2.0, 0.0], [-1.0, -1.0, -1.0]])
FIRST, HALF = 7.0 / 5, 0.5
"""Mean of -log p over the mask, and a controller's scale."""


def _weight() -> AdvantageWeight:
    return AdvantageWeight(EntropyRatio(scale=HALF))


def _check(weight: AdvantageWeight, advantages: torch.Tensor) -> None:
    assert float(weight.controller.initial_entropy) == pytest.approx(FIRST)
    assert torch.equal(advantages, torch.where(ADVANTAGES > 0, HALF * ADVANTAGES, ADVANTAGES))


def test_openrlhf() -> None:
    class RemoteExperienceMaker:
        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            for e in experiences:
                e.advantages = e.rows.clone()
            return experiences

    class Maker(advantage_hooks.OpenRLHFMixin, RemoteExperienceMaker):
        eapo = _weight()

    experiences = [
        SimpleNamespace(
            action_log_probs=LOGP[i : i + 1], action_mask=MASK[i : i + 1].bool(), rows=ADVANTAGES[i : i + 1], info={}
        )
        for i in range(2)
    ]
    maker = Maker()
    out = maker.compute_advantages_and_returns(experiences)
    _check(maker.eapo, torch.cat([e.advantages for e in out]))
    assert out[0].info["eapo/positive_weight"].tolist() == [HALF]


def test_skyrl() -> None:
    class Data(dict):
        metadata = {"pad_size": 1}  # noqa: RUF012

    class RayPPOTrainer:
        def __init__(self) -> None:
            self.all_metrics: dict[str, float] = {}

        def compute_advantages_and_returns(self, data: Data) -> Data:
            data["advantages"] = torch.cat([ADVANTAGES, ADVANTAGES[:1]])
            return data

    class Trainer(advantage_hooks.SkyRLMixin, RayPPOTrainer):
        eapo = _weight()

    data = Data(action_log_probs=torch.cat([LOGP, LOGP[:1]]), loss_mask=torch.cat([MASK, MASK[:1]]).float())
    trainer = Trainer()
    _check(trainer.eapo, trainer.compute_advantages_and_returns(data)["advantages"][:2])
    assert trainer.all_metrics["eapo/entropy"] == pytest.approx(FIRST), "the padding row is not measured"


def test_nemo_rl() -> None:
    class GRPOAdvantageEstimator:
        last_metrics = {"mine": 1.0}  # noqa: RUF012

        def compute_advantage(self, prompt_ids: Any, rewards: Any, mask: Any, **kwargs: Any) -> torch.Tensor:
            assert set(kwargs) == {"logprobs_policy", "logprobs_reference", "repeated_batch"}
            return ADVANTAGES.expand(mask.shape)

    estimator = advantage_hooks.NemoRLEstimator(GRPOAdvantageEstimator(), _weight())
    call = {"prompt_ids": None, "rewards": None, "mask": MASK, "repeated_batch": {}, "logprobs_reference": None}
    _check(estimator.eapo, estimator.compute_advantage(logprobs_policy=LOGP, **call))
    assert estimator.last_metrics["mine"] == 1.0
    assert estimator.last_metrics["eapo/positive_weight"] == HALF
    with pytest.raises(EapoError, match="logprobs_policy"):
        estimator.compute_advantage(logprobs_policy=torch.zeros_like(LOGP), **call)


@pytest.mark.parametrize("recomputed", [False, True])
def test_areal(recomputed: bool) -> None:
    class PPOActor:
        engine = SimpleNamespace(data_parallel_group=None)

        def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
            return {**data, "advantages": ADVANTAGES.clone()}

    class Actor(advantage_hooks.ArealMixin, PPOActor):
        eapo = _weight()

    data = {"loss_mask": MASK.float(), "logprobs": LOGP - 9.0 if recomputed else LOGP}
    if recomputed:
        data["prox_logp"] = LOGP
    actor = Actor()
    _check(actor.eapo, actor._compute_advantages(data)["advantages"])


@pytest.mark.parametrize("entropy", [False, True])
def test_slime(entropy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantage_hooks, "_SLIME", {})
    args = SimpleNamespace(normalize_advantages=False, save=str(tmp_path), load=str(tmp_path))

    def data(factor: float) -> dict[str, Any]:
        rows: dict[str, Any] = {
            "rewards": [2.0, -1.0], "loss_masks": list(MASK), "kl": [torch.zeros(3), torch.zeros(3)],
            "log_probs": list(factor * LOGP),
        }  # fmt: skip
        if entropy:
            rows["entropy"] = [-2.0 * row for row in rows["log_probs"]]
        return rows

    first, second = data(1.0), data(0.5)
    advantage_hooks.slime_advantages(args, first)
    advantage_hooks.slime_advantages(args, second)
    assert [a.tolist() for a in first["advantages"]] == [[2.0] * 3, [-1.0] * 3]
    assert [a.tolist() for a in second["advantages"]] == [[1.0] * 3, [-1.0] * 3]
    assert [a.tolist() for a in second["returns"]] == [[2.0] * 3, [-1.0] * 3]
    monkeypatch.setattr(advantage_hooks, "_SLIME", {})
    again = data(0.25)
    advantage_hooks.slime_advantages(args, again)
    assert again["advantages"][0].tolist() == [0.5] * 3, "H_0 is that of the first run"
    with pytest.raises(EapoError, match="normalize_advantages"):
        advantage_hooks.slime_advantages(SimpleNamespace(normalize_advantages=True), data(1.0))
    with pytest.raises(EapoError, match="context parallelism"):
        advantage_hooks.slime_advantages(args, {**data(1.0), "loss_masks": [MASK[0][:2], MASK[1]]})


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def _prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    """prime_rl.trainer.rl.loss and prime_rl.configs.trainer, as far as they are used."""
    loss, configs = ModuleType("prime_rl.trainer.rl.loss"), ModuleType("prime_rl.configs.trainer")

    def default_loss_fn(inputs: LossInputs, config: Any) -> LossOutputs:
        ratio = (inputs.trainer_logprobs - inputs.inference_logprobs).exp()
        return LossOutputs(-(config.adv_tau * inputs.advantages * ratio)[inputs.loss_mask].sum())

    loss.default_loss_fn = loss.ipo_loss_fn = default_loss_fn  # type: ignore[attr-defined]
    configs.DefaultLossConfig = configs.IPOLossConfig = SimpleNamespace  # type: ignore[attr-defined]
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.configs"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, loss.__name__, loss)
    monkeypatch.setitem(sys.modules, configs.__name__, configs)


def test_prime_rl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _prime_rl(monkeypatch)
    monkeypatch.setattr(loss_hooks, "_PRIME", {})
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    def micro_batch(entropy: float) -> Any:
        logp = torch.full((3,), -entropy)
        inputs = LossInputs(logp + parameter, logp, None, torch.tensor([2.0, -1.0, 5.0]), torch.tensor([True, True, False]))
        return loss_hooks.prime_rl_loss(inputs, adv_tau=1.0, directory=str(tmp_path))

    losses = []
    for entropies in ((2.0, 2.0), (1.0, 1.0), (1.0, 3.0), (7.0, 7.0)):
        optimizer.zero_grad()
        outputs = [micro_batch(entropy) for entropy in entropies]
        sum(o.loss for o in outputs).backward()
        losses.append([float(o.metrics["eapo/positive_weight"]) for o in outputs])
        assert parameter.grad[:2].tolist() == pytest.approx([-2 * 2 * losses[-1][0] * parameter[0].exp().item(),
                                                             2 * parameter[1].exp().item()])  # fmt: skip
        optimizer.step()
    assert losses == [[1.0, 1.0], [1.0, 1.0], [0.5, 0.5], [1.0, 1.0]], "of the step before; the same for all micro-batches"
    loss_hooks._PRIME["weight"].close()
    monkeypatch.setattr(loss_hooks, "_PRIME", {})
    assert float(micro_batch(2.0).metrics["eapo/positive_weight"]) == 3.5, "the state of the last run"
    loss_hooks._PRIME["weight"].close()


def test_torchtitan() -> None:
    class DAPOLoss:
        def __call__(
            self, logits: Any, labels: Any, global_valid_tokens: Any = None, *, generator_logprobs: Any, advantages: Any,
            loss_mask: Any,
        ) -> Any:  # fmt: skip
            return (advantages * loss_mask).sum() / global_valid_tokens, {"loss/mean": advantages.sum()}

    class Loss(loss_hooks.TorchtitanMixin, DAPOLoss):
        pass

    loss_of, optimizer = Loss(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    mask, advantages = torch.tensor([True, True, False]), torch.tensor([3.0, -1.0, 0.0])
    found = []
    for logp in ([-2.0, -2.0, 0.0], [float("inf"), -1.0, 0.0], [-1.0, -1.0, 0.0]):
        loss, metrics = loss_of(None, None, 2.0, generator_logprobs=torch.tensor(logp), advantages=advantages, loss_mask=mask)
        optimizer.step()
        found.append((float(loss), float(metrics["eapo/positive_weight/max"])))
    assert found == [(1.0, 1.0), (1.0, 1.0), (0.25, 0.5)]
    assert loss_of.step_weight is not None
    loss_of.step_weight.close()


@pytest.mark.parametrize(
    ("mixin", "method"),
    [
        (advantage_hooks.OpenRLHFMixin, "compute_advantages_and_returns"),
        (advantage_hooks.SkyRLMixin, "compute_advantages_and_returns"),
        (advantage_hooks.ArealMixin, "_compute_advantages"),
        (loss_hooks.TorchtitanMixin, "__call__"),
    ],
)
def test_a_base_whose_hook_has_another_name_is_refused(mixin: type, method: str) -> None:
    """Else the adapter's method would never be called, and the run be one without the weight."""
    right, renamed = type("Right", (), {method: lambda self: None}), type("Renamed", (), {f"{method}2": lambda self: None})
    type("Fine", (type("Mine", (mixin, type("Between", (right,), {})), {}),), {})
    for bases in ((mixin, renamed), (mixin,), (right, mixin)):
        with pytest.raises(EapoError, match=rf"Bad: expected {mixin.__name__} before a class with {method}\(\).*got"):
            type("Bad", bases, {})


def test_an_estimator_with_another_method_is_refused() -> None:
    with pytest.raises(EapoError, match=r"estimator: expected one of NeMo-RL's, with compute_advantage\(\), got object"):
        advantage_hooks.NemoRLEstimator(object())
