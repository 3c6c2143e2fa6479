"""``python -m trainer export``: a trained model as a directory that ``from_pretrained`` and
inference engines load.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel

from ..config.settings import parse_config
from ..errors import ConfigError, check
from ..models.policy import Policy, load_policy
from .checkpoint import read_tensors, verify

DTYPES = ("float32", "bfloat16")


def export(source: Path, out: Path, dtype: str) -> Path:
    """Write configuration, generation configuration, tokenizer with its chat template and
    safetensors.

    Adapters are merged in fp32. Runs on one process and a CPU, whatever the run was trained on;
    shards are combined.

    Args:
        source: directory of a run (the model it saved), or one of its checkpoints.
        out: a new or empty directory, renamed from a temporary one when it is complete.
        dtype: of the weights, "float32" as trained or "bfloat16".

    Returns:
        ``out``.

    Raises:
        ConfigError: there is no such run or checkpoint, or ``out`` is not empty.
        CheckpointError: the checkpoint is damaged.
    """
    check(dtype in DTYPES, "--dtype", f"one of {', '.join(DTYPES)}", dtype)
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(free, "--out", "a new or an empty directory", str(out))
    policy = _load(source)
    model = policy.model.float().merge_and_unload() if isinstance(policy.model, PeftModel) else policy.model
    model.to(getattr(torch, dtype))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        complete = Path(scratch) / out.name
        model.save_pretrained(complete)
        policy.tokenizer.save_pretrained(complete)
        complete.rename(out)
    return out


def _load(source: Path) -> Policy:
    """The policy of a run's saved model or of one of its checkpoints, on the CPU."""
    source = source.resolve()
    of_checkpoint = source.parent.name == "checkpoints" and source.is_dir()
    run = source.parent.parent if of_checkpoint else source
    if not ((run / "config.toml").is_file() and (of_checkpoint or (run / "model").is_dir())):
        raise ConfigError(f"export: expected a run with a saved model, or one of its checkpoints (RUN/checkpoints/step-...), "
                          f"got {source}")  # fmt: skip
    config = parse_config([], recipe=run / "config.toml", prog="python -m trainer export")
    model = config.model.replace(device="cpu", attention="eager", gradient_checkpointing=False)
    if not of_checkpoint:
        return load_policy(model.replace(path=str(run / "model")), config.lora.replace(rank=0), seed=0)
    verify(source)
    policy = load_policy(model, config.lora, seed=0)
    read_tensors(source, {"weights": policy.trained_weights()})
    return policy
