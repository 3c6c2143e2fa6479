"""TRL's GRPO trainer with the EAPO weight. Runs on a CPU in seconds.

.venv/bin/python -m pip install --no-deps trl==1.16.0
.venv/bin/python examples/trl_eapo.py
"""

from __future__ import annotations

import tempfile

import tiny
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig

from eapo_kernels import EntropyRatio
from eapo_kernels.integrations.trl import EAPOTrainer


def even_words(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Share of the words with an even number."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        trainer = EAPOTrainer(  # was: GRPOTrainer(
            model=tiny.model(),
            processing_class=tiny.tokenizer(),
            reward_funcs=even_words,
            train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{2 * i} w{3 * i}" for i in range(64)]}),
            args=GRPOConfig(
                output_dir=directory,
                loss_type="dapo",  # any of TRL's
                max_steps=24,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                per_device_train_batch_size=16,
                num_generations=8,
                gradient_accumulation_steps=2,
                max_completion_length=12,
                logging_steps=4,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            controller=EntropyRatio(kappa=1.0, low=0.2, high=5.0),  # optional, as the next argument
            fused_head="eapo",  # this package's op instead of TRL's chunked head
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for row in trainer.state.log_history:
        if "reward" in row:
            names = ("reward", "eapo/entropy", "eapo/entropy_ratio", "eapo/positive_weight")
            print(f"step {row['step']:2d}", *(f"{name} {row[name]:.3f}" for name in names), sep="  ")


if __name__ == "__main__":
    main()
