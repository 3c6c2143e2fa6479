"""``python -m trainer COMMAND``.

commands:
  train --config RECIPE.toml [--section.key value ...]   train, evaluate before and after, save, draw the report
  train --dry-run [PROCESSES] --config RECIPE.toml ...   check rewards, data and engine and estimate the memory, without weights
  eval  --run RUN|RUN/checkpoints/NAME                   evaluate a run's model, or one of its checkpoints
  eval  --config RECIPE.toml [--model.path DIR ...]      evaluate a model or a saved adapter
  export RUN|RUN/checkpoints/NAME --out DIR [--dtype bfloat16]
                                                         write the model as transformers and vLLM load it, adapters merged
  report RUN [RUN ...] [--out DIR]                       draw curves and a Markdown page from run directories
  print-config [--config RECIPE.toml] [overrides]        print the resolved configuration as TOML
  demo [overrides]                                       a real EAPO run in minutes, without GPU or network

``train --help`` lists every setting. Exit code 1: the run failed. 2: a wrong recipe, argument, file or model. 130: interrupted.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    # Read once, when PyTorch first allocates on the CPU: large tensors on huge pages of their own leave no gaps in glibc's heap
    # (docs/log.md, 2026-11-30).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if arguments[0] == "demo":
        # Read once, when OpenMP and transformers are loaded. Passive waiting saves two thirds of the time on a busy machine and
        # costs nothing on an idle one.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ["HF_HUB_OFFLINE"] = "1"
    from .commands import run

    return run(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
