"""``python -m benchmarks.report``: result files as tables and plots, and the generated parts of
README.md and docs/benchmarks.md.

Without ``--result`` it reads the newest file of each GPU and kind of CPU in benchmarks/results; without
any other option it prints the tables. A file whose correctness gate was red is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import MASK_SIZE, SPARSE_MODES
from .results import FOLDER, ROOT, ResultFile, by_date, load

Row = dict[str, Any]
Result = dict[str, Any]

FLOOR, UNFUSED, OURS = "bare_gemms", "unfused_eager", "eapo"


@dataclass(frozen=True)
class Group:
    """One case in one mode: the implementations in ``rows`` ran on the same tensors in the same
    rounds.

    Attributes:
        memory_budget: bytes for this package's workspace, or None for its default.
    """

    mode: str
    inputs: str
    n: int
    d: int
    v: int
    dtype: str
    memory_budget: int | None
    rows: tuple[Row, ...]

    @property
    def shape(self) -> str:
        return f"N={self.n} D={self.d} V={self.v} {self.dtype}"

    @property
    def case(self) -> str:
        return f"{self.inputs} {self.shape}{self.budget}"

    @property
    def budget(self) -> str:
        """The memory budget and how often the logits are as large, in words; nothing with the
        default budget."""
        if self.memory_budget is None:
            return ""
        logits = self.n * self.v * {"float32": 4}.get(self.dtype, 2)
        return f", memory budget {self.memory_budget / 2**20:g} MiB, logits {logits / self.memory_budget:.1f} times as large"

    @property
    def timed(self) -> list[Row]:
        """Rows of those that ran, fastest first: by the ratio to the floor, which is of the same
        rounds, else by the median."""
        ran = [row for row in self.rows if row["ms"]]
        return sorted(ran, key=lambda row: over(row, FLOOR) or row["ms"]["p50"])

    def fastest_of_families(self) -> dict[str, Row]:
        """The fastest row of every family but the floor's, fastest first."""
        best: dict[str, Row] = {}
        for row in self.timed:
            if not is_floor(row["provider"]):
                best.setdefault(family(row["provider"]), row)
        return best


def groups(result: Result) -> list[Group]:
    """The cases and modes of a result, in the order of the file."""
    rows: dict[tuple[Any, ...], list[Row]] = {}
    for row in result["rows"]:
        shape = (row["shape"][name] for name in ("N", "D", "V", "dtype"))
        key = (row["mode"], row["inputs"], *shape, row.get("memory_budget"))
        rows.setdefault(key, []).append(row)
    return [Group(*key, rows=tuple(found)) for key, found in rows.items()]


def is_gpu(result: Result) -> bool:
    """Absolute times are reported for GPUs alone: those of a CPU say little about another."""
    return not result["environment"]["gpu"].startswith("CPU")


def family(provider: str) -> str:
    """Variants of one package share a family; unfused PyTorch is one family as it is, another
    compiled."""
    return provider if provider.startswith("unfused_") else provider.split("_")[0]


def is_ours(provider: str) -> bool:
    return family(provider) == OURS


def is_floor(provider: str) -> bool:
    """The matrix products, together or one by one."""
    return family(provider) == "bare"


def over(row: Row, base: str) -> float | None:
    """Median ratio of the row's time to the base's in the same round."""
    return row["time_over"].get(base)


def unique(names: Iterable[str]) -> list[str]:
    """Each once, in order of appearance."""
    return list(dict.fromkeys(names))


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]], *, words: int = 1) -> list[str]:
    """Lines of a table. The first ``words`` columns are aligned left, the others, numbers,
    right."""
    rule = ["---" if place < words else "---:" for place in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


_ERRORS = ("logp", "entropy", "d_hidden", "d_weight")
COMPARED = ("kernels", "selftest")
"""Stages of the GPU command that compare with float64."""

_PLAIN = ("gpu", "driver", "cuda", "torch", "python", "commit", "date", "clocks")
"""Keys of the environment that are not versions of other packages."""

MODES = {
    "fwd": "log-prob and entropy",
    "fwd_bwd": "loss and both gradients",
    "frozen_head": "loss and d_hidden",
    "half_zero_rows": "loss and both gradients, half of the tokens masked",
    "sampling_mask": "loss and both gradients over the 50 likeliest ids of each row; the floor: the whole products",
    "sparse_gradient": "loss and both gradients with gradient_tolerance 2e-3 where there is such a setting",
}


def result_section(result: Result, *, level: int = 2) -> str:
    """Everything about one result file, under a heading of the given level."""
    found, marks = groups(result), "#" * level
    env = result["environment"]
    lines = [f"{marks} {env['gpu']}, {env['date'][:10]}", "", environment_line(result), ""]
    for group in found:
        if group.timed:
            title = f"{marks}# `{group.mode}`, {MODES[group.mode]}: {group.case}"
            lines += [title, "", case_line(group), "", *case_table(group, is_gpu(result)), ""]
    for title, entries in (("Could not run", absent(found)), ("Settings that differ from defaults", settings(found))):
        if entries:
            lines += [f"{marks}# {title}", "", *entries, ""]
    return "\n".join(lines).rstrip()


def environment_line(result: Result) -> str:
    """Device, versions, commit, date, and what the correctness gate compared."""
    env, gate = result["environment"], result["gate"]
    known = [env["gpu"]]
    known += [
        f"{name} {env[key]}" for name, key in (("driver", "driver"), ("CUDA", "cuda"), ("torch", "torch")) if env.get(key)
    ]
    known += [f"{key} {value}" for key, value in env.items() if key not in _PLAIN and value]
    known += [f"Python {env['python']}", f"commit {env['commit']}", env["date"]]
    if env.get("clocks"):
        known.append(f"before the first run {clocks(env['clocks'])}")
    tests = gate.get("tests")
    seen = [f"{tests['passed']} tests passed, {tests['skipped']} skipped"] if tests else []
    seen += [
        f"{count} comparisons of {name} with float64" for name, count in gate.get("stages", {}).items() if name in COMPARED
    ]
    seen.append(f"{len(gate['cases'])} cases and modes within the bounds")
    return f"{', '.join(known)}. Correctness gate green: {', '.join(seen)}."


def clocks(state: dict[str, float]) -> str:
    """SM clock, power and temperature, as far as they are known."""
    parts = []
    if "sm_mhz" in state:
        parts.append(f"SM clock {state['sm_mhz']:.0f} MHz")
    if "power_w" in state:
        limit = f" of {state['power_limit_w']:.0f}" if "power_limit_w" in state else ""
        parts.append(f"{state['power_w']:.0f}{limit} W")
    if "temperature_c" in state:
        parts.append(f"{state['temperature_c']:.0f} °C")
    return ", ".join(parts)


def case_line(group: Group) -> str:
    """What the inputs were like, and the GPU after the last round."""
    first = group.rows[0]
    line = f"Mean entropy {first['mean_entropy_nats']:.2f} nats, largest |logit| {first['largest_logit']:.1f}"
    state = clocks(first["clocks"])
    return f"{line}; after the last round {state}." if state else f"{line}."


def case_table(group: Group, gpu: bool) -> list[str]:
    """The implementations that ran, fastest first. Milliseconds and rates only from a GPU."""
    errors = [name for name in _ERRORS if any(name in row["errors"] for row in group.timed)]
    columns: dict[str, Callable[[Row], str]] = {
        "implementation": lambda row: f"**`{row['provider']}`**" if is_ours(row["provider"]) else f"`{row['provider']}`",
        "job": lambda row: short_job(row["job"]),
        "time / floor": lambda row: ratio(over(row, FLOOR)),
        "time / unfused": lambda row: ratio(over(row, UNFUSED)),
    }
    if gpu:
        columns["ms (p20-p80)"] = milliseconds
        columns["TFLOP/s"] = lambda row: f"{row['tflops_useful']:.0f}"
    columns["peak MiB"] = lambda row: mebibytes(row["peak_bytes"])
    columns |= {f"{name} error": lambda row, name=name: error(row["errors"].get(name)) for name in errors}  # type: ignore[misc]
    columns["rounds"] = lambda row: str(row["rounds"])
    return markdown_table(list(columns), [[cell(row) for cell in columns.values()] for row in group.timed], words=2)


def absent(found: list[Group]) -> list[str]:
    """What could not run: every reason once, with the implementations it stopped, and in how many
    of their cases if not in all."""
    tried: dict[str, int] = {}
    stopped: dict[str, dict[str, int]] = {}
    for group in found:
        for row in group.rows:
            name = row["provider"]
            tried[name] = tried.get(name, 0) + 1
            if row["error"]:
                names = stopped.setdefault(row["error"], {})
                names[name] = names.get(name, 0) + 1

    def stopped_in(name: str, times: int) -> str:
        return f"`{name}`" if times == tried[name] else f"`{name}` ({times} of {tried[name]} cases and modes)"

    return [f"- {reason}: {', '.join(stopped_in(*item) for item in names.items())}" for reason, names in stopped.items()]


def settings(found: list[Group]) -> list[str]:
    """The settings of those that ran, where they are not the package's defaults."""
    rows = [row for group in found for row in group.timed if row["settings"] != "defaults"]
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["settings"], []).append(row["provider"])
    return [f"- {', '.join(f'`{name}`' for name in unique(them))}: {what}" for what, them in names.items()]


def short_job(job: str) -> str:
    """A job in fewer letters."""
    for long, short in (("log-prob", "logp"), ("cross-entropy", "CE"), ("matrix products", "products")):
        job = job.replace(long, short)
    return job


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def milliseconds(row: Row) -> str:
    ms = row["ms"]
    digits = 1 if ms["p50"] >= 100 else 2 if ms["p50"] >= 1 else 3
    return f"{ms['p50']:.{digits}f} ({ms['p20']:.{digits}f}-{ms['p80']:.{digits}f})"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def error(value: Any) -> str:
    """A relative error; NaN and infinities are kept as text in the file."""
    return "-" if value is None else f"{float(value):.1e}"


_README_WORDS = (
    "Forward: log-prob and entropy. With gradients: the policy loss, d_hidden and d_weight. The floor is the bare matrix",
    "products, unfused is plain PyTorch. Of each package the fastest variant is shown; where two are named, the first is",
    "forward's, and job, memory and error are the other's. Memory is the peak beyond the inputs.",
    "All tables: [docs/benchmarks.md](docs/benchmarks.md).",
)


def newest_results(folder: Path = FOLDER) -> list[Result]:
    """The newest result of each GPU, then of each kind of CPU.

    Raises ValueError when a file in the folder is no result or its gate was red.
    """
    every = [result for kind in ("gpu", "cpu") for result in by_date(kind, folder)]
    return list({result["environment"]["gpu"]: result for result in every}.values())


def docs_part(result: Result) -> str:
    """All tables of one result."""
    return result_section(result, level=3)


def readme_part(result: Result) -> str:
    """Ours, unfused PyTorch and the fastest variant of every peer on one case; milliseconds from a
    GPU only.

    A second table for the first case with a memory budget of its own: the peak memory where the
    logits do not fit.
    """
    found, where = groups(result), where_and_when(result)
    timed = [g for g in found if g.mode == "fwd_bwd" and g.timed]
    if not timed:
        return f"{where}: no case with gradients; see [docs/benchmarks.md](docs/benchmarks.md)."
    lines = [
        f"{where}; {timed[0].case}; correctness gate green.",
        *_README_WORDS,
        "",
        *_readme_table(timed[0], found, is_gpu(result)),
    ]
    small = next((g for g in timed[1:] if g.memory_budget is not None), None)
    if small is not None:
        lines += ["", f"The same at {small.case}:", "", *_readme_table(small, found, is_gpu(result))]
    return "\n".join(lines)


def where_and_when(result: Result) -> str:
    """Device, torch, date and commit of a result."""
    env = result["environment"]
    return f"{env['gpu']}, torch {env['torch']}, {env['date'][:10]}, commit {env['commit']}"


def sparse_table(found: list[Group]) -> list[str]:
    """The loss with both gradients over a sampling mask and with a tolerance, beside the exact one and the fastest peer."""
    body = []
    for group in found:
        ours = [row for row in group.timed if is_ours(row["provider"])]
        row, exact = (next((r for r in ours if r["provider"].endswith(end)), None) for end in ("_one_pass", "_exact"))
        if group.mode not in SPARSE_MODES or row is None:
            continue
        metrics = row.get("metrics", {})
        errors = [error(row["errors"].get(name)) for name in ("d_hidden", "d_weight")]
        kept = f"{metrics['sparse/kept_per_row']:.0f}" if metrics else str(MASK_SIZE)
        dense = f"{100 * metrics['sparse/dense_share']:.1f} %" if metrics else "-"
        others = [r for r in group.timed if not is_ours(r["provider"]) and not is_floor(r["provider"])]
        other = next((f"{ratio(over(r, FLOOR))} `{r['provider']}`" for r in others if r["objective"] == "policy"), "-")
        cells = [ratio(over(row, FLOOR)), "-" if exact is None else ratio(over(exact, FLOOR)), other, *errors]
        body.append([f"`{group.mode}`", f"{row['mean_entropy_nats']:.2f}", kept, dense, *cells, mebibytes(row["peak_bytes"])])
    head = [
        "mode", "mean entropy, nats", "entries a row", "whole rows", "time / three whole products", "exact",
        "fastest other", "d_hidden error", "d_weight error", "peak MiB",
    ]  # fmt: skip
    return markdown_table(head, body) if body else []


def sparse_part(result: Result) -> str:
    """The table of a result of ``SPARSE_MODES``."""
    found = groups(result)
    shape = next(g.shape for g in found if g.mode in SPARSE_MODES)
    where = f"{where_and_when(result)}; {shape}, rows of SmolLM2-135M at three temperatures."
    return "\n".join([where, "", *sparse_table(found)])


def _readme_table(main: Group, found: list[Group], gpu: bool) -> list[str]:
    forward = next((g for g in found if g.mode == "fwd" and g.case == main.case), None)
    forward_rows = forward.fastest_of_families() if forward else {}
    rows = main.fastest_of_families()
    columns = ["forward: time / floor", "time / unfused", "with gradients: time / floor", "time / unfused"]
    columns += [*(["ms (p20-p80)"] if gpu else []), "peak MiB", "gradient error"]
    body = [_readme_line(forward_rows.get(name), rows.get(name), gpu) for name in unique([*rows, *forward_rows])]
    return markdown_table(["implementation", "job", *columns], body, words=2)


def _readme_line(forward: Row | None, backward: Row | None, gpu: bool) -> list[str]:
    """A family's line: its fastest variant forward, and with gradients. Both are named where they
    differ."""
    shown = [row for row in (forward, backward) if row]
    names = ", ".join(unique(f"`{row['provider']}`" for row in shown))
    cells = [f"**{names}**" if is_ours(shown[0]["provider"]) else names, short_job(shown[-1]["job"])]
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
    """A file with a generated block: its path, the name of its marks, and what it shows of one
    result."""

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
    rows = result["rows"]
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
    where = f"{where_and_when(result)}; {shape}; medians of {rows[0]['rounds']} rounds."
    return "\n".join([where, "", *markdown_table(head, body, words=3)])


def errors_part(result: Result) -> str:
    """The largest errors of those that return log-probs, entropies and gradients."""
    group = groups(result)[0]
    names = ("logp", "entropy", "d_hidden")
    full = [row for row in group.timed if all(name in row["largest_errors"] for name in names)]
    full.sort(key=lambda row: float(row["largest_errors"]["logp"]))
    body = [[f"`{row['provider']}`", *(error(row["largest_errors"][name]) for name in names)] for row in full]
    head = ["implementation", "log-prob, nats", "entropy, nats", "d_hidden, share of its largest entry"]
    return "\n".join([f"{where_and_when(result)}; {group.case}.", "", *markdown_table(head, body)])


README = Target(ROOT / "README.md", "benchmark", readme_part)
DOCS = Target(ROOT / "docs" / "benchmarks.md", "results", docs_part)
SPARSE = Target(ROOT / "docs" / "sparse.md", "sparse", sparse_part)
README_SPARSE = Target(ROOT / "README.md", "sparse", sparse_part)
README_ERRORS = Target(ROOT / "README.md", "errors", errors_part)
OVERHEAD = Target(ROOT / "docs" / "benchmarks.md", "methods", methods_part)


def main(arguments: list[str] | None = None) -> int:
    """Print or write. Exit code 1 when a result is refused or missing, or, with ``--check``, when a
    block is not current."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--result", type=Path, nargs="+", default=None, metavar="FILE", help="instead of the newest ones")
    parser.add_argument("--out", type=Path, default=None, help="folder for report.md and the plots")
    parser.add_argument("--docs", action="store_true", help="renew the tables in docs/benchmarks.md")
    parser.add_argument("--readme", action="store_true", help="renew the table in README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; say whether both are current")
    options = parser.parse_args(arguments)
    blocks = options.docs or options.readme or options.check
    if options.result and blocks:
        parser.error("--result: expected without --docs, --readme and --check, which show the newest of benchmarks/results")
    try:
        results = [load(path) for path in options.result] if options.result else newest_results(FOLDER)
        overheads = newest_results(FOLDER / "methods")
        sparse = newest_results(FOLDER / "sparse")
        largest = newest_results(FOLDER / "errors")
        if options.check:
            targets = [(README, results), (README_SPARSE, sparse), (README_ERRORS, largest)]
            return _check([*targets, (DOCS, results), (SPARSE, sparse), (OVERHEAD, overheads)])
        if options.docs and sparse:
            from .plots import draw_sparse

            draw_sparse(sparse[-1], SPARSE.path.with_suffix(".png"))
        for target, wanted, shown in (
            (DOCS, options.docs, results),
            (SPARSE, options.docs, sparse),
            (README_SPARSE, options.readme, sparse),
            (README_ERRORS, options.readme, largest),
            (OVERHEAD, options.docs, overheads),
            (README, options.readme, results),
        ):
            if wanted:
                target.write(shown)
        if not results and (options.out or not blocks):
            raise ValueError("benchmarks/results: expected a result, got none; make bench-cpu OUT=benchmarks/results makes one")
        if options.out:
            print(f"wrote {write_report(results, options.out)}")
        elif not blocks:
            print("\n\n".join(map(result_section, results)))
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_report(results: list[Result], folder: Path) -> Path:
    """report.md, and the plots of each result in a folder of its own; its path. Raises ImportError
    without matplotlib."""
    parts = ["# Benchmark report"]
    for result in results:
        name = Path(ResultFile(result["environment"]).name).stem
        from .plots import draw  # plots imports the groups from here

        plots = draw(result, folder / name)
        pictures = [f"![{path.stem.replace('_', ' ')}]({path.relative_to(folder).as_posix()})" for path in plots]
        parts += [result_section(result), *pictures]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _check(targets: list[tuple[Target, list[Result]]]) -> int:
    stale = {target.path.name: None for target, results in targets if not target.current(results)}
    if stale:
        names = ", ".join(stale)
        print(f"{names}: not what benchmarks/results says; run python -m benchmarks.report --docs --readme", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
