"""The generated parts of README.md and docs/benchmarks.md: what the newest results in ``benchmarks/results`` say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..results import FOLDER, ROOT, newest
from .groups import FLOOR, UNFUSED, Result, Row, groups, is_gpu, is_ours, markdown_table, over, unique
from .tables import error, mebibytes, milliseconds, ratio, result_section, short_job

_README_WORDS = (
    "Forward: log-prob and entropy. With gradients: the policy loss, d_hidden and d_weight. The floor is the bare matrix",
    "products, unfused is plain PyTorch. Of each package the fastest variant is shown; where two are named, the first is",
    "forward's, and job, memory and error are the other's. Memory is the peak beyond the inputs.",
    "All tables: [docs/benchmarks.md](docs/benchmarks.md).",
)


def newest_results(folder: Path = FOLDER) -> list[Result]:
    """The newest GPU and the newest CPU result, those that there are.

    Raises ValueError when a file in the folder is no result or its gate was red.
    """
    return [result for kind in ("gpu", "cpu") if (result := newest(kind, folder))]


def docs_part(result: Result) -> str:
    """All tables of one result."""
    return result_section(result, level=3)


def readme_part(result: Result) -> str:
    """Ours, unfused PyTorch and the fastest variant of every peer on one case; milliseconds from a GPU only."""
    env, found = result["environment"], groups(result)
    where = f"{env['gpu']}, torch {env['torch']}, {env['date'][:10]}, commit {env['commit']}"
    main = next((g for g in found if g.mode == "fwd_bwd" and g.timed), None)
    if main is None:
        return f"{where}: no case with gradients; see [docs/benchmarks.md](docs/benchmarks.md)."
    forward = next((g for g in found if g.mode == "fwd" and g.case == main.case), None)
    forward_rows = forward.fastest_of_families() if forward else {}
    rows = main.fastest_of_families()
    names = unique([*rows, *forward_rows])
    columns = ["forward: time / floor", "time / unfused", "with gradients: time / floor", "time / unfused"]
    if is_gpu(result):
        columns += ["ms (p20-p80)"]
    columns += ["peak MiB", "gradient error"]
    body = [_readme_line(forward_rows.get(name), rows.get(name), is_gpu(result)) for name in names]
    return "\n".join(
        [
            f"{where}; {main.case}; correctness gate green.",
            *_README_WORDS,
            "",
            *markdown_table(["who", "job", *columns], body, words=2),
        ]
    )


def _readme_line(forward: Row | None, backward: Row | None, gpu: bool) -> list[str]:
    """A family's line: its fastest variant forward, and with gradients. Both are named where they differ."""
    shown = [row for row in (forward, backward) if row]
    names = unique(f"`{row['provider']}`" for row in shown)
    who = ", ".join(names)
    cells = [f"**{who}**" if is_ours(shown[0]["provider"]) else who, short_job(shown[-1]["job"])]
    for row in (forward, backward):
        cells += ["-", "-"] if row is None else [ratio(over(row, FLOOR)), ratio(over(row, UNFUSED))]
    if gpu:
        cells.append("-" if backward is None else milliseconds(backward))
    if backward is None:
        return [*cells, "-", "-"]
    gradients = [backward["errors"][name] for name in ("d_hidden", "d_weight") if name in backward["errors"]]
    return [*cells, mebibytes(backward["peak_bytes"]), error(max(map(float, gradients), default=None))]


@dataclass(frozen=True)
class Target:
    """A file with a generated block: its path, the name of its marks, and what it shows of one result."""

    path: Path
    mark: str
    part: Callable[[Result], str]

    def block(self, results: list[Result]) -> str:
        """The text between the marks."""
        parts = [self.part(result) for result in results]
        if not any(is_gpu(result) for result in results):
            parts.append("No GPU result is committed yet." if results else "No result is committed yet.")
        return "\n\n".join(parts)

    def filled(self, results: list[Result]) -> str:
        """The file's text with a new block. Raises ValueError when the marks are not there."""
        begin, end = f"<!-- {self.mark} -->", f"<!-- /{self.mark} -->"
        head, first, rest = self.path.read_text().partition(begin)
        _, last, tail = rest.partition(end)
        if not (first and last):
            raise ValueError(f"{self.path.name}: expected {begin} and {end}, got a file without them")
        return f"{head}{begin}\n{self.block(results)}\n{end}{tail}"

    def current(self, results: list[Result]) -> bool:
        return self.filled(results) == self.path.read_text()

    def write(self, results: list[Result]) -> None:
        self.path.write_text(self.filled(results))


def methods_part(result: Result) -> str:
    """What every method costs over GRPO, from a result of ``benchmarks.methods``."""
    env, rows = result["environment"], result["rows"]
    shape = " ".join(f"{key}={value}" for key, value in rows[0]["shape"].items())
    needs = {"second_moments": "second moments", "tempered_logp": "log-probs at another temperature"}
    body = [
        [
            f"`{row['method']}`",
            row["scope"],
            ", ".join(needs.get(name, name.replace("_", " ")) for name in row["needs"]) or "-",
            f"{row['over_grpo']:.2f}",
            f"{row['weights_over_grpo']:.3f}" if row["weights_over_grpo"] else "-",
        ]
        for row in rows
    ]
    head = ["method", "scope", "needs beyond log-prob and entropy", "loss / grpo", "weights once a step / grpo"]
    where = f"{env['gpu']}, torch {env['torch']}, {env['date'][:10]}, commit {env['commit']}; {shape}; "
    where += f"medians of {rows[0]['rounds']} rounds."
    return "\n".join([where, "", *markdown_table(head, body, words=3)])


README = Target(ROOT / "README.md", "benchmark", readme_part)
DOCS = Target(ROOT / "docs" / "benchmarks.md", "results", docs_part)
OVERHEAD = Target(ROOT / "docs" / "benchmarks.md", "methods", methods_part)
