"""``python -m benchmarks.host_cost``: what a loss and its backward cost the host on the Triton backend.

No GPU is needed: Triton's own launch path runs with a stand-in driver that counts instead of
launching, kernels are compiled for sm_90, and small CPU tensors report a CUDA device. The products
of the library are counted and left out. So results are garbage, and processor time is that of
PyTorch's calls (on a CPU, whose small operations cost about as much as launching them), of this
package and of Triton's launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eapo_kernels import TokenBatch, eapo_loss, token_stats
from eapo_kernels.testing import make_inputs

N, D, V = 64, 32, 256
FAMILY, CAPABILITY, PROGRAMS = "sm90", (9, 0), 132


@dataclass
class Counts:
    """Of one call.

    Attributes:
        torch_calls: operations of PyTorch, views included, products not.
        products: of the library.
        launches, descriptors: of Triton kernels; tensor descriptors among their arguments.
    """

    torch_calls: int = 0
    products: int = 0
    launches: int = 0
    descriptors: int = 0


class StandIn:
    """A driver for Triton that loads and launches nothing."""

    def __init__(self, counts: Counts) -> None:
        self.counts, self.utils, self.launcher_cls = counts, self, self._launcher

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.tools.tensor_descriptor import TensorDescriptor

        def launch(*arguments: Any) -> None:
            self.counts.launches += 1
            self.counts.descriptors += [type(a) for a in arguments].count(TensorDescriptor)

        return launch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": PROGRAMS, "warpSize": 32}


class _Calls(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.torch_calls += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_a_stand_in(counts: Counts) -> Iterator[None]:
    """CPU tensors report a CUDA device, and the Triton backend launches on the stand-in."""
    from triton.runtime import driver

    from eapo_kernels.ops import gemm, triton
    from eapo_kernels.ops.triton import backend

    def product(out: Tensor, a: Tensor, b: Tensor, *, overwrite: bool = False) -> Tensor:
        counts.products += 1
        return out

    # No mocks: a call of one costs as much as a launch.
    instead = {"family": lambda device: FAMILY, "slots": lambda device, tile: PROGRAMS, "capability": lambda device: CAPABILITY}
    modules = [importlib.import_module(f"{triton.__name__}.{one.name}") for one in pkgutil.iter_modules(triton.__path__)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in instead.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        able = replace(backend.BACKEND, supports=lambda projection: None)
        stack.enter_context(mock.patch.object(backend, "BACKEND", able))
        stack.enter_context(mock.patch.object(gemm, "add_product_", product))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", bool))
        stack.enter_context(mock.patch.object(torch.cuda, "device", contextlib.nullcontext))
        stack.enter_context(mock.patch.object(driver, "_active", StandIn(counts)))
        yield


def calls() -> dict[str, Callable[[], object]]:
    """What is measured: one chunk, bf16, with old log-probs and metrics."""
    inputs = make_inputs(N, D, V, dtype=torch.bfloat16)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    ids = torch.arange(N) // 8
    batch = TokenBatch(
        inputs.targets, ids, rewards=torch.linspace(0, 1, 8), group_ids=torch.arange(8) // 4, old_logp=torch.full((N,), -3.0)
    )

    def loss() -> None:
        out = eapo_loss(hidden, weight, batch, positive_weight=0.7, schedule="one_pass", backend="triton")
        torch.autograd.grad(out.loss, (hidden, weight))

    def stats() -> None:
        s = token_stats(hidden, weight, inputs.targets, entropy="nograd", backend="triton")
        torch.autograd.grad(s.logp.sum(), (hidden, weight))

    return {"eapo_loss and backward": loss, "token_stats and backward": stats}


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row a call: counts, and the median processor time of ``rounds``."""
    rows, counts = [], Counts()  # a compiled kernel keeps the launcher of its first driver
    with on_a_stand_in(counts):
        for name, call in calls().items():
            call()  # compiles
            before = replace(counts)
            call()  # without the mode, which does not look into a custom op
            row = {"call": name} | {field: value - getattr(before, field) for field, value in vars(counts).items()}
            before = replace(counts)
            with _Calls(counts):
                call()
            row["torch_calls"] = counts.torch_calls - before.torch_calls
            times = []
            for _ in range(rounds):
                start = time.process_time()
                call()
                times.append(1e3 * (time.process_time() - start))
            rows.append(row | {"milliseconds": round(statistics.median(times), 3)})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="timed calls (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
