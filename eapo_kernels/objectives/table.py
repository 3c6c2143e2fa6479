"""The tables of docs/methods.md, from the registry: ``python -m eapo_kernels.objectives.table [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..errors import require
from .config import EAPOConfig
from .controllers import controller_defaults
from .method import Method
from .methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- generated: python -m eapo_kernels.objectives.table -->", "<!-- end of the generated tables -->"
_WORDS = {"second_moments": "second moments", "answer": "answer marks"}


def tables() -> str:
    """What each method is, and the numbers that ``get_method`` changes, as Markdown."""
    what = [
        (f"`{m.name}`", _escaped(m.summary), f"`{_escaped(m.formula)}`", _statistics(m), m.scope, m.confidence, _source(m))
        for m in METHODS.values()
    ]
    numbers = [(f"`{m.name}`", _config(m), _token_weighting(m), _controller(m)) for m in METHODS.values()]
    return "\n\n".join(
        (
            _table(("method", "in a sentence", "weights", "statistics", "scope", "confidence", "source"), what),
            _table(("method", "config, where not the default", "token_weighting", "controller"), numbers),
        )
    )


def page(text: str) -> str:
    """``text`` with fresh tables between its marks."""
    marked = text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)
    require(marked, "docs/methods.md", f"one {BEGIN!r} before one {END!r}", "another number or order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Write the tables, or say whether they are those of the registry: 0 when they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    check = parser.parse_args(arguments).check
    old = path.read_text()
    new = page(old)
    if not check:
        path.write_text(new)
    elif old != new:
        print(f"{path.name} is not what the registry says: run python -m eapo_kernels.objectives.table", file=sys.stderr)
        return 1
    return 0


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _source(m: Method) -> str:
    parts = m.source.split(";")
    return "; ".join(f"[{p.strip()[:10]}](https://arxiv.org/abs/{p.strip()[:10]}){p.strip()[10:]}" if p.strip()[:4].isdigit()
                     else p.strip() for p in parts)  # fmt: skip


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
    if m.positive_weight != 1:
        parts.append(
            "positive_weight: the controller's" if m.positive_weight is None else f"positive_weight={m.positive_weight}"
        )
    return ", ".join(parts)


def _token_weighting(m: Method) -> str:
    return (
        ""
        if m.token_weighting is None
        else ", ".join(f"{f.name}={getattr(m.token_weighting, f.name)}" for f in fields(m.token_weighting))
    )


def _controller(m: Method) -> str:
    if m.controller is None:
        return ""
    settings = {**controller_defaults(m.controller), **m.controller_settings}
    numbers = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"{m.controller}: {numbers}" if numbers else m.controller


if __name__ == "__main__":
    sys.exit(main())
