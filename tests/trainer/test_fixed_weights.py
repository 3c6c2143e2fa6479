"""The comparison of EAPO with fixed weights: its arms, its runs, its statistics, and the page drawn
from its measurements.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments.fixed_weights import __main__ as command
from benchmarks.experiments.fixed_weights import page, runs
from benchmarks.experiments.fixed_weights.runs import ARMS, FIXED_WEIGHTS, arm_config
from benchmarks.experiments.fixed_weights.statistics import Run, crossed, match, over_seeds, smooth, spread
from eapo_kernels import TokenBatch, make_controller, policy_loss
from trainer.config import Config
from trainer.config.settings import to_toml
from trainer.errors import ConfigError
from trainer.runs.rundir import RunDirectory, read

Change = Callable[..., Config]
COMMITTED = Path(command.__file__).parent
STEPS = 8

STAND_IN = """\
import pathlib, signal, sys, time
path = pathlib.Path(sys.argv[-1]).parent
if path.name == "psr-seed0": sys.exit("error: psr cannot")
def stop(*_): (path / "stopped").touch(); sys.exit(130)
signal.signal(signal.SIGINT, stop)
if path.name == "nsr-seed0": (path / "started").touch(); time.sleep(60)
(path / "config.toml").write_text((path / "recipe.toml").read_text())
(path / "finished.json").write_text('{"step": 2}')
"""
"""In the place of the trainer: psr fails, nsr takes a minute, the others finish at once."""


@pytest.fixture
def recipe(changed: Change) -> Config:
    return changed(name="cmp", steps=2, diagnose_every=0, rewards={"functions": ("rouge",)}, data={"eval_limit": 1})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TRAIN", (sys.executable, "-S", "-c", STAND_IN))


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_the_weights_of_the_loss_and_nothing_else(config: Config, arm: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8), torch.randn(20, 8)
    rewards = torch.tensor([0.9, 0.1, 0.3, 0.4])  # graded; above the mean of the group: the first
    batch = TokenBatch(
        targets=torch.arange(12), sequence_ids=torch.arange(4).repeat_interleave(3), rewards=rewards,
        group_ids=torch.zeros(4, dtype=torch.int64), old_logp=torch.log_softmax(hidden @ weight.T, -1)[range(12), range(12)],
    )  # fmt: skip
    method = arm_config(config, arm, seed=0).method()
    controller = make_controller(method)
    assert controller is not None
    controller.update(2.0, 1.0)
    positive = controller.update(1.2, 1.0)  # the entropy has fallen to 0.6 of the first
    loss = policy_loss(hidden, weight, batch, method=method, positive_weight=positive).loss
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).repeat_interleave(3)
    above, below = FIXED_WEIGHTS.get(arm, (0.6, 1.0))
    expected = -(torch.where(advantages > 0, above, below) * advantages).mean()  # the ratio is 1
    torch.testing.assert_close(loss, expected)


def test_arms_refuse_what_they_cannot_change(config: Config, changed: Change) -> None:
    with pytest.raises(ConfigError, match=r"--arms: expected names among eapo, grpo, .*got 'gspo'"):
        arm_config(config, "gspo", 0)
    with pytest.raises(ConfigError, match=r"loss.method: expected 'eapo'"):
        arm_config(changed(loss={"method": "dapo"}), "eapo", 0)


def test_finished_runs_are_kept_and_failures_reported(
    recipe: Config, stand_in: None, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [arm_config(recipe, arm, 0) for arm in ("grpo", "psr", "eapo")]
    for finished in (0, 2):
        assert runs.train(configs, jobs=2) == ["psr-seed0: error: psr cannot"]
        assert f"3 runs of 2 steps, {finished} finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"out: expected a directory for this recipe alone, got .*grpo-seed0"):
        runs.train([configs[0].replace(steps=3)], jobs=1)


def test_an_interrupt_is_passed_on(recipe: Config, stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = arm_config(recipe, "nsr", 0)
    path, sleep = RunDirectory(config).path, time.sleep

    def interrupted(seconds: float) -> None:
        if (path / "started").exists():
            signal.raise_signal(signal.SIGINT)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.train([config, arm_config(recipe, "eapo", 0)], jobs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (path / "stopped").exists()
    assert not RunDirectory(arm_config(recipe, "eapo", 0)).path.exists()


@pytest.mark.slow
def test_the_command_trains_and_draws(recipe: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    monkeypatch.setattr(command, "HERE", tmp_path)
    assert command.main(["train", "--arms", "psr", "--seeds", "4"]) == 0
    directory = Path(recipe.out) / "cmp"
    rows = read(directory / "psr-seed4", "metrics")
    assert [row["eapo/positive_weight"] for row in rows] == [1.0, 1.0]
    found = page.load(directory / page.METRICS).runs["psr"][4]
    assert found.curves["reward/mean"] == pytest.approx([row["reward/mean"] for row in rows], rel=1e-5)
    assert "PSR (1; negatives 0)" in (directory / page.PAGE).read_text()
    assert command.main(["train", "--arms", "psr", "--optim.lr", "-1"]) == 2


def test_the_committed_page_is_drawn_from_the_committed_metrics(tmp_path: Path) -> None:
    for name in (page.METRICS, page.PAGE):
        shutil.copy(COMMITTED / name, tmp_path)
    page.draw(tmp_path)
    assert (tmp_path / page.PAGE).read_text() == (COMMITTED / page.PAGE).read_text()
    assert (tmp_path / page.FIGURE).stat().st_size > 20_000
    found = page.load(COMMITTED / page.METRICS)
    assert {arm: list(each) for arm, each in found.runs.items()} == {arm: [0, 1, 2] for arm in ARMS}
    for name, value in tomllib.loads((COMMITTED / "recipe.toml").read_text()).items():
        committed = found.config[name]
        if name == "eapo":  # the runs are older than this setting, and had its value 1
            assert value.pop("anchor_steps") == 1
        assert committed == ({**committed, **value} if isinstance(value, dict) else value), name


def run(arm: str, seed: int, gain: float, entropy: float) -> Run:
    """A run whose reward rises by ``gain`` and whose entropy falls by ``entropy`` a step; seeds
    differ by 0.1 in reward.
    """
    i = np.arange(float(STEPS))
    curves = {
        "reward/mean": 0.3 + 0.1 * seed + gain * i,
        "eapo/entropy": 2.0 - entropy * i,
        "diversity/distinct_2": 0.9 - 0.5 * entropy * i,
        "eapo/positive_weight": np.ones(STEPS),
    }
    values = np.array([[0.2, 0.4, math.nan], [0.2 + gain * STEPS, 0.4 + gain * STEPS, math.nan]])
    return Run(arm, seed, curves, {"held-out": dict.fromkeys(("reward", "entropy", "length"), values)})


@pytest.fixture
def found() -> page.Comparison:
    rates = {"eapo": (0.01, 0.02), "grpo": (0.02, 0.1), "nsr": (0.0, 0.0)}
    each = {arm: {seed: run(arm, seed, *rate) for seed in ((0,) if arm == "nsr" else (0, 1))} for arm, rate in rates.items()}
    return page.Comparison({**page.load(COMMITTED / page.METRICS).config, "steps": STEPS}, each)


def cells(table: str, title: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {title}"))
    return [cell.strip() for cell in line.split("|")][1:-1]


def test_the_tables(found: page.Comparison) -> None:
    training, evaluation, paired, difference = (part for part in page.tables(found).split("\n\n") if part.startswith("|"))
    # The last quarter is the steps 6 and 7 (from 0): reward 0.3 + 0.01 * 6.5, and 0.1 more for the other seed.
    row = cells(training, "EAPO")
    assert row[:3] == ["EAPO (entropy ratio)", "2", "0.415 [0.365, 0.465]"]
    assert row[6:] == ["0.071", "0.071", "0.000"]  # 0.1 / sqrt(2)
    assert cells(training, "NSR")[1:4] == ["1", "0.300", "2.000"]
    assert cells(evaluation, "before training")[1].startswith("0.300 [")
    assert cells(evaluation, "GRPO")[1].startswith("0.460 [")
    assert cells(paired, "EAPO")[1] == "-0.080 [-0.080, -0.080]"  # 8 steps, 0.01 less a step, every prompt
    assert cells(paired, "NSR")[1] == "-0.160 [-0.160, -0.160]"
    row = cells(difference, "EAPO")
    assert row[:4] == ["EAPO (entropy ratio)", "2", "-0.065 [-0.065, -0.065]", "+0.520 [+0.520, +0.520]"]
    assert row[5:8] == ["0.360, 0.460", "8/4, 8/4", "+0.180 [+0.180, +0.180]"]


def test_smoothing_is_centred_and_shorter_at_the_ends() -> None:
    assert smooth(np.array([1.0, 2.0, 3.0, 4.0, 10.0, 6.0])) == pytest.approx([2.0, 2.5, 4.0, 5.0, 23 / 4, 20 / 3])


def test_equal_reward_is_where_both_runs_first_reach_what_both_reach(found: page.Comparison) -> None:
    metrics = ("eapo/entropy", "diversity/distinct_2")
    matched = match(found.runs["eapo"][0], found.runs["grpo"][0], metrics)
    # Smoothed, the arm's reward ends at 0.3 + 0.01 * 6 (mean of the last three steps, 5 to 7): the smaller maximum. The
    # baseline gains 0.02 a step: 0.3 + 0.02 * i reaches 0.36 at i = 3, the fourth step.
    assert matched.reward == pytest.approx(0.36)
    assert (matched.step, matched.baseline_step) == (8, 4)
    assert matched.gap["eapo/entropy"] == pytest.approx((2.0 - 0.02 * 6) - (2.0 - 0.1 * 3))
    assert matched.gap["diversity/distinct_2"] == pytest.approx(-0.01 * 6 + 0.05 * 3)
    # The levels run from 0.32, the higher of the two first smoothed rewards, to 0.36; each run is read at the first step whose
    # smoothed reward is at least as high.
    curves = ([0.31, 0.315, 0.32, 0.33, 0.34, 0.35, 0.355, 0.36], [0.32, 0.33, 0.34, 0.36])
    entropies = [[2.0 - fall * i for i in (1, 1.5, 2, 3, 4, 5, 5.5, 6)] for fall in (0.02, 0.1)]
    gaps = []
    for level in np.linspace(0.32, 0.36, 21) - 1e-9:
        own, other = (next(i for i, reward in enumerate(curve) if reward >= level) for curve in curves)
        gaps.append(entropies[0][own] - entropies[1][other])
    assert matched.mean_gap["eapo/entropy"] == pytest.approx(sum(gaps) / 21)
    same = match(found.runs["grpo"][1], found.runs["grpo"][1], metrics)
    assert same.gap == dict.fromkeys(metrics, 0.0)


def test_intervals_are_over_seeds_and_prompts() -> None:
    values = np.random.default_rng(1).normal(size=(1, 400)) + 3.0
    estimate = crossed(values, 2000)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    # Seeds that differ and prompts that do not: the interval is the seeds'.
    seeds = np.repeat(np.arange(10.0)[:, None], 400, axis=1)
    estimate = crossed(seeds, 2000)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * np.arange(10).std() / 10**0.5, rel=0.1)
    assert crossed(np.array([[1.0, math.nan], [3.0, math.nan]]), 200).mean == 2.0
    one, two = over_seeds([0.5], 100), over_seeds([0.5, 0.7], 500)
    assert (one.mean, math.isnan(one.low)) == (0.5, True)
    assert (two.mean, two.low, two.high) == (pytest.approx(0.6), 0.5, 0.7)


def test_spread_is_the_mean_over_steps_of_the_deviation_between_seeds() -> None:
    assert spread(np.array([[0.0, 1.0], [2.0, 1.0]])) == pytest.approx((2**0.5 + 0) / 2)
    assert math.isnan(spread(np.array([[0.0, 1.0]])))
