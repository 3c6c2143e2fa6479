"""The speed of a backend on this machine: beside the library's products, and raced.

``python -m eapo_kernels selftest`` times public calls on a GPU beside bare products. With ``--tune`` it
races tiles and backends first, and remembers the fastest. The candidates are few and shipped
(``ops.triton.tiles``), so a race takes two minutes; the search of ``python -m benchmarks.gpu --tune``
looks further and takes five. Each candidate must pass the self-check's cases before it is timed,
through the public functions, side by side with the others.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import EapoError
from .loss import eapo_loss
from .ops import chunking, measured_tiles, verdicts
from .ops.dispatch import available_backends
from .ops.token_stats import token_stats
from .ops.verdicts import Question
from .selftest import CASES, DTYPES, FEW_ROWS, N_ROWS, SOFTCAP, check, check_case, compile_cases, make_problem
from .types import Options, TokenBatch

RACED = {"scaled_exp_gemm": (2, 3, 4), "stream_statistics": (0, 1), "logit_gradient": (1,)}
"""Kernel -> places in ``CASES`` that a candidate must pass."""

SIZES = ((4096, 32768), (4096, 16384), (2048, 16384), (2048, 8192), (1024, 8192), (1024, 4096))
"""N and V (or the user's, if smaller) of a race: the first that fits the free memory."""

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


class Tuned(NamedTuple):
    """The result of ``tune``: the races, the fastest backend and why, the file."""

    races: list[Race]
    backend: str
    reason: str
    path: str


Clock = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""

FLUSH_BYTES = 2**28
"""Written before each timed call: several times an L2 cache."""


def clock(device: torch.device) -> Clock:
    """Events on a GPU, with L2 flushed before; the wall clock elsewhere."""
    if device.type != "cuda":

        def wall(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)

        return wall
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def events(call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return events


class Operands(NamedTuple):
    """Random hidden [N, D], weight [V, D] (leaves), targets [N]; the soft-cap of a question."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    softcap: float | None


def make_operands(question: Question, device: torch.device, n: int, v: int) -> Operands:
    """Operands of the user's dtype and D."""
    dtype, g = DTYPES[question.dtype], torch.Generator(device).manual_seed(3)
    draw: dict[str, Any] = {"generator": g, "device": device}
    hidden = torch.randn(n, question.dim, **draw).to(dtype).requires_grad_()
    weight = (torch.randn(v, question.dim, **draw) / question.dim**0.5).to(dtype).requires_grad_()
    return Operands(hidden, weight, torch.randint(v, (n,), **draw), SOFTCAP if question.softcap else None)


def calls(o: Operands, backend: str) -> dict[str, Callable[[], object]]:
    """Public calls, by the Triton kernel that dominates them."""
    leaves = o.hidden, o.weight
    terms: dict[str, Any] = {"softcap": o.softcap, "backend": backend}
    with torch.no_grad():
        old_logp = token_stats(*leaves, o.targets, softcap=o.softcap, backend="torch").logp
    advantages = torch.ones(1, device=o.targets.device)
    batch = TokenBatch(o.targets, torch.zeros_like(o.targets), old_logp=old_logp, advantages=advantages)

    def one_pass() -> None:
        torch.autograd.grad(eapo_loss(*leaves, batch, positive_weight=1.0, schedule="one_pass", **terms).loss, leaves)

    @torch.no_grad()
    def forward() -> None:
        token_stats(*leaves, o.targets, **terms)

    def recomputed() -> None:
        s = token_stats(*leaves, o.targets, options=Options(plan="recompute"), **terms)
        torch.autograd.grad(s.logp.sum(), leaves)

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


class Speed(NamedTuple):
    """A timed call. beside: its rate over that of the same number of products by the library."""

    what: str
    milliseconds: float
    teraflops: float
    beside: float


SPEED_ROWS, SPEED_COLUMNS, SPEED_BYTES = 4096, 8192, 2**31
"""Rows and columns of the calls beside the library, and the free memory without which they are left
out."""


def measure(question: Question, device: torch.device) -> tuple[list[Speed], float | None]:
    """Median times on a GPU, and the time of one pass over that of the torch backend; [] and None
    where there is no GPU or too little memory."""
    if device.type != "cuda" or free_bytes(device) < SPEED_BYTES:
        return [], None
    o = make_operands(question, device, SPEED_ROWS, SPEED_COLUMNS)
    hidden, weight = o.hidden.detach(), o.weight.detach()
    matrix = hidden @ weight.T

    def product() -> None:
        torch.mm(hidden, weight.T)

    def products() -> None:
        product()
        torch.mm(matrix, weight)
        torch.mm(matrix.T, hidden)

    ours, plain = calls(o, question.backend), calls(o, "torch")
    timed: dict[str, tuple[Callable[[], object], int]] = {
        "bare product": (product, 1),
        "three bare products": (products, 3),
        "statistics": (ours["stream_statistics"], 1),
        "one pass": (ours["scaled_exp_gemm"], 3),
        "one pass, torch backend": (plain["scaled_exp_gemm"], 3),
    }
    ms = medians({name: call for name, (call, _) in timed.items()}, clock(device), 0.0, least=10)
    bare = {1: ms["bare product"], 3: ms["three bare products"]}
    flops = 2e-9 * SPEED_ROWS * SPEED_COLUMNS * question.dim
    found = [Speed(name, ms[name], flops * count / ms[name], bare[count] / ms[name]) for name, (_, count) in timed.items()]
    return found, ms["one pass"] / ms["one pass, torch backend"]


def speed_table(speeds: Sequence[Speed]) -> str:
    """The results of ``measure`` for a person, or nothing."""
    if not speeds:
        return ""
    head = f"\n\n{f'N={SPEED_ROWS} V={SPEED_COLUMNS}':<40} {'ms':>8} {'TFLOP/s':>9} {'of the library':>15}"
    lines = [f"{s.what:<40} {s.milliseconds:>8.3f} {s.teraflops:>9.1f} {s.beside:>14.0%}" for s in speeds]
    return "\n".join([head, *lines])


def race(question: Question, device: torch.device, seconds: float, timed: Clock, *, toy: bool = False) -> list[Race]:
    """Race the Triton tiles of each kernel that multiplies; no file is written. toy: on a CPU, where one
    case is enough."""
    from .ops.triton import tiles
    from .ops.triton.common import family
    from .ops.triton.compiling import compiled_together

    name, size = family(device), DTYPES[question.dtype].itemsize
    run, found = calls(make_operands(question, device, *sizes(question, device)), "triton"), []
    rows = FEW_ROWS if toy else N_ROWS
    problems = [make_problem(question, device, full=full, rows=rows) for full in ((True,) if toy else (False, True))]
    for kernel, places in RACED.items():
        if kernel == "scaled_exp_gemm" and (question.softcap or question.dtype == "float32"):
            continue  # these store logits
        known = tiles.candidates(
            kernel, name, size, question.dim, question.vocab, descriptors=not question.strided and question.dim * size % 16 == 0
        )
        good, wrong = {}, []
        cases = [CASES[place] for place in (places[:1] if toy else places)]
        with compiled_together(launch=False):
            for tile in known:
                with tiles.on_trial(kernel, tile):
                    compile_cases(problems, cases, "triton")
        for tile in known:
            with tiles.on_trial(kernel, tile):
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


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, and what PyTorch keeps of it unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def sizes(question: Question, device: torch.device) -> tuple[int, int]:
    """N and V of a race. Raises EapoError if a GPU has too little free memory for the smallest."""
    if device.type != "cuda":
        return 40, 300
    free, budget = free_bytes(device), chunking.workspace_bytes(Options(), device)
    for n, most in SIZES:
        v = min(question.vocab, most)
        operands = 12 * question.dim * (n + v)  # with their gradients, and sums of these in fp32
        needed = operands + min(8 * n * v, budget) + 2 * FLUSH_BYTES  # as much again for what is small
        if needed <= free:
            return n, v
    raise EapoError(f"tune: expected {needed / 2**20:.0f} MiB of free GPU memory, got {free / 2**20:.0f}")


def _with_tile(trial: Any, kernel: str, tile: Any, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with trial(kernel, tile):
            call()

    return run


def fastest_backend(question: Question, device: torch.device, seconds: float, timed: Clock) -> tuple[str, str]:
    """("cuda" if it is right and faster here than "triton", else "triton"; why)."""
    reason = available_backends(device)["cuda"]
    if reason is not None or question.softcap or question.strided or question.dtype == "float32":
        return "triton", reason or "cuda does not take these inputs"
    rows = check(Question("cuda", question.dtype, question.dim, question.vocab), device, first_only=True)
    if rows[-1].outcome != "right":
        return "triton", f"cuda is {rows[-1].outcome}: {rows[-1].title}: {rows[-1].detail}"
    o = make_operands(question, device, *sizes(question, device))
    runs = {name: calls(o, name)["scaled_exp_gemm"] for name in ("triton", "cuda")}
    ms = medians(runs, timed, seconds)
    better = ms["cuda"] < (1 - TIE) * ms["triton"]
    return "cuda" if better else "triton", f"one pass: cuda {ms['cuda']:.3f} ms, triton {ms['triton']:.3f} ms"


def write(question: Question, device: torch.device, races: Sequence[Race], backend: str) -> str:
    """Add the chosen tiles to this device's file, whole or not at all; returns its path."""
    from .ops.triton import tiles
    from .ops.triton.common import family

    path, size = verdicts.tuned_file(device), DTYPES[question.dtype].itemsize
    lines = _kept_lines(path)
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


def _kept_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of tuned tiles, if it exists. Raises EapoError if it has another format."""
    from .ops.triton import tiles

    if not path.exists():
        return []
    tiles.measured(path)
    return list(measured_tiles.load(path)["lines"])


def tune(question: Question, device: torch.device, seconds: float, *, toy: bool = False) -> Tuned:
    """Race tiles and backends, and write the fastest. A file that cannot be added to is refused first."""
    _kept_lines(verdicts.tuned_file(device))
    timed = clock(device)
    races = race(question, device, seconds * 0.8, timed, toy=toy)
    write(question, device, races, "triton")  # the backends are raced with the tiles that were chosen
    backend, reason = fastest_backend(question, device, seconds * 0.2, timed)
    return Tuned(races, backend, reason, write(question, device, races, backend))


def race_table(tuned: Tuned) -> str:
    """The result of ``tune`` for a person."""
    lines = [f"{'kernel':<20} {'ms before':>10} {'ms now':>8}  tile"]
    for one in tuned.races:
        kept = "" if one.chosen != one.before else " (as before)"
        lines.append(f"{one.kernel:<20} {one.milliseconds_before:>10.3f} {one.milliseconds:>8.3f}  {one.chosen}{kept}")
        lines += [f"    wrong: {sentence}" for sentence in one.wrong]
    return "\n".join([*lines, f"backend: {tuned.backend} ({tuned.reason})", f"written: {tuned.path}"])
