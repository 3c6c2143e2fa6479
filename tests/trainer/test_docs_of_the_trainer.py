"""The trainer's guide agrees with the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest

from trainer.config.settings import parse_config

ROOT = Path(__file__).parents[2]


def test_the_memory_of_the_head_is_as_the_guide_says() -> None:
    """12 bytes a logit at the peak of an unfused head; 4 for every entry of the gradient of a
    trained head.
    """
    rows = re.findall(
        r"V = (\d+), D = (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \|[^|]*\| \+ ([\d.]+) GB", (ROOT / "docs/training.md").read_text()
    )
    assert len(rows) == 4
    for V, D, short, long, gradient in rows:
        for said, tokens in ((short, 8192), (long, 65536)):
            assert float(said) == pytest.approx(12 * tokens * int(V) / 1e9, abs=0.051)
        assert float(gradient) == pytest.approx(4 * int(V) * int(D) / 1e9, abs=0.051)


def test_the_recipe_of_the_guide_is_valid(tmp_path: Path) -> None:
    """And its columns are those of the row above it."""
    text = (ROOT / "docs" / "training.md").read_text()
    (recipe,) = re.findall(r"\n\n((?:    .*\n)*    every = 10\n)", text)
    (row,) = re.findall(r'\n    (\{"problem.*\})\n', text)
    file = tmp_path / "sums.toml"
    file.write_text(dedent(recipe))
    config = parse_config([], recipe=file)
    assert set(json.loads(row)) == {config.data.columns.prompt, config.data.columns.answer}
    assert (config.rewards.functions, config.steps) == (("math_verify",), 40)


def test_every_setting_that_the_guide_names_exists() -> None:
    known = parse_config([])
    text = (ROOT / "docs" / "training.md").read_text()
    sections = "model|lora|data|rollout|rewards|loss|eapo|optim|eval|log|checkpoint"
    names = set(re.findall(rf"[`-]((?:{sections})\.[a-z_.]+)[ `]", text))
    assert names
    for name in names:
        node = known
        for part in name.split("."):
            assert hasattr(node, part), name
            node = getattr(node, part)
