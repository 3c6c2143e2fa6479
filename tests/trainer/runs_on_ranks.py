"""``python runs_on_ranks.py LAUNCHES.json``: run pairs of processes, which are forked from this
one.

Starting Python for every process would take longer than the runs. LAUNCHES is a list of {"name":
str, "recipes": [path]} with an optional "kill" (rank 1 kills itself at that point of its saves, see
``killed_run.kill_at``), or of {"name": str, "command": [argument]} for the command line, with an
optional "fail" (function and number of the call that is out of memory on rank 1), or of {"name":
str, "load": [path]} to load models without training. Output goes to NAME-RANK.out and .err beside
LAUNCHES, exit statuses to standard output.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
import weakref
from collections import Counter
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from killed_run import kill_at
from tiny import GivenCompletions, raised_by, without_report
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import commands, loop, ranks
from trainer.config import Config
from trainer.config.settings import parse_config
from trainer.models import policy as policy_module
from trainer.models.weights import fill, full_tensor
from trainer.rollouts.vllm_engine import _import_vllm


def train(config: Config) -> bool:
    """Train without drawing a report, which takes longer than the steps; in bfloat16 on
    ``GivenCompletions``.
    """
    with pytest.MonkeyPatch.context() as patch:
        without_report(patch)
        if config.model.dtype == "bfloat16":
            patch.setattr(loop, "make_engine", lambda *_: GivenCompletions())
        return loop.train(config)


class FullTensors(TorchDispatchMode):
    """Counts the memories of full matrices of ``model`` that are alive at once."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        full = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
        self.shapes = full - {((rows + 1) // 2, columns) for rows, columns in full}  # those are shards too
        assert len(self.shapes) > 1
        self.alive: Counter[int] = Counter()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not isinstance(out, DTensor) and not out.is_meta and (*out.shape,) in self.shapes:
            place = out.untyped_storage().data_ptr()
            self.alive[place] += 1
            self.most = max(self.most, len(+self.alive))
            weakref.finalize(out, self._gone, place)
        return out

    def _gone(self, place: int) -> None:
        self.alive[place] -= 1


def load(recipe: str) -> None:
    """Load the model of a recipe; leave what this rank has of it in RECIPE-RANK.pt."""
    config, seen = parse_config(["--config", recipe]), {}

    def counted(model: torch.nn.Module, *args: Any) -> None:
        seen["meta"] = all(p.is_meta for p in model.parameters())
        with FullTensors(model) as tensors:
            fill(model, *args)
        seen["full"] = tensors.most

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "fill", counted)
        policy = policy_module.load_policy(config.model, config.lora, seed=1)
    weights = {name: full_tensor(weight.detach()) for name, weight in policy.state_dict().items()}
    model = policy.language_model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    seen |= {"weights": weights, "buffers": dict(policy.named_buffers()), "tied": tied, "eos": policy.eos_ids}
    torch.save(seen, f"{recipe}-{ranks.rank()}.pt")


def work(launch: dict[str, Any]) -> int:
    """What one rank does. Returns its exit status."""
    if "command" in launch:
        name, *arguments = launch["command"]
        breaks = "fail" in launch and os.environ["RANK"] == "1"
        with raised_by(*launch["fail"], torch.OutOfMemoryError("CUDA out of memory")) if breaks else nullcontext():
            return commands.run(name, arguments)
    with ranks.init_distributed("cpu"):
        if "kill" in launch and not ranks.is_main():
            kill_at(launch["kill"])
        for path in launch.get("load", ()):
            load(path)
        return 0 if all(train(parse_config(["--config", recipe])) for recipe in launch.get("recipes", ())) else 130


def fork(launch: dict[str, Any], rank: int, port: int, directory: Path) -> int:
    """Start one rank and return its process id. As under torchrun, its parent hosts the store."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for descriptor, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(directory / f"{launch['name']}-{rank}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
        faulthandler.enable()  # shows where a rank crashes
        faulthandler.dump_traceback_later(240, exit=True)  # shows where a rank hangs
        torch.set_num_threads(1)
        status = work(launch)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(file: Path) -> None:
    if find_spec("vllm"):  # once, instead of in every rank
        _import_vllm(torch.device("cpu"))
    for launch in json.loads(file.read_text()):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = [fork(launch, rank, store.port, file.parent) for rank in range(2)]
        print(launch["name"], *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
