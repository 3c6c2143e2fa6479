"""``python -m benchmarks.cpu``: this package beside unfused PyTorch and the bare products on this machine's processor.

Absolute times of a CPU mean little: read the ratios, which are medians over pairs of runs of the same round.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from .case import make_case
from .measure import environment, measure
from .providers import load_providers

SHAPE = (2048, 576, 49152)
"""SmolLM2-135M's head and the tokens of a small step."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write the JSON. Exit code 1 when the correctness gate is red."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON (default: print only)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each provider that count (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("N", "D", "V"), help="default: %(default)s")
    options = parser.parse_args(arguments)

    case, truth = make_case(*options.shape, torch.float32)
    report = {"environment": environment(), "gate": {}, "rows": []}
    n, d, v = options.shape
    print(f"N={n} D={d} V={v} fp32, mean entropy {float(truth.entropy.mean()):.2f} nats, {report['environment']['device']}")
    print(f"{'mode':12} {'provider':24} {'ms':>9} {'/unfused':>9} {'/products':>9} {'MiB':>7}  largest relative error")
    for mode in ("fwd", "fwd_bwd", "frozen_head"):
        report["gate"][mode], rows = measure(case, truth, load_providers(), mode, options.rounds)
        report["rows"] += rows
        for row in rows:
            error = max(row["errors"].values(), default=float("nan"))
            print(
                f"{mode:12} {row['provider']:24} {row['ms']['p50']:9.0f} {row['time_over_unfused_eager']:9.2f} "
                f"{row['time_over_bare_gemms']:9.2f} {row['peak_bytes'] / 2**20:7.0f}  {error:.1e}",
                flush=True,
            )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        env = report["environment"]
        path = options.out / f"cpu-{env['date'][:10]}-{env['commit']}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {path}")
    red = [line for verdict in report["gate"].values() for line in verdict["red"]]
    for line in red:
        print(f"gate red: {line}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
