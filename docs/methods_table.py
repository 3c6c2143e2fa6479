"""The tables of docs/methods.md, from ``METHODS``: ``python docs/methods_table.py [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from eapo_kernels import METHODS, EAPOConfig, EapoError, Method
from eapo_kernels.objectives.controllers import controller_defaults

PAGE = Path(__file__).with_name("methods.md")
BEGIN, END = "<!-- generated: python docs/methods_table.py -->", "<!-- end of the generated tables -->"
_WORDS = {"second_moments": "second moments", "answer": "answer marks"}


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Write the tables into the page; with ``--check`` only compare them, and return 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    check = parser.parse_args(arguments).check
    old = path.read_text()
    new = page(old)
    if not check:
        path.write_text(new)
    elif old != new:
        print(f"{path.name}: expected the tables of METHODS, got others; run python docs/methods_table.py", file=sys.stderr)
        return 1
    return 0


def page(text: str) -> str:
    """``text`` with new tables between its two marks."""
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        raise EapoError(f"docs/methods.md: expected one {BEGIN!r} before one {END!r}, got another number or order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def tables() -> str:
    """One table with what each method is, one with the settings that ``get_method`` changes; Markdown."""
    what = [
        (f"`{m.name}`", _escaped(m.summary), f"`{_escaped(m.formula)}`", _statistics(m), m.scope, m.confidence, _source(m))
        for m in METHODS.values()
    ]
    numbers = [(f"`{m.name}`", _config(m), _token_weighting(m), _controller(m)) for m in METHODS.values()]
    return "\n\n".join(
        (
            _table(("method", "in a sentence", "weights", "statistics", "scope", "confidence", "source"), what),
            _table(("method", "config, where not the default", "token weighting", "controller"), numbers),
        )
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def _source(m: Method) -> str:
    parts = [p.strip() for p in m.source.split(";")]
    return "; ".join(f"[{p[:10]}](https://arxiv.org/abs/{p[:10]}){p[10:]}" if p[:4].isdigit() else p for p in parts)


def _statistics(m: Method) -> str:
    names = ["log-prob"]
    if m.token_weighting is not None or m.controller is not None or m.config.entropy_coef:
        names.append("entropy")
    if m.config.kl_coef:
        names.append("reference log-prob")
    if m.token_weighting is not None:
        names += [_WORDS.get(n, n.replace("_", " ")) for n in sorted(m.token_weighting.needs)]
        names += [f"({n.replace('_', ' ')})" for n in sorted(m.token_weighting.uses)]
    return ", ".join(names)


def _config(m: Method) -> str:
    base = EAPOConfig()
    own = [(f.name, getattr(m.config, f.name)) for f in fields(EAPOConfig)]
    parts = [f"{name}={value}" for name, value in own if value != getattr(base, name)]
    if m.positive_weight is None:
        parts.append("positive_weight: the controller's")
    elif m.positive_weight != 1:
        parts.append(f"positive_weight={m.positive_weight}")
    return ", ".join(parts)


def _token_weighting(m: Method) -> str:
    weighting = m.token_weighting
    return "" if weighting is None else ", ".join(f"{f.name}={getattr(weighting, f.name)}" for f in fields(weighting))


def _controller(m: Method) -> str:
    if m.controller is None:
        return ""
    numbers = ", ".join(f"{k}={v}" for k, v in {**controller_defaults(m.controller), **m.controller_settings}.items())
    return f"{m.controller}: {numbers}" if numbers else m.controller


if __name__ == "__main__":
    sys.exit(main())
