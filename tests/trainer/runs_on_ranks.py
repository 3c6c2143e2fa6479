"""``torchrun --standalone --nproc-per-node 2 runs_on_ranks.py [KILL] RECIPE ...``: train each on
one pair of processes.

KILL: a number; the last rank kills itself at the so-manieth moment of its saves (see
``killed_run.kill_at``).
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import pytest
import torch
from killed_run import kill_at
from tiny import GivenCompletions

from trainer import loop, ranks
from trainer.config import Config
from trainer.config.settings import parse_config


def train(config: Config) -> bool:
    """Train without drawing a report, which takes longer than the steps; in bfloat16 on
    ``GivenCompletions``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda *_, **__: (Path("curves.png"), Path("report.md")))
        patch.setattr(loop, "summary_table", lambda *_, **__: "")
        if config.model.dtype == "bfloat16":
            patch.setattr(loop, "make_engine", lambda *_: GivenCompletions())
        return loop.train(config)


def main(arguments: list[str]) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # what hangs says where
    torch.set_num_threads(1)
    with ranks.init_distributed("cpu"):
        if arguments[0].isdigit() and not ranks.is_main():
            kill_at(int(arguments[0]))
        for recipe in arguments[arguments[0].isdigit() :]:
            assert train(parse_config(["--config", recipe]))


if __name__ == "__main__":
    main(sys.argv[1:])
