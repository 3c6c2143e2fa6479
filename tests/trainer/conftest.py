"""Fixtures: a tiny model, prompts about numbers, and the configuration of a short run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported: no test reaches the hub

pytest.importorskip("transformers", reason="the trainer's models and tokenizers need transformers: pip install '.[train]'")
pytest.importorskip("peft", reason="the trainer's adapters need peft: pip install '.[train]'")
pytest.importorskip("pydantic", reason="the trainer's settings need pydantic: pip install '.[train]'")
pytest.importorskip("rouge_score", reason="the trainer's ROUGE reward needs rouge-score: pip install '.[train]'")
pytest.importorskip("datasets", reason="the trainer's data files need datasets: pip install '.[train]'")

from tiny import make_model, make_tokenizer, tiny_config, without_report

from trainer.config import Config
from trainer.models.policy import Policy


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: a tiny model gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def with_report() -> None:
    """For tests that need the report which the loop draws at its end."""


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "with_report" not in request.fixturenames:
        without_report(monkeypatch)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def policy() -> Policy:
    return Policy(make_model(), make_tokenizer())


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"what is after n{i} ?", "answer": f"n{i + 1} n{i + 2}", "number": i} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(model_dir: Path, prompts: Path, tmp_path: Path) -> Config:
    """A run of the real loop that takes less than a second."""
    return tiny_config(model_dir, prompts, tmp_path / "runs")


@pytest.fixture
def changed(config: Config) -> Callable[..., Config]:
    """``changed(steps=5, optim={"lr": 1.0})``: the config with fields replaced, of itself and of
    its sections.
    """
    return config.replace
