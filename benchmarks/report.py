"""``python -m benchmarks.report``: result files as tables, bars and plots, and the generated parts of README.md and docs/.

Without ``--result`` it reads the newest GPU and the newest CPU file of benchmarks/results; without any other option it prints
the tables. A file whose correctness gate was red is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .reporting.blocks import DOCS, OVERHEAD, README, Target, newest_results
from .reporting.groups import Result
from .reporting.plots import draw
from .reporting.tables import result_section
from .results import FOLDER, ResultFile, load


def main(arguments: list[str] | None = None) -> int:
    """Print or write. Exit code 1 when a result is refused or missing, or, with ``--check``, when a block is not current."""
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
        if options.check:
            return _check([(README, results), (DOCS, results), (OVERHEAD, overheads)])
        for target, wanted, shown in (
            (DOCS, options.docs, results),
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
    """report.md, and the plots of each result in a folder of its own; its path. Raises ImportError without matplotlib."""
    parts = ["# Benchmark report"]
    for result in results:
        name = Path(ResultFile(result["environment"]).name).stem
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
