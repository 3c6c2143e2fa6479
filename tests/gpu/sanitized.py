"""A program for compute-sanitizer: every job at a small or a tiny size, or every CUDA kernel. The
results are not compared.

``python tests/gpu/sanitized.py small|tiny|kernels``; prints the names of what it ran.
"""

from __future__ import annotations

import os
import sys

import torch

SIZES = {"small": (130, 136, 1031), "tiny": (16, 64, 257)}
"""(N, D, V). small: ragged in every direction, several tiles. tiny: what checking every access of
shared memory bears."""


def main(which: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if which == "kernels":
        from benchmarks import kernels

        for check in kernels.checks("cuda", ""):
            for shape in kernels.SHAPES[:2]:
                check.launch(shape, device)
            print(str(check).replace(" ", "-"), flush=True)
        torch.cuda.synchronize()
        return
    from jobs import JOBS, job_inputs

    from eapo_kernels import Options

    n, d, v = SIZES[which]
    budgets = (Options(), Options(memory_budget=40 * v * 16)) if which == "small" else (Options(),)
    for dim in (d, d + 1):  # the latter without tensor descriptors
        inputs, batch = job_inputs(device, size=(n, dim, v))
        for name, job in JOBS.items():
            if name.startswith("cuda-") and dim % 8:
                continue  # it needs descriptors
            for options in budgets:
                job(inputs, batch, options)
            print(name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
