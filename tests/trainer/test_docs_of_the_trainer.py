"""The trainer's guides say what the code and the committed measurements say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.config.settings import parse_config
from trainer.evaluation.arms import arm_config
from trainer.evaluation.comparison import load_comparison
from trainer.evaluation.comparison_page import BEGIN, END
from trainer.evaluation.comparison_tables import tables
from trainer.runs.resume import check_settings, settings_of

ROOT = Path(__file__).parents[2]
RAW = ROOT / "docs" / "comparison"


def test_the_memory_of_the_head_is_as_the_guide_says() -> None:
    """12 bytes a logit at the peak of the usual head; 4 for every entry of a trained head's gradient."""
    rows = re.findall(
        r"V = (\d+), D = (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \|[^|]*\| \+ ([\d.]+) GB", (ROOT / "docs/training.md").read_text()
    )
    assert len(rows) == 4
    for V, D, short, long, gradient in rows:
        for said, tokens in ((short, 8192), (long, 65536)):
            assert float(said) == pytest.approx(12 * tokens * int(V) / 1e9, abs=0.051)
        assert float(gradient) == pytest.approx(4 * int(V) * int(D) / 1e9, abs=0.051)


def test_every_setting_that_the_guides_name_exists() -> None:
    known = parse_config([])
    for page in ("training.md", "comparison.md"):
        text = (ROOT / "docs" / page).read_text()
        sections = "model|lora|data|rollout|rewards|loss|eapo|optim|eval|log|checkpoint"
        names = set(re.findall(rf"[`-]((?:{sections})\.[a-z_.]+)[ `]", text))
        for name in names:
            node = known
            for part in name.split("."):
                assert hasattr(node, part), f"{page}: {name}"
                node = getattr(node, part)
        assert names or page == "comparison.md"


def test_the_committed_table_is_what_report_makes_of_the_committed_metrics() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    block = page.partition(BEGIN)[2].partition(END)[0].strip()
    found = load_comparison(RAW)
    assert tables(found, parse_config([], recipe=RAW / "eapo-seed0" / "config.toml").eval.resamples) == block
    assert (ROOT / "docs" / "comparison.png").is_file()


def test_the_committed_runs_are_the_recipe() -> None:
    recipe = parse_config([], recipe=ROOT / "trainer/recipes/compare.toml")
    for arm, runs in load_comparison(RAW).runs.items():
        for seed, run in runs.items():
            path = RAW / f"{arm}-seed{seed}" / "config.toml"
            check_settings(path, settings_of(parse_config([], recipe=path)), arm_config(recipe, arm, seed))
            assert [row["step"] for row in run.rows] == list(range(1, recipe.steps + 1))
