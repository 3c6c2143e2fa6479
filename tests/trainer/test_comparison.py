"""The comparison's statistics against values worked out by hand, and its page from runs made here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from trainer.__main__ import main
from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import DataError
from trainer.evaluation.arms import arm_config
from trainer.evaluation.comparison import Run, crossed, is_comparison, load_comparison, match, over_seeds, smooth, spread
from trainer.evaluation.comparison_page import BEGIN, END, with_block, write_comparison
from trainer.evaluation.comparison_tables import show, tables

STEPS = 8
EVALUATED = ("reward", "reward_best", "entropy", "distinct_2", "self_bleu", "length")


def write_run(directory: Path, arm: str, seed: int, *, gain: float, entropy: float, steps: int = STEPS) -> None:
    """A run whose reward rises by ``gain`` and whose entropy falls by ``entropy`` a step; seeds differ by 0.1 in reward."""
    config = arm_config(Config(name=directory.name, out=str(directory.parent), steps=STEPS), arm, seed)
    path = directory / config.name
    path.mkdir(parents=True)
    (path / "config.toml").write_text(to_toml(config))
    rows = [
        {
            "step": i + 1,
            "reward/mean": 0.3 + 0.1 * seed + gain * i,
            "eapo/entropy": 2.0 - entropy * i,
            "diversity/distinct_2": 0.9 - 0.5 * entropy * i,
            "eapo/positive_weight": 1.0,
        }
        for i in range(steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [
        {
            "dataset": "held-out",
            "step": step,
            "responses": 4,
            "values": {name: [0.2 + gain * step, 0.4 + gain * step, None] for name in EVALUATED},
        }
        for step in (0, steps)
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for seed in (0, 1):
        write_run(tmp_path / "cmp", "eapo", seed, gain=0.01, entropy=0.02)
        write_run(tmp_path / "cmp", "grpo", seed, gain=0.02, entropy=0.1)
    write_run(tmp_path / "cmp", "nsr", 0, gain=0.0, entropy=0.0)
    write_run(tmp_path / "cmp", "nsr", 1, gain=0.0, entropy=0.0, steps=3)
    return tmp_path / "cmp"


def cells(table: str, title: str) -> list[str]:
    return [cell.strip() for cell in next(line for line in table.splitlines() if line.startswith(f"| {title}")).split("|")][
        1:-1
    ]


def test_runs_are_found_in_order_and_unfinished_ones_named(directory: Path) -> None:
    found = load_comparison(directory)
    assert {arm: list(runs) for arm, runs in found.runs.items()} == {"eapo": [0, 1], "grpo": [0, 1], "nsr": [0]}
    assert found.unfinished == ["nsr-seed1 (3 of 8 steps)"]
    assert is_comparison(directory)
    assert not is_comparison(directory / "nsr-seed0")
    with pytest.raises(DataError, match=r"expected a finished run in .*, got none at all"):
        load_comparison(directory / "nsr-seed0")


def test_smoothing_is_centred_and_shorter_at_the_ends() -> None:
    assert smooth(np.array([1.0, 2.0, 3.0, 4.0, 10.0, 6.0])) == pytest.approx([2.0, 2.5, 4.0, 5.0, 23 / 4, 20 / 3])


def test_equal_reward_is_where_both_runs_first_reach_what_both_reach(directory: Path) -> None:
    runs = load_comparison(directory).runs
    found = match(runs["eapo"][0], runs["grpo"][0])
    # Smoothed, the arm's reward ends at 0.3 + 0.01 * 6 (mean of the last three steps, 5 to 7): the smaller maximum. The
    # baseline gains 0.02 a step: 0.3 + 0.02 * i reaches 0.36 at i = 3, the fourth step.
    assert found.reward == pytest.approx(0.36)
    assert (found.step, found.baseline_step) == (8, 4)
    assert found.gap["entropy"] == pytest.approx((2.0 - 0.02 * 6) - (2.0 - 0.1 * 3))
    assert found.gap["distinct_2"] == pytest.approx(-0.01 * 6 + 0.05 * 3)
    # The levels run from 0.32, the higher of the two first smoothed rewards, to 0.36; each run is read at the first step whose
    # smoothed reward is at least as high.
    curves = ([0.31, 0.315, 0.32, 0.33, 0.34, 0.35, 0.355, 0.36], [0.32, 0.33, 0.34, 0.36])
    entropies = [[2.0 - fall * i for i in (1, 1.5, 2, 3, 4, 5, 5.5, 6)] for fall in (0.02, 0.1)]
    gaps = []
    for level in np.linspace(0.32, 0.36, 21) - 1e-9:
        own, other = (next(i for i, reward in enumerate(curve) if reward >= level) for curve in curves)
        gaps.append(entropies[0][own] - entropies[1][other])
    assert found.mean_gap["entropy"] == pytest.approx(sum(gaps) / 21)
    same = match(runs["grpo"][1], runs["grpo"][1])
    assert same.gap == {"entropy": 0.0, "distinct_2": 0.0}


def test_intervals_are_over_seeds_and_questions() -> None:
    values = np.random.default_rng(1).normal(size=(1, 400)) + 3.0
    found = crossed(values, 2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    # Seeds that differ and questions that do not: the interval is the seeds'.
    seeds = np.repeat(np.arange(10.0)[:, None], 400, axis=1)
    assert crossed(seeds, 2000).high - crossed(seeds, 2000).low == pytest.approx(
        2 * 1.96 * np.arange(10).std() / 10**0.5, rel=0.1
    )
    assert crossed(np.array([[1.0, math.nan], [3.0, math.nan]]), 200).mean == 2.0
    one = over_seeds([0.5], 100)
    assert (one.mean, math.isnan(one.low)) == (0.5, True)
    assert show(one) == "0.500"
    assert show(over_seeds([0.5, 0.7], 500), sign=True) == "+0.600 [+0.500, +0.700]"


def test_spread_is_the_mean_over_steps_of_the_deviation_between_seeds() -> None:
    assert spread(np.array([[0.0, 1.0], [2.0, 1.0]])) == pytest.approx((2**0.5 + 0) / 2)
    assert math.isnan(spread(np.array([[0.0, 1.0]])))


def test_the_tables(directory: Path) -> None:
    page = tables(load_comparison(directory), resamples=200)
    training, evaluation, paired, difference = (part for part in page.split("\n\n") if part.startswith("|"))
    # The last quarter is the steps 6 and 7 (from 0): reward 0.3 + 0.01 * 6.5, and 0.1 more for the other seed.
    row = cells(training, "EAPO")
    assert row[:3] == ["EAPO (entropy ratio)", "2", "0.415 [0.365, 0.465]"]
    assert row[6:] == ["0.071", "0.071", "0.000"]  # 0.1 / sqrt(2)
    assert cells(training, "NSR")[1:4] == ["1", "0.300", "2.000"]
    assert cells(evaluation, "before training")[1].startswith("0.300 [")
    assert cells(evaluation, "GRPO")[1].startswith("0.460 [")
    assert cells(paired, "EAPO")[1] == "-0.080 [-0.080, -0.080]"  # 8 steps, 0.01 less a step, every question
    assert cells(paired, "NSR")[1] == "-0.160 [-0.160, -0.160]"
    row = cells(difference, "EAPO")
    assert row[:4] == ["EAPO (entropy ratio)", "2", "-0.065 [-0.065, -0.065]", "+0.520 [+0.520, +0.520]"]
    assert row[5:8] == ["0.360, 0.460", "8/4, 8/4", "+0.180 [+0.180, +0.180]"]
    assert "Not finished and left out: nsr-seed1 (3 of 8 steps)." in page


def test_report_draws_a_comparison_and_keeps_what_a_person_wrote(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs"
    out.mkdir()
    (out / "comparison.md").write_text(f"# Mine\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert main(["report", str(directory), "--out", str(out)]) == 0
    page = (out / "comparison.md").read_text()
    assert page.startswith("# Mine\n\nbefore\n\n")
    assert page.endswith(f"{END}\n\nafter\n")
    assert "old" not in page
    assert (out / "comparison.png").stat().st_size > 20_000
    write_comparison(directory)
    assert tables(load_comparison(directory), 2000) in (directory / "comparison.md").read_text()
    assert with_block("# A page\n", "new") == f"# A page\n\n{BEGIN}\nnew\n{END}\n"


def test_runs_of_different_lengths_are_refused(directory: Path) -> None:
    shorter = directory / "psr-seed0"
    write_run(directory, "psr", 0, gain=0.0, entropy=0.0, steps=3)
    config = (shorter / "config.toml").read_text().replace(f"steps = {STEPS}\n", "steps = 3\n", 1)
    (shorter / "config.toml").write_text(config)
    with pytest.raises(DataError, match=r"expected runs of one length in .*, got \[3, 8\] steps"):
        load_comparison(directory)


def test_a_run_reads_its_last_quarter() -> None:
    run = Run("eapo", 0, [{"m": float(i)} for i in range(8)], {})
    assert run.end("m") == 6.5
