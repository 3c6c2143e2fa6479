"""A run of the real loop on a tiny model and prompts about numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's models and tokenizers need transformers: pip install '.[train]'")
pytest.importorskip("peft", reason="the trainer's adapters need peft: pip install '.[train]'")
pytest.importorskip("tyro", reason="the trainer's command line needs tyro: pip install '.[train]'")
pytest.importorskip("rouge_score", reason="the trainer's ROUGE reward needs rouge-score: pip install '.[train]'")
pytest.importorskip("nltk", reason="the trainer's measures of diversity need nltk: pip install '.[train]'")
pytest.importorskip("datasets", reason="the trainer's data files need datasets: pip install '.[train]'")

from tiny import make_model, make_tokenizer

from trainer.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RewardsConfig,
    RolloutConfig,
)
from trainer.models.policy import Policy


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from threads, which on a busy machine wait for each other most of
    the time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """A run of the real loop that takes about a second."""
    return Config(
        name="tiny",
        out=str(tmp_path / "runs"),
        steps=3,
        model=ModelConfig(path=str(model_dir), device="cpu"),
        data=DataConfig(train=str(prompts), eval=str(prompts), train_limit=8, eval_limit=2),
        rollout=RolloutConfig(prompts=3, responses=4, max_new_tokens=6),
        rewards=RewardsConfig(functions=("reward_functions:low_numbers",)),
        optim=OptimConfig(lr=1e-2),
        eval=EvalConfig(responses=3, resamples=50),
    )


@pytest.fixture
def changed(config: Config) -> Callable[..., Config]:
    """``changed(steps=5, optim={"lr": 1.0})``: the config with fields of itself and of its sections
    replaced.
    """

    def change(**fields: Any) -> Config:
        sections = {k: replace(getattr(config, k), **v) for k, v in fields.items() if isinstance(v, dict)}
        return replace(config, **{**fields, **sections})

    return change
