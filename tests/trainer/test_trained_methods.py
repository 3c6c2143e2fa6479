"""Every method trains from its name alone, and its controller resumes from a checkpoint."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eapo_kernels import METHODS, make_controller
from trainer.config import Config
from trainer.config.settings import parse_config, to_toml
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.runs.rundir import read

Change = Callable[..., Config]
BINARY = {"psr", "nsr", "w_reinforce"}
BY_CORRECTNESS = BINARY | {"pear", "dcpo", "trace"}  # a tiny model's share of low numbers hardly ever exceeds a half


def metrics_of(config: Config) -> list[dict[str, Any]]:
    return read(Path(config.out) / config.name, "metrics")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_from_its_name(changed: Change, method: str) -> None:
    reward = "has_a_low_number" if method in BY_CORRECTNESS else "low_numbers"
    config = changed(
        data={"eval": ""}, loss={"method": method}, rewards={"functions": (f"reward_functions:{reward}",)},
        optim={"minibatches": 2, "micro_batch_tokens": 60},
    )  # fmt: skip
    assert train(config)
    rows = metrics_of(config)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert all(value is not None and math.isfinite(value) for value in row.values()), row
        assert {"dynamics/predicted_entropy_change", "dynamics/measured_entropy_change"} <= row.keys()
        assert -1e-6 <= row["dynamics/positive_gradient_share"] <= 1
    assert any(row["grad_norm"] > 0 for row in rows)
    assert any(row["dynamics/measured_entropy_change"] != 0 for row in rows)
    if METHODS[method].controller not in (None, "entropy_ratio"):
        assert any(name.startswith("controller/") for name in rows[0])


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.controller])
def test_a_controller_goes_on_after_a_checkpoint(method: str) -> None:
    """Five steps give the same state as three steps, a checkpoint, and two steps."""
    entropies = [2.0, 1.5, 1.7, 1.2, 0.9]
    through, first, again = (make_controller(METHODS[method]) for _ in range(3))
    assert through
    assert first
    assert again
    for entropy in entropies:
        through.update(10 * entropy, 10)
    for entropy in entropies[:3]:
        first.update(10 * entropy, 10)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for entropy in entropies[3:]:
        again.update(10 * entropy, 10)
    assert through.values() == again.values()


@pytest.mark.parametrize("method", sorted(BINARY))
def test_graded_rewards_are_refused_in_the_first_step(changed: Change, method: str) -> None:
    expected = rf"expected rewards of 0 or 1 with method '{method}', got 0\.\d+ from reward_functions:low_numbers"
    with pytest.raises(ConfigError, match=expected):
        train(changed(loss={"method": method}))
    late = {"functions": ("reward_functions:has_a_low_number",), "overlong": "penalty", "overlong_window": 5}
    with pytest.raises(ConfigError, match=r"got -?[01]?\.?\d+ from reward_functions:has_a_low_number, overlong"):
        train(changed(loss={"method": method}, rewards=late, overwrite=True))


def test_a_methods_numbers_are_keys_of_its_section(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[loss]\nmethod = "steer"\nlambda_min = 0.5\nclip_high = 0.3\nform = "released"\n')
    config = parse_config(["--loss.lambda-min", "0.6", "--loss.dual_clip=None"], recipe=recipe)
    method = config.method()
    assert (method.token_weighting.lambda_min, method.token_weighting.form) == (0.6, "released")  # type: ignore[union-attr]
    assert (method.config.clip_high, method.config.dual_clip) == (0.3, None)
    recipe.write_text(to_toml(config))
    assert parse_config([], recipe=recipe) == config
    other = parse_config(["--loss.method", "nsr", "--loss.kl_coef", "1"], recipe=recipe)
    assert other.loss.numbers == {"kl_coef": 1}
    assert other.loss.clip_high == 0.3, "a setting of every method is kept"
    assert parse_config(["--loss.method", "aepo", "--loss.target", "0.7"]).method().controller_settings["target"] == 0.7


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--loss.lambda_min", "0.5"], "line: loss.lambda_min: expected at loss one of method, .*; got 'lambda_min'"),
        (["--loss.method", "steer", "--loss.lambda_min", "2"], r"loss\.lambda_min: expected a finite number in .*, got 2"),
        (["--loss.method", "steer", "--loss.form", "x"], "loss.form: expected one of theorem, released, got 'x'"),
        (["--loss.method", "steer", "--loss.form"], "command line: loss.form: expected a value, got nothing"),
        (["--loss.kappa", "2"], "loss.kappa: expected kappa in the section eapo, got 2"),
        (["--loss.reference_ema", "2"], r"loss\.reference_ema: expected a number less than or equal to 1, got '2'"),
        (["--loss.method", "steer", "--loss.lamda_min", "2"], r"expected at loss one of .* \(did you mean 'lambda_min'\?\)"),
    ],
)  # fmt: skip
def test_wrong_numbers_are_one_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        parse_config(arguments)
    assert "\n" not in str(error.value)
