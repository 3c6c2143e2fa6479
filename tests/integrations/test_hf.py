"""patch_causal_lm on tiny models of every family, against the model's own logits."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import pickle
import types
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_batch, tiny_model

from eapo_kernels import EAPOConfig, EapoError, ShapeError, TokenBatch, TokenStats, eapo_loss
from eapo_kernels.integrations import FusedLMHead
from eapo_kernels.integrations.head import PrimeHead
from eapo_kernels.integrations.hf import next_token_targets, patch_causal_lm, unpatch_causal_lm


def _from_logits(model: Any, ids: torch.Tensor, attention: torch.Tensor, targets: torch.Tensor, inv_temperature: float) -> Any:
    z = model(input_ids=ids, attention_mask=attention).logits.float() * inv_temperature
    logps = z.log_softmax(-1)
    valid = targets != -100
    logp = logps.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(valid, logp, 0.0), torch.where(valid, -(logps.exp() * logps).sum(-1), 0.0)


def _gradients(model: Any, logp: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    (torch.randn_like(logp) * logp + torch.randn_like(logp) * entropy).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal up to fp32 rounding: 1e-5 of the largest element."""
    bound = 1e-5 * max(theirs.abs().max().item(), 1.0)
    assert (ours - theirs).abs().max().item() <= bound, what


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_and_gradients_are_those_of_the_logits(family: str) -> None:
    model = tiny_model(family)
    ids, attention, response = tiny_batch()
    targets = next_token_targets(ids, response)
    logp, entropy = _from_logits(model, ids, attention, targets, 1 / 0.7)
    expected = _gradients(model, logp, entropy)
    logits = model(input_ids=ids, attention_mask=attention).logits
    names = list(model.state_dict())

    assert patch_causal_lm(model) is model
    stats = model(input_ids=ids, attention_mask=attention, targets=targets, inv_temperature=1 / 0.7)
    assert isinstance(stats, TokenStats)
    _assert_close(stats.logp, logp, "logp")
    _assert_close(stats.entropy, entropy, "entropy")
    found = _gradients(model, stats.logp, stats.entropy)
    assert found.keys() == expected.keys()
    for name in expected:
        _assert_close(found[name], expected[name], name)
    assert torch.equal(model(input_ids=ids, attention_mask=attention).logits, logits)
    assert list(model.state_dict()) == names
    own = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert own == bool(model.config.tie_word_embeddings)

    unpatch_causal_lm(model)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert "forward" not in vars(model)
    assert torch.equal(model(input_ids=ids, attention_mask=attention).logits, logits)


def test_check_rejects_a_wrong_scale() -> None:
    model = tiny_model("cohere_scale")
    with pytest.raises(EapoError, match="expected log-probs within"):
        patch_causal_lm(model, logit_scale=3.0)
    assert type(model.get_output_embeddings()) is torch.nn.Linear, "the failed patch is undone"
    assert not model.training


def test_bfloat16_matches_its_logits() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    ids, attention, response = tiny_batch()
    targets = next_token_targets(ids, response)
    with torch.no_grad():
        logp, _ = _from_logits(model, ids, attention, targets, 1.0)
        stats = patch_causal_lm(model)(input_ids=ids, attention_mask=attention, targets=targets)
    assert (stats.logp - logp).abs().max() < 0.1, "bf16 logits carry 8 bits"


def test_generation_saving_and_copying_still_work(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama_tied")
    ids, _, _ = tiny_batch(rows=2)
    before = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    patch_causal_lm(model)
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=4, do_sample=False), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    targets = next_token_targets(ids)
    assert torch.allclose(twin(input_ids=ids, targets=targets).logp[:, :-1], -torch.tensor(97.0).log())
    assert not torch.allclose(model(input_ids=ids, targets=targets).logp[:, :-1], -torch.tensor(97.0).log())
    buffer = io.BytesIO()
    torch.save(model.get_output_embeddings().state_dict(), buffer)


def _accelerated(model: Any) -> Any:
    """A forward on the object, bound to it, as accelerate's mixed precision leaves."""
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: forward(self, *args, **kwargs), model)
    return model


def _replica(model: torch.nn.Module) -> Any:
    """A replica as nn.DataParallel makes it, with parameters of its own: here the negative ones."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            replica._parameters.pop(name, None)
            vars(replica)[name] = None if parameter is None else -parameter.detach()
    return copies[model]


@pytest.mark.parametrize("before", [lambda model: model, _accelerated])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "replica"])
@torch.no_grad()
def test_a_copy_computes_with_its_own_weights(how: str, before: Any) -> None:
    if how == "pickle" and before is _accelerated:
        pytest.skip("a local function has no pickle")
    model = patch_causal_lm(before(tiny_model("gemma2_softcap")))
    ids, _, _ = tiny_batch(rows=2)
    targets = next_token_targets(ids)
    twin: Any = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "replica": _replica}[how](model)
    if how != "replica":
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
        for parameter in twin.parameters():
            parameter.neg_()
    negative = tiny_model("gemma2_softcap")
    for parameter in negative.parameters():
        parameter.neg_()
    logits = negative(input_ids=ids).logits
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert (twin(input_ids=ids, targets=targets).logp[:, :-1] - expected).abs().max() < 1e-5
    assert torch.equal(twin(input_ids=ids).logits, logits)
    assert type(twin) is type(model)
    if how == "deepcopy":
        assert type(unpatch_causal_lm(twin)) is type(negative)
        assert torch.equal(twin(input_ids=ids).logits, logits)


def test_a_forward_that_holds_the_original_is_not_copied() -> None:
    model = tiny_model("llama")
    old = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: old(*args, **kwargs), model)
    patch_causal_lm(model)
    for copied in (copy.deepcopy, pickle.dumps, lambda m: m._replicate_for_data_parallel()):
        with pytest.raises(EapoError, match="expected one that can be copied"):
            copied(model)
    model = tiny_model("llama")
    model.forward = functools.partial(type(model).forward, model)
    with pytest.raises(EapoError, match="a method bound to it"):
        patch_causal_lm(model)


def test_the_patch_is_seen_by_export_and_signature(tmp_path: Any) -> None:
    model = tiny_model("llama")
    signature = inspect.signature(model.forward)
    patch_causal_lm(model)
    assert inspect.signature(model.forward) == signature
    ids, _, _ = tiny_batch(rows=2)
    given = {"input_ids": ids, "targets": next_token_targets(ids)}
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        found, expected = program.module()(**given), model(**given)
    torch.testing.assert_close(found.logp, expected.logp)
    torch.testing.assert_close(found.entropy, expected.entropy)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_head_of_ones_own_model_is_compared_with_its_logits() -> None:
    torch.manual_seed(0)
    linear, hidden = torch.nn.Linear(8, 31), 4 * torch.randn(2, 3, 8)
    logits = 2.0 * (1.5 * linear(hidden) / 2.0).tanh()
    FusedLMHead.from_linear(linear, softcap=2.0, logit_scale=1.5).check(hidden, logits)
    for wrong in ({}, {"softcap": 2.0}, {"logit_scale": 1.5}, {"softcap": 2.0, "logit_scale": 1 / 1.5}):
        with pytest.raises(EapoError, match="expected log-probs within"):
            FusedLMHead.from_linear(linear, **wrong).check(hidden, logits)
    with pytest.raises(EapoError, match="logits: expected"):
        FusedLMHead.from_linear(linear).check(hidden, logits[..., :30])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_head_with_prime_rls_call(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    labels, temperature = torch.randint(0, 37, (2, 5)), torch.rand(2, 5) + 0.5
    head = PrimeHead(8, 37, chunk_size=3, softcap=softcap)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    head.weight = torch.nn.Parameter(weight.detach().clone())
    found = head(hidden, labels, temperature=temperature)
    z = hidden @ weight.T
    log_p = ((z if softcap is None else softcap * (z / softcap).tanh()) / temperature[..., None]).log_softmax(-1)
    expected = {"logprobs": log_p.gather(-1, labels[..., None])[..., 0], "entropy": -(log_p.exp() * log_p).sum(-1)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(found[name].sum(), (hidden, head.weight), retain_graph=True)
        theirs = torch.autograd.grad(value.sum(), (hidden, weight), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for given in ({"labels": None, "temperature": temperature}, {"labels": labels}):
        for error in (AssertionError, EapoError):  # prime-rl asserts
            with pytest.raises(error, match="FusedOutputLinear requires"):
                head(hidden, **given)


def test_compute_runs_the_one_pass_loss_inside_the_forward() -> None:
    model = patch_causal_lm(tiny_model("gemma2_softcap"))
    ids, attention, response = tiny_batch(rows=4)
    targets = next_token_targets(ids, response)
    b, length = ids.shape
    with torch.no_grad():
        old = model(input_ids=ids, attention_mask=attention, targets=targets, entropy="none").logp
    batch = TokenBatch(
        targets=targets.flatten(),
        sequence_ids=torch.arange(b).repeat_interleave(length),
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.2]),
        group_ids=torch.tensor([0, 0, 1, 1]),
        old_logp=old.flatten(),
    )

    def loss_of(schedule: str) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = model(
            input_ids=ids, attention_mask=attention,
            compute=lambda hidden, weight, **options: eapo_loss(
                hidden.flatten(0, 1), weight, batch, positive_weight=0.5, config=EAPOConfig(), schedule=schedule, **options
            ).loss,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), model.get_output_embeddings().weight.grad.clone()

    one, other = loss_of("one_pass"), loss_of("autograd")
    _assert_close(one[0], other[0], "loss")
    _assert_close(one[1], other[1], "d_weight")


def _with_lora(model: Any, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"} | changes
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_the_head(when: str) -> None:
    ids, attention, response = tiny_batch()
    targets = next_token_targets(ids, response)
    plain = _with_lora(tiny_model("llama"))
    logp, entropy = _from_logits(plain, ids, attention, targets, 1.0)
    expected = _gradients(plain, logp, entropy)
    if when == "before":
        model = _with_lora(patch_causal_lm(tiny_model("llama")))
    else:
        model = patch_causal_lm(_with_lora(tiny_model("llama")))
    stats = model(input_ids=ids, attention_mask=attention, targets=targets)
    _assert_close(stats.logp, logp, "logp")
    _assert_close(stats.entropy, entropy, "entropy")
    found = _gradients(model, stats.logp, stats.entropy)
    assert found.keys() == expected.keys()
    assert any("lm_head.lora_A" in name for name in found)
    for name in expected:
        _assert_close(found[name], expected[name], name)
    with model.disable_adapter(), torch.no_grad():
        bare = model(input_ids=ids, attention_mask=attention, targets=targets)
        base = patch_causal_lm(tiny_model("llama"))(input_ids=ids, attention_mask=attention, targets=targets)
    assert torch.equal(bare.logp, base.logp)
    if when == "after":
        unpatch_causal_lm(model)
        assert type(model.get_base_model().get_output_embeddings().base_layer) is torch.nn.Linear


def test_lora_beside_the_head() -> None:
    model = patch_causal_lm(_with_lora(tiny_model("qwen2"), target_modules=["q_proj", "v_proj"]))
    ids, attention, response = tiny_batch()
    stats = model(input_ids=ids, attention_mask=attention, targets=next_token_targets(ids, response))
    stats.logp.sum().backward()
    assert all(("lora" in name) == (p.grad is not None) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "expected plain LoRA"),
        ({"lora_dropout": 0.1}, "expected lora_dropout 0"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "expected nn.Linear, or peft's LoRA"),
    ],
)
def test_other_adapters_on_the_head_are_refused(changes: dict[str, Any], message: str) -> None:
    ids, _, _ = tiny_batch()
    with pytest.raises(EapoError, match=message):  # noqa: PT012
        model = patch_causal_lm(_with_lora(tiny_model("llama"), **changes), check=False).train()
        model(input_ids=ids, targets=next_token_targets(ids))


def test_mistakes_say_what_was_expected() -> None:
    model = tiny_model("llama")
    ids, _, response = tiny_batch()
    with pytest.raises(EapoError, match="expected one that patch_causal_lm has patched"):
        unpatch_causal_lm(model)
    with pytest.raises(EapoError, match="transformers causal language model"):
        patch_causal_lm(torch.nn.Linear(2, 2))
    with pytest.raises(EapoError, match="with an output head"):
        patch_causal_lm(model.base_model)
    patch_causal_lm(model)
    with pytest.raises(EapoError, match="expected one that is not patched"):
        patch_causal_lm(model)
    targets = next_token_targets(ids, response)
    with pytest.raises(EapoError, match="labels"):
        model(input_ids=ids, targets=targets, labels=targets)
    with pytest.raises(ShapeError, match=r"targets|hidden"):
        model(input_ids=ids, targets=targets[:, 1:])
    with pytest.raises(EapoError, match="entropy"):
        model.get_output_embeddings()(torch.zeros(2, 32), entropy="none")
    with pytest.raises(EapoError, match="arguments with targets"):
        model.get_output_embeddings()(torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64), temperature=2.0)
    with pytest.raises(ShapeError, match="input_ids"):
        next_token_targets(ids.int())
    with pytest.raises(ShapeError, match="mask"):
        next_token_targets(ids, response[:, 1:])


def test_a_head_with_hooks_or_a_replaced_forward_is_refused() -> None:
    linear = torch.nn.Linear(4, 7)
    linear.register_forward_hook(lambda *_: None)
    with pytest.raises(EapoError, match="_forward_hooks"):
        FusedLMHead.from_linear(linear)
    other = torch.nn.Linear(4, 7)
    other.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(EapoError, match="a replaced forward"):
        FusedLMHead.from_linear(other)
    with pytest.raises(EapoError, match=r"plain nn\.Linear"):
        FusedLMHead.from_linear(FusedLMHead(4, 7))
    with pytest.raises(EapoError, match="softcap"):
        FusedLMHead(4, 7, softcap=-1.0)
    again = FusedLMHead.from_linear(FusedLMHead(4, 7, True).to_linear())
    assert again.bias is not None


def test_a_wrapped_head_cannot_be_unpatched() -> None:
    model = patch_causal_lm(tiny_model("llama"))
    ids, _, _ = tiny_batch()
    hook = model.lm_head.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(EapoError, match=r"unpatch before FSDP2 or DeepSpeed wraps the model.*_forward_pre_hooks"):
        unpatch_causal_lm(model)
    assert isinstance(model(input_ids=ids, targets=next_token_targets(ids)), TokenStats), "still patched"
    hook.remove()
    unpatch_causal_lm(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_targets_shift_once() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_token_targets(ids).tolist() == [[6, 7, 8, -100]]
    assert next_token_targets(ids, torch.tensor([[0, 0, 1, 0]])).tolist() == [[-100, 7, -100, -100]]
