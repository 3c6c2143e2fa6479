"""The task: from given digits write an expression that equals a target. Questions have many right
answers, and a program checks each.

A question is written "49576=33:", an answer "9+4*6": digits of the question, each at most once, joined
by +, - and *.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, product
from math import prod
from typing import NamedTuple

import numpy as np

DIGITS = 5
"""Digits of a question, all different."""
USED = (4, 5)
"""How many of them an answer uses."""
FEWEST = 4
"""Right answers that a question has at least, up to the order of terms and factors."""
LARGEST = 99
HELD_OUT = 5
"""One of so many sets of digits belongs to the held-out questions."""
ALPHABET = "0123456789+-*=:"
LONGEST = 2 * DIGITS
"""Tokens of the longest answer, its end included."""

_EXPRESSION = re.compile(r"\d(?:[+*-]\d)+")

Answer = tuple[tuple[str, tuple[str, ...]], ...]
"""Signs and factors of the terms, in order: 2+3*4 and 4*3+2 are one answer."""


class Question(NamedTuple):
    digits: str
    target: int

    def __str__(self) -> str:
        return f"{self.digits}={self.target}:"


def right_answer(question: Question, text: str) -> Answer | None:
    """The answer that ``text`` writes, or None where it is not a right one."""
    used = text[::2]
    if not _EXPRESSION.fullmatch(text) or len(used) not in USED:
        return None
    if len(set(used)) < len(used) or not set(used) <= set(question.digits):
        return None
    terms = re.findall(r"([+-])([^+-]+)", f"+{text}")
    answer = tuple(sorted((sign, tuple(sorted(factors.split("*")))) for sign, factors in terms))
    return answer if _value(answer) == question.target else None


def _value(answer: Answer) -> int:
    return sum(int(sign + "1") * prod(map(int, factors)) for sign, factors in answer)


@cache
def answers(digits: str) -> dict[int, list[Answer]]:
    """Target -> all its right answers, from these digits in ascending order."""
    found: dict[int, list[Answer]] = {}
    for used in USED:
        for chosen in combinations(digits, used):
            for terms in _partitions(chosen):
                for signs in product("+-", repeat=len(terms)):
                    if "+" in signs:  # an expression cannot begin with a minus
                        answer = tuple(sorted(zip(signs, terms, strict=True)))
                        found.setdefault(_value(answer), []).append(answer)
    return found


def _partitions(digits: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
    """Every way to put the digits into products."""
    if not digits:
        yield []
        return
    for rest in _partitions(digits[1:]):
        yield [(digits[0],), *rest]
        for i, term in enumerate(rest):
            yield [*rest[:i], (digits[0], *term), *rest[i + 1 :]]


@cache
def all_questions(*, held_out: bool) -> tuple[Question, ...]:
    """Every question of a part, in a fixed random order. The parts share no set of digits."""
    random = np.random.default_rng(0)
    sets = random.permutation(["".join(digits) for digits in combinations("123456789", DIGITS)]).tolist()
    own = [digits for number, digits in enumerate(sets) if (number % HELD_OUT == 0) == held_out]
    found = [
        Question("".join(random.permutation(list(digits))), target)
        for digits in own
        for target, right in sorted(answers(digits).items())
        if 0 < target <= LARGEST and len(right) >= FEWEST
    ]
    return tuple(found[i] for i in random.permutation(len(found)))


def example(question: Question, random: np.random.Generator) -> str:
    """The text of a right answer, each equally likely, in random order."""
    right = answers("".join(sorted(question.digits)))[question.target]
    answer = right[random.integers(len(right))]
    terms = [(sign, "*".join(random.permutation(factors))) for sign, factors in answer]
    while True:
        order = random.permutation(len(terms))
        if terms[order[0]][0] == "+":
            return "".join(sign + term for sign, term in (terms[i] for i in order))[1:]
