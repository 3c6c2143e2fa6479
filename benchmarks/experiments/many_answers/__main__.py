"""``python -m benchmarks.experiments.many_answers [train | draw]``, from a checkout.

train: make the initial weights, search the learning rates, train what results.jsonl lacks, then draw. The same command
continues.
draw: the page's tables and the figure from results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import page
from .arms import ARMS, CONTROL, LEARNING_RATES, SEARCH_SEED, SEARCH_STEPS, TESTED, Job, Size
from .runs import run
from .weights import Recipe, initial_policy

HERE = Path(__file__).parent
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.many_answers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", choices=("train", "draw"))
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of results.jsonl, the page and the figure (default: this one)"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/many_answers"), help="folder of the initial weights")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread (default 1)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds of an arm (default 5)")
    parser.add_argument("--tested-seeds", type=int, default=10, help=f"seeds of {TESTED} and {CONTROL} (default 10)")
    parser.add_argument("--lr", type=float, default=None, help="for all arms, without a search")
    for field in fields(Size):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    for name in ("width", "layers", "supervised_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)
    options = parser.parse_args(arguments)
    if CONTROL in options.arms and TESTED not in options.arms:
        parser.error(f"--arms: expected {TESTED} beside {CONTROL}, which has its learning rate and mean weight")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "train":
        train(options)
    page.draw(options.out)
    return 0


def train(options: argparse.Namespace) -> None:
    """Append to results.jsonl what it lacks."""
    size = Size(**{field.name: getattr(options, field.name) for field in fields(Size)})
    given = {"width": options.width, "layers": options.layers, "steps": options.supervised_steps}
    recipe = Recipe(base=size.model, **{name: value for name, value in given.items() if value is not None})
    options.cache.mkdir(parents=True, exist_ok=True)
    model = initial_policy(recipe, options.cache, torch.device(size.device), getattr(torch, size.dtype))
    file = options.out / page.RESULTS
    pool = ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        work = partial(_append, pool, file, partial(run, size=size, model=model))
        first = [arm for arm in options.arms if arm == TESTED]
        others = [arm for arm in options.arms if arm not in (TESTED, CONTROL)]
        rates: dict[str, float] = {}
        for arms in (first, others):  # the control needs the tested arm's rate and weight, and no search
            if options.lr is None:
                work([Job(arm, lr, SEARCH_SEED, SEARCH_STEPS) for arm in arms for lr in LEARNING_RATES])
            rates |= {arm: options.lr or page.best_rate(page.load(file), arm) for arm in arms}
            seeds = {arm: options.tested_seeds if arm == TESTED else options.seeds for arm in arms}
            work(
                [
                    Job(arm, rates[arm], seed, size.steps)
                    for seed in range(max(seeds.values(), default=0))
                    for arm in arms
                    if seed < seeds[arm]
                ]
            )
            if arms == first and CONTROL in options.arms:
                weight = mean_weight(page.load(file), size.steps)
                work([Job(CONTROL, rates[TESTED], seed, size.steps, weight) for seed in range(options.tested_seeds)])


def mean_weight(rows: Sequence[Row], steps: int) -> float:
    """The mean of the tested arm's weights over steps and seeds, to three digits."""
    own = [row for row in rows if row["arm"] == TESTED and row["steps"] == steps and row["seed"] != SEARCH_SEED]
    return float(f"{np.mean([np.mean(row['curves']['weight']) for row in own]):.3g}")


def _append(pool: ProcessPoolExecutor, file: Path, work: Any, jobs: Sequence[Job]) -> None:
    """Run the jobs that ``file`` lacks and append each when it is done."""
    done = {_key(row) for row in page.load(file)} if file.exists() else set()
    waiting = {pool.submit(work, job): job for job in jobs if (job.arm, job.lr, job.seed, job.steps, job.weight) not in done}
    for future in as_completed(waiting):
        row, job = future.result(), waiting[future]
        with file.open("a") as lines:
            lines.write(json.dumps(page.rounded(row)) + "\n")
        last = row["evaluations"][-1]
        print(f"{job.arm} lr {job.lr:g} seed {job.seed}: {row['seconds']:.0f} s, pass@1 {last['pass@1']:.3f}", flush=True)


def _key(row: Row) -> tuple[Any, ...]:
    return row["arm"], row["lr"], row["seed"], row["steps"], row["positive_weight"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
