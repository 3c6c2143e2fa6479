"""``python -m benchmarks.first_light --out DIR``: every CUDA product once, before anything else relies on one.

A kernel and tile have a process of their own, in which they go from one tile without a ragged edge to many waves: one that
hangs, crashes or is wrong is named and takes nobody with it. Writes DIR/first_light.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eapo_kernels import available_backends, reference
from eapo_kernels.ops.cuda import configs
from eapo_kernels.ops.cuda.configs import ProductBuild
from eapo_kernels.ops.projection import Projection
from eapo_kernels.testing import make_inputs

SHAPES = ((128, 64, 256), (130, 136, 1031), (700, 1024, 50257))
"""[N, D] x [V, D]: a tile with nothing to cut off; ragged in every direction; many units for every program."""

FLOOR = {torch.float32: 4e-5, torch.bfloat16: 1.2e-2}
"""Allowed difference from float64, of the largest value: sums in fp32, and E rounded to bfloat16 (after offsets in fp32)."""

HANGS = 3
"""Exit code when a kernel hangs or crashes."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Results = Iterator[tuple[str, Tensor, Tensor]]
"""(name, result, truth)."""


def names(builds: Sequence[ProductBuild]) -> dict[str, list[ProductBuild]]:
    """By the kernel and the number of its tile: what shares a process."""
    tiles = configs.tiles()
    found: dict[str, list[ProductBuild]] = {}
    for item in builds:
        found.setdefault(f"{item.kernel}-{item.tile.name}-{tiles.index(item.tile)}", []).append(item)
    return found


@torch.no_grad()
def check(item: ProductBuild, shape: tuple[int, int, int], device: str) -> str | None:
    """How the results are wrong, or None. NaN is wrong, and so is a single bit between two runs."""
    for name, got, truth in launches(item, shape, device):
        error = float(torch.where(got == truth, 0.0, (got.double() - truth).abs()).max())  # a range may have the maximum -inf
        allowed = 0.0 if name.startswith("output") else FLOOR[got.dtype] * float(truth.abs().max())
        if not error <= allowed:
            return f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
    return None


def launches(item: ProductBuild, shape: tuple[int, int, int], device: str) -> Results:
    """Run the kernel twice, finish its sums as the backend does, and yield what came out beside the truth."""
    from eapo_kernels.ops.cuda import products
    from eapo_kernels.ops.triton.exp_finalize import exp_finalize
    from eapo_kernels.ops.triton.finalize import finalize
    from eapo_kernels.ops.triton.offsets import row_offsets
    from eapo_kernels.ops.triton.one_pass import workspace

    inputs = make_inputs(*shape, dtype=_DTYPES[item.operand], bias=item.bias, device=device)
    g = torch.Generator().manual_seed(3)
    temperature = (0.5 + torch.rand(shape[0], generator=g)).to(device)
    p = Projection(
        inputs.hidden.detach(), inputs.weight.detach(), None if inputs.bias is None else inputs.bias.detach(),
        row_inv_temperature=temperature,
    )  # fmt: skip
    exact = inputs.to(torch.float64)
    scaled = {"bias": exact.bias, "inv_temperature": temperature.double()}
    truth = reference.token_stats(exact.hidden, exact.weight, exact.targets, second_moments=item.second_moments, **scaled)
    if item.kernel == "stream_statistics":
        launch, sums = products.stream_statistics(
            p, inputs.targets, entropy=item.entropy, second_moments=item.second_moments, budget=2**30, tile=item.tile
        )
        written = [sums.values]
    else:
        exp = products.exp_sums(p, item.entropy, item.tile)
        row_offsets(p, inputs.targets, truth.logp.float() + 0.3, exp)()
        matrix = workspace(p, torch.bfloat16)
        launch = products.exp_gemm(p, inputs.targets, exp, matrix, tile=item.tile)
        written = [exp.values, matrix]
    assert launch.build == item
    first = None
    for _ in range(2):
        for tensor in written:
            tensor.fill_(torch.nan)
        launch()
        again, first = first, [tensor.clone() for tensor in written]
    assert again is not None
    for number, (a, b) in enumerate(zip(again, first, strict=True)):
        yield f"output {number} of the second run", b, a.double()
    if item.kernel == "stream_statistics":
        last, final = finalize(sums)
    else:
        bits = reference.logits(exact.hidden, exact.weight, **scaled) / math.log(2) - exp.offsets[0].double().unsqueeze(1)
        yield "E", matrix, bits.exp2_().scatter_(1, inputs.targets.unsqueeze(1), 0.0)
        last, final, _ = exp_finalize(p, exp)
    last()
    for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
        value = getattr(final.statistics, name)
        if value is not None:
            yield name, value, getattr(truth, name)


@torch.no_grad()
def run_all(device: str) -> None:
    """Every build on the first two shapes, its results not looked at: what tools watch."""
    for item in configs.product_builds():
        for shape in SHAPES[:2]:
            for _ in launches(item, shape, device):
                pass
        print(str(item).replace(" ", "-"), flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def child(name: str, device: str) -> None:
    """Print each case, and behind it what came of it; the first one that raises ends the process."""
    for item in names(list(configs.product_builds()))[name]:
        for shape in SHAPES:
            print(f"{item}, {'x'.join(map(str, shape))}: ", end="", flush=True)
            print(check(item, shape, device) or "right", flush=True)


def watch(commands: dict[str, list[str]], seconds: float) -> tuple[list[str], dict[str, str]]:
    """Run all at once. Returns the cases that are right, and what is wrong by case; who is not done after ``seconds`` hangs."""
    until, right, wrong = time.monotonic() + seconds, [], {}
    running = {
        name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    for name, process in running.items():
        try:
            out, err = process.communicate(timeout=max(0.0, until - time.monotonic()))
            end = None
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            end = "hangs"
        if end is None and process.returncode:
            end = f"ended with {process.returncode}: {(err.strip().splitlines() or ['nothing printed'])[-1][:300]}"
        lines = out.splitlines()
        for line in lines:
            case, _, verdict = line.partition(": ")
            if verdict == "right":
                right.append(case)
            elif verdict:
                wrong[case] = verdict
        if end is not None:
            last = lines[-1].removesuffix(": ") if lines and lines[-1].endswith(": ") else f"{name}, outside a case"
            wrong[last] = end
    return right, wrong


def hangs_or_crashes(wrong: dict[str, str]) -> bool:
    """Whether something is worse than wrong: it would take what follows with it."""
    return any(verdict == "hangs" or verdict.startswith("ended with") for verdict in wrong.values())


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when something is wrong, HANGS when it hangs or crashes, 2 where the backend cannot run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_light", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for first_light.json")
    parser.add_argument("--seconds", type=float, default=90.0, help="default: %(default)s")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    reason = available_backends("cuda")["cuda"] if torch.cuda.is_available() else "no CUDA device"
    if reason is not None:
        print(f"benchmarks.first_light: the cuda backend: {reason}", file=sys.stderr)
        return 2
    if options.child is not None:
        child(options.child, "cuda")
        return 0
    found = names(list(configs.product_builds()))
    commands = {name: [sys.executable, "-m", "benchmarks.first_light", "--child", name] for name in found}
    right, wrong = watch(commands, options.seconds)
    for case, verdict in wrong.items():
        print(f"{case}: {verdict}")
    print(f"first light: {len(right)} right, {len(wrong)} wrong")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "first_light.json").write_text(json.dumps({"right": right, "wrong": wrong}, indent=1) + "\n")
    return HANGS if hangs_or_crashes(wrong) else 1 if wrong or not right else 0


if __name__ == "__main__":
    sys.exit(main())
