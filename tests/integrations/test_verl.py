"""The verl adapter on the real verl 0.9.1 in its own environment: `make test-verl`."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_batch, tiny_model

from eapo_kernels import EapoError, EntropyRatio, ShapeError
from eapo_kernels.integrations import AdvantageWeight
from eapo_kernels.integrations.weight import STATE_FILE

pytest.importorskip(
    "verl", reason="verl does not import here, it needs transformers < 5.11 and ray: make test-verl", exc_type=ImportError
)
core = pytest.importorskip(
    "verl.trainer.ppo.core_algos", reason="needs ray and tensordict: make test-verl", exc_type=ImportError
)

from eapo_kernels.integrations import verl as adapter  # noqa: E402

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
B, T = 6, 5


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    adapter.activate(None)


def _actor_config(**changes: Any) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=2, rollout_n=2, **changes)


def _tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[:, 0] = True
    logp = -torch.rand(B, T, generator=g) * 3
    advantages = torch.randn(B, 1, generator=g).expand(B, T).contiguous()
    return {
        "old_log_prob": logp + 0.4 * torch.randn(B, T, generator=g), "log_prob": logp, "advantages": advantages,
        "response_mask": mask,
    }  # fmt: skip


def _loss(name: str, given: dict[str, torch.Tensor], config: Any, mode: str = "token-mean", **more: Any) -> Any:
    logp = given["log_prob"].clone().requires_grad_()
    loss, metrics = core.get_policy_loss_fn(name)(**{**given, "log_prob": logp}, loss_agg_mode=mode, config=config, **more)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def test_importing_verl_finds_the_plugin() -> None:
    assert core.POLICY_LOSS_REGISTRY["eapo"] is adapter.eapo_policy_loss
    assert core.get_adv_estimator_fn("eapo") is adapter.eapo_advantage
    from verl.utils.experimental import torch_functional

    assert torch_functional.FusedLinearForPPO is not adapter.FusedLinearForPPO, "the op is swapped on request only"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("micro", [False, True])
def test_the_loss_is_vanilla_without_the_dual_clip(mode: str, micro: bool) -> None:
    given = _tokens()
    configs = [_actor_config(clip_ratio_high=0.3, clip_ratio_c=c) for c in (3.0, 1e9)]
    for config in configs:
        if micro:
            config.global_batch_info.update(dp_size=2, batch_num_tokens=77, global_batch_size=12, loss_scale_factor=9)
    weights = torch.rand(B, T)
    ours = _loss("eapo", given, configs[0], mode, rollout_is_weights=weights)
    theirs = _loss("vanilla", given, configs[1], mode, rollout_is_weights=weights)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert ours[2].keys() == theirs[2].keys()
    for name in ours[2]:
        assert ours[2][name] == pytest.approx(theirs[2][name], abs=1e-6), name


@pytest.mark.parametrize("name", adapter.HOMOGENEOUS_LOSSES)
def test_these_losses_are_homogeneous_in_the_advantage(name: str) -> None:
    """loss(A with weighted positives) = w loss(positives) + loss(negatives), on verl's own functions."""
    from eapo_kernels.integrations import scale_positive

    given, config, w = _tokens(1), _actor_config(), 0.35
    a = given["advantages"]
    scaled = _loss(name, {**given, "advantages": scale_positive(a, w)}, config)
    positive = _loss(name, {**given, "advantages": a.clamp_min(0)}, config)
    negative = _loss(name, {**given, "advantages": a.clamp_max(0)}, config)
    torch.testing.assert_close(scaled[0], w * positive[0] + negative[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled[1], w * positive[1] + negative[1], rtol=1e-5, atol=1e-7)


def _rewarded(seed: int = 0) -> Any:
    import numpy as np
    from tensordict import TensorDict
    from verl import DataProto

    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 3:] = 0
    scores = torch.zeros(B, T)
    scores[:, 0] = torch.randn(B, generator=g)
    batch = TensorDict({"token_level_rewards": scores, "response_mask": mask}, batch_size=[B])
    return DataProto(batch=batch, non_tensor_batch={"uid": np.array(["a", "a", "a", "b", "b", "b"], dtype=object)})


@pytest.mark.parametrize(
    ("base", "settings"),
    [("grpo", {}), ("grpo", {"norm_adv_by_std_in_grpo": False}), ("rloo", {"eapo": {"advantage": "rloo"}})],
)
def test_the_estimator_weights_positive_advantages_once(base: str, settings: dict[str, Any]) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = OmegaConf.create({"gamma": 1.0, "lam": 1.0, **settings})
    common = {"norm_adv_by_std_in_grpo": settings.get("norm_adv_by_std_in_grpo", True), "config": config}
    with pytest.raises(EapoError, match="trainer_mode=eapo_sync"):
        compute_advantage(_rewarded(), adv_estimator="eapo", **common)
    weight = AdvantageWeight(EntropyRatio(scale=0.25))
    weight.observe(torch.ones(3), torch.ones(3))
    weight.step()
    adapter.activate(weight)
    found = compute_advantage(_rewarded(), adv_estimator="eapo", **common).batch
    expected = compute_advantage(_rewarded(), adv_estimator=base, **common).batch
    a = expected["advantages"]
    assert (a > 0).any()
    torch.testing.assert_close(found["advantages"], torch.where(a > 0, 0.25 * a, a))
    torch.testing.assert_close(found["returns"], expected["returns"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_behind_verls_contract(dtype: torch.dtype) -> None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 7, 32, generator=g).to(dtype), torch.randn(101, 32, generator=g).to(dtype)
    ids = torch.randint(0, 101, (2, 7), generator=g)
    results = []
    for kind in (adapter.FusedLinearForPPO, FusedLinearForPPO):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logp, entropy = kind(chunk_size=4)(*leaves, ids.int(), temperature=0.8)
        (logp.sum() + 0.3 * entropy.float().sum()).backward()
        results.append((logp.detach(), entropy.detach().float(), *(leaf.grad.float() for leaf in leaves)))
    bound = 1e-5 if dtype == torch.float32 else 6e-2  # theirs rounds logits, entropy and gradients to bf16
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()
    with pytest.raises(ShapeError, match="input_ids"):
        adapter.FusedLinearForPPO()(hidden, weight, ids[:, 1:])
    with pytest.raises(EapoError, match="impl_backend"):
        adapter.FusedLinearForPPO(impl_backend="triton")


def _fused(model: Any, monkeypatch: pytest.MonkeyPatch, backend: str = "torch") -> Any:
    """The model with verl's fused forward on our op; everything is restored after the test."""
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental import torch_functional

    monkeypatch.setattr(type(model), "forward", type(model).forward)
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", torch_functional.FusedLinearForPPO)
    monkeypatch.setattr(monkey_patch, "patch_forward_with_backends", monkey_patch.patch_forward_with_backends)
    adapter.install_fused_op()
    adapter.install_fused_op()
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 0.05}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("phi", {}),  # a bias
        ("qwen2", {}),
    ],
)
def test_the_fused_forward_computes_the_models_own_logits(
    family: str, changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's own op, which gets the head's weight only, is off for all of these but the last."""
    from test_families import _tiny

    model = _tiny(family, **changes).to(dtype)
    twin = copy.deepcopy(model)
    ids, _, _ = tiny_batch(rows=2)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float() / 0.7
        for parameter in twin.parameters():
            parameter.mul_(0.9)
        others = twin(input_ids=ids).logits.float() / 0.7
    expected = [z.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] for z in (logits, others)]
    bound = (1e-5 if dtype == torch.float32 else 2**-8) * logits.abs().max()  # the model's own are rounded to its dtype
    _fused(model, monkeypatch)
    _fused(twin, monkeypatch, "liger")  # of the same class, as a reference policy is
    for patched, right in zip((model, twin), expected, strict=True):
        found = patched(input_ids=ids, return_dict=True, temperature=0.7)
        assert (found.log_probs[:, :-1] - right).abs().max() < bound
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert (model(input_ids=ids, return_dict=True, temperature=0.7).entropy - entropy).abs().max() < bound
    if family == "phi":
        model(input_ids=ids, return_dict=True).log_probs[:, :-1].sum().backward()
        assert model.lm_head.bias.grad.abs().sum() > 0


def test_a_head_that_is_not_learned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    model = tiny_model("qwen2")
    own = type(model).forward
    monkeypatch.setattr(type(model), "forward", own)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    early = copy.deepcopy(model)
    with pytest.raises(EapoError, match="install_fused_op: expected a call before verl patches the first model"):
        _fused(model, monkeypatch)
    type(model).forward = lambda self, *args, **kwargs: _doubled(own(self, *args, **kwargs))
    with pytest.raises(EapoError, match="expected logits that are a scaled or soft-capped output of the head"):
        _fused(model, monkeypatch)
    ids, _, _ = tiny_batch(rows=2)
    type(model).forward = own
    patch_forward_with_backends(early, use_fused_kernels=True, fused_kernels_backend="torch")
    with pytest.raises(EapoError, match="expected a model that verl patches after install_fused_op"):
        early(input_ids=ids, return_dict=True)


def test_verls_forward_of_models_with_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl replaces their forward before it asks for fused kernels: what it computes is the head alone."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from verl.models.transformers import qwen2_vl, qwen3_vl

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "mrope_interleaved": True}
    text = {
        **sizes,
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 1, "num_heads": 4, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **special)).eval()
    ids = tiny_batch(rows=1)[0].clamp(3, 89)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    for owner, forward in (
        (type(model), qwen3_vl.forward_with_normal_backend),
        (type(model.model), qwen3_vl.qwen3_vl_base_forward),
    ):
        monkeypatch.setattr(owner, "forward", forward)
    _fused(model, monkeypatch)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True).log_probs
    assert (found[:, :-1] - expected).abs().max() < 1e-5
    # Qwen2-VL's needs positions in four rows, and with transformers 5 does not run in verl 0.9.1: it is not called.
    monkeypatch.setattr(type(model), "forward", qwen2_vl.forward_with_normal_backend)
    _fused(model, monkeypatch)


def _doubled(output: Any) -> Any:
    output.logits = torch.cat([2 * output.logits[..., :9], output.logits[..., 9:]], -1)
    return output


def test_training_steps_with_verls_functions_and_our_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's patched forward, advantages and loss registry with our op, weight and loss: the reward rises."""
    from omegaconf import OmegaConf
    from verl.models.transformers.monkey_patch import patch_forward_with_backends
    from verl.trainer.ppo.ray_trainer import compute_advantage

    model = tiny_model("qwen2")
    kind, own = type(model), type(model).forward
    monkeypatch.setattr(kind, "forward", own)  # restored after the test
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    ids, attention, _ = tiny_batch(rows=B)
    theirs = model(input_ids=ids, attention_mask=attention, return_dict=True, temperature=0.9)
    kind.forward = own
    _fused(model, monkeypatch)
    ours = model(input_ids=ids, attention_mask=attention, return_dict=True, temperature=0.9)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-4, atol=1e-5)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    config, weight = _actor_config(), AdvantageWeight()
    adapter.activate(weight)
    prompt = torch.full((B, 1), 5)
    rewards = []
    torch.manual_seed(0)
    for _ in range(12):
        sequence = prompt
        for _ in range(T):
            kind_forward = model.model(input_ids=sequence).last_hidden_state[:, -1]
            sequence = torch.cat([sequence, model.lm_head(kind_forward).softmax(-1).multinomial(1)], 1)
        with torch.no_grad():
            old = model(input_ids=sequence, return_dict=True)
        data = _rewarded()
        data.batch["response_mask"] = torch.ones(B, T, dtype=torch.int64)
        score = (sequence[:, 1:] < VOCABULARY // 2).float().mean(1)
        data.batch["token_level_rewards"] = torch.zeros(B, T).index_copy(1, torch.tensor([T - 1]), score[:, None])
        weight.observe(old.entropy[:, :-1], data.batch["response_mask"])
        weight.step()
        advantages = compute_advantage(data, adv_estimator="eapo", config=OmegaConf.create({})).batch["advantages"]
        output = model(input_ids=sequence, return_dict=True)
        loss, _ = core.get_policy_loss_fn("eapo")(
            old_log_prob=old.log_probs[:, :-1], log_prob=output.log_probs[:, :-1], advantages=advantages,
            response_mask=data.batch["response_mask"], loss_agg_mode="token-mean", config=config,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(score.mean().item())
    assert sum(rewards[-4:]) > sum(rewards[:4])
    assert float(weight.weight) != 1.0


class _Store:
    """A stand-in for verl's TransferQueue with the calls of the two stages."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields

    def kv_batch_get(self, keys: Any, partition_id: str, select_fields: list[str]) -> Any:
        return self.fields.select(*[name for name in select_fields if name in self.fields.keys()])  # noqa: SIM118

    def kv_batch_put(self, keys: Any, partition_id: str, fields: Any) -> Any:
        self.fields.update(fields)
        return _Batch(keys, partition_id)


class _Batch(SimpleNamespace):
    def __init__(self, keys: Any, partition_id: str) -> None:
        super().__init__(keys=keys, partition_id=partition_id, extra_info={})

    def __len__(self) -> int:
        return len(self.keys)


def _config(directory: Path, **changes: Any) -> Any:
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {
            "trainer": {"v1": {"trainer_mode": "eapo_sync"}, "default_local_dir": str(directory), "resume_mode": "auto"},
            "algorithm": {
                "adv_estimator": "eapo", "use_kl_in_reward": False, "gamma": 1.0, "lam": 1.0, "eapo": {"scale": 0.5},
                "rollout_correction": None,
            },
            "actor_rollout_ref": {
                "actor": {"policy_loss": {"loss_mode": "eapo"}, "loss_agg_mode": "token-mean", "loss_scale_factor": None},
                "rollout": {"temperature": 1.0, "calculate_log_probs": False, "n": 3},
            },
        }
    )  # fmt: skip
    for path, value in changes.items():
        OmegaConf.update(config, path.replace("__", "."), value, merge=False)
    return config


def _trainer(directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """verl's own sync trainer class; only the constructor, which needs Ray, is replaced."""
    base = pytest.importorskip("verl.trainer.ppo.v1.trainer_base", reason="needs TransferQueue: make test-verl")
    from eapo_kernels.integrations import verl_trainer  # noqa: F401  registers

    monkeypatch.setattr(base.PPOTrainer, "__init__", lambda self, config: setattr(self, "config", config))
    return base.get_trainer_cls("eapo_sync")(_config(directory, **changes))


def test_the_sync_trainer_measures_weights_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensordict import NonTensorStack, TensorDict
    from verl.trainer.ppo.v1 import trainer_base

    trainer = _trainer(tmp_path, monkeypatch)
    assert trainer.config.trainer.v1.trainer_mode == "sync"
    lengths, prompt = [5, 3, 4, 5, 2, 5], 2
    torch.manual_seed(0)

    def nested(extra: int, make: Any) -> torch.Tensor:
        return torch.nested.as_nested_tensor([make(n + extra) for n in lengths], layout=torch.jagged)

    entropies = nested(prompt, torch.rand)
    scores = nested(0, torch.zeros)
    scores.values()[torch.tensor(lengths).cumsum(0) - 1] = torch.randn(B)
    store = _Store(
        TensorDict({"response_mask": nested(0, torch.ones), "rm_scores": scores}, batch_size=[B]).set(
            "uid", NonTensorStack("a", "a", "a", "b", "b", "b")
        )
    )
    monkeypatch.setattr(trainer_base, "tq", store)
    batch = _Batch([f"{u}_{i}_0" for i, u in enumerate("aaabbb")], "train")

    def compute_log_prob(batch: Any) -> Any:
        store.fields.update(TensorDict({"entropy": entropies, "log_probs": -nested(prompt, torch.rand)}, batch_size=[B]))
        return batch

    trainer.actor_rollout_wg = SimpleNamespace(compute_log_prob=compute_log_prob)
    metrics: dict[str, Any] = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    # verl shifts by one: the response's entropies are those of the position before each token.
    ends = torch.tensor([n + prompt for n in lengths]).cumsum(0)
    own = torch.cat([entropies.values()[e - n - 1 : e - 1] for e, n in zip(ends.tolist(), lengths, strict=True)])
    assert metrics["eapo/entropy"] == pytest.approx(own.mean().item(), rel=1e-6)
    assert metrics["actor/entropy"] == pytest.approx(metrics["eapo/entropy"], rel=1e-5), "token-mean: verl's own number"
    assert metrics["eapo/positive_weight"] == 0.5

    trainer._compute_advantage(batch, metrics)
    r = torch.stack([row.sum() for row in scores.unbind()]).view(2, 3)
    a = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten()
    expected = torch.where(a > 0, 0.5 * a, a)
    found = torch.stack([row[0] for row in store.fields["advantages"].unbind()])
    torch.testing.assert_close(found, expected)

    trainer.global_steps = 7
    trainer.config.trainer.resume_mode = "disable"
    monkeypatch.setattr(trainer_base.PPOTrainer, "_save_checkpoint", lambda self: None)
    monkeypatch.setattr(trainer_base.PPOTrainer, "_load_checkpoint", lambda self: setattr(self, "global_steps", 7))
    trainer._save_checkpoint()
    assert (tmp_path / "global_step_7" / STATE_FILE).is_file()
    again = _trainer(tmp_path, monkeypatch)
    again._load_checkpoint()
    assert torch.equal(again.eapo.controller.initial_entropy, trainer.eapo.controller.initial_entropy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm__adv_estimator": "grpo"}, "adv_estimator"),
        ({"actor_rollout_ref__actor__policy_loss__loss_mode": "clip_cov"}, "positively homogeneous"),
        ({"algorithm__rollout_correction": {"bypass_mode": True}}, "bypass_mode"),
        ({"algorithm__eapo": {"kapa": 1.0}}, r"algorithm\.eapo"),
    ],
)
def test_unsupported_configurations_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EapoError, match=message):
        _trainer(tmp_path, monkeypatch, **changes)
