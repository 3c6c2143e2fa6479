"""``python -m eapo_kernels selftest --tune``: race tiles and backends on this GPU, and remember the
fastest.

The candidates are few and shipped (``ops.triton.tiles``), so a race takes two minutes; the search of
``python -m benchmarks.gpu --tune`` looks further and takes five. Each candidate must pass the
self-check's cases before it is timed, through the public functions, side by side with the others.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import torch

from .errors import EapoError
from .loss import eapo_loss
from .ops import verdicts
from .ops.token_stats import token_stats
from .ops.verdicts import Question
from .selftest import CASES, DTYPES, FEW_ROWS, N_ROWS, check, check_case, make_problem
from .types import Options, TokenBatch

RACED = {"scaled_exp_gemm": (2, 3, 4), "stream_statistics": (0, 1), "logit_gradient": (1,)}
"""Kernel -> places in ``CASES`` that a candidate must pass."""

ROWS, COLUMNS = 4096, 32768
TIE = 0.02
"""Share by which a rival must be faster than what is in use."""


class Race(NamedTuple):
    """What a race found: the tile in use and the chosen one, with median milliseconds; what was wrong."""

    kernel: str
    before: Any
    chosen: Any
    milliseconds_before: float
    milliseconds: float
    wrong: tuple[str, ...]


Clock = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


def clock(device: torch.device) -> Clock:
    """Events on a GPU, with L2 flushed before; the wall clock elsewhere."""
    if device.type != "cuda":

        def wall(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)

        return wall
    flush = torch.empty(2**26, dtype=torch.int32, device=device)

    def events(call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return events


def calls(question: Question, device: torch.device, backend: str, *, toy: bool = False) -> dict[str, Callable[[], object]]:
    """Public calls at the user's D that a kernel dominates, by kernel."""
    n, v = (40, 300) if toy else (ROWS, min(question.vocab, COLUMNS))
    dtype, g = DTYPES[question.dtype], torch.Generator().manual_seed(3)
    hidden = torch.randn(n, question.dim, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, question.dim, generator=g) / question.dim**0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g).to(device)
    with torch.no_grad():
        old_logp = token_stats(hidden, weight, targets, backend="torch").logp
    batch = TokenBatch(targets, torch.zeros_like(targets), old_logp=old_logp, advantages=torch.ones(1, device=device))

    def one_pass() -> None:
        loss = eapo_loss(hidden, weight, batch, positive_weight=1.0, schedule="one_pass", backend=backend).loss
        torch.autograd.grad(loss, (hidden, weight))

    @torch.no_grad()
    def forward() -> None:
        token_stats(hidden, weight, targets, backend=backend)

    def recomputed() -> None:
        s = token_stats(hidden, weight, targets, backend=backend, options=Options(plan="recompute"))
        torch.autograd.grad(s.logp.sum(), (hidden, weight))

    return {"scaled_exp_gemm": one_pass, "stream_statistics": forward, "logit_gradient": recomputed}


def medians(runs: dict[Any, Callable[[], object]], timed: Clock, seconds: float, least: int = 3) -> dict[Any, float]:
    """Median milliseconds of calls that are timed in turn, for about ``seconds``."""
    for run in runs.values():
        run()
    until = time.monotonic() + seconds
    times: dict[Any, list[float]] = {name: [] for name in runs}
    while len(next(iter(times.values()))) < least or time.monotonic() < until:
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def race(question: Question, device: torch.device, seconds: float, timed: Clock, *, toy: bool = False) -> list[Race]:
    """Race the Triton tiles of each kernel that multiplies; no file is written. toy: on a CPU, where one
    case is enough."""
    from .ops.triton import tiles
    from .ops.triton.common import family

    name, size = family(device), DTYPES[question.dtype].itemsize
    run, found = calls(question, device, "triton", toy=toy), []
    rows = FEW_ROWS if toy else N_ROWS
    problems = [make_problem(question, device, full=full, rows=rows) for full in ((True,) if toy else (False, True))]
    for kernel, places in RACED.items():
        known = tiles.candidates(
            kernel, name, size, question.dim, question.vocab, descriptors=not question.strided and question.dim * size % 16 == 0
        )
        good, wrong = {}, []
        for tile in known:
            with tiles.on_trial(kernel, tile):
                cases = [CASES[place] for place in (places[:1] if toy else places)]
                checked = (check_case(p, case, "triton", full=p.bias is not None) for p in problems for case in cases)
                bad = next((row for row in checked if row.outcome != "right"), None)
            if bad is None:
                good[tile] = _with_tile(tiles.on_trial, kernel, tile, run[kernel])
            else:
                wrong.append(f"{tile}: {bad.title}: {bad.outcome} {bad.detail}")
        if not good:
            raise EapoError(f"tune: expected at least one right tile of {kernel}, got {wrong[0]}")
        ms = medians(good, timed, seconds / len(RACED))
        before = known[0] if known[0] in good else next(iter(good))
        best = min(ms, key=lambda tile: ms[tile])
        chosen = best if ms[best] < (1 - TIE) * ms[before] else before
        found.append(Race(kernel, known[0], chosen, ms[before], ms[chosen], tuple(wrong)))
    return found


def _with_tile(trial: Any, kernel: str, tile: Any, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with trial(kernel, tile):
            call()

    return run


def fastest_backend(question: Question, device: torch.device, seconds: float, timed: Clock) -> tuple[str, str]:
    """("cuda" if it is right and faster here than "triton", else "triton"; why)."""
    from .ops.dispatch import available_backends

    reason = available_backends(device)["cuda"]
    if reason is not None or question.softcap or question.strided or question.dtype == "float32":
        return "triton", reason or "cuda does not take these inputs"
    rows = check(Question("cuda", question.dtype, question.dim, question.vocab), device, first_only=True)
    if rows[-1].outcome != "right":
        return "triton", f"cuda is {rows[-1].outcome}: {rows[-1].title}: {rows[-1].detail}"
    runs = {name: calls(question, device, name)["scaled_exp_gemm"] for name in ("triton", "cuda")}
    ms = medians(runs, timed, seconds)
    better = ms["cuda"] < (1 - TIE) * ms["triton"]
    return "cuda" if better else "triton", f"one pass: cuda {ms['cuda']:.3f} ms, triton {ms['triton']:.3f} ms"


def write(question: Question, device: torch.device, races: Sequence[Race], backend: str) -> str:
    """Add the chosen tiles to this device's file, whole or not at all; returns its path."""
    from .ops.triton import tiles
    from .ops.triton.common import family

    path, size = verdicts.tuned_file(device), DTYPES[question.dtype].itemsize
    lines = []
    if path.exists():
        tiles.measured(path)  # an error names a file of another format
        lines = json.loads(path.read_text())["lines"]
    defaults = {f.name: f.default for f in fields(tiles.Tile)}
    for one in races:
        key = {"kernel": one.kernel, "family": family(device), "itemsize": size, "dim": question.dim, "vocab": question.vocab}
        tile = {name: value for name, value in asdict(one.chosen).items() if value != defaults[name]}
        lines = [line for line in lines if any(line.get(name) != value for name, value in key.items())]
        lines.append(key | {"tile": tile, "ms": round(one.milliseconds, 4)})
    made = verdicts.describe_gpu(device) if device.type == "cuda" else {"gpu": "none"}
    made |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime()), "backend": backend}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"environment": made, "lines": lines}, indent=1) + "\n")
    part.replace(path)
    tiles.forget_tuned(path)
    tiles.use_tuned(path)
    verdicts.fastest.cache_clear()
    verdicts.sources.cache_clear()
    return str(path)


def tune(question: Question, device: torch.device, seconds: float, *, toy: bool = False) -> tuple[list[Race], str]:
    """Race, write, and say it: (races, lines for a person)."""
    timed = clock(device)
    races = race(question, device, seconds * 0.8, timed, toy=toy)
    backend, why = fastest_backend(question, device, seconds * 0.2, timed)
    path = write(question, device, races, backend)
    lines = [f"{'kernel':<20} {'ms before':>10} {'ms now':>8}  tile"]
    for one in races:
        kept = "" if one.chosen != one.before else " (as before)"
        lines.append(f"{one.kernel:<20} {one.milliseconds_before:>10.3f} {one.milliseconds:>8.3f}  {one.chosen}{kept}")
        lines += [f"    wrong: {sentence}" for sentence in one.wrong]
    return races, "\n".join([*lines, f"backend: {backend} ({why})", f"written: {path}"])
