"""The initial policy: a small language model, supervised for some minutes on examples that are made here.

It is written once to a folder named by what determines it, and read from there afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.models.embedded import resolve

from .task import ALPHABET, all_questions, example


@dataclass(frozen=True)
class Recipe:
    """What determines the weights.

    Attributes:
        base: an own model of ``width`` and ``layers`` where empty, else an embedded name, a folder or
            a hub id.
        steps, batch, lr: of AdamW with a cosine schedule; a step sees ``batch`` examples.
    """

    base: str = ""
    width: int = 128
    layers: int = 3
    steps: int = 8000
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0

    def folder(self, root: Path) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]
        return root / f"weights-{digest}"


def initial_policy(recipe: Recipe, root: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """The folder of the supervised model in Hugging Face format; made where it is missing."""
    folder = recipe.folder(root)
    if folder.exists():
        return folder
    torch.manual_seed(recipe.seed)
    if recipe.base:
        source = resolve(recipe.base)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        tokenizer = characters()
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=recipe.width * 8 // 3,
                num_hidden_layers=recipe.layers, num_attention_heads=recipe.width // 32, max_position_embeddings=64,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    supervise(model.to(device), tokenizer, recipe, dtype)
    scratch = folder.with_suffix(".tmp")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character."""
    words = {word: number for number, word in enumerate(["<end>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def supervise(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, dtype: torch.dtype) -> None:
    """Train ``model`` on right answers to the training questions, each step with new ones."""
    random = np.random.default_rng(recipe.seed)
    questions = all_questions(held_out=False)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    model.train()
    for _ in range(recipe.steps):
        rows = []
        for question in (questions[i] for i in random.integers(len(questions), size=recipe.batch)):
            prompt = tokenizer.encode(str(question), add_special_tokens=False)
            answer = tokenizer.encode(example(question, random), add_special_tokens=False)
            rows.append((prompt, [*answer, tokenizer.eos_token_id]))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            # Causal attention over rows padded on the right needs no mask.
            loss = model(input_ids=ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
