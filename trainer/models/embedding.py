"""Sentence embeddings from a plain encoder: mean of the last hidden states over real tokens,
normalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel

from .embedded import resolve
from .limits import load_tokenizer, positions


class SentenceEmbedding:
    """Texts -> [n, dim] fp32 CPU unit vectors; the dot product of two is their cosine.

    For an encoder of the sentence-transformers family with mean pooling (as MiniLM-L6) the vectors
    equal those of that library.
    """

    def __init__(self, name: str, cache: str, device: torch.device, batch: int = 64) -> None:
        directory = resolve(name, cache, "rewards.embedding_model")
        self.tokenizer = load_tokenizer(directory, "rewards.embedding_model")
        self.model = AutoModel.from_pretrained(directory).to(device).eval().requires_grad_(False)
        self.device, self.batch = device, batch
        self.max_tokens = min(self.tokenizer.model_max_length, 256, positions(self.model)[0] or 256)
        self._kept: dict[str, Tensor] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within it no text is embedded twice: an evaluation needs the vectors of its rewards again.
        Elsewhere a vector must not depend (by rounding) on the batches of earlier calls.
        """
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        vectors: dict[str, Tensor] = {} if self._kept is None else self._kept
        unique = sorted(set(texts) - vectors.keys(), key=len)
        for start in range(0, len(unique), self.batch):
            chunk = unique[start : start + self.batch]
            tokens = self.tokenizer(chunk, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
            tokens = tokens.to(self.device)
            hidden = self.model(**tokens).last_hidden_state
            weight = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            vectors.update(zip(chunk, normalize(mean.float(), dim=-1).cpu(), strict=True))
        return torch.stack([vectors[text] for text in texts])
