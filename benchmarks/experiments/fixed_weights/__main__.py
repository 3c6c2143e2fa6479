"""``python -m benchmarks.experiments.fixed_weights COMMAND``, from a checkout.

commands:
  train [--arms ...] [--seeds ...] [--jobs N] [overrides]   train what is missing in runs/fixed_weights, then draw there
  draw                                                      redraw this folder's page and figure from its metrics.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.settings import parse_config
from trainer.errors import TrainerError

from . import page, runs

HERE = Path(__file__).parent


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 where a run failed, 2 for wrong arguments, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.fixed_weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    parser.add_argument("command", choices=("train", "draw"))
    parser.add_argument("--arms", nargs="+", default=runs.ARMS, choices=runs.ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1), each with its share of the cores")
    options, overrides = parser.parse_known_args(arguments)
    if options.command == "draw":
        page.draw(HERE)
        return 0
    try:
        config = parse_config(overrides, recipe=HERE / "recipe.toml", prog=parser.prog)
        # Seed by seed, so that at any time every arm has about as many finished runs.
        configs = [runs.arm_config(config, arm, seed) for seed in options.seeds for arm in options.arms]
        failed = runs.train(configs, max(1, options.jobs))
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    finished = [config for config in configs if runs.is_finished(config)]
    if finished:
        directory = Path(config.out) / config.name
        page.collect(config, finished, directory / page.METRICS)
        page.draw(directory)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
