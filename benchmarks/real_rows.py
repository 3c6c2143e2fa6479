"""``python -m benchmarks.real_rows``: hidden states and head of a real model at the tokens of answers that it sampled itself.

SmolLM2-135M answers medical questions (``--model`` takes any other causal language model without soft-cap or bias on its head).
The file is too large to commit (60 MB) and takes about a minute to make.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eapo_kernels.testing import Inputs

FOLDER = Path(__file__).parent
PATH = FOLDER / "data" / "real_rows.safetensors"
QUESTIONS = FOLDER.parent / "trainer" / "data" / "medical_definitions" / "train.jsonl"
_NEW_TOKENS, _BATCH = 64, 32


def load(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Inputs:
    """The first ``n`` rows. Raises ValueError when the file is missing or its sizes are others."""
    if not PATH.exists():
        raise ValueError(
            f"inputs 'real': expected {PATH.relative_to(FOLDER.parent)}, got none; run python -m benchmarks.real_rows"
        )
    tensors = load_file(PATH)
    rows, dim = tensors["hidden"].shape
    vocab = tensors["weight"].shape[0]
    if (dim, vocab) != (d, v) or n > rows:
        raise ValueError(f"inputs 'real': expected N <= {rows}, D = {dim}, V = {vocab}, got N = {n}, D = {d}, V = {v}")
    hidden, weight = (tensors[name].to(device, dtype) for name in ("hidden", "weight"))
    return Inputs(hidden[:n], weight, tensors["targets"][:n].to(device))


def shape() -> tuple[int, int, int] | None:
    """(rows, D, V) of the file, or None without one. Reads its header only."""
    if not PATH.exists():
        return None
    with safe_open(PATH, "pt") as file:
        rows, dim = file.get_slice("hidden").get_shape()
        return rows, dim, file.get_slice("weight").get_shape()[0]


@torch.no_grad()
def collect(model_folder: Path, n: int, seed: int) -> dict[str, Tensor]:
    """hidden [n, D] and weight [V, D] bf16, targets [n] int64: the positions that predict the sampled tokens, in order."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = [json.loads(line)["prompt"] for line in QUESTIONS.read_text().splitlines()]
    torch.manual_seed(seed)
    hidden: list[Tensor] = []
    targets: list[Tensor] = []
    while (have := sum(map(len, targets))) < n:
        first = len(targets) % len(prompts)
        chats = [p if isinstance(p, list) else [{"role": "user", "content": p}] for p in prompts[first : first + _BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=_NEW_TOKENS)
        start = inputs["input_ids"].shape[1]
        answers = ids[:, start:]
        ended = answers == tokenizer.eos_token_id
        counts = ended.cumsum(1) - ended.long() == 0  # up to and with the first end of sequence
        mask = torch.cat([inputs["attention_mask"], counts.long()], 1)
        states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, start - 1 : -1]
        for state, answer, keep in zip(states, answers, counts, strict=True):
            hidden.append(state[keep])
            targets.append(answer[keep])
        print(f"{min(have + int(counts.sum()), n)} of {n} rows", file=sys.stderr)
    weight = model.get_output_embeddings().weight
    return {
        "hidden": torch.cat(hidden)[:n].bfloat16(),
        "weight": weight.bfloat16().clone(),
        "targets": torch.cat(targets)[:n].contiguous(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Make the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_rows", description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="folder of a transformers model (default: SmolLM2-135M)")
    parser.add_argument("--rows", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=PATH, help="default: %(default)s")
    options = parser.parse_args(arguments)
    folder = options.model
    if folder is None:
        from trainer.models.embedded import resolve

        folder = resolve("smollm2-135m", "~/.cache/eapo_kernels")
    tensors = collect(folder, options.rows, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.out)
    sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    print(f"wrote {options.out}: {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
