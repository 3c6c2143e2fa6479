"""Every Python block of docs/integrations.md, extracted and run; recipes run on stand-ins."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from torch.optim import optimizer as torch_optimizer

from eapo_kernels.integrations import AdvantageWeight, FusedLMHead

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
LOGP = torch.tensor([[-2.0, -2.0, float("nan")], [-1.0, -1.0, -1.0]])
ADVANTAGES = torch.tensor([[2.0, 2.0, 0.0], [-1.0, -1.0, -1.0]])
ENTROPY = 7 / 5  # mean of -LOGP over MASK


def _blocks() -> dict[str, list[tuple[int, str]]]:
    """Heading -> the Python blocks below it, each with the line where it begins."""
    found: dict[str, list[tuple[int, str]]] = {}
    heading, lines = "", PAGE.read_text().split("\n")
    for number, line in enumerate(lines):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line == "```python":
            end = lines.index("```", number)
            found.setdefault(heading, []).append((number + 1, "\n".join(lines[number + 1 : end])))
    return found


BLOCKS = _blocks()


def _run(heading: str, block: int = 0, **names: Any) -> dict[str, Any]:
    """Run one block with these names defined; returns its globals."""
    line, source = BLOCKS[heading][block]
    namespace: dict[str, Any] = {"__name__": "pasted", **names}
    exec(compile("\n" * line + source, str(PAGE), "exec", dont_inherit=True), namespace)
    return namespace


def _halved(weight: AdvantageWeight) -> None:
    """Give the weight a first step with twice the entropy of LOGP, so that the next weight is 0.5."""
    weight.observe(torch.full((4,), 2 * ENTROPY), torch.ones(4))
    weight.step()


def _check(weight: AdvantageWeight, advantages: torch.Tensor) -> None:
    assert float(weight.weight) == pytest.approx(0.5)
    torch.testing.assert_close(advantages, torch.where(ADVANTAGES > 0, 0.5 * ADVANTAGES, ADVANTAGES))


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A stand-in for a framework's module."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        parent = ".".join(parts[:length])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def optimizer_hooks() -> Iterator[None]:
    """Remove the optimizer hooks that a recipe registers."""
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = dict(hooks)
    yield
    hooks.clear()
    hooks.update(before)


def test_every_block_has_a_test() -> None:
    source = Path(__file__).read_text()
    for heading, blocks in BLOCKS.items():
        run = re.findall(rf'_run\(\s*"{re.escape(heading)}"', source)
        assert len(run) >= len(blocks), f"{heading}: expected {len(blocks)} blocks to be run, got {len(run)}"


def test_any_trainer(tmp_path: Path) -> None:
    found = _run("Any trainer", old_policy_batches=[(-LOGP, MASK)], advantages=ADVANTAGES, checkpoint_folder=tmp_path)
    assert torch.equal(found["advantages"], ADVANTAGES), "the first step has weight 1"
    again = AdvantageWeight()
    again.load(tmp_path)
    assert float(again.controller.initial_entropy) == pytest.approx(ENTROPY)


def test_transformers() -> None:
    ids, attention, response = tiny_batch()
    names = {"input_ids": ids, "attention_mask": attention, "response_mask": response, "temperature": 0.7}
    stats = _run("transformers", 0, model=tiny_model("llama"), **names)["stats"]
    assert stats.logp.shape == stats.entropy.shape == ids.shape
    my_model = torch.nn.Module()
    my_model.lm_head = torch.nn.Linear(8, 31)
    found = _run("transformers", 1, my_model=my_model, hidden=torch.randn(3, 8), targets=torch.tensor([1, 2, 3]))
    assert isinstance(my_model.lm_head, FusedLMHead)
    assert found["stats"].logp.shape == (3,)


def test_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl==1.16.0")
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=4, max_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = _run(
        "TRL", model=tiny_model("qwen3"), reward=lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids],
        grpo_config=config, dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3"]}), tokenizer=tiny_tokenizer(),
    )["trainer"]  # fmt: skip
    trainer.train()
    assert float(trainer.eapo.controller.initial_entropy) > 0


def test_cross_entropy() -> None:
    hidden, head, ids = torch.randn(2, 5, 8), torch.nn.Linear(8, 31, bias=False), torch.randint(31, (2, 5))
    found = _run("Cross-entropy", hidden=hidden, lm_head=head, ids=ids)
    z = head(hidden)
    torch.testing.assert_close(found["lse"], z.logsumexp(-1))
    torch.testing.assert_close(found["loss"], torch.nn.functional.cross_entropy(z.flatten(0, 1), ids.flatten()))


def test_liger() -> None:
    g = torch.Generator().manual_seed(0)
    found = _run(
        "Liger-Kernel", hidden=torch.randn(2, 3, 8, generator=g), lm_head=torch.nn.Linear(8, 31, bias=False),
        ids=torch.randint(31, (2, 3), generator=g), mask=MASK, advantages=torch.tensor([1.0, -1.0]),
        old_logp=torch.full((2, 3), -3.0),
    )  # fmt: skip
    found["loss"].backward()
    assert found["sft_loss"] > 0


def test_parallel_training(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        stats = _run(
            "Parallel training", hidden=torch.randn(3, 8), targets=torch.tensor([1, 2, 3]),
            output_layer=torch.nn.Linear(8, 31), tensor_parallel_group=dist.group.WORLD,
        )["stats"]  # fmt: skip
    finally:
        dist.destroy_process_group()
    assert stats.logp.shape == (3,)


def test_nemo_rl() -> None:
    found = _run("NeMo-RL")
    _halved(found["WEIGHT"])
    _check(found["WEIGHT"], found["weigh"](ADVANTAGES, LOGP, MASK))
    with pytest.raises(ValueError, match="unset skip_prev_logprobs"):
        found["weigh"](ADVANTAGES, torch.zeros_like(LOGP), MASK)


def test_openrlhf() -> None:
    found = _run("OpenRLHF")
    _halved(found["WEIGHT"])
    rows = [slice(0, 1), slice(1, 2)]
    experiences = found["weigh"]([
        SimpleNamespace(action_log_probs=LOGP[r], action_mask=MASK[r].bool(), advantages=ADVANTAGES[r], info={}) for r in rows
    ])  # fmt: skip
    _check(found["WEIGHT"], torch.cat([e.advantages for e in experiences]))
    assert experiences[0].info["eapo_positive_weight"].tolist() == [0.5]


def test_skyrl(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data(dict):
        metadata = {"pad_size": 1}  # noqa: RUF012

    class RayPPOTrainer:
        all_metrics: dict[str, float] = {}  # noqa: RUF012

        def compute_advantages_and_returns(self, data: Data) -> Data:
            data["advantages"] = torch.cat([ADVANTAGES, ADVANTAGES[:1]])
            return data

    _module(monkeypatch, "skyrl.train.trainer", RayPPOTrainer=RayPPOTrainer)
    trainer = _run("SkyRL")["EAPOTrainer"]()
    _halved(trainer.eapo)
    data = Data(action_log_probs=torch.cat([LOGP, LOGP[:1]]), loss_mask=torch.cat([MASK, MASK[:1]]).float())
    _check(trainer.eapo, trainer.compute_advantages_and_returns(data)["advantages"][:2])
    assert trainer.all_metrics["eapo/entropy"] == pytest.approx(ENTROPY), "the padding row is masked"


@pytest.mark.parametrize("recomputed", [False, True])
def test_areal(recomputed: bool) -> None:
    found = _run("AReaL")
    _halved(found["WEIGHT"])
    data = {"advantages": ADVANTAGES, "loss_mask": MASK.float(), "logprobs": LOGP - 9.0 if recomputed else LOGP}
    data |= {"prox_logp": LOGP} if recomputed else {}
    _check(found["WEIGHT"], found["weigh"](data, None)["advantages"])


def test_slime(monkeypatch: pytest.MonkeyPatch) -> None:
    mpu = SimpleNamespace(get_data_parallel_group=lambda: None)
    _module(monkeypatch, "megatron.core", mpu=mpu)
    found = _run("slime")
    _halved(found["WEIGHT"])
    data: dict[str, Any] = {
        "rewards": [2.0, -1.0], "kl": [torch.zeros(2), torch.zeros(3)], "log_probs": [LOGP[0, :2], LOGP[1]],
        "loss_masks": [MASK[0, :2], MASK[1]],
    }  # fmt: skip
    found["advantages"](SimpleNamespace(normalize_advantages=False), data)
    assert [a.tolist() for a in data["returns"]] == [[2.0] * 2, [-1.0] * 3]
    torch.testing.assert_close(data["advantages"], [torch.ones(2), -torch.ones(3)])
    with pytest.raises(ValueError, match="normalize_advantages"):
        found["advantages"](SimpleNamespace(normalize_advantages=True), data)


@dataclasses.dataclass
class LossInputs:
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor


def _default_loss(inputs: LossInputs, config: Any) -> Any:
    return SimpleNamespace(loss=config.adv_tau * inputs.advantages[inputs.loss_mask].sum(), metrics={})


STEPS = ((2.0, 2.0), (1.0, 1.0), (1.0, 3.0), (7.0, 7.0))
WEIGHTS = [1.0, 1.0, 0.5, 1.0]
"""Entropies of two micro-batches in each of four steps; each weight is the previous entropy / the first."""


@pytest.mark.usefixtures("optimizer_hooks")
def test_prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    _module(monkeypatch, "prime_rl.configs.trainer", DefaultLossConfig=SimpleNamespace)
    _module(monkeypatch, "prime_rl.trainer.rl.loss", default_loss_fn=_default_loss)
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(8, 31, bias=False)
    _run("prime-rl", 0, model=model)
    found = model.lm_head(torch.randn(2, 3, 8), torch.randint(31, (2, 3)), temperature=torch.ones(2, 3))
    assert found["logprobs"].shape == found["entropy"].shape == (2, 3)
    loss = _run("prime-rl", 1)["loss"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    mask, advantages = torch.tensor([True, True, False]), torch.tensor([2.0, -1.0, 5.0])
    for entropies, weight in zip(STEPS, WEIGHTS, strict=True):
        for entropy in entropies:
            outputs = loss(LossInputs(torch.full((3,), -entropy), advantages, mask), adv_tau=3.0)
            assert float(outputs.metrics["eapo/positive_weight"]) == weight
            assert float(outputs.loss) == 3.0 * (2.0 * weight - 1.0)
        optimizer.step()


@pytest.mark.usefixtures("optimizer_hooks")
def test_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    class DAPOLoss:
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config:
            pass

        def __call__(
            self, logits: Any, labels: Any, global_valid_tokens: Any = None, *, generator_logprobs: Any, advantages: Any,
            loss_mask: Any,
        ) -> Any:  # fmt: skip
            return (advantages * loss_mask).sum() / global_valid_tokens, {}

    _module(monkeypatch, "torchtitan.experiments.rl.losses.dapo", DAPOLoss=DAPOLoss)
    kind = _run("torchtitan")["EAPOLoss"]
    assert kind.Config is not DAPOLoss.Config
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    mask, advantages, loss_of = torch.tensor([True, True, False]), torch.tensor([3.0, -1.0, 0.0]), kind()
    for entropies, weight in zip(STEPS, WEIGHTS, strict=True):
        for entropy in entropies:
            logp = torch.tensor([-entropy, float("inf"), -entropy])  # not finite: an entropy of the other token alone
            loss, _ = loss_of(None, None, 2.0, generator_logprobs=logp, advantages=advantages, loss_mask=mask)
            assert float(loss) == (3.0 * weight - 1.0) / 2.0
        optimizer.step()
