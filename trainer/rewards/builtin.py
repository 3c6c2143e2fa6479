"""Built-in rewards that compare the texts with the reference answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rouge_score.rouge_scorer import RougeScorer

from ..models.embedding import SentenceEmbedding
from . import Completion, Failed, reference_of, text_of


class Similarity:
    """share * cosine of sentence embeddings + (1 - share) * ROUGE-L, between the completion and the
    reference ``answer``.

    The cosine alone can be gamed: "Asthma is a kind of fruit" is close to any sentence about
    asthma.
    """

    def __init__(self, embedding: SentenceEmbedding, share: float) -> None:
        self.embedding, self.share = embedding, share

    def __call__(self, completions: Sequence[Completion], answer: Sequence[object], **_: object) -> list[float | Failed]:
        texts = [text_of(completion) for completion in completions]
        references = [reference if isinstance(reference := reference_of(own), str) else "" for own in answer]
        vectors = self.embedding([*texts, *references])
        cosine = (vectors[: len(texts)] * vectors[len(texts) :]).sum(-1).tolist()
        return [
            r if isinstance(r, Failed) else self.share * c + (1 - self.share) * r
            for c, r in zip(cosine, rouge(texts, answer), strict=True)
        ]


_ROUGE = RougeScorer(["rougeL"], use_stemmer=True)


def rouge(completions: Sequence[Completion], answer: Sequence[object], **_: object) -> list[float | Failed]:
    """F1 of ROUGE-L (longest common subsequence of stemmed words) with the reference answer."""
    return _compared(lambda reference, text: _ROUGE.score(reference, text)["rougeL"].fmeasure, completions, answer)


def exact_match(completions: Sequence[Completion], answer: Sequence[object], **_: object) -> list[float | Failed]:
    """1 where the completion equals the reference up to case and surrounding space, else 0."""
    return _compared(lambda r, text: float(text.strip().casefold() == r.strip().casefold()), completions, answer)


def _compared(
    score: Callable[[str, str], float], completions: Sequence[Completion], answer: Sequence[object]
) -> list[float | Failed]:
    """``score(reference, text)`` of each completion; a failure where there is no reference."""
    pairs = [(reference_of(own), text_of(completion)) for own, completion in zip(answer, completions, strict=True)]
    return [reference if isinstance(reference, Failed) else score(reference, text) for reference, text in pairs]
