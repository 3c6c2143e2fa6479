"""The reward ``math_verify``: whether the completion's final answer equals the reference as a
mathematical object.

Completions are untrusted input to a computer algebra system: some take minutes to simplify. They
are graded in worker processes. There math-verify's own time limit works, which uses signals of a
main thread, and a worker that does not obey it is killed. The workers import neither torch nor the
trainer.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.pool import Pool

from . import Completion, Failed, Score, reference_of, text_of

LIMIT = 60.0
"""Seconds after which a worker that does not obey math-verify's limit of 5 s for each operation is
killed."""


def grade(answer: str, completion: str) -> tuple[Score, bool]:
    """1 or 0, and whether the completion has an answer that can be parsed.

    The last \\boxed{} counts, else the last LaTeX expression, else the last number. A reference
    without LaTeX delimiters is LaTeX as a whole.
    """
    from math_verify import parse, verify

    reference = parse(answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}")
    if not reference:
        return Failed(f"expected a reference answer that math-verify can parse, got {answer!r}"), True
    found = parse(completion)
    return float(verify(reference, found)), bool(found)


def _ready() -> None:
    import math_verify  # noqa: F401  loaded before the first answer comes

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would print every completion that takes too long
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the trainer decides


class MathVerify:
    """1 where the completion's answer equals the column ``answer``, else 0.

    An answer that cannot be parsed or takes too long is 0 and is counted. A reference that cannot
    be parsed is a failure.
    """

    def __init__(self, workers: int = 2) -> None:
        self.workers, self.counts = workers, dict[str, float]()
        self.pool: Pool | None = None

    def __call__(self, completions: Sequence[Completion], answer: Sequence[object], **_: object) -> list[Score]:
        pairs = [(reference_of(gold), text_of(completion)) for gold, completion in zip(answer, completions, strict=True)]
        found: dict[int, tuple[Score, bool]] = {}
        found |= {i: (gold, True) for i, (gold, _) in enumerate(pairs) if isinstance(gold, Failed)}
        late = 0
        while len(found) < len(pairs):
            if self.pool is None:
                self.pool = multiprocessing.get_context("spawn").Pool(self.workers, _ready)
            waiting = {i: self.pool.apply_async(grade, pair) for i, pair in enumerate(pairs) if i not in found}
            for i, result in waiting.items():
                try:
                    found[i] = result.get(LIMIT)
                except multiprocessing.TimeoutError:
                    found[i], late = (0.0, True), late + 1
                    self.pool.terminate()
                    self.pool = None
                    break
        self.counts = {"unparsed": sum(not parsed for _, parsed in found.values()) / len(pairs), "late": late / len(pairs)}
        return [found[i][0] for i in range(len(pairs))]

    def metrics(self) -> Mapping[str, float]:
        """Shares of the latest call: completions without an answer that can be parsed, and those
        that took too long.
        """
        return self.counts
