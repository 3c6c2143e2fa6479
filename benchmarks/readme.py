"""``python -m benchmarks.readme``: the README's benchmark block from the newest committed result; ``--check`` compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_MODES = {
    "fwd": "log-prob and entropy",
    "fwd_bwd": "EAPO loss, forward and backward",
    "frozen_head": "the same, head frozen",
}
BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"


def newest_result(folder: Path = ROOT / "benchmarks" / "results") -> dict[str, Any]:
    """The result file with the latest date in its environment."""
    results = [json.loads(path.read_text()) for path in folder.glob("cpu-*.json")]
    if not results:
        raise FileNotFoundError(f"{folder}: expected at least one cpu-*.json, got none")
    return max(results, key=lambda r: r["environment"]["date"])


def block(result: dict[str, Any]) -> str:
    """The Markdown between the marks: ratios and memory, since absolute times of a CPU say little."""
    env, shape = result["environment"], result["rows"][0]["shape"]
    lines = [
        f"N={shape['N']} tokens, D={shape['D']}, V={shape['V']}, {shape['dtype']}, {env['device']}, torch {env['torch']}, "
        f"{env['date'][:10]}, correctness gate green; medians of",
        "interleaved runs. Memory is the peak beyond the inputs, gradients included. GPU results are still to come.",
        "",
        "| what | who | time / unfused PyTorch | time / bare matrix products | peak MiB | largest relative error |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [_MODES[row["mode"]], f"`{row['provider']}`"]
        cells += [f"{row[f'time_over_{base}']:.2f}" for base in ("unfused_eager", "bare_gemms")]
        errors = row["errors"].values()
        cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{max(errors):.0e}"] if errors else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(readme: str, result: dict[str, Any]) -> str:
    """The README with its block replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{block(result)}\n{END}{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Write the block, or with ``--check`` say whether it is current (exit code 1 when not)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    current = path.read_text()
    fresh = render(current, newest_result())
    if options.check:
        if fresh != current:
            print(
                "README.md: the benchmark block is not what benchmarks/results says; run python -m benchmarks.readme",
                file=sys.stderr,
            )
        return int(fresh != current)
    path.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
