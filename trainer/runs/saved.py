"""What a run saved, its model and its checkpoints: loaded, and with ``python -m trainer export`` written
as a directory that ``from_pretrained`` and inference engines load.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel

from ..config import LoraConfig, ModelConfig
from ..config.settings import parse_config
from ..errors import check
from ..models.policy import Policy, load_policy
from ..models.weights import write_model
from .checkpoint import read_tensors, verify
from .locate import locate

DTYPES = ("float32", "bfloat16")


def load_saved(model: ModelConfig, lora: LoraConfig, checkpoint: Path | None) -> Policy:
    """The policy of ``model``, with the weights of a checkpoint where one is given.

    Raises:
        TrainerError: there is no such model, or the checkpoint is damaged.
    """
    if checkpoint:
        verify(checkpoint)
    policy = load_policy(model, lora, seed=0)
    if checkpoint:
        read_tensors(checkpoint, {"weights": policy.trained_weights()})
    return policy


def export(source: Path, out: Path, dtype: str) -> Path:
    """Write configuration, generation configuration, tokenizer with its chat template and
    safetensors.

    Adapters are merged in fp32. Runs on one process and a CPU, whatever the run was trained on;
    shards are combined.

    Args:
        source: as in ``locate``.
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
    run, checkpoint = locate(source)
    config = parse_config([], recipe=run / "config.toml", prog="python -m trainer export")
    if not checkpoint:
        config = config.replace(model={"path": str(run / "model")}, lora={"rank": 0})
    here = config.model.replace(device="cpu", attention="eager", gradient_checkpointing=False)
    policy = load_saved(here, config.lora, checkpoint)
    model = policy.model.float().merge_and_unload() if isinstance(policy.model, PeftModel) else policy.model
    model.to(getattr(torch, dtype))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        complete = Path(scratch) / out.name
        write_model(complete, model, policy.tokenizer)
        complete.rename(out)
    return out
