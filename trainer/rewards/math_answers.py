"""The reward ``math_verify``: whether the completion's final answer equals the reference as a
mathematical object.

Completions are untrusted input to a computer algebra system: some take minutes to simplify. They
are graded in worker processes, where math-verify's own time limit works (it needs a main thread's
signals) and a worker that does not obey it can be killed.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import signal
from collections.abc import Sequence
from multiprocessing.pool import Pool

from . import Completion, Failed, Score, reference_of, text_of

WORKERS = 2
LIMIT = 60.0
"""Seconds after which a worker that does not obey math-verify's limit of 5 s for each operation is
killed."""
# What an answer that is still to be computed has: an operator between numbers, but for 4.2 x 10^2; where an integer is asked, a
# ratio as well.
SUM = re.compile(r"[\d)}.]\s*(?:[-+*÷]|\\times|\\cdot|\\div)\s*(?!10\^)[\d(\\{]")
RATIO = re.compile(r"\d\s*/\s*\d|\\frac")


def grade(answer: str | Failed, completion: str) -> Score:
    """1 or 0; 0 for a completion whose answer cannot be parsed, or is still to be computed: where the
    reference is a number, "17 + 25" is not 42, and where it is an integer, 84/2 neither.

    The last \\boxed{} counts, else the last LaTeX expression, else the last number. A reference
    without LaTeX delimiters is LaTeX as a whole.
    """
    from math_verify import parse, verify

    if isinstance(answer, Failed):
        return answer
    reference = parse(answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}")
    if not reference:
        return Failed(f"expected a reference answer that math-verify can parse, got {answer!r}")
    found = parse(completion)
    if found and getattr(reference[0], "is_number", False):
        forms = [SUM, RATIO] if reference[0].is_integer else [SUM]
        results = (str(own[-1]).rpartition("=")[2] for own in (reference, found))  # the last element is the text
        asked_open, is_open = (any(form.search(result) for form in forms) for result in results)
        if is_open and not asked_open:
            return 0.0
    return float(verify(reference, found))


def _ready() -> None:
    import math_verify  # noqa: F401  loaded before the first answer comes

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would print every completion that takes too long
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the trainer decides


class MathVerify:
    """1 where the completion's answer equals the column ``answer``, else 0. A reference that cannot
    be parsed and an answer that takes too long are failures.
    """

    def __init__(self) -> None:
        self.pool: Pool | None = None

    def __call__(self, completions: Sequence[Completion], answer: Sequence[object], **_: object) -> list[Score]:
        pairs = [(reference_of(gold), text_of(completion)) for gold, completion in zip(answer, completions, strict=True)]
        scores: list[Score] = []
        while len(scores) < len(pairs):
            if self.pool is None:
                self.pool = multiprocessing.get_context("spawn").Pool(WORKERS, _ready)
            for waiting in [self.pool.apply_async(grade, pair) for pair in pairs[len(scores) :]]:
                try:
                    scores.append(waiting.get(LIMIT))
                except multiprocessing.TimeoutError:
                    scores.append(Failed(f"not graded within {LIMIT:g} s"))
                    self.pool.terminate()
                    self.pool = None
                    break
        return scores
