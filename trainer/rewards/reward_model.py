"""The reward ``reward_model``: a sequence classifier with one output, the format of Hugging Face's
reward models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from ..config import RewardModelConfig
from ..dataset import content_of, plain
from ..errors import ModelError
from ..models.embedded import resolve
from ..models.limits import load_tokenizer, positions, token_rows
from . import Completion, Failed, Score, text_of


class RewardModel:
    """The raw output of the classifier (no sigmoid) for prompt and completion together.

    Prompt and completion go through the tokenizer's chat template, or as a pair of texts where it
    has none. Without a padding token completions are run one at a time.

    Raises:
        ModelError: not such a model, more than one output, or a directory that lacks the weights of
            the output layer.
    """

    def __init__(self, config: RewardModelConfig, cache: str, device: torch.device) -> None:
        directory = resolve(config.path, cache, "rewards.reward_model.path")
        try:
            self.tokenizer = load_tokenizer(directory, "rewards.reward_model")
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                directory, dtype=getattr(torch, config.dtype), output_loading_info=True
            )
        except (ImportError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"rewards.reward_model: expected a sequence classifier in {directory}, got: {reason}") from error
        if missing := sorted(loaded["missing_keys"]):
            raise ModelError(f"rewards.reward_model: expected all weights in {directory}, got none of {', '.join(missing)}")
        if (outputs := model.config.num_labels) != 1:
            raise ModelError(f"rewards.reward_model: expected a model with 1 output, got {outputs} in {directory}")
        self.rows, held = token_rows(model), positions(model)[0]
        self.max_tokens = config.max_tokens if held is None else min(held, config.max_tokens)
        pad = self.tokenizer.pad_token_id
        self.batch = config.batch if pad in range(self.rows) else 1
        if self.batch > 1:
            model.config.get_text_config().pad_token_id = pad  # the classifier reads the last token that is no padding
        self.model = model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **_: object) -> list[Score]:
        encoded = [self._encode(p, text_of(c)) for p, c in zip(prompts, completions, strict=True)]
        scores: list[Score] = [self._refused(tokens["input_ids"]) for tokens in encoded]
        fitting = sorted((i for i, score in enumerate(scores) if score is None), key=lambda i: len(encoded[i]["input_ids"]))
        for start in range(0, len(fitting), self.batch):
            chunk = fitting[start : start + self.batch]
            inputs = self.tokenizer.pad([encoded[i] for i in chunk], padding=len(chunk) > 1, return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device)).logits
            for i, score in zip(chunk, logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
        return scores

    def _refused(self, ids: list[int]) -> Failed | None:
        if len(ids) > self.max_tokens:
            return Failed(f"expected at most {self.max_tokens} tokens (rewards.reward_model.max_tokens), got {len(ids)}")
        if max(ids) >= self.rows:
            return Failed(f"expected token ids below the {self.rows} rows of the reward model's embedding, got {max(ids)}")
        return None

    def _encode(self, prompt: Any, completion: str) -> dict[str, list[int]]:
        if self.tokenizer.chat_template is None:
            text = prompt if isinstance(prompt, str) else "\n".join(map(content_of, prompt))
            return dict(self.tokenizer(text, completion))
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(plain, prompt)]
        text = self.tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": completion}], tokenize=False)
        return dict(self.tokenizer(text, add_special_tokens=False))
