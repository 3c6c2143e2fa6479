"""An exported model equals the trained one, in the standard format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEMPLATE, make_model, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trainer import loop
from trainer.__main__ import main
from trainer.config import Config
from trainer.models.policy import Policy
from trainer.models.weights import checkpoint_weights
from trainer.runs.saved import export

Change = Callable[..., Config]
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], tuple[Path, Policy]]:
    """Train; return the directory of the run and the policy as it was in memory at the end."""
    policies = []

    def keep(*args: Any, **options: Any) -> Policy:
        policies.append(load(*args, **options))
        return policies[-1]

    load = loop.load_policy
    monkeypatch.setattr(loop, "load_policy", keep)

    def run(config: Config) -> tuple[Path, Policy]:
        assert loop.train(config)
        return Path(config.out) / config.name, policies[-1]

    return run


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def short(changed: Change, tied: bool = False, **sections: Any) -> Config:
    config = changed(steps=2, data={"eval": ""}, checkpoint={"every": 1, "keep": 2}, **sections)
    if not tied:
        return config
    directory = Path(config.out).parent / "tied"
    make_model(tie_word_embeddings=True).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return config.replace(model={"path": str(directory)})


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_model_and_its_checkpoints(changed: Change, trained: Any, tied: bool) -> None:
    run, policy = trained(short(changed, tied))
    first, last = (run / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    found = {}
    for source in (run, last, first):
        out = export(source, run.parent / f"exported-{source.name}", "float32")
        found[source] = AutoModelForCausalLM.from_pretrained(out)
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
        assert found[source].config.to_dict() == policy.language_model.config.to_dict() | {"_name_or_path": str(out)}
        assert GenerationConfig.from_pretrained(out).eos_token_id == 1
        assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "as readable as the configuration"
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    wanted = logits(policy.language_model)
    assert torch.equal(logits(found[run]), wanted)
    assert torch.equal(logits(found[last]), wanted)
    assert not torch.equal(logits(found[first]), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged(changed: Change, trained: Any, dtype: str) -> None:
    """In fp32, on the frozen weights of the training: those are rounded in bfloat16."""
    run, policy = trained(short(changed, lora={"rank": 2}, model={"dtype": dtype}))
    merged = dict(checkpoint_weights(policy.language_model))
    for source in (run, run / "checkpoints" / "step-000002"):
        out = export(source, run.parent / f"exported-{source.name}", "float32")
        assert not list(out.glob("adapter*"))
        weights = load_file(out / "model.safetensors")
        assert weights.keys() == merged.keys()
        assert all(torch.equal(weights[name], weight.float()) for name, weight in merged.items())
        model = AutoModelForCausalLM.from_pretrained(out)
        if dtype == "float32":  # the policy computes in bfloat16 otherwise
            torch.testing.assert_close(logits(model), logits(policy.language_model), rtol=1e-5, atol=1e-5)


def test_bf16_is_the_trained_weights_rounded(changed: Change, trained: Any) -> None:
    run, policy = trained(short(changed))
    model = AutoModelForCausalLM.from_pretrained(export(run, run.parent / "deep" / "half", "bfloat16"))
    assert model.dtype is torch.bfloat16
    for name, weight in policy.language_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16()), name


def test_what_is_refused_leaves_nothing(
    changed: Change, trained: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = trained(short(changed))
    out = run.parent / "out"

    def fails(*arguments: str, source: Path = run) -> str:
        capsys.readouterr()
        assert main(["export", str(source), "--out", str(out), *arguments]) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "run: expected a run with a saved model, or one of its checkpoints" in fails(source=run / "nowhere")
    assert "--dtype: expected one of float32, bfloat16, got 'int4'" in fails("--dtype", "int4")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "export: expected one process, without torchrun, got '2 processes'" in fails()
        assert main(["report", str(run)]) == 2
        assert "report: expected one process, without torchrun, got '2 processes'" in capsys.readouterr().err
    damaged = run / "checkpoints" / "step-000001"
    (damaged / "state.pt").write_bytes(b"")
    assert "state.pt: expected" in fails(source=damaged)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", _full)
        with pytest.raises(OSError, match="disk"):
            export(run, out, "float32")
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny"]

    out.mkdir()
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert "--out: expected a new or an empty directory" in fails()
    shutil.rmtree(run / "model")
    shutil.rmtree(out)
    assert "run: expected a run with a saved model" in fails()


def _full(*_: Any, **__: Any) -> None:
    raise OSError("disk")
