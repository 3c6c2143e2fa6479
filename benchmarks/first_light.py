"""``python -m benchmarks.first_light --out DIR``: every CUDA kernel once, before anything else relies on one.

A kernel and tile have a process of their own, in which they go from one tile without a ragged edge to many waves: one that
hangs, crashes or is wrong is named and takes nobody with it. Writes DIR/first_light.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from eapo_kernels import available_backends
from eapo_kernels.ops.cuda import tiles
from eapo_kernels.ops.cuda.tiles import Build

SHAPES = ((128, 64, 256), (130, 136, 1031), (700, 1024, 50257))
"""[N, D] x [V, D]: a tile with nothing to cut off; ragged in every direction; many units for every program."""

HANGS = 3
"""Exit code when a kernel hangs or crashes."""


def builds() -> list[Build]:
    """All of them."""
    return list(tiles.builds())


def names() -> dict[str, list[Build]]:
    """Builds by what shares a process: a kernel, and of a product the number of its tile."""
    known = tiles.tiles()
    found: dict[str, list[Build]] = {}
    for item in builds():
        found.setdefault(f"{item.kernel}-{item.tile.name}-{known.index(item.tile)}", []).append(item)
    return found


@torch.no_grad()
def run_all(device: str) -> None:
    """Every build on the first two shapes, its results not looked at: what tools watch."""
    from .launches import results

    for item in builds():
        for shape in SHAPES[:2]:
            for _ in results(item, shape, device):
                pass
        print(str(item).replace(" ", "-"), flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def child(name: str, device: str) -> None:
    """Print each case, and behind it what came of it; the first one that raises ends the process."""
    from .launches import check

    for item in names()[name]:
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
    commands = {name: [sys.executable, "-m", "benchmarks.first_light", "--child", name] for name in names()}
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
