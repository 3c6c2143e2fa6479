"""This package's op behind the whole of TRL's fused-head contract, beside TRL's own head."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, tiny_batch, tiny_model

from eapo_kernels import EapoError

pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl==1.16.0")

from trl.trainer.utils import add_fused_lm_head

from eapo_kernels.integrations.trl import add_eapo_head


def test_the_contract_in_full() -> None:
    fields = ("log_probs", "entropy", "log_sum_sq_probs")
    theirs, ours = tiny_model("cohere_scale"), tiny_model("cohere_scale")
    add_fused_lm_head(theirs, temperature=0.7, outputs=fields)
    add_eapo_head(ours, temperature=0.7, outputs=fields)
    ids, attention, response = tiny_batch()
    labels = torch.where(response, ids, -100)
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    for given in ({"labels": labels}, {"shift_labels": shifted}, {"labels": labels, "num_items_in_batch": 11}):
        a = theirs(input_ids=ids, attention_mask=attention, fused_lm_head=True, **given)
        b = ours(input_ids=ids, attention_mask=attention, fused_lm_head=True, **given)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    masked = ours(input_ids=ids, attention_mask=attention, fused_lm_head=True, labels=torch.full_like(ids, -100))
    masked.loss.backward()
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    with pytest.raises(EapoError, match="outputs"):
        add_eapo_head(tiny_model("llama"), outputs=("is_top1",))


def test_the_router_loss_of_a_mixture_of_experts() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    models = []
    for add in (add_fused_lm_head, add_eapo_head):
        torch.manual_seed(0)
        models.append(Qwen3MoeForCausalLM(config).eval())
        add(models[-1])
    ids, attention, response = tiny_batch()
    given = {"labels": torch.where(response, ids, -100), "fused_lm_head": True, "output_router_logits": True}
    a, b = (model(input_ids=ids, attention_mask=attention, **given) for model in models)
    torch.testing.assert_close(b.aux_loss, a.aux_loss)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-5, atol=1e-5)
